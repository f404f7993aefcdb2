"""The pages: their Python runs as it stands, and the site is built from them without complaint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The pages on `sepconv.tf1` and `sepconv.torch` run in the tests of those doors.
PAGES = {
    "README.md": "jax",
    "docs/numpy.md": None,
    "docs/jax.md": None,
    "docs/keras.md": "jax",
    "docs/fuse.md": "jax",
    "docs/files.md": "jax",
    "docs/migration-keras-2.md": "torch",
    "docs/migration-torch.md": None,
    "docs/gpu.md": None,
}
# Of a file that is not there, and of layers of another page.
NOT_RUN = {"README.md": ("model_of_2019.h5", "tf.variable_scope")}


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page, tmp_path):
    text = (ROOT / page).read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    skipped = [s for s in snippets if any(word in s for word in NOT_RUN.get(page, ()))]
    assert len(skipped) == len(NOT_RUN.get(page, ()))
    run = [snippet for snippet in snippets if snippet not in skipped]
    assert run
    backend = PAGES[page]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    environment |= {"KERAS_HOME": str(tmp_path)} | ({"KERAS_BACKEND": backend} if backend else {})
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(run)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for printed in re.findall(r"\nprints\n\n((?:    .*\n)+)", text):
        first = printed.splitlines()[0].strip()
        assert first in done.stdout


def test_examples_in_docstrings_of_models_and_their_files_run(tmp_path):
    program = """
        import doctest, importlib, pkgutil
        import sepconv.keras, sepconv.models
        found = ["sepconv.doctor", "sepconv.progress"]
        folder = sepconv.models.__path__
        found += [each.name for each in pkgutil.iter_modules(folder, "sepconv.models.")]
        results = [doctest.testmod(importlib.import_module(name)) for name in found]
        assert not any(each.failed for each in results)
        assert sum(each.attempted for each in results) > 60
    """
    environment = os.environ | {"KERAS_BACKEND": "torch", "KERAS_HOME": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_site_is_built_without_complaint(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reference = (tmp_path / "api.html").read_text(encoding="utf-8")
    for name in ("numpy.separable_conv2d_grad", "torch.SeparableConv2d", "fuse", "load"):
        assert f'id="sepconv.{name}"' in reference
    # Examples are code, not quotations of quotations.
    assert "<blockquote>" not in reference
    pages = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").glob("*.md")}
    for page in pages:
        assert (tmp_path / page).with_suffix(".html").exists()
    # No page asks another host for a font, a style or a script.
    for page in tmp_path.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r'<(?:script|link)[^>]*(?:src|href)="(https?://[^"]+)"', text) == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_outside_of_the_site_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target
