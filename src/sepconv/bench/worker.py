"""A process that runs candidates: requests come as lines of JSON, each is answered by one line.

Run as `python -m sepconv.bench.worker ENGINE THREADS`, by any interpreter that has NumPy and what
the engine needs. It times its own calls, so the way to it costs nothing. Whatever an engine prints
goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from sepconv import machine
from sepconv.bench.engines import Ready, UnableError
from sepconv.bench.problems import Problem
from sepconv.timing import block_of

__all__ = ["serve"]

# The thread pool of whoever was timed before may spin a while before it sleeps.
_SETTLE_SECONDS = 0.01


class _Desk:
    """The requests, by name."""

    def __init__(self, engine: str, threads: int) -> None:
        self._engine = importlib.import_module(f"sepconv.bench.engines.{engine}")
        self._threads = threads
        self._ready: dict[str, Ready] = {}
        self._engine.limit_threads(threads)

    def versions(self) -> dict[str, str]:
        return machine.versions(*self._engine.PACKAGES)

    def prepare(self, name: str, path: str, mode: str, copies: int) -> None:
        problem = Problem.load(Path(path))
        self._ready[name] = self._engine.prepare(name, problem, mode, copies, self._threads)

    def results(self, name: str, path: str) -> None:
        ready = self._ready[name]
        np.savez(path, *(np.asarray(a, np.float32) for a in ready.arrays(ready.call())))

    def time(self, name: str, calls: int) -> list[float]:
        if self._threads > 1:
            time.sleep(_SETTLE_SECONDS)
        return list(block_of(self._ready[name].call)(calls))

    def forget(self) -> None:
        self._ready.clear()
        self._engine.forget()


def serve(engine: str, threads: int, requests: TextIO, answers: TextIO) -> None:
    """Answers requests until there are no more.

    An answer is `{"answer": value}`, or `{"error": text}` with `"unable": true` where the engine
    says that it cannot do what is asked.

    Args:
        engine: A module of `sepconv.bench.engines`.
        threads: How many CPUs it may use.
        requests: Lines of JSON, `{"command": name, ...}`.
        answers: Where the answers go, a line each.
    """
    desk: _Desk | None = None
    for line in requests:
        request: dict[str, Any] = json.loads(line)
        try:
            desk = desk or _Desk(engine, threads)
            reply = {"answer": getattr(desk, request.pop("command"))(**request)}
        except Exception as error:
            text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            reply = {"error": text, "unable": False}
            if isinstance(error, UnableError):
                reply = {"error": str(error), "unable": True}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    # Standard output carries answers only.
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.argv[1], int(sys.argv[2]), sys.stdin, _answers)
