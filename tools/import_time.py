"""Milliseconds that importing sepconv with its kernels takes beyond NumPy, in fresh processes.

python tools/import_time.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys

CODE = """
import time, numpy
start = time.perf_counter()
import sepconv, sepconv.numpy, sepconv._native
print(1e3 * (time.perf_counter() - start))
"""
MOST_MILLISECONDS = 50


def main() -> None:
    """Prints the times; ends the program if the median is too long."""
    times = []
    for _ in range(11):
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        times.append(float(done.stdout))
    median = statistics.median(times)
    print(
        f"import: {median:.1f} ms beyond NumPy (fastest {min(times):.1f}, slowest {max(times):.1f})"
    )
    if median >= MOST_MILLISECONDS:
        raise SystemExit(f"that is not below {MOST_MILLISECONDS} ms")


if __name__ == "__main__":
    main()
