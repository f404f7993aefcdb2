"""The GPU kernels, forward and backward.

Images are in the layout of the call. Geometry that decides code (channels, kernel, strides) is
known to the compiler, sizes of images and the batch are not. Sums run in float32. What goes from
one stage to the next (v forward, dz and du backward) is rounded to the dtype of the tensors, as in
a network of separate layers.

The depthwise stage walks down the rows of an image. A program has a strip of BLOCK_PIXELS columns
(of all images, one after the other) and some channels, and reads each row of x once, at as many
shifts as the kernel is wide; a row goes into the sums of all outputs that it is part of, of which
those not complete yet stay in registers. So an element takes 3 loads and conversions where the taps
one by one take 9. Rows of the output that share no row of x (dilation) are walked apart: PHASES.

Names are those of `sepconv.reference`: x input, u depthwise output, v the same after bias and
activation, z pointwise output, y output; k numbers depthwise channels, n filters.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "activate_kernel",
    "depthwise_kernel",
    "forward_kernel",
    "input_gradient_kernel",
    "kernel_gradient_kernel",
    "narrow_gradients_kernel",
    "pointwise_gradient_kernel",
    "pointwise_kernel",
    "slope_kernel",
]


# The interpreter of Triton keeps bfloat16 as integers: it cuts bits off where the hardware rounds,
# and would multiply matrices of those integers.
_INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _round(x, DTYPE: tl.constexpr):
    """To the nearest number of the dtype, halfway to the even one."""
    if _INTERPRETED:
        if DTYPE == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def _float32(x):
    """To float32.

    Of two numbers of bfloat16 in a register, by a shift and a mask, where the compiler takes three
    instructions: every tap of every element passes here.
    """
    if (x.dtype == tl.bfloat16) & (not _INTERPRETED):
        y = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def _settled(v):
    """V itself, but what follows can't reach back across it.

    The compiler likes to compute an operand of a matrix product in the layout that the product
    wants. For v it would bring the pixels of every tap into that layout, through shared memory with
    a barrier each, instead of v alone: three times the instructions.
    """
    if not _INTERPRETED:
        if v.dtype.primitive_bitwidth == 16:
            v = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [v], dtype=v.dtype, is_pure=False, pack=2
            )
        else:
            v = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [v], dtype=v.dtype, is_pure=False, pack=1
            )
    return v


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


# ------------------------------------------------------------------------------------- activations
# The coefficients are those of csrc/math-inl.h, where they are explained. NaN passes every branch.


@triton.jit
def _exp(x):
    # exp2 of the hardware is good to 2 units in the last place, but only of an exact argument.
    x = tl.where(x > 89.0, 89.0, tl.where(x < -104.0, -104.0, x))
    n = tl.floor(x * 1.44269504 + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4  # ln(2) in two parts
    return tl.exp2(r * 1.44269504) * tl.exp2(n - 1.0) * 2.0  # n may be 128


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + _exp(-x))


@triton.jit
def _tanh(x):
    square = x * x
    p = -0.006045165097 * square + 0.02096132911
    p = p * square - 0.05384326318
    p = p * square + 0.1333271885
    p = p * square - 0.3333332843
    far = 1.0 - 2.0 / (_exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, p * square * x + x, tl.where(x < 0.0, -far, far))


@triton.jit
def _expm1_below_zero(x):
    p = 0.001164287033 * x + 0.008238221347
    p = p * x + 0.04164992996
    p = p * x + 0.1666656276
    p = p * x + 0.4999999896
    return tl.where(x > -0.5, p * x * x + x, _exp(x) - 1.0)


@triton.jit
def _normal_cdf(x):
    v = tl.abs(x) * 0.707106781
    t = 1.0 / (1.0 + 0.5 * v)
    p = 0.03795032551 * t - 0.2045616511
    p = p * t + 0.4180938966
    p = p * t - 0.3467121499
    p = p * t + 0.03446830323
    p = p * t - 0.001414983665
    p = p * t + 0.07089172186
    p = p * t + 0.1810285839
    p = p * t + 0.2459932007
    p = p * t + 0.2821707443
    p = p * t + 0.2820920117
    half_erfc = 0.5 * t * p * _exp(-v * v)
    return tl.where(x > 0.0, 1.0 - half_erfc, half_erfc)


@triton.jit
def _hard_sigmoid(x):
    linear = x * (1.0 / 6.0) + 0.5
    return tl.where(linear < 0.0, 0.0, tl.where(linear > 1.0, 1.0, linear))


@triton.jit
def _activate(x, NAME: tl.constexpr):
    if NAME == "linear":
        y = x
    elif NAME == "relu":
        y = tl.where(x < 0.0, 0.0, x)
    elif NAME == "relu6":
        y = tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))
    elif NAME == "leaky_relu":
        y = tl.where(x < 0.0, 0.2 * x, x)
    elif NAME == "sigmoid":
        y = _sigmoid(x)
    elif NAME == "tanh":
        y = _tanh(x)
    elif NAME == "silu":
        y = x * _sigmoid(x)
    elif NAME == "gelu":
        y = x * _normal_cdf(x)
    elif NAME == "hard_sigmoid":
        y = _hard_sigmoid(x)
    elif NAME == "hard_silu":
        y = x * _hard_sigmoid(x)
    else:
        tl.static_assert(NAME == "elu", "no such activation")
        y = tl.where(x < 0.0, _expm1_below_zero(x), x)
    return y


@triton.jit
def _slope(z, NAME: tl.constexpr):
    """At a kink: relu, relu6 and hard_sigmoid 0, leaky_relu and elu 1."""
    if NAME == "linear":
        slope = tl.full(z.shape, 1.0, tl.float32)
    elif NAME == "relu":
        slope = tl.where(z > 0.0, 1.0, 0.0)
    elif NAME == "relu6":
        slope = tl.where((z > 0.0) & (z < 6.0), 1.0, 0.0)
    elif NAME == "leaky_relu":
        slope = tl.where(z < 0.0, 0.2, 1.0)
    elif NAME == "sigmoid":
        s = _sigmoid(z)
        slope = s * (1.0 - s)
    elif NAME == "tanh":
        t = _tanh(z)
        slope = 1.0 - t * t
    elif NAME == "silu":
        s = _sigmoid(z)
        slope = s * (1.0 + z * (1.0 - s))
    elif NAME == "gelu":
        slope = _normal_cdf(z) + z * _exp(-0.5 * z * z) * 0.398942280  # 1 / sqrt(2 pi)
    elif NAME == "hard_sigmoid":
        slope = tl.where((z > -3.0) & (z < 3.0), 1.0 / 6.0, 0.0)
    elif NAME == "hard_silu":
        slope = tl.where(z > -3.0, tl.where(z < 3.0, z * (1.0 / 3.0) + 0.5, 1.0), 0.0)
    else:
        tl.static_assert(NAME == "elu", "no such activation")
        slope = tl.where(z < 0.0, _exp(z), 1.0)
    return slope


@triton.jit
def _slope_from_output(y, NAME: tl.constexpr):
    """For those activations of whose output the slope is a function."""
    if NAME == "sigmoid":
        slope = y * (1.0 - y)
    elif NAME == "tanh":
        slope = 1.0 - y * y
    elif NAME == "hard_sigmoid":
        slope = tl.where((y > 0.0) & (y < 1.0), 1.0 / 6.0, 0.0)
    elif NAME == "elu":
        slope = tl.where(y < 0.0, y + 1.0, 1.0)
    else:  # The output has the sign and the kinks of its argument.
        slope = _slope(y, NAME)
    return slope


@triton.jit
def _times_slope(dy, reference, NAME: tl.constexpr, FROM_OUTPUT: tl.constexpr):
    if FROM_OUTPUT:
        dz = dy * _slope_from_output(reference, NAME)
    else:
        dz = dy * _slope(reference, NAME)
    return dz


# --------------------------------------------------------------------------------------- addresses


@triton.jit
def _strip(program, segments, batch, width, BLOCK_PIXELS: tl.constexpr, WIDE: tl.constexpr):
    """Image and column of the lanes of a program, which of them exist, and its segment of rows."""
    segment = program % segments
    tile = program // segments
    if WIDE:
        tile, segment = tile.to(tl.int64), segment.to(tl.int64)
    lane = tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    image = lane // width
    return image, lane % width, image < batch, segment


@triton.jit
def _offset(image, row, column, height, width, CHANNELS: tl.constexpr, LAYOUT: tl.constexpr):
    """Where channel 0 of a pixel lies."""
    if LAYOUT == 0:
        offset = ((image * height + row) * width + column) * CHANNELS
    else:
        offset = (image * CHANNELS * height + row) * width + column
    return offset


@triton.jit
def _plane(channel, height, width, LAYOUT: tl.constexpr, WIDE: tl.constexpr):
    """Where a channel lies, counted from channel 0 of the same pixel."""
    if LAYOUT == 1:
        if WIDE:
            channel = channel.to(tl.int64)
        channel = channel * (height * width)
    return channel


# ---------------------------------------------------------------------------------------- forward


@triton.jit
def _added(sums, INDEX: tl.constexpr, term):
    """Sums with a term added to one of them."""
    return sums[:INDEX] + (sums[INDEX] + term,) + sums[INDEX + 1 :]


@triton.jit
def _tap(kernel_ptr, TAP: tl.constexpr, k, DEPTH: tl.constexpr):
    """Weights of a tap: in two dimensions, so that they lie across threads as x does."""
    at = kernel_ptr + (TAP * DEPTH + k)[None, :]
    return _float32(tl.load(at, mask=(k < DEPTH)[None, :], other=0.0))


@triton.jit
def _held_taps(kernel_ptr, k, DEPTH: tl.constexpr, TAPS: tl.constexpr, HELD: tl.constexpr):
    """The weights of all taps, if they are HELD in registers from row to row."""
    taps = ()
    if HELD:
        for tap in tl.static_range(TAPS):
            taps = taps + (_tap(kernel_ptr, tap, k, DEPTH),)
    return taps


@triton.jit
def _rows_of_x(
    t,
    x_ptr,
    image,
    column,
    exists,
    k,
    phase,
    height,
    width,
    pad_top,
    pad_left,
    CHANNELS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    DILATION_HEIGHT: tl.constexpr,
    DILATION_WIDTH: tl.constexpr,
    ROW_STEP: tl.constexpr,
    LAYOUT: tl.constexpr,
    INPUT_ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The rows of x that begin with output t of a phase, each at all shifts: a tuple.

    Output t of a phase is met by the rows t * ROW_STEP + i of it, i = 0 ... KERNEL_HEIGHT - 1; rows
    of a phase are DILATION_HEIGHT apart.
    """
    PIXEL: tl.constexpr = CHANNELS if LAYOUT == 0 else 1
    # What is activated to 0: zeros are padded after the activation.
    SIGMOID: tl.constexpr = (INPUT_ACTIVATION == "sigmoid") | (INPUT_ACTIVATION == "hard_sigmoid")
    PADDING: tl.constexpr = float("-inf") if SIGMOID else 0.0
    left = column * STRIDE_WIDTH - pad_left
    plane = _plane(k // MULTIPLIER, height, width, LAYOUT, WIDE)[None, :]
    known = (k < CHANNELS * MULTIPLIER)[None, :]
    rows = ()
    for s in tl.static_range(min(ROW_STEP, KERNEL_HEIGHT)):
        row = phase * STRIDE_HEIGHT - pad_top + DILATION_HEIGHT * (t * ROW_STEP + s)
        corner = _offset(image, row, left, height, width, CHANNELS, LAYOUT)
        there = exists & (row >= 0) & (row < height)
        for j in tl.static_range(KERNEL_WIDTH):
            right = left + j * DILATION_WIDTH
            met = (there & (right >= 0) & (right < width))[:, None] & known
            at = (corner + j * DILATION_WIDTH * PIXEL)[:, None] + plane
            rows = rows + (tl.load(x_ptr + at, mask=met, other=PADDING),)
    return rows


@triton.jit
def _weights(taps, kernel_ptr, TAP: tl.constexpr, k, DEPTH: tl.constexpr, HELD: tl.constexpr):
    if HELD:
        w = taps[TAP]
    else:
        w = _tap(kernel_ptr, TAP, k, DEPTH)
    return w


@triton.jit
def _walk(
    sums,
    rows,
    taps,
    kernel_ptr,
    k,
    DEPTH: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    ROW_STEP: tl.constexpr,
    INPUT_ACTIVATION: tl.constexpr,
    FLIPPED: tl.constexpr,
    HELD: tl.constexpr,
):
    """Adds the rows of x that begin with output t of a phase to the sums that they are part of.

    `sums` are those of the outputs up to t, t the last one; the first one is complete afterwards.
    """
    OPEN: tl.constexpr = (KERNEL_HEIGHT + ROW_STEP - 1) // ROW_STEP - 1
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    for s in tl.static_range(min(ROW_STEP, KERNEL_HEIGHT)):
        for j in tl.static_range(KERNEL_WIDTH):
            a = _activate(_float32(rows[s * KERNEL_WIDTH + j]), INPUT_ACTIVATION)
            # Constants are not given names: a name would make tensors of them.
            for back in tl.static_range(OPEN + 1):
                if s + ROW_STEP * back < KERNEL_HEIGHT:
                    w = _weights(
                        taps,
                        kernel_ptr,
                        TAPS - 1 - ((s + ROW_STEP * back) * KERNEL_WIDTH + j)
                        if FLIPPED
                        else (s + ROW_STEP * back) * KERNEL_WIDTH + j,
                        k,
                        DEPTH,
                        HELD,
                    )
                    sums = _added(sums, OPEN - back, a * w)
    return sums


@triton.jit
def _first_sum(depthwise_bias_ptr, k, DEPTH: tl.constexpr, BLOCK_PIXELS: tl.constexpr):
    """What the sum of an output begins with."""
    u = tl.zeros([BLOCK_PIXELS, k.shape[0]], tl.float32)
    if depthwise_bias_ptr is not None:
        u += tl.load(depthwise_bias_ptr + k, mask=k < DEPTH, other=0.0).to(tl.float32)[None, :]
    return u


@triton.jit
def forward_kernel(
    x_ptr,
    kernel_ptr,
    pointwise_ptr,
    depthwise_bias_ptr,
    bias_ptr,
    y_ptr,
    batch,
    height,
    width,
    out_height,
    out_width,
    pad_top,
    pad_left,
    segments,
    rows,
    CHANNELS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    FILTERS: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    DILATION_HEIGHT: tl.constexpr,
    DILATION_WIDTH: tl.constexpr,
    ROW_STEP: tl.constexpr,
    PHASES: tl.constexpr,
    LAYOUT: tl.constexpr,
    INPUT_ACTIVATION: tl.constexpr,
    DEPTHWISE_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HELD: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BLOCK_FILTERS: tl.constexpr,
):
    """y: all channels and filters of a strip in one program, the depthwise output never stored.

    Grid: (strips x segments of `rows` rows of a phase, phases).
    """
    DEPTH: tl.constexpr = CHANNELS * MULTIPLIER
    OPEN: tl.constexpr = (KERNEL_HEIGHT + ROW_STEP - 1) // ROW_STEP - 1
    image, column, exists, segment = _strip(
        tl.program_id(0), segments, batch, out_width, BLOCK_PIXELS, WIDE
    )
    phase = tl.program_id(1)
    k = tl.arange(0, BLOCK_DEPTH)
    n = tl.arange(0, BLOCK_FILTERS)
    p = tl.load(
        pointwise_ptr + k[:, None] * FILTERS + n[None, :],
        mask=(k < DEPTH)[:, None] & (n < FILTERS)[None, :],
        other=0.0,
    )
    zero = tl.zeros([BLOCK_PIXELS, BLOCK_DEPTH], tl.float32)
    taps = _held_taps(kernel_ptr, k, DEPTH, KERNEL_HEIGHT * KERNEL_WIDTH, HELD)
    begun = _first_sum(depthwise_bias_ptr, k, DEPTH, BLOCK_PIXELS)
    open_sums = (zero,) * OPEN
    first = segment * rows
    ahead = _rows_of_x(
        first,
        x_ptr,
        image,
        column,
        exists,
        k,
        phase,
        height,
        width,
        pad_top,
        pad_left,
        CHANNELS,
        MULTIPLIER,
        KERNEL_HEIGHT,
        KERNEL_WIDTH,
        STRIDE_HEIGHT,
        STRIDE_WIDTH,
        DILATION_HEIGHT,
        DILATION_WIDTH,
        ROW_STEP,
        LAYOUT,
        INPUT_ACTIVATION,
        WIDE,
    )
    for t in range(first, first + rows + OPEN):
        # The next rows are under way while these are computed with.
        rows_of_x = ahead
        ahead = _rows_of_x(
            t + 1,
            x_ptr,
            image,
            column,
            exists,
            k,
            phase,
            height,
            width,
            pad_top,
            pad_left,
            CHANNELS,
            MULTIPLIER,
            KERNEL_HEIGHT,
            KERNEL_WIDTH,
            STRIDE_HEIGHT,
            STRIDE_WIDTH,
            DILATION_HEIGHT,
            DILATION_WIDTH,
            ROW_STEP,
            LAYOUT,
            INPUT_ACTIVATION,
            WIDE,
        )
        sums = _walk(
            open_sums + (begun,),
            rows_of_x,
            taps,
            kernel_ptr,
            k,
            DEPTH,
            KERNEL_HEIGHT,
            KERNEL_WIDTH,
            ROW_STEP,
            INPUT_ACTIVATION,
            False,
            HELD,
        )
        open_sums = sums[1:]
        complete = t - OPEN
        if complete >= first:
            v = _round(_activate(sums[0], DEPTHWISE_ACTIVATION), x_ptr.dtype.element_ty)
            z = tl.zeros([BLOCK_PIXELS, BLOCK_FILTERS], tl.float32)
            z = _dot(_settled(v), p, z, PRECISION)
            if bias_ptr is not None:
                z += tl.load(bias_ptr + n, mask=n < FILTERS, other=0.0).to(tl.float32)[None, :]
            y = _round(_activate(z, ACTIVATION), y_ptr.dtype.element_ty)
            row = phase + PHASES * complete
            at = _offset(image, row, column, out_height, out_width, FILTERS, LAYOUT)
            plane = _plane(n, out_height, out_width, LAYOUT, WIDE)
            met = (exists & (row < out_height))[:, None] & (n < FILTERS)[None, :]
            tl.store(y_ptr + at[:, None] + plane[None, :], y, mask=met)


@triton.jit
def depthwise_kernel(
    x_ptr,
    kernel_ptr,
    depthwise_bias_ptr,
    slope_of_ptr,
    v_ptr,
    batch,
    height,
    width,
    out_height,
    out_width,
    pad_top,
    pad_left,
    segments,
    rows,
    CHANNELS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    DILATION_HEIGHT: tl.constexpr,
    DILATION_WIDTH: tl.constexpr,
    ROW_STEP: tl.constexpr,
    PHASES: tl.constexpr,
    LAYOUT: tl.constexpr,
    INPUT_ACTIVATION: tl.constexpr,
    DEPTHWISE_ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    FLIPPED: tl.constexpr,
    HELD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """A strip of v, BLOCK_DEPTH channels of it.

    With the kernel FLIPPED it is the gradient of x, times the SLOPE at `slope_of`, given du for x,
    where the stride is 1. Grid: (strips x segments of rows, phases, blocks of channels).
    """
    DEPTH: tl.constexpr = CHANNELS * MULTIPLIER
    OPEN: tl.constexpr = (KERNEL_HEIGHT + ROW_STEP - 1) // ROW_STEP - 1
    image, column, exists, segment = _strip(
        tl.program_id(0), segments, batch, out_width, BLOCK_PIXELS, WIDE
    )
    phase = tl.program_id(1)
    k = tl.program_id(2) * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
    plane = _plane(k, out_height, out_width, LAYOUT, WIDE)
    zero = tl.zeros([BLOCK_PIXELS, BLOCK_DEPTH], tl.float32)
    taps = _held_taps(kernel_ptr, k, DEPTH, KERNEL_HEIGHT * KERNEL_WIDTH, HELD)
    begun = _first_sum(depthwise_bias_ptr, k, DEPTH, BLOCK_PIXELS)
    open_sums = (zero,) * OPEN
    first = segment * rows
    for t in range(first, first + rows + OPEN):
        rows_of_x = _rows_of_x(
            t,
            x_ptr,
            image,
            column,
            exists,
            k,
            phase,
            height,
            width,
            pad_top,
            pad_left,
            CHANNELS,
            MULTIPLIER,
            KERNEL_HEIGHT,
            KERNEL_WIDTH,
            STRIDE_HEIGHT,
            STRIDE_WIDTH,
            DILATION_HEIGHT,
            DILATION_WIDTH,
            ROW_STEP,
            LAYOUT,
            INPUT_ACTIVATION,
            WIDE,
        )
        sums = _walk(
            open_sums + (begun,),
            rows_of_x,
            taps,
            kernel_ptr,
            k,
            DEPTH,
            KERNEL_HEIGHT,
            KERNEL_WIDTH,
            ROW_STEP,
            INPUT_ACTIVATION,
            FLIPPED,
            HELD,
        )
        open_sums = sums[1:]
        complete = t - OPEN
        row = phase + PHASES * complete
        at = _offset(image, row, column, out_height, out_width, DEPTH, LAYOUT)
        met = (exists & (complete >= first) & (row < out_height))[:, None] & (k < DEPTH)[None, :]
        v = _activate(sums[0], DEPTHWISE_ACTIVATION)
        if SLOPE != "linear":
            x = tl.load(slope_of_ptr + at[:, None] + plane[None, :], mask=met, other=0.0)
            v = v * _slope(_float32(x), SLOPE)
        v = _round(v, v_ptr.dtype.element_ty)
        tl.store(v_ptr + at[:, None] + plane[None, :], v, mask=met)


@triton.jit
def pointwise_kernel(
    v_ptr,
    pointwise_ptr,
    bias_ptr,
    y_ptr,
    pixels,
    area,
    DEPTH: tl.constexpr,
    FILTERS: tl.constexpr,
    POINTWISE_ROW: tl.constexpr,
    POINTWISE_COLUMN: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_FILTERS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The pointwise stage alone: y = activation(v @ pointwise + bias). `area`: pixels of one image.

    Grid: blocks of pixels x blocks of filters; programs of the same pixels are neighbours.
    """
    blocks: tl.constexpr = (FILTERS + BLOCK_FILTERS - 1) // BLOCK_FILTERS
    block = tl.program_id(0) // blocks
    n = tl.program_id(0) % blocks * BLOCK_FILTERS + tl.arange(0, BLOCK_FILTERS)
    k = tl.arange(0, BLOCK_DEPTH)
    if WIDE:
        block, n, k = block.to(tl.int64), n.to(tl.int64), k.to(tl.int64)
    pixel = block * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    exists = (pixel < pixels)[:, None]
    if LAYOUT == 0:
        v_at, y_at, step = pixel * DEPTH, pixel * FILTERS, 1
    else:
        start, place = pixel // area * area, pixel % area
        v_at, y_at, step = start * DEPTH + place, start * FILTERS + place, area
    z = tl.zeros([BLOCK_PIXELS, BLOCK_FILTERS], tl.float32)
    for first in tl.range(0, DEPTH, BLOCK_DEPTH, num_stages=STAGES):
        known = first + k < DEPTH
        v = tl.load(
            v_ptr + v_at[:, None] + (first + k)[None, :] * step,
            mask=exists & known[None, :],
            other=0.0,
        )
        p = tl.load(
            pointwise_ptr + (first + k)[:, None] * POINTWISE_ROW + n[None, :] * POINTWISE_COLUMN,
            mask=known[:, None] & (n < FILTERS)[None, :],
            other=0.0,
        )
        z = _dot(v, p, z, PRECISION)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + n, mask=n < FILTERS, other=0.0).to(tl.float32)[None, :]
    y = _round(_activate(z, ACTIVATION), y_ptr.dtype.element_ty)
    at = y_at[:, None] + n[None, :] * step
    tl.store(y_ptr + at, y, mask=exists & (n < FILTERS)[None, :])


@triton.jit
def activate_kernel(z_ptr, y_ptr, size, NAME: tl.constexpr, BLOCK: tl.constexpr):
    """Y = activation(z), element by element; y may be z."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, _round(_activate(z, NAME), y_ptr.dtype.element_ty), mask=i < size)


# --------------------------------------------------------------------------------------- backward


@triton.jit
def slope_kernel(
    dy_ptr,
    reference_ptr,
    dz_ptr,
    size,
    NAME: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Dz = dy * slope, element by element; `reference` is z or, FROM_OUTPUT, y. dz may be dy."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + i, mask=i < size, other=0.0).to(tl.float32)
    reference = tl.load(reference_ptr + i, mask=i < size, other=0.0).to(tl.float32)
    dz = _times_slope(dy, reference, NAME, FROM_OUTPUT)
    tl.store(dz_ptr + i, _round(dz, dz_ptr.dtype.element_ty), mask=i < size)


@triton.jit
def narrow_gradients_kernel(
    dy_ptr,
    reference_ptr,
    u_ptr,
    pointwise_ptr,
    du_ptr,
    d_pointwise_ptr,
    d_depthwise_bias_ptr,
    d_bias_ptr,
    pixels,
    area,
    tiles,
    DEPTH: tl.constexpr,
    FILTERS: tl.constexpr,
    LAYOUT: tl.constexpr,
    DEPTHWISE_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BLOCK_FILTERS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Both products of the backward pass at once, all filters in one program.

    du = dz @ pointwise^T * slope, and partial sums of d_pointwise = v^T @ dz and of the gradients
    of the biases, so that dz is read once and never stored. What is not asked for is None. `area`:
    pixels of one image. Grid: (blocks of channels, parts of `tiles` blocks of pixels).
    """
    k = tl.program_id(0) * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
    n = tl.arange(0, BLOCK_FILTERS)
    part = tl.program_id(1)
    if WIDE:
        part, k, n = part.to(tl.int64), k.to(tl.int64), n.to(tl.int64)
    stored = dy_ptr.dtype.element_ty
    if du_ptr is not None:
        p_t = tl.load(
            pointwise_ptr + k[None, :] * FILTERS + n[:, None],
            mask=(k < DEPTH)[None, :] & (n < FILTERS)[:, None],
            other=0.0,
        )
    d_pointwise = tl.zeros([BLOCK_DEPTH, BLOCK_FILTERS], tl.float32)
    # Summed over pixels at the end, not tile by tile.
    d_depthwise_bias = tl.zeros([BLOCK_PIXELS, BLOCK_DEPTH], tl.float32)
    d_bias = tl.zeros([BLOCK_PIXELS, BLOCK_FILTERS], tl.float32)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        pixel = (part * tiles + tile) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        exists = (pixel < pixels)[:, None]
        if LAYOUT == 0:
            u_at, y_at, step = pixel * DEPTH, pixel * FILTERS, 1
        else:
            start, place = pixel // area * area, pixel % area
            u_at, y_at, step = start * DEPTH + place, start * FILTERS + place, area
        y_at = y_at[:, None] + n[None, :] * step
        u_at = u_at[:, None] + k[None, :] * step
        y_met, u_met = exists & (n < FILTERS)[None, :], exists & (k < DEPTH)[None, :]
        dz = tl.load(dy_ptr + y_at, mask=y_met, other=0.0)
        if ACTIVATION != "linear":
            reference = tl.load(reference_ptr + y_at, mask=y_met, other=0.0).to(tl.float32)
            dz = _times_slope(dz.to(tl.float32), reference, ACTIVATION, FROM_OUTPUT)
            dz = _settled(_round(dz, stored))
        if d_bias_ptr is not None:
            d_bias += dz.to(tl.float32)
        if u_ptr is not None:
            u = tl.load(u_ptr + u_at, mask=u_met, other=0.0)
        if du_ptr is not None:
            du = tl.zeros([BLOCK_PIXELS, BLOCK_DEPTH], tl.float32)
            du = _dot(dz, p_t, du, PRECISION)
            if DEPTHWISE_ACTIVATION != "linear":
                du = du * _slope(u.to(tl.float32), DEPTHWISE_ACTIVATION)
            du = _round(du, stored)
            tl.store(du_ptr + u_at, du, mask=u_met)
            if d_depthwise_bias_ptr is not None:
                d_depthwise_bias += du.to(tl.float32)
        if d_pointwise_ptr is not None:
            # Pixels that do not exist have dz = 0.
            v = u
            if DEPTHWISE_ACTIVATION != "linear":
                v = _settled(_round(_activate(u.to(tl.float32), DEPTHWISE_ACTIVATION), stored))
            d_pointwise = _dot(tl.trans(v), dz, d_pointwise, PRECISION)
    if d_pointwise_ptr is not None:
        tl.store(
            d_pointwise_ptr + (part * DEPTH + k[:, None]) * FILTERS + n[None, :],
            d_pointwise,
            mask=(k < DEPTH)[:, None] & (n < FILTERS)[None, :],
        )
    if d_depthwise_bias_ptr is not None:
        total = tl.sum(d_depthwise_bias, 0)
        tl.store(d_depthwise_bias_ptr + part * DEPTH + k, total, mask=k < DEPTH)
    if d_bias_ptr is not None:
        first = (n < FILTERS) & (tl.program_id(0) == 0)
        tl.store(d_bias_ptr + part * FILTERS + n, tl.sum(d_bias, 0), mask=first)


@triton.jit
def pointwise_gradient_kernel(
    v_ptr,
    dz_ptr,
    d_pointwise_ptr,
    pixels,
    area,
    DEPTH: tl.constexpr,
    FILTERS: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BLOCK_FILTERS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Partial sums of d_pointwise = v^T dz. `area`: pixels of one image.

    Grid: (blocks of channels x blocks of filters, parts of TILES tiles of pixels).
    """
    blocks: tl.constexpr = (FILTERS + BLOCK_FILTERS - 1) // BLOCK_FILTERS
    k = tl.program_id(0) // blocks * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
    n = tl.program_id(0) % blocks * BLOCK_FILTERS + tl.arange(0, BLOCK_FILTERS)
    part = tl.program_id(1)
    if WIDE:
        part = part.to(tl.int64)
        k, n = k.to(tl.int64), n.to(tl.int64)
    total = tl.zeros([BLOCK_DEPTH, BLOCK_FILTERS], tl.float32)
    for tile in tl.range(0, TILES, num_stages=STAGES):
        pixel = (part * TILES + tile) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        v_met = (pixel < pixels)[None, :] & (k < DEPTH)[:, None]
        z_met = (pixel < pixels)[:, None] & (n < FILTERS)[None, :]
        if LAYOUT == 0:
            v = tl.load(v_ptr + pixel[None, :] * DEPTH + k[:, None], mask=v_met, other=0.0)
            dz = tl.load(dz_ptr + pixel[:, None] * FILTERS + n[None, :], mask=z_met, other=0.0)
        else:
            image, place = pixel // area * area, pixel % area
            v_at = (image * DEPTH + place)[None, :] + k[:, None] * area
            dz_at = (image * FILTERS + place)[:, None] + n[None, :] * area
            v = tl.load(v_ptr + v_at, mask=v_met, other=0.0)
            dz = tl.load(dz_ptr + dz_at, mask=z_met, other=0.0)
        total = _dot(v, dz, total, PRECISION)
    tl.store(
        d_pointwise_ptr + (part * DEPTH + k[:, None]) * FILTERS + n[None, :],
        total,
        mask=(k < DEPTH)[:, None] & (n < FILTERS)[None, :],
    )


@triton.jit
def kernel_gradient_kernel(
    x_ptr,
    du_ptr,
    d_kernel_ptr,
    batch,
    height,
    width,
    out_height,
    out_width,
    pad_top,
    pad_left,
    segments,
    rows,
    CHANNELS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    DILATION_HEIGHT: tl.constexpr,
    DILATION_WIDTH: tl.constexpr,
    ROW_STEP: tl.constexpr,
    PHASES: tl.constexpr,
    LAYOUT: tl.constexpr,
    INPUT_ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Partial sums of d_depthwise_kernel, those of all taps in registers until the end.

    A row of x meets the rows of du that it was part of, which stay in registers: OPEN of them.
    Partial sums have the number of the strip, segment and phase in front; those depend on the shape
    alone, so that results do not depend on the device. Grid: (strips x segments, phases, blocks of
    channels).
    """
    DEPTH: tl.constexpr = CHANNELS * MULTIPLIER
    OPEN: tl.constexpr = (KERNEL_HEIGHT + ROW_STEP - 1) // ROW_STEP - 1
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    image, column, exists, segment = _strip(
        tl.program_id(0), segments, batch, out_width, BLOCK_PIXELS, WIDE
    )
    phase = tl.program_id(1)
    k = tl.program_id(2) * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
    known = (k < DEPTH)[None, :]
    u_plane = _plane(k, out_height, out_width, LAYOUT, WIDE)[None, :]
    zero = tl.zeros([BLOCK_PIXELS, BLOCK_DEPTH], tl.float32)
    sums = (zero,) * TAPS
    before = (zero,) * OPEN
    first = segment * rows
    for t in range(first, first + rows + OPEN):
        out_row = phase + PHASES * t
        there = exists & (t < first + rows) & (out_row < out_height)
        at = _offset(image, out_row, column, out_height, out_width, DEPTH, LAYOUT)[:, None]
        du = tl.load(du_ptr + at + u_plane, mask=there[:, None] & known, other=0.0)
        met_by = before + (_float32(du),)
        rows_of_x = _rows_of_x(
            t,
            x_ptr,
            image,
            column,
            exists,
            k,
            phase,
            height,
            width,
            pad_top,
            pad_left,
            CHANNELS,
            MULTIPLIER,
            KERNEL_HEIGHT,
            KERNEL_WIDTH,
            STRIDE_HEIGHT,
            STRIDE_WIDTH,
            DILATION_HEIGHT,
            DILATION_WIDTH,
            ROW_STEP,
            LAYOUT,
            INPUT_ACTIVATION,
            WIDE,
        )
        for s in tl.static_range(min(ROW_STEP, KERNEL_HEIGHT)):
            for j in tl.static_range(KERNEL_WIDTH):
                a = _activate(_float32(rows_of_x[s * KERNEL_WIDTH + j]), INPUT_ACTIVATION)
                for back in tl.static_range(OPEN + 1):
                    if s + ROW_STEP * back < KERNEL_HEIGHT:
                        sums = _added(
                            sums,
                            (s + ROW_STEP * back) * KERNEL_WIDTH + j,
                            a * met_by[OPEN - back],
                        )
        before = met_by[1:]
    part = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    if WIDE:
        part = part.to(tl.int64)
    for tap in tl.static_range(TAPS):
        at = (part * TAPS + tap) * DEPTH + k
        tl.store(d_kernel_ptr + at, tl.sum(sums[tap], 0), mask=k < DEPTH)


@triton.jit
def input_gradient_kernel(
    du_ptr,
    x_ptr,
    kernel_ptr,
    dx_ptr,
    batch,
    height,
    width,
    out_height,
    out_width,
    pad_top,
    pad_left,
    CHANNELS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    DILATION_HEIGHT: tl.constexpr,
    DILATION_WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr,
    INPUT_ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """The gradient of x with strides or a multiplier: every pixel gathers what its taps went into.

    Grid: (blocks of pixels of x, blocks of channels).
    """
    DEPTH: tl.constexpr = CHANNELS * MULTIPLIER
    tile = tl.program_id(0)
    if WIDE:
        tile = tile.to(tl.int64)
    pixel = tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    column = pixel % width
    row = pixel // width % height
    image = pixel // width // height
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    known = (c < CHANNELS)[None, :]
    dx = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    for m in tl.static_range(MULTIPLIER):
        k = c * MULTIPLIER + m
        plane = _plane(k, out_height, out_width, LAYOUT, WIDE)[None, :]
        for i in tl.static_range(KERNEL_HEIGHT):
            down = row + pad_top - i * DILATION_HEIGHT
            there = (image < batch) & (down >= 0) & (down % STRIDE_HEIGHT == 0)
            down = down // STRIDE_HEIGHT
            for j in tl.static_range(KERNEL_WIDTH):
                right = column + pad_left - j * DILATION_WIDTH
                met = there & (right >= 0) & (right % STRIDE_WIDTH == 0)
                right = right // STRIDE_WIDTH
                met = met & (down < out_height) & (right < out_width)
                at = _offset(image, down, right, out_height, out_width, DEPTH, LAYOUT)
                du = tl.load(du_ptr + at[:, None] + plane, mask=met[:, None] & known, other=0.0)
                w = _tap(kernel_ptr, i * KERNEL_WIDTH + j, k, DEPTH)
                dx += _float32(du) * w
    at = _offset(image, row, column, height, width, CHANNELS, LAYOUT)[:, None]
    at += _plane(c, height, width, LAYOUT, WIDE)[None, :]
    met = (image < batch)[:, None] & known
    if INPUT_ACTIVATION != "linear":
        x = tl.load(x_ptr + at, mask=met, other=0.0)
        dx = dx * _slope(_float32(x), INPUT_ACTIVATION)
    tl.store(dx_ptr + at, _round(dx, dx_ptr.dtype.element_ty), mask=met)
