"""`explain`: its limits by hand, and its plan against what it says about the call."""

import pytest

from sepconv import ConvSpec, _native, explain
from sepconv.plans import Work, backward_work, forward_work
from sepconv.spec import ACTIVATIONS

SAME = ConvSpec(padding="same")


def test_work_counts_every_product_and_every_array_once():
    # 10 x 10 pixels, 8 channels twice, 5 filters, 3 x 3 taps, both biases absent but the last.
    geometry = SAME.resolve((2, 10, 10, 8), (3, 3, 8, 2), (1, 1, 16, 5), (5,))
    pixels, depth = 2 * 10 * 10, 16
    weights = 9 * depth + depth * 5 + 5
    assert forward_work(geometry) == Work(
        2 * pixels * depth * (9 + 5),
        4 * (pixels * 8 + pixels * 5 + weights),
        2 * pixels * depth * 5,
    )
    assert backward_work(geometry, "bfloat16") == Work(
        2 * pixels * depth * (3 * 9 + 2 * 5),
        2 * (2 * pixels * 8 + pixels * 5 + 2 * weights),
        2 * pixels * depth * 2 * 5,
    )


def test_an_activation_reads_the_output_for_its_slope():
    shapes = ((1, 4, 4, 3), (3, 3, 3, 1), (1, 1, 3, 7))
    linear = ConvSpec().resolve(*shapes)
    relu = ConvSpec(activation="relu").resolve(*shapes)
    assert backward_work(relu).bytes - backward_work(linear).bytes == 4 * 2 * 2 * 7
    assert backward_work(relu).flops == backward_work(linear).flops


def test_the_limit_is_the_slower_of_arithmetic_and_memory():
    work = Work(flops=3_000_000, bytes=1_000_000, product_flops=2_000_000)
    assert work.limit(100.0, 1000.0) == pytest.approx(30e-6)
    assert work.limit(100.0, 10.0) == pytest.approx(100e-6)
    assert work + work == Work(6_000_000, 2_000_000, 4_000_000)
    # Units of their own for the products: the slower of both.
    assert work.limit(100.0, 1000.0, 125.0) == pytest.approx(16e-6)
    assert work.limit(100.0, 1000.0, 1000.0) == pytest.approx(10e-6)
    assert work.limit(100.0, 10.0, 1000.0) == pytest.approx(100e-6)


@pytest.mark.parametrize("size", [1, 7, 19, 56])
@pytest.mark.parametrize("filters", [3, 64, 728])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_the_plan_covers_the_call(size, filters, dtype):
    plan = explain(SAME, (2, size, size, 96), 3, filters, dtype)
    pixels = 2 * size * size
    forward, backward = plan.forward, plan.backward
    assert (forward["tiles"] - 1) * forward["tile_pixels"] < pixels
    assert forward["tiles"] * forward["tile_pixels"] >= pixels
    assert forward["panels"] * forward["panel_filters"] >= filters
    assert forward["panel_filters"] <= _native.tile_constants(dtype)["columns"]
    assert forward["panels_packed_before"] + forward["panels_packed_in_time"] <= forward["panels"]
    assert backward["channel_slices"] * backward["slice_channels"] >= 96
    # Pairs of bfloat16 are made and used without a pass between.
    in_place = dtype in ("float32", "float64") or forward["dot_of_pairs"]
    assert forward["input_in_place"] == forward["output_in_place"] == in_place
    # Those of the backward pass are pairs of filters, too.
    assert backward["dot_of_pairs"] == (forward["dot_of_pairs"] and filters % 2 == 0)
    assert 0 < plan.forward_limit < plan.training_limit
    works = plan.forward_work, plan.backward_work
    of_pairs = [
        work.limit(plan.gflops, plan.gigabytes_per_second, plan.pair_gflops if pairs else None)
        for work, pairs in zip(
            works, (forward["dot_of_pairs"], backward["dot_of_pairs"]), strict=True
        )
    ]
    assert (plan.forward_limit, plan.training_limit) == (of_pairs[0], sum(of_pairs))
    assert ("of pairs of bfloat16" in str(plan)) == bool(forward["dot_of_pairs"])
    assert "packed" in str(plan) or "read in place" in str(plan)


@pytest.mark.parametrize(
    ("spec", "multiplier", "cause"),
    [
        (ConvSpec(data_format="channels_first"), 1, "channels_first"),
        (ConvSpec(input_activation="relu"), 1, "an activation before the depthwise stage"),
        (ConvSpec(), 3, "a depth multiplier"),
    ],
)
def test_the_text_tells_why_input_is_staged(spec, multiplier, cause):
    plan = explain(spec, (1, 8, 8, 8), 3, 16, depth_multiplier=multiplier)
    assert plan.forward["input_in_place"] == 0
    assert f"input: rows staged in the cache: {cause}" in str(plan)
    assert "input: read in place" in str(explain(ConvSpec(), (1, 8, 8, 8), 3, 16))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_output_is_recomputed_only_where_the_slope_needs_it(activation):
    plan = explain(ConvSpec(activation=activation), (1, 8, 8, 8), 3, 16)
    follows = _native.slope_follows_from_output(ACTIVATIONS.index(activation))
    assert plan.backward["output_recomputed"] == (activation != "linear" and not follows)


def test_threads_follow_the_setting_and_the_size():
    before = _native.get_num_threads()
    try:
        _native.set_num_threads(3)
        large = explain(SAME, (1, 56, 56, 128), 3, 128)
        assert large.forward["threads"] == 3
        assert large.gflops == pytest.approx(3 * explain(SAME, (1, 1, 1, 1), 3, 1).gflops)
    finally:
        _native.set_num_threads(before)
    assert explain(SAME, (1, 4, 4, 4), 3, 4).forward["threads"] == 1


def test_a_call_that_no_kernel_runs_says_why():
    plan = explain(SAME, (1, 8, 8, 8), 3, 16, device="mps")
    assert plan.forward == {} == plan.backward
    assert "run on cpu, cuda, and the data is on 'mps'" in plan.why_not
    assert plan.why_not in str(plan)


def test_an_empty_output_is_nothing_to_compute():
    plan = explain(SAME, (0, 8, 8, 8), 3, 16)
    assert plan.why_not is None
    assert "nothing to compute" in str(plan)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1, 8, 8), 3, 16), r"`x_shape` must have 4 sizes. Received: x_shape=\(1, 8, 8\)"),
        (((1, 8, 8, 8), 3, 16, "int8"), "`dtype` must be one of .* Received: dtype='int8'"),
        (((1, 8, 8, 8), 3, 0), "pointwise_kernel"),
        (((1, 2, 2, 8), 5, 4), "kernel"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        explain(ConvSpec(), *arguments)


def test_native_plan_checks_its_geometry():
    geometry = SAME.resolve((1, 8, 8, 8), (3, 3, 8, 1), (1, 1, 8, 16))
    with pytest.raises(ValueError, match="22 integers"):
        _native.plan(geometry[:-1], "float32", False)
    with pytest.raises(ValueError, match="dtype_name"):
        _native.plan(geometry, "int8", False)
    with pytest.raises(ValueError, match="in_channels"):
        _native.plan(geometry._replace(in_channels=-1), "float32", True)
