"""The processes that run candidates, seen from the one that asks."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

import sepconv
from sepconv import machine
from sepconv.bench.candidates import Candidate
from sepconv.bench.problems import Array
from sepconv.timing import Block

__all__ = ["RefusedError", "Worker", "WorkerError", "Workers", "pinned"]


class RefusedError(Exception):
    """A candidate does not do what is asked; the message is the reason.

    Attributes:
        unable: Whether it is known that it cannot, as opposed to a failure.
    """

    def __init__(self, reason: str, *, unable: bool = False) -> None:
        super().__init__(reason)
        self.unable = unable


class WorkerError(RuntimeError):
    """A process ended, or did not answer in time."""


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Keeps this process, and those it starts, on so many CPUs while the block runs.

    Args:
        threads: How many.

    Raises:
        ValueError: this process may not use so many.
    """
    count = machine.usable_cpus()
    if not 1 <= threads <= count:
        raise ValueError(
            f"`threads` must be between 1 and {count}, the CPUs that this process may use. "
            f"Received: threads={threads}"
        )
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[-threads:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Worker:
    """A process that runs one engine.

    Args:
        python: The interpreter.
        candidate: Whose engine.
        threads: How many CPUs the engine may use.
        folder: For what is exchanged.
        patience_seconds: How long an answer may take.
    """

    def __init__(
        self, python: str, candidate: Candidate, threads: int, folder: Path, patience_seconds: float
    ) -> None:
        self._name = candidate.group
        self._folder = folder
        self._patience = patience_seconds
        # Its own log lines say nothing about the result and would mix with the table.
        self._log = (folder / f"{self._name}.log").open("w+", errors="replace")
        self._process = subprocess.Popen(
            [python, "-m", "sepconv.bench.worker", candidate.engine, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=_environment(candidate, threads, folder),
        )
        assert self._process.stdout is not None
        self._answers = self._process.stdout
        os.set_blocking(self._answers.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._answers, selectors.EVENT_READ)
        self._read = b""

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def ask(self, command: str, **arguments: Any) -> Any:
        """Sends a request and returns its answer.

        Args:
            command: A command of `sepconv.bench.worker`.
            **arguments: Its arguments.

        Raises:
            RefusedError: the engine raised an error, or says that it cannot do it.
            WorkerError: the process ended or did not answer in time; it is ended then.
        """
        assert self._process.stdin is not None
        try:
            text = json.dumps({"command": command, **arguments})
            self._process.stdin.write(text.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        reply = json.loads(self._line(command))
        if "error" in reply:
            raise RefusedError(reply["error"], unable=reply["unable"])
        return reply["answer"]

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._selector.close()
        self._answers.close()
        self._log.close()

    def _line(self, command: str) -> bytes:
        deadline = time.monotonic() + self._patience
        while b"\n" not in self._read:
            left = deadline - time.monotonic()
            if left <= 0:
                self._process.kill()
                self._process.wait()
                raise WorkerError(
                    f"The process of {self._name} did not answer {command!r} within "
                    f"{self._patience:.0f} s and was ended. {self._last_words()}"
                )
            if not self._selector.select(left):
                continue
            piece = self._answers.read()
            if piece == b"":
                raise self._ended()
            self._read += piece or b""
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _ended(self) -> WorkerError:
        code = self._process.wait(timeout=10)
        return WorkerError(
            f"The process of {self._name} ended with status {code}. {self._last_words()}"
        )

    def _last_words(self) -> str:
        self._log.flush()
        self._log.seek(0)
        text = self._log.read()[-2000:].strip()
        return f"It wrote: {text}" if text else "It wrote nothing."


def _environment(candidate: Candidate, threads: int, folder: Path) -> dict[str, str]:
    """Makes the package importable in any interpreter, without what is installed beside it."""
    shelf = folder / "package"
    shelf.mkdir(exist_ok=True)
    link = shelf / "sepconv"
    if not link.exists():
        link.symlink_to(Path(sepconv.__file__).parent, target_is_directory=True)
    path = [str(shelf)]
    if not candidate.in_tensorflow:
        path += filter(None, [os.environ.get("PYTHONPATH")])
    variables = {
        "PYTHONPATH": os.pathsep.join(path),
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # Large tensors of torch in large pages, as arrays of NumPy are: four times as fast.
        "THP_MEM_ALLOC_ENABLE": "1",
        # They go to a log that nobody reads unless the process ends.
        "PYTHONWARNINGS": "ignore",
    }
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        variables[name] = str(threads)
    if candidate.keras_backend:
        variables["KERAS_BACKEND"] = candidate.keras_backend
    return {**os.environ, **variables}


class Workers:
    """All processes of a run: one for each group of candidates, started when it is needed.

    Args:
        threads: How many CPUs each may use.
        tensorflow_python: The interpreter that has TensorFlow; without one, this one.
        patience_seconds: How long an answer may take; `torch.compile` takes the longest.
    """

    def __init__(
        self,
        threads: int,
        *,
        tensorflow_python: str | None = None,
        patience_seconds: float = 600,
    ) -> None:
        self._threads = threads
        self._tensorflow_python = tensorflow_python or sys.executable
        self._patience = patience_seconds
        self._temporary = tempfile.TemporaryDirectory(prefix="sepconv-bench-")
        self.folder = Path(self._temporary.name)
        self._running: dict[str, Worker] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._running.values():
            worker.close()
        self._temporary.cleanup()

    def versions(self, candidate: Candidate) -> Mapping[str, str]:
        """Returns the versions of what runs a candidate.

        Args:
            candidate: Who.

        Raises:
            RefusedError: it is not installed; the message says how to get it.
        """
        absent = candidate.absent()
        if absent is not None:
            raise RefusedError(absent, unable=True)
        try:
            answer: dict[str, str] = self._worker(candidate).ask("versions")
        except RefusedError as error:
            self._end(candidate.group)
            reason = f"{error}. To get it: {candidate.install}"
            raise RefusedError(reason, unable=True) from None
        return answer

    def prepare(self, candidate: Candidate, problem_path: Path, mode: str, copies: int) -> None:
        """Makes a candidate ready.

        Args:
            candidate: Who.
            problem_path: What `Problem.save` wrote.
            mode: One of `MODES`.
            copies: How many inputs take turns.

        Raises:
            RefusedError: it cannot; the message is the reason.
            WorkerError: its process ended or hangs.
        """
        self._worker(candidate).ask(
            "prepare", name=candidate.name, path=str(problem_path), mode=mode, copies=copies
        )

    def results(self, candidate: Candidate) -> list[Array]:
        """Returns what a candidate that is ready computes.

        Args:
            candidate: Who.

        Raises:
            RefusedError: it failed.
            WorkerError: its process ended or hangs.
        """
        path = self.folder / "results.npz"
        self._worker(candidate).ask("results", name=candidate.name, path=str(path))
        with np.load(path) as file:
            return [file[name] for name in file.files]

    def block(self, candidate: Candidate) -> Block:
        """Returns the block that times a candidate which is ready, in its own process."""
        worker = self._worker(candidate)
        ask = functools.partial(worker.ask, "time", name=candidate.name)
        return lambda calls: ask(calls=calls)

    def forget(self) -> None:
        """Lets every process drop what it has prepared, and ends those that fail to."""
        for group, worker in list(self._running.items()):
            try:
                worker.ask("forget")
            except (RefusedError, WorkerError):
                self._end(group)

    def _end(self, group: str) -> None:
        worker = self._running.pop(group, None)
        if worker is not None:
            worker.close()

    def _worker(self, candidate: Candidate) -> Worker:
        worker = self._running.get(candidate.group)
        if worker is not None and worker.is_alive:
            return worker
        self._end(candidate.group)
        python = self._tensorflow_python if candidate.in_tensorflow else sys.executable
        if not Path(python).exists():
            raise RefusedError(
                f"there is no interpreter {python}. To get it: {candidate.install}", unable=True
            )
        self._running[candidate.group] = Worker(
            python, candidate, self._threads, self.folder, self._patience
        )
        return self._running[candidate.group]
