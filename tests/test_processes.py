"""Processes: fork, spawn, pools, signals, the end of the interpreter, and memory that runs out.

Every scene plays in a process of its own, so that what it does to signals, memory and threads stays
there. A scene that hangs is ended by an alarm, which fails its test.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from test_native import THREADED, flatten, run

import sepconv

# Until a scene counts as hanging. None takes a tenth of it, unless sanitizers look on.
SECONDS = int(os.environ.get("SEPCONV_SCENE_SECONDS", "120"))

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


def scene(code: str, expected: int = 0, **variables: str) -> str:
    """Runs code in a process of its own; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    prologue = f"import signal; signal.alarm({SECONDS})\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", prologue + code],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == expected, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def bits(index: int, threads: int = 3) -> list[bytes]:
    """The results of one call, computed in whatever process this runs."""
    sepconv.set_num_threads(threads)
    problem = THREADED[index]
    results = run(problem.geometry, "float32", problem.arrays(np.float32))
    return [array.tobytes() for array in flatten(results)]


def large_call():
    """A call of some tenths of a second: (call, its output)."""
    problem = replace(THREADED[0], batch=100)
    g, arrays = problem.geometry, problem.arrays(np.float32)
    weights = [arrays[i] for i in (1, 2, 4, 3)]
    flat, y = np.array(g, np.int64), np.empty(g.y_shape, np.float32)
    return lambda: sepconv._native.forward(flat, arrays.x, *weights, y), y


# --------------------------------------------------------------------------------- fork and spawn


def test_forks_in_the_middle_of_calls_of_other_threads_compute():
    scene(
        f"""
import os, threading
from test_processes import bits

expected = bits(0)
stop = threading.Event()

def call():
    while not stop.is_set():
        bits(0)

callers = [threading.Thread(target=call) for _ in range(2)]
for caller in callers:
    caller.start()
failures = 0
for _ in range(40):
    child = os.fork()
    if child == 0:
        signal.alarm({SECONDS // 2})
        os._exit(0 if bits(0) == expected else 1)
    failures += os.waitpid(child, 0)[1] != 0
stop.set()
for caller in callers:
    caller.join()
assert failures == 0, failures
assert bits(0) == expected
"""
    )


def test_a_fork_of_a_fork_computes():
    scene(
        """
import os, sys
from test_processes import bits

expected = bits(2)
for _ in range(3):
    child = os.fork()
    if child:
        assert bits(2) == expected
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert bits(2) == expected
"""
    )


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_a_pool_of_processes_compute(method):
    """What joblib, dask and the like do, with the pool of the standard library."""
    scene(
        f"""
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from test_processes import bits

if __name__ == "__main__":
    expected = [bits(index) for index in range(6)]
    context = multiprocessing.get_context({method!r})
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        for _ in range(2):
            assert list(pool.map(bits, range(6))) == expected
    assert [bits(index) for index in range(6)] == expected
"""
    )


def test_workers_of_joblib_compute():
    """Processes of loky, threads in them, and a pool of processes inside of a thread."""
    pytest.importorskip("joblib")
    scene(
        """
from joblib import Parallel, delayed
from test_processes import bits

def inner(index):
    return Parallel(2, backend="threading")(delayed(bits)(i) for i in (index, index))

if __name__ == "__main__":
    expected = [bits(index) for index in range(6)]
    for backend in ("loky", "threading", "multiprocessing"):
        assert Parallel(2, backend=backend)(delayed(bits)(i) for i in range(6)) == expected
    nested = Parallel(2, backend="loky")(delayed(inner)(i) for i in range(6))
    assert nested == [[one, one] for one in expected]
    assert [bits(index) for index in range(6)] == expected
"""
    )


def test_workers_of_dask_compute():
    pytest.importorskip("dask")
    scene(
        """
import dask
from test_processes import bits

if __name__ == "__main__":
    expected = tuple(bits(index) for index in range(6))
    calls = [dask.delayed(bits)(index) for index in range(6)]
    for scheduler in ("processes", "threads", "synchronous"):
        assert dask.compute(*calls, scheduler=scheduler, num_workers=2) == expected
"""
    )


# --------------------------------------------------------------------------- signals and the end


def test_ctrl_c_in_a_call_raises_when_the_call_has_finished():
    """The call itself is not cut short: what it wrote is complete."""
    scene(
        """
import os, threading, time
import numpy as np
import sepconv._native
from test_processes import large_call

call, y = large_call()
call()
expected = y.copy()
for delay in (0.0, 0.002, 0.01, 0.03):
    y.fill(np.nan)
    running = threading.Event()

    def interrupt(delay=delay):
        running.wait()
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=interrupt)
    sender.start()
    try:
        running.set()
        while True:
            call()
    except KeyboardInterrupt:
        pass
    sender.join()
    call()
    assert np.array_equal(y, expected)
"""
    )


def test_ctrl_c_ends_a_program_that_does_not_catch_it():
    scene(
        """
import os, threading
import sepconv._native
from test_processes import large_call

call, _ = large_call()
threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
while True:
    call()
""",
        expected=-signal.SIGINT,
    )


def test_the_interpreter_waits_for_a_thread_in_a_call():
    scene(
        """
import threading
import sepconv._native
from test_processes import large_call

call, y = large_call()
threading.Thread(target=lambda: [call() for _ in range(3)]).start()
"""
    )


def test_the_interpreter_ends_while_daemon_threads_are_in_calls_issue_7():
    """A thread that came back from a call into an interpreter that ends aborted the process."""
    for _ in range(2):
        scene(
            """
import sys, threading, time
import sepconv._native
from test_processes import large_call

class SlowEnd:  # Time for the threads to come back while the interpreter ends.
    def __del__(self, sleep=time.sleep):
        sleep(0.5)

def call_for_ever():
    while True:
        call()

sys.slow_end, slow_end = SlowEnd(), SlowEnd()
call, _ = large_call()
for _ in range(2):
    threading.Thread(target=call_for_ever, daemon=True).start()
time.sleep(0.05)
"""
        )


WAYS_OUT = {
    "end of the program": "pass",
    "exit": "sys.exit(0)",
    "at once": "os._exit(0)",
    "exit of a thread": "threading.Thread(target=sys.exit).start()",
    "exit of a forked child": "os.fork() or sys.exit(0); sys.exit(os.wait()[1])",
    "exit beside a thread that waits": (
        "threading.Thread(target=threading.Event().wait, daemon=True).start(); sys.exit(0)"
    ),
}


@pytest.mark.parametrize("way", WAYS_OUT.values(), ids=WAYS_OUT)
def test_a_process_whose_pool_has_threads_ends_cleanly(way):
    """No thread of the pool may be joinable: the C++ runtime aborts the process of one."""
    printed = scene(
        f"""
import os, sys, threading
from test_processes import bits

before = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0
bits(0)
if before:
    assert len(os.listdir("/proc/self/task")) >= before + 2
print("computed", flush=True)
{way}
"""
    )
    assert printed == "computed\n"


def test_a_child_ends_that_was_forked_while_other_threads_were_in_calls_issue_7():
    scene(
        """
import os, sys, threading
import sepconv._native
from test_processes import bits, large_call

call, _ = large_call()
caller = threading.Thread(target=lambda: [call() for _ in range(5)])
caller.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        sys.exit(0 if bits(0) == bits(0) else 1)
    assert os.waitpid(child, 0)[1] == 0
caller.join()
"""
    )


def test_a_subinterpreter_is_refused_issue_7():
    """On CPython 3.11 the import was let in, and the interpreters shared objects."""
    scene(
        """
import importlib

subinterpreters = importlib.import_module(
    "_interpreters" if __import__("sys").version_info >= (3, 13) else "_xxsubinterpreters")
code = '''
try:
    import sepconv._native
except ImportError as error:
    assert "interpreter" in str(error), error
else:
    raise AssertionError("imported")
'''

def run_in_another():
    raised = subinterpreters.run_string(subinterpreters.create(), code)
    assert raised is None, raised

run_in_another()
import sepconv._native
run_in_another()
"""
    )


# ----------------------------------------------------------------------------------------- memory


def test_memory_does_not_grow():
    """400,000 small calls, refused calls, large ones, and callers that come and go."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    scene(
        """
import threading
import numpy as np
import sepconv, sepconv.numpy as door
from sepconv import _native
from test_native import THREADED
from test_processes import bits

g = THREADED[0].geometry._replace(
    in_height=3, in_width=3, in_channels=2, out_height=3, out_width=3, out_channels=3)
x, y = np.ones(18, np.float32), np.ones(27, np.float32)
kernel, pointwise, bias = (np.ones(size, np.float32) for size in (18, 6, 3))
flat = np.array(g, np.int64)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def small(count):
    for _ in range(count):
        _native.forward(flat, x, kernel, pointwise, None, bias, y)
        _native.backward(flat, y, x, kernel, pointwise, None, bias, None, x.copy(), None, None,
                         None, None)

def refused(count):
    for _ in range(count):
        try:
            _native.forward(flat, x, kernel, pointwise, None, None, y)
        except ValueError:
            continue
        raise AssertionError("not refused")

def doors(count):
    image = np.ones((1, 5, 5, 2), np.float32)
    for _ in range(count):
        door.separable_conv2d(image, kernel.reshape(3, 3, 2, 1), pointwise.reshape(1, 1, 2, 3))

def callers(count):
    for _ in range(count):
        thread = threading.Thread(target=bits, args=(3,))
        thread.start()
        thread.join()

def everything(scale):
    small(50_000 * scale // 100)
    refused(10_000 * scale // 100)
    doors(10_000 * scale // 100)
    callers(1 + scale)
    for index in range(6):
        bits(index)

everything(20)
grown = []
for _ in range(4):
    before = resident()
    everything(100)
    grown.append(resident() - before)
# A worker may get its scratch late, once. What leaks grows in every round: 10 bytes a call.
assert min(grown) < 1 << 20, grown
"""
    )


def test_a_call_without_memory_raises_and_the_next_one_computes():
    """The limit moves through every allocation of the call."""
    if sys.platform != "linux":
        pytest.skip("other systems do not keep to the limit")
    printed = scene(
        """
import resource, threading
import numpy as np
import sepconv
from sepconv import _native
from strategies import Problem
from sepconv import ConvSpec

# Copies in float32 of the weights are most of the scratch.
problem = Problem(ConvSpec(padding="same"), 1, 40, 40, 1000, 1, (3, 3), 1500)
g = problem.geometry
arrays = [None if a is None else a.astype(np.float16) for a in problem.arrays(np.float32)]
x, kernel, pointwise, bias, _, dy = arrays
flat, y, dx = np.array(g, np.int64), np.empty(g.y_shape, np.float16), np.empty_like(x)
d_pointwise = np.empty_like(pointwise)
sepconv.set_num_threads(3)

def forward():
    _native.forward(flat, x, kernel, pointwise, None, bias, y)

def backward():
    _native.backward(flat, dy, x, kernel, pointwise, None, bias, None, dx, None, d_pointwise, None,
                     None)

def used():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * 4096

unlimited = resource.getrlimit(resource.RLIMIT_AS)
results = []

def attempt(call, outputs, extra=None):
    # A thread of its own, because a thread keeps scratch for its next call.
    def limited():
        if extra is not None:
            resource.setrlimit(resource.RLIMIT_AS, (used() + extra, unlimited[1]))
        try:
            call()
            refused = False
        except MemoryError:
            refused = True
        finally:
            resource.setrlimit(resource.RLIMIT_AS, unlimited)
        results.append(None if refused else [output.tobytes() for output in outputs])

    thread = threading.Thread(target=limited)
    thread.start()
    thread.join()
    return results.pop()

calls = {forward: [y], backward: [dx, d_pointwise]}
expected = {call: attempt(call, outputs) for call, outputs in calls.items()}
refused, computed = dict.fromkeys(calls, 0), dict.fromkeys(calls, 0)
for mebibytes in range(1, 50, 2):
    for call, outputs in calls.items():
        for output in outputs:
            output.fill(np.nan)
        result = attempt(call, outputs, mebibytes << 20)
        if result is None:
            refused[call] += 1
            assert all(np.isnan(output).all() for output in outputs), (call, mebibytes)
            assert attempt(call, outputs) == expected[call]
        else:
            computed[call] += 1
            assert result == expected[call]
print(*refused.values(), *computed.values())
""",
        # What is freed goes back to the system, so that every call has to ask for it again.
        MALLOC_ARENA_MAX="1",
        MALLOC_MMAP_THRESHOLD_="65536",
    )
    refusals_and_results = [int(count) for count in printed.split()]
    assert min(refusals_and_results) >= 3, refusals_and_results
