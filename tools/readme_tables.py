"""Writes the measured tables of README.md anew from the published run.

python tools/readme_tables.py             after `sepconv bench --csv benchmarks/published/bench.csv`
python tools/readme_tables.py --check     only tells whether they are those of the run
"""

from __future__ import annotations

import sys
from pathlib import Path

from sepconv.bench.results import Case, Run, geometric_mean, read_csv
from sepconv.bench.tables import cases_by_setting

ROOT = Path(__file__).parents[1]
CSV = ROOT / "benchmarks/published/bench.csv"
README = ROOT / "README.md"
TIMES = "\N{MULTIPLICATION SIGN}"
BEGIN, END = "<!-- tools/readme_tables.py -->\n", "<!-- end -->\n"

# Names of candidates and what the tables call them.
PEERS = {
    "keras on jax": "Keras on JAX",
    "torch channels_last": "torch",
    "torch.compile": "torch.compile",
    "tensorflow": "TensorFlow",
    "litert": "LiteRT",
    "onnxruntime": "onnxruntime",
    "openvino": "OpenVINO",
}
SENTENCES = {
    "inference": "Inference: microseconds of a layer that `sepconv.numpy.prepare` made, its share "
    "of the FMA peak,\nand how many times as long others take (torch: two `Conv2d` in "
    "channels_last):",
    "training": "Training step of `sepconv.numpy`, that is forward and all four gradients, "
    "likewise:",
}


def table(cases: list[Case]) -> str:
    """The table of one setting, in Markdown."""
    present = [name for name in PEERS if any(name in case.others for case in cases)]
    heads = ["layer", "µs", "of peak", "best other", *(PEERS[name] for name in present)]
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)]]
    columns: dict[str, list[float]] = {name: [] for name in ("best", *present)}
    for case in cases:
        ours = case.ours
        ratios = {name: case.ratio(name) for name in present if name in case.others}
        ratios["best"] = case.ratio(case.best_peer) if case.best_peer else float("nan")
        for name, ratio in ratios.items():
            columns[name].append(ratio)
        share = ours.gflop / (ours.median_us * 1e-6) / ours.fma_peak_gflops
        cells = [f"{ratios[name]:.2f}{TIMES}" if name in ratios else "" for name in columns]
        layer = case.label.replace("x", TIMES).replace(">", "→")
        lines.append([layer, f"{ours.median_us:.0f}", f"{100 * share:.0f} %", *cells])
    means = [f"{geometric_mean(ratios):.2f}{TIMES}" for ratios in columns.values()]
    lines.append(["geometric mean", "", "", *means])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(run: Run) -> str:
    """All tables: one image, one thread, float32."""
    parts = []
    for cases in cases_by_setting(run):
        setting = cases[0].setting
        if (setting.batch, setting.threads, setting.dtype) == (1, 1, "float32"):
            parts += [SENTENCES[setting.mode], table(cases)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Writes or checks README.md."""
    readme = README.read_text(encoding="utf-8")
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    written = f"{head}{BEGIN}\n{text(read_csv(CSV))}\n{END}{tail}"
    if "--check" in sys.argv[1:]:
        if written != readme:
            raise SystemExit(
                "The tables of README.md are not those of the run. Run: "
                "python tools/readme_tables.py"
            )
    else:
        README.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
