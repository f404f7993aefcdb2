"""The benchmark on a GPU, without one: its cases, what it makes of given times, its engine."""

import doctest
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from sepconv.bench import command, gpu, page, results, tables
from sepconv.bench.engines import cuda
from sepconv.bench.gpu import GpuPlan, gpu_cases, measure_gpu
from sepconv.bench.peaks import Peaks
from sepconv.bench.problems import MODES, problem_of
from sepconv.bench.rows import parse_row
from sepconv.bench.truth import Truth
from sepconv.bench.workers import RefusedError
from sepconv.cli import app

TINY = parse_row("9x8x11-13k3s2")


def test_examples_of_the_docstrings_hold():
    found = doctest.testmod(gpu)
    assert found.attempted > 0
    assert found.failed == 0


def test_cases_by_themselves_cover_every_setting_and_begin_with_the_telling_ones():
    cases = gpu_cases()
    settings = [(case.dtype, case.batch, case.mode) for case in cases]
    assert {(dtype, batch) for dtype, batch, _ in settings} == {
        ("bfloat16", 1),
        ("bfloat16", 32),
        ("bfloat16", 256),
        ("float32", 32),
        ("float32", 16),
    }
    assert settings[0] == ("bfloat16", 32, MODES[0])
    assert len(set(map(str, cases))) == len(cases) == 12 * 2 * 4 + 2
    (first, second) = [case for case in cases if case.batch == 16]
    assert first.row.label == "512x512 64>128"
    assert "sepconv.torch contiguous" in first.candidates
    assert [first.mode, second.mode] == list(MODES)
    quick = gpu_cases(quick=True)
    assert len(quick) == 7
    assert quick[-1].row == first.row


def test_cases_are_chosen():
    cases = gpu_cases([TINY], (2, 3), ("float32",), MODES[:1], candidates=["torch"])
    assert [(c.batch, c.candidates) for c in cases] == [(2, ("torch",)), (3, ("torch",))]
    assert len(gpu_cases([TINY])) == 2
    for arguments, rule in (
        (((), (0,)), r"`batch` must be positive. Received: batch=0"),
        (((), (), ("int8",)), r"`dtype` must be one of .*'int8'"),
        (((), (), (), ("sleep",)), r"`mode` must be one of .*'sleep'"),
    ):
        with pytest.raises(ValueError, match=rule):
            gpu_cases(*arguments)
    with pytest.raises(ValueError, match=r"`peer` must be one of sepconv\.torch, .*'caffe'"):
        gpu_cases(candidates=["caffe"])
    with pytest.raises(ValueError, match=r"`rounds` must be positive"):
        GpuPlan(cases, rounds=0)


class Stand:
    """A candidate that takes given times."""

    def __init__(self, microseconds, error=0.1, peak=5.0):
        self.error_of_allowed, self.peak_megabytes = error, peak
        self.graph = lambda calls: [microseconds * 1e-6] * 2
        self.eager = lambda calls: [3 * microseconds * 1e-6]


class Pretence:
    """A device that says what it is told."""

    def __init__(self, **candidates):
        self.facts = {"gpu": "Some <GPU>", "torch": "9"}
        self.candidates, self.log = candidates, []

    def warm_up(self, cases, seconds):
        self.log.append(("warm_up", len(cases), seconds))

    def peaks(self, dtype):
        return Peaks(1e6, 1e3)

    def begin(self, case):
        self.log.append(("begin", str(case)))

    def prepare(self, case, candidate):
        found = self.candidates.get(candidate.replace(".", "_").replace(" ", "_"), 40.0)
        if isinstance(found, Exception):
            raise found
        return found if isinstance(found, Stand) else Stand(found)

    def end(self):
        self.log.append(("end",))


def last(plan, device):
    return list(measure_gpu(plan, device))[-1].run


def test_given_times_make_a_run_that_goes_through_csv_and_page(tmp_path):
    device = Pretence(sepconv_torch=Stand(20.0, peak=1.0), torch=RefusedError("no", unable=True))
    plan = GpuPlan(gpu_cases([TINY], (2,)), rounds=3)
    steps = list(measure_gpu(plan, device))
    assert [step.done for step in steps] == [0, 0, 1, 2]
    run = steps[-1].run
    assert device.log[0] == ("warm_up", 2, 210.0)
    assert device.log[1:] == [
        ("begin", str(plan.cases[0])),
        ("end",),
        ("begin", str(plan.cases[1])),
        ("end",),
    ]
    assert run.facts["gpu"] == "Some <GPU>"
    graph, eager, *_ = results.cases_of(run.results)
    assert (graph.setting.buffers, eager.setting.buffers) == ("graph", "eager")
    assert str(graph.setting) == "inference, batch 2, bfloat16, cuda, graph replayed"
    assert graph.ours.median_us == pytest.approx(20.0)
    assert eager.ours.median_us == pytest.approx(60.0)
    assert graph.ratio("torch.compile") == pytest.approx(2.0)
    assert graph.notes == {"torch": "no"}
    # 5 x 4 pixels of 2 images: bytes at 1e12 a second, in 16 bits.
    elements = 2 * (9 * 8 * 11 + 5 * 4 * 13) + 11 * (9 + 13) + 13
    assert graph.ours.limit_us == pytest.approx(2 * elements / 1e12 * 1e6)
    assert graph.ours.bound == "memory"
    path = tmp_path / "gpu.csv"
    results.write_csv(path, run)
    again = results.read_csv(path)
    assert repr(again.results) != ""
    assert [r.candidate for r in again.results] == [r.candidate for r in run.results]
    assert again.results[0].device == "cuda"
    assert again.results[0].peak_megabytes == 1.0
    memory = tables.memory_table(again)
    assert memory.rows == [["9x8 11>13 s2", "bfloat16", "2", "1.0", "5.0", "5.0", "5.0"]]
    page.write_page(tmp_path / "gpu.md", again)
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert text.startswith("# Benchmarks on a GPU\n")
    for part in ("Memory of a training step", "Some <GPU>", "products of bfloat16", "2.00x"):
        assert part in text, part
    command.report([again], Console(file=io.StringIO(), width=120), None)


def test_cases_that_find_no_time_left_are_noted(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    device = Pretence()

    def end():
        now[0] += 60.0

    device.end = end
    run = last(GpuPlan(gpu_cases([TINY], (1, 2, 3)), budget_seconds=100.0), device)
    noted = [result for result in run.results if result.note == "no time was left"]
    assert len(run.results) == 6 * 5 * 2
    assert len(noted) == 4 * 5 * 2
    assert not any(result.is_timed for result in noted)


def test_what_is_ours_and_wrong_is_an_error():
    case = gpu_cases([TINY], (1,), (), MODES[:1])
    with pytest.raises(RuntimeError, match=r"sepconv\.torch, 9x8 11>13 s2.*wrong by 7 times"):
        last(GpuPlan(case), Pretence(sepconv_torch=Stand(1.0, error=7.0)))
    with pytest.raises(RuntimeError, match="wrong by nan"):
        last(GpuPlan(case), Pretence(sepconv_torch=Stand(1.0, error=math.nan)))
    run = last(GpuPlan(case), Pretence(torch=Stand(1.0, error=2.0)))
    assert {r.note for r in run.results if r.candidate == "torch"} == {
        "wrong by 2 times what rounding allows"
    }


# The engine, on the CPU but for graphs and events.

ROWS = ("9x8x11-13k3s2", "8x7x6-10k5d2m2", "7x7x5-3k2v")


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_everyone_computes_the_truth_of_the_engine(row, mode, dtype):
    engine = cuda.Gpu("cpu")
    (case,) = gpu_cases([parse_row(row)], (2,), (dtype,), (mode,))
    engine.begin(case)
    for name in case.candidates:
        if name.startswith("torch.compile"):
            continue  # Takes a minute, and is the pair.
        ready = engine.prepare(case, name)
        assert ready.error_of_allowed < 1, name
        assert min(ready.eager(2)) > 0
        assert math.isnan(ready.peak_megabytes)
    engine._truth = [(value + allowed * 3, allowed) for value, allowed in engine._truth]
    assert engine.prepare(case, "torch").error_of_allowed > 1
    engine.end()


def test_the_truth_of_the_engine_is_that_of_the_reference():
    (case,) = gpu_cases([TINY], (2,), ("float32",), MODES[1:])
    problem = problem_of(TINY, 2)
    truth = Truth.of(problem, MODES[1])
    engine = cuda.Gpu("cpu")
    engine.begin(case)
    x = torch.from_numpy(problem.to_nchw(problem.x))
    dy = torch.from_numpy(problem.to_nchw(problem.dy))
    kernel, pointwise, bias = map(torch.from_numpy, problem.weights)
    kernel = kernel.permute(2, 3, 0, 1).reshape(11, 1, 3, 3)
    weights = [kernel, pointwise.permute(3, 2, 0, 1), bias]
    y, dx, d_kernel, d_pointwise, d_bias = cuda._computed(case, x, dy, weights)
    found = [
        problem.from_nchw(y.numpy()),
        problem.from_nchw(dx.numpy()),
        d_kernel.numpy().reshape(11, 1, 3, 3).transpose(2, 3, 0, 1),
        d_pointwise.numpy().transpose(2, 3, 1, 0),
        d_bias.numpy(),
    ]
    for one, other in zip(found, truth.values, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)
    engine.end()


# The command.


def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    csv = tmp_path / "bench.csv"
    shown = CliRunner().invoke(app, ["bench", "--device", "cuda", "--quick", "--csv", str(csv)])
    assert shown.exit_code == 1
    assert "`device` must be one that this machine has" in shown.output
    assert not csv.exists()


def test_an_unknown_device_is_refused():
    shown = CliRunner().invoke(app, ["bench", "--device", "tpu"])
    assert shown.exit_code == 1
    assert "`device` must be cpu or cuda. Received: device='tpu'" in shown.output


def test_the_command_measures_shows_and_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "Gpu", lambda: Pretence(sepconv_torch=20.0))
    csv, report = tmp_path / "gpu.csv", tmp_path / "gpu.html"
    shown = CliRunner().invoke(
        app,
        ["bench", "--device", "cuda", "--quick", "--csv", str(csv), "--page", str(report)],
    )
    assert shown.exit_code == 0, shown.output
    assert len(results.read_csv(csv).results) == 7 * 5 * 2
    assert "Some &lt;GPU&gt;" in report.read_text(encoding="utf-8")
    assert "512x512 64>128" in shown.output
    assert Path(csv).exists()
