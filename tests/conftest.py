"""Fixtures and settings that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest

import sepconv

# Time limits per example would only measure the machine. `--hypothesis-profile=thorough` looks
# longer.
hypothesis.settings.register_profile("default", deadline=None, max_examples=100, print_blob=True)
hypothesis.settings.register_profile(
    "thorough", parent=hypothesis.settings.get_profile("default"), max_examples=2000
)
hypothesis.settings.load_profile("default")


def pytest_report_header() -> str:
    try:
        from sepconv import _native
    except ImportError:  # Only what needs no native kernel can be tested: the GPU kernels.
        return "sepconv: no native kernel"
    return (
        f"sepconv: targets {', '.join(_native.available_targets())}; "
        f"{sepconv.get_num_threads()} threads"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        from sepconv import _native

        metafunc.parametrize("target", _native.available_targets(), indirect=True)


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces an instruction set; a test that asks for it runs once for each that this CPU has."""
    from sepconv import _native

    before = sepconv.cpu_target()
    _native.set_target(request.param)
    try:
        assert sepconv.cpu_target() == request.param
        yield request.param
    finally:
        _native.set_target(before)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Puts the number of threads back to its default after the test."""
    try:
        yield
    finally:
        sepconv.set_num_threads(0)
