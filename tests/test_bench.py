"""The benchmark: its rows, its arithmetic on given times, its files, and one small real run."""

import csv
import dataclasses
import doctest
import importlib
import io
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from sepconv import reference
from sepconv.bench import candidates, command, page, results, rows, tables, workers
from sepconv.bench.candidates import CANDIDATES, DOORS, PEERS, USUAL_PEERS, Candidate
from sepconv.bench.peaks import Peaks
from sepconv.bench.problems import MODES, Problem, problem_of
from sepconv.bench.run import Plan, Step, measure
from sepconv.bench.truth import Truth
from sepconv.cli import app
from sepconv.plans import forward_work

TINY = "9x8x11-13k3s2"


@pytest.mark.parametrize(
    "module",
    ["candidates", "command", "peaks", "results", "rows"],
)
def test_examples_of_the_docstrings_hold(module):
    found = doctest.testmod(importlib.import_module(f"sepconv.bench.{module}"))
    assert found.attempted > 0
    assert found.failed == 0


# Rows.


def test_a_free_form_names_every_size():
    row = rows.parse_row("147x146x64-128k5s2d1m3v")
    assert (row.height, row.width, row.channels, row.filters) == (147, 146, 64, 128)
    assert (row.kernel, row.strides, row.dilation) == ((5, 5), (2, 2), (1, 1))
    assert (row.depth_multiplier, row.padding) == (3, "valid")
    assert row.label == "147x146 64>128 k5 s2 m3 valid"
    assert rows.parse_row("8x8x2-4d2k1").label == "8x8 2>4 k1 d2"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("147x147", "must look like 147x147x64-128k3s1d1"),
        ("8x8x2-4q3", "must look like"),
        ("8x8x2-4k3k5", "must name each of k, s, d, m once"),
        ("8x8x0-4", "must have positive numbers"),
        ("8x8x2-4s0", "must have positive numbers"),
        ("4x8x2-4k5v", "must have output pixels"),
    ],
)
def test_a_wrong_free_form_is_named_with_its_rule(text, rule):
    with pytest.raises(ValueError, match=rule) as caught:
        rows.parse_row(text)
    assert f"row={text!r}" in str(caught.value)


def test_rows_are_chosen_by_network_by_text_and_in_free_form():
    usual = rows.choose_rows()
    assert len(usual) == 12
    assert {row.label for row in rows.choose_rows(quick=True)} < {row.label for row in usual}
    every = rows.choose_rows(["all"])
    assert {row.network for row in every} == set(rows.network_names())
    assert len({row.label for row in every}) == len(every) > 50
    found = rows.choose_rows(["xception-299"], ["19x19", TINY])
    assert [row.label for row in found] == ["19x19 728>728", "19x19 728>1024", "9x8 11>13 s2"]
    assert [row.label for row in rows.choose_rows(texts=["block4_sepconv1"])] == ["37x37 256>728"]


def test_rows_that_are_not_there_are_an_error():
    with pytest.raises(ValueError, match=r"`network` must be all or one of .*'lenet'"):
        rows.choose_rows(["lenet"])
    with pytest.raises(ValueError, match=r"`row` must be sizes .* Received: row='no such'"):
        rows.choose_rows(texts=["no such"])


# Problems and their truth.


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_the_truth_is_that_of_the_reference(data_format):
    problem = problem_of(rows.parse_row("7x6x3-5k3s2m2"), 2, data_format=data_format)
    truth = Truth.of(problem, MODES[1])
    y = reference.forward(problem.geometry, problem.x, *problem.weights)
    gradients = reference.backward(problem.geometry, problem.dy, problem.x, *problem.weights)
    expected = [y, *(g for g in gradients if g is not None)]
    assert len(truth.values) == 5
    for value, allowed, wanted in zip(truth.values, truth.allowed, expected, strict=True):
        assert np.max(np.abs(value - wanted) / allowed) < 1e-3


def test_a_wrong_result_is_outside_of_what_rounding_allows():
    truth = Truth.of(problem_of(rows.parse_row(TINY)), MODES[0])
    y = truth.values[0]
    assert truth.worst_error([y.astype(np.float32)]) < 1
    wrong = y.copy()
    wrong[0, 1, 2, 3] += 1e-3
    assert truth.worst_error([wrong]) > 1
    wrong[0, 0, 0, 0] = np.nan
    assert truth.worst_error([wrong]) == math.inf
    assert truth.worst_error([y[:, 1:]]) == math.inf
    assert truth.worst_error([]) == math.inf


def test_a_problem_goes_through_its_file(tmp_path):
    problem = problem_of(rows.parse_row("5x4x2-3k3d2"), 2, dtype="bfloat16")
    problem.save(tmp_path / "problem.npz")
    loaded = Problem.load(tmp_path / "problem.npz")
    assert (loaded.spec, loaded.geometry, loaded.dtype) == (
        problem.spec,
        problem.geometry,
        "bfloat16",
    )
    np.testing.assert_array_equal(loaded.dy, problem.dy)
    # The last 16 bits of a float32 are those that bfloat16 does not have.
    assert not np.any(loaded.x.view(np.uint32) & 0xFFFF)


# Candidates.


def test_candidates_are_chosen_by_name_and_by_group():
    assert [c.name for c in candidates.choose()] == [
        c.name for c in CANDIDATES if c.ours or c.name in USUAL_PEERS
    ]
    assert [c.name for c in candidates.choose(["sepconv.numpy"], ["all"])][1:] == list(PEERS)
    assert all(c.door in DOORS for c in CANDIDATES if c.door)
    with pytest.raises(
        ValueError, match=r"`door` must be one of sepconv\.numpy prepared, .*door='torch'"
    ):
        candidates.choose(["torch"])
    with pytest.raises(ValueError, match=r"`peer` must be one of torch, .*peer='caffe'"):
        candidates.choose(peers=["caffe"])


# Results: given times.

BLANK = results.Result(
    network="n",
    layer="l",
    label="a",
    mode="inference",
    batch=1,
    dtype="float32",
    data_format="channels_last",
    threads=1,
    buffers="warm",
    candidate="",
    ours=False,
    gflop=0.002,
    megabytes=1.0,
    limit_us=20.0,
    bound="arithmetic",
    fma_peak_gflops=100.0,
    memory_gigabytes_per_second=10.0,
)


def timed(label, candidate, microseconds, **changes):
    return dataclasses.replace(
        BLANK,
        label=label,
        candidate=candidate,
        ours=candidate in DOORS,
        median_us=microseconds,
        quartile1_us=0.75 * microseconds,
        quartile3_us=1.25 * microseconds,
        best_us=0.5 * microseconds,
        samples=10,
        error_of_allowed=0.5,
        **changes,
    )


@pytest.fixture
def run():
    found = [
        timed("a", "sepconv.numpy", 40.0),
        timed("a", "sepconv.torch", 50.0),
        timed("a", "torch channels_last", 20.0),
        timed("a", "openvino", 80.0),
        timed("b", "sepconv.numpy", 10.0),
        timed("b", "sepconv.torch", 10.0),
        timed("b", "torch channels_last", 40.0),
        dataclasses.replace(BLANK, label="b", candidate="openvino", note="cannot | will not"),
        timed("a", "sepconv.numpy", 30.0, threads=2),
    ]
    return results.Run(found, {"cpu": "Some <CPU>", "date": "2020-01-02", "numpy": "2.0"})


def test_ratios_refer_to_our_first_door(run):
    one, two, other = results.cases_of(run.results)
    assert one.ours.candidate == "sepconv.numpy"
    assert one.ratio("torch channels_last") == 0.5
    assert one.ratio("sepconv.torch") == 1.25
    assert (one.best_peer, two.best_peer, other.best_peer) == (
        "torch channels_last",
        "torch channels_last",
        None,
    )
    assert two.notes == {"openvino": "cannot | will not"}
    assert one.ours.percent_of_limit == 50
    assert one.ours.spread == 0.25
    assert [(c.label, peer, r) for c, peer, r in results.below([one, two])] == [
        ("a", "torch channels_last", 0.5)
    ]


def test_geometric_mean_of_ratios():
    assert results.geometric_mean([0.5, 2.0, 8.0]) == 2.0
    assert results.geometric_mean([]) is None


def test_summary_has_the_mean_the_least_and_the_door_of_the_same_framework(run):
    means, slower = tables.summary_tables(run)
    by_peer = {row[1]: row[2:] for row in means.rows}
    assert by_peer["the best of each layer"] == ["1.41x", "0.50x", "2", ""]
    # 20/50 and 40/10.
    assert by_peer["torch channels_last"] == ["1.41x", "0.50x", "2", "1.26x sepconv.torch"]
    assert by_peer["openvino"] == ["2.00x", "2.00x", "1", ""]
    assert [row[1:] for row in slower.rows] == [["a", "torch channels_last", "0.50x"]]


def test_a_csv_is_read_as_it_was_written(run, tmp_path):
    path = tmp_path / "new" / "bench.csv"
    results.write_csv(path, run)
    assert [p.name for p in path.parent.iterdir()] == ["bench.csv"]
    again = results.read_csv(path)
    assert again.facts == run.facts
    assert repr(again.results) == repr(run.results)
    with path.open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert lines[2]["ratio_to_ours"] == "0.5"
    assert lines[0]["percent_of_limit"] == "50"
    assert lines[0]["gflops"] == "50"
    assert lines[7]["median_us"] == lines[7]["ratio_to_ours"] == ""
    assert {line["cpu"] for line in lines} == {"Some <CPU>"}


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n"])
def test_another_csv_is_refused(tmp_path, text):
    path = tmp_path / "other.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="`path` must be a CSV of `sepconv bench`"):
        results.read_csv(path)


def test_runs_of_two_machines_are_not_merged(run):
    later = results.Run([timed("a", "openvino", 60.0)], {**run.facts, "date": "2021-01-01"})
    merged = command.merge([run, later])
    assert len(merged.results) == len(run.results)
    assert results.cases_of(merged.results)[0].ratio("openvino") == 1.5
    with pytest.raises(ValueError, match="must be runs of one machine"):
        command.merge([run, results.Run([], {"cpu": "another"})])


# The page and the terminal.


def test_the_page_has_every_table_and_stands_alone(run, tmp_path):
    path = tmp_path / "new" / "index.html"
    page.write_page(path, run, command="some command")
    text = path.read_text(encoding="utf-8")
    assert "Some &lt;CPU&gt;" in text
    assert "cannot | will not" in text
    assert "<td>40 ±25%</td><td>50 arithmetic</td><td>0.50x torch channels_last</td>" in text
    assert "some command" in text
    # Of each of the two settings: ratios and roofline.
    assert text.count("data:image/svg+xml;base64,") == 4
    assert "http" not in text.replace("http://www.w3.org", "")


def test_a_markdown_page_has_its_plots_beside_it(run, tmp_path):
    path = tmp_path / "benchmarks.md"
    page.write_page(path, run)
    text = path.read_text(encoding="utf-8")
    assert (
        "| b | 10 ±25% | 200 arithmetic | 4.00x torch channels_last | 1.00x | 4.00x | - |" in text
    )
    assert "cannot \\| will not" in text
    for name in ("ratios-1", "roofline-1", "ratios-2", "roofline-2"):
        assert f"(benchmarks/{name}.svg)" in text
        assert "<svg" in (tmp_path / "benchmarks" / f"{name}.svg").read_text(encoding="utf-8")
    first = (tmp_path / "benchmarks" / "ratios-1.svg").read_bytes()
    page.write_page(path, run)
    assert (tmp_path / "benchmarks" / "ratios-1.svg").read_bytes() == first


def test_a_page_needs_times_of_ours_and_a_known_ending(run, tmp_path):
    with pytest.raises(ValueError, match=r"`page` must end in \.html or \.md"):
        page.write_page(tmp_path / "page.pdf", run)
    with pytest.raises(ValueError, match="`run` must have times of a door"):
        page.write_page(tmp_path / "page.md", results.Run([], {}))


def test_a_wide_table_is_cut_so_that_nothing_is_lost(run):
    for width in (40, 60, 200):
        shown = io.StringIO()
        command.report([run], Console(file=shown, width=width), None)
        text = shown.getvalue()
        assert "torch\n" in text or "torch " in text
        assert all(f in text for f in ("2.00x", "0.50x", "1.25x", "geometric mean", "50 arith"))


# Workers, and what comes of their failures.


def test_who_cannot_start_is_refused_with_the_way_to_get_it():
    nobody = Candidate("nobody", "no_such_engine", (), "pip install nobody", "")
    without = dataclasses.replace(nobody, packages=("no_such_package",))
    numpy_door = CANDIDATES[0]
    with workers.pinned(1), workers.Workers(1) as running:
        for candidate, reason in (
            (without, "needs no_such_package. Run: pip install nobody"),
            (nobody, "No module named .*no_such_engine.* To get it: pip install nobody"),
        ):
            with pytest.raises(workers.RefusedError, match=reason) as caught:
                running.versions(candidate)
            assert caught.value.unable
        assert "numpy" in running.versions(numpy_door)
        running.forget()
        assert "numpy" in running.versions(numpy_door)


def test_a_worker_that_is_silent_or_gone_is_an_error_that_names_it(tmp_path):
    problem_of(rows.parse_row("200x200x64-64")).save(tmp_path / "problem.npz")
    numpy_door = CANDIDATES[0]
    with workers.Workers(1, patience_seconds=60) as running:
        running.prepare(numpy_door, tmp_path / "problem.npz", MODES[1], 1)
        block = running.block(numpy_door)
        assert len(block(2)) == 2
        running._running["numpy"]._patience = 0.2
        with pytest.raises(workers.WorkerError, match="of numpy did not answer 'time' within"):
            block(10**6)
        with pytest.raises(workers.WorkerError, match="of numpy ended with status"):
            block(1)
        running.prepare(numpy_door, tmp_path / "problem.npz", MODES[0], 1)
        assert [array.shape for array in running.results(numpy_door)] == [(1, 200, 200, 64)]


@pytest.fixture(scope="module")
def running():
    with workers.Workers(
        1, tensorflow_python=os.environ.get("SEPCONV_ORACLE_PYTHON"), patience_seconds=240
    ) as running:
        yield running


# The others take part in the small run below.
FURTHER = [c for c in CANDIDATES if c.engine not in ("numpy", "jax", "torch")]


@pytest.mark.parametrize("candidate", FURTHER, ids=lambda candidate: candidate.name)
def test_every_engine_that_is_installed_computes_the_truth(candidate, running):
    try:
        running.versions(candidate)
    except workers.RefusedError as error:
        pytest.skip(str(error))
    path = running.folder / "problem.npz"
    for form, mode in (("9x8x11-13k5s2", MODES[0]), ("8x7x6-10d2", candidate.modes[-1])):
        problem = problem_of(rows.parse_row(form), 2)
        problem.save(path)
        running.prepare(candidate, path, mode, 2)
        assert Truth.of(problem, mode).worst_error(running.results(candidate)) < 1
        assert min(running.block(candidate)(3)) > 0
        running.forget()


class Actors:
    """In place of processes: all compute the truth, but for those that are told otherwise."""

    def __init__(self, folder, results_of, block_of):
        self.folder, self.results_of, self.block_of = folder, results_of, block_of

    def __call__(self, threads, **_):
        self.threads = threads
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def versions(self, candidate):
        if candidate.name == "litert":
            raise workers.RefusedError("needs it", unable=True)
        return {candidate.engine: "1"}

    def prepare(self, candidate, path, mode, copies):
        self.truth = Truth.of(Problem.load(path), mode).values
        self.copies = copies

    def results(self, candidate):
        return [value * self.results_of.get(candidate.name, 1.0) for value in self.truth]

    def block(self, candidate):
        return self.block_of.get(candidate.name, lambda calls: [1e-3] * calls)

    def forget(self):
        pass


def plan_of(*peers, **changes):
    row = rows.parse_row(TINY)
    chosen = candidates.choose(["sepconv.numpy"], peers)
    return Plan([row], chosen, **{"modes": MODES[:1], "rounds": 2, **changes})


def last_step(plan, monkeypatch, actors):
    monkeypatch.setattr("sepconv.bench.run.Workers", actors)
    monkeypatch.setattr(
        "sepconv.bench.run.measure_peaks", lambda threads: Peaks(100.0, 10.0, 800.0)
    )
    *_, last = measure(plan)
    assert isinstance(last, Step)
    assert (last.done, last.now) == (plan.steps, "")
    return {result.candidate: result for result in last.run.results}


def test_a_wrong_peer_a_failing_one_and_an_absent_one_are_notes(tmp_path, monkeypatch):
    def fail(calls):
        raise workers.WorkerError("it\nended")

    plan = plan_of("torch", "jax.lax", "openvino", "litert")
    actors = Actors(tmp_path, {"torch": 1.5}, {"openvino": fail})
    found = last_step(plan, monkeypatch, actors)
    assert list(found) == [candidate.name for candidate in plan.candidates]
    assert "times what rounding allows" in found["torch"].note
    assert found["torch"].error_of_allowed > 1
    assert found["openvino"].note == "it ended"
    assert found["litert"].note == "needs it"
    assert {name for name, result in found.items() if result.is_timed} == {
        "sepconv.numpy",
        "jax.lax",
    }
    work = forward_work(problem_of(rows.parse_row(TINY)).geometry)
    assert found["jax.lax"].limit_us == pytest.approx(1e6 * work.limit(100.0, 10.0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_limits_of_bfloat16_refer_to_its_products(dtype, tmp_path, monkeypatch):
    found = last_step(plan_of(dtypes=[dtype]), monkeypatch, Actors(tmp_path, {}, {}))
    work = forward_work(problem_of(rows.parse_row(TINY)).geometry, dtype)
    pairs = 800.0 if dtype == "bfloat16" else None
    assert found["sepconv.numpy"].limit_us == pytest.approx(1e6 * work.limit(100.0, 10.0, pairs))


def test_a_wrong_door_of_ours_is_an_error(tmp_path, monkeypatch):
    actors = Actors(tmp_path, {"sepconv.numpy": 1.5}, {})
    with pytest.raises(RuntimeError, match=r"sepconv\.numpy, inference of 9x8 11>13 s2: wrong by"):
        last_step(plan_of(), monkeypatch, actors)


def test_who_has_used_up_the_time_has_no_further_turns(tmp_path, monkeypatch):
    actors = Actors(tmp_path, {}, {})
    found = last_step(plan_of(turn_seconds=0.0, rounds=9), monkeypatch, actors)
    # The first round is not counted; three follow whatever they take.
    assert found["sepconv.numpy"].samples == 3 * 20


def test_fresh_buffers_are_twice_the_last_level_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("sepconv.machine.last_level_cache_bytes", lambda: 9 * 8 * 11 * 4 * 10)
    actors = Actors(tmp_path, {}, {})
    last_step(plan_of(), monkeypatch, actors)
    assert actors.copies == 1
    last_step(plan_of(buffers="fresh"), monkeypatch, actors)
    assert actors.copies == 20


# The command.


def call(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--row", "8x8x8"], "`row` must be"),
        (["--network", "lenet"], "`network` must be"),
        (["--door", "caffe"], "`door` must be"),
        (["--peer", "caffe"], "`peer` must be"),
        (["--mode", "backward"], "`mode` must be"),
        (["--dtype", "int8"], "`dtype` must be"),
        (["--buffers", "cold"], "`buffers` must be"),
        (["--batch", "0"], "`batch` must be positive. Received: batch=0"),
        (["--rounds", "0"], "`rounds` must be positive. Received: rounds=0"),
        (["--threads", "100000"], "`threads` must be between 1 and"),
        (["--data-format", "NHWC"], "`data_format` must be"),
        (["--page", "page.pdf"], "`page` must end in"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(arguments, message):
    result = call(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_absent_package_is_named_with_the_way_to_get_it(monkeypatch):
    for module in ("command", "page", "pictures"):
        monkeypatch.delitem(sys.modules, f"sepconv.bench.{module}")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = call("--row", TINY, "--explain")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "error: The benchmark needs the package matplotlib. Run: pip install 'sepconv[bench]'"
    ]


def test_explain_shows_the_plan_of_every_row_and_measures_nothing():
    result = call("--row", TINY, "--row", "4x4x8-8", "--dtype", "bfloat16", "--explain")
    assert result.exit_code == 0
    assert "1 x 9x8x11 -> 5x4x13, kernel 3x3, bfloat16" in result.stdout
    assert "1 x 4x4x8 -> 4x4x8, kernel 3x3, bfloat16" in result.stdout
    assert result.stdout.count("gradients:") == 4


def test_a_report_comes_from_csv_files_alone(run, tmp_path):
    path, target = tmp_path / "bench.csv", tmp_path / "page.md"
    results.write_csv(path, run)
    result = call("--report-from", path, "--page", target)
    assert result.exit_code == 0
    assert "0.50x torch channels_last" in result.stdout
    text = target.read_text(encoding="utf-8")
    assert "0.50x torch channels_last" in text
    assert f"`sepconv bench --report-from {path} --page {target}`" in text


def test_a_small_run_times_doors_and_peers_and_tells_who_is_missing(tmp_path):
    path, target = tmp_path / "bench.csv", tmp_path / "index.html"
    arguments = ["--row", TINY, "--rounds", 2, "--csv", path, "--page", target]
    for door in ("sepconv.numpy", "sepconv.jax", "sepconv.torch"):
        arguments += ["--door", door]
    for peer in ("torch", "torch channels_last", "tensorflow"):
        arguments += ["--peer", peer]
    result = call(*arguments, "--tensorflow-python", tmp_path / "no-python")
    assert result.exit_code == 0, result.output
    found = results.read_csv(path)
    assert {r.mode for r in found.results} == set(MODES)
    assert len(found.results) == 12
    for result in found.results:
        if result.candidate == "tensorflow":
            assert not result.is_timed
            assert "there is no interpreter" in result.note
            continue
        assert result.note == ""
        assert result.median_us > 0
        assert 0 <= result.error_of_allowed < 1
        assert result.samples >= 2
        assert result.limit_us > 0
        assert result.fma_peak_gflops > 0
    assert {"jax", "torch", "cpu", "sepconv"} <= set(found.facts)
    assert target.exists()


def test_the_readme_has_the_tables_of_the_published_run():
    tool = Path(__file__).parents[1] / "tools/readme_tables.py"
    subprocess.run([sys.executable, tool, "--check"], check=True)
