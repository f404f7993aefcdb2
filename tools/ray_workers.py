"""Calls of the kernel in the worker processes of ray: the bits of this process, or an error.

    pip install ray && python tools/ray_workers.py

Eight tasks, each with its own number of threads and three callers at once, on read-only arrays of
the object store; then a task that an actor starts.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray

CALLS = 6


def results(x: Any, kernel: Any, pointwise: Any, threads: int) -> tuple[int, list[bytes]]:
    """Process id, and the bits of y and of the gradients, which all callers got."""
    import sepconv
    from sepconv.numpy import separable_conv2d, separable_conv2d_grad

    sepconv.set_num_threads(threads)
    keywords: Any = {"padding": "same", "activation": "silu"}

    def call(_: int) -> list[bytes]:
        y = separable_conv2d(x, kernel, pointwise, **keywords)
        gradients = separable_conv2d_grad(np.ones_like(y), x, kernel, pointwise, **keywords)
        return [array.tobytes() for array in (y, *gradients[:3])]

    with ThreadPoolExecutor(3) as pool:
        received = list(pool.map(call, range(CALLS)))
    assert all(one == received[0] for one in received)
    return os.getpid(), received[0]


@ray.remote(num_cpus=0.5)
class Starter:
    """An actor."""

    def start(self, *arguments: Any) -> Any:
        """Runs `results` in a task of its own."""
        task = ray.remote(num_cpus=0.5)(results)
        return ray.get(task.remote(*arguments))


def main() -> None:
    """Compares the bits of all tasks with those of this process."""
    rng = np.random.default_rng(0)
    shapes = [(2, 40, 41, 33), (3, 3, 33, 1), (1, 1, 33, 47)]
    arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
    _, expected = results(*arrays, 3)  # The pool of threads runs before ray starts.
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        _node_ip_address="127.0.0.1",
    )
    stored = [ray.put(array) for array in arrays]
    task = ray.remote(results)
    received = ray.get([task.remote(*stored, threads) for threads in (1, 2, 3, 0) * 2])
    received.append(ray.get(Starter.remote().start.remote(*stored, 2)))
    processes = {process for process, _ in received}
    assert os.getpid() not in processes
    assert all(bits == expected for _, bits in received), "other bits in a worker"
    print(f"{len(received)} tasks, {CALLS} calls each, in {len(processes)} processes: same bits")
    ray.shutdown()


if __name__ == "__main__":
    main()
