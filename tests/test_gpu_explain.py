"""`explain` for a GPU, without one; and what the other doors say of GPUs."""

from __future__ import annotations

import math

import pytest

from sepconv import ConvSpec, backends, explain
from sepconv.plans import backward_work, forward_work
from sepconv.triton import tuning

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

SAME = ConvSpec(padding="same")


@pytest.fixture(autouse=True)
def asked_for():
    backends.use_gpu_kernels(True)
    yield
    backends.use_gpu_kernels(False)


def test_kernels_that_nobody_asked_for_do_not_run():
    backends.use_gpu_kernels(False)
    plan = on_gpu((32, 112, 112, 32), 64)
    assert "sepconv.torch.use_gpu_kernels()" in plan.why_not
    assert plan.why_not in str(plan)


def on_gpu(x_shape, filters, dtype="bfloat16", spec=SAME, **arguments):
    return explain(spec, x_shape, 3, filters, dtype, device="cuda", **arguments)


def test_few_filters_are_one_kernel_and_the_grid_covers_the_call():
    plan = on_gpu((32, 112, 112, 32), 64)
    (kernel,) = plan.forward
    assert kernel.name == "forward_kernel"
    assert kernel.blocks["filters"] >= 64
    assert kernel.blocks["depth"] >= 32
    # Down the rows: each program a strip of columns.
    assert kernel.programs * kernel.blocks["pixels"] >= 32 * 112
    assert "narrow_gradients_kernel" in {k.name for k in plan.backward}
    assert "stays on the multiprocessor" in str(plan)
    assert "computed again" in str(plan)


def test_many_filters_are_separate_kernels_and_say_why():
    assert tuning.forward_blocks(on_gpu((32, 19, 19, 728), 728).geometry, 2) is None
    plan = on_gpu((32, 19, 19, 728), 728)
    assert [k.name for k in plan.forward] == ["depthwise_kernel", "torch.addmm"]
    assert "with 728 filters" in str(plan)
    assert "torch.addmm, a matrix product of the library" in str(plan)
    # In float32 the product is ours as well.
    assert all(
        not k.name.startswith("torch") for k in on_gpu((2, 19, 19, 728), 728, "float32").forward
    )


def test_limits_are_those_of_given_ceilings():
    plan = on_gpu((32, 112, 112, 32), 64, ceilings=(800e3, 4000.0))
    forward, backward = (work(plan.geometry, "bfloat16") for work in (forward_work, backward_work))
    assert plan.forward_limit == forward.bytes / 4000e9
    assert plan.training_limit == pytest.approx((forward.bytes + backward.bytes) / 4000e9)
    assert "at least 19.3 us, bound by memory" in str(plan)
    bound = on_gpu((32, 19, 19, 728), 728, ceilings=(800e3, 4000.0))
    assert "bound by arithmetic" in str(bound)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose ceilings are measured")
def test_without_a_gpu_there_is_no_limit():
    plan = on_gpu((32, 112, 112, 32), 64)
    assert plan.ceilings is None
    assert math.isnan(plan.forward_limit)
    assert math.isnan(plan.training_limit)
    assert "the ceilings of a GPU are not measured here" in str(plan)


def test_what_no_kernel_runs_says_why():
    plan = on_gpu((1, 8, 8, 4), 5, "float64")
    assert (
        plan.why_not
        == "the GPU kernel computes float32, bfloat16, float16, and the data is float64"
    )
    assert not plan.forward
    assert "no kernel of this library: the GPU kernel computes" in str(plan)
    taps = explain(SAME, (1, 32, 32, 4), 16, 5, device="cuda").why_not
    most = backends._TRITON_MOST_TAPS
    assert taps == f"the GPU kernel has at most {most} taps, and this one 256"
    empty = on_gpu((0, 8, 8, 4), 5)
    assert "nothing to compute" in str(empty)


@pytest.mark.parametrize("spec", [SAME, ConvSpec(data_format="channels_first", activation="gelu")])
@pytest.mark.parametrize("filters", [3, 64, 300])
def test_every_kind_of_call_is_explained(spec, filters):
    shape = (2, 9, 8, 20) if spec.data_format == "channels_last" else (2, 20, 9, 8)
    for dtype in ("float32", "bfloat16", "float16"):
        plan = on_gpu(shape, filters, dtype, spec, depth_multiplier=2)
        assert plan.forward
        assert plan.backward
        assert all(kernel.programs > 0 or kernel.name[:6] == "torch." for kernel in plan.backward)


def test_jax_on_a_gpu_computes_by_itself_and_says_so(monkeypatch):
    jax = pytest.importorskip("jax")
    from sepconv.jax import why_not

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    shapes = ((1, 5, 5, 2), (3, 3, 2, 1), (1, 1, 2, 4))
    reason = why_not(*(jax.ShapeDtypeStruct(shape, "float32") for shape in shapes))
    assert reason == (
        "on a GPU, JAX computes its own two convolutions: the GPU kernels of this library take "
        "tensors of torch, and the data is on 'gpu'"
    )
