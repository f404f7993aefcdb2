"""The GPU kernels, forward and backward.

Images are in the layout of the call; "pixels" of an image are all (image, row, column) in that
order. Geometry that decides code (channels, kernel, strides) is known to the compiler, sizes of
images and the batch are not. Sums run in float32. What goes from one stage to the next (v forward,
dz and du backward) is rounded to the dtype of the tensors, as in a network of separate layers.

Names are those of `sepconv.reference`: x input, u depthwise output, v the same after bias and
activation, z pointwise output, y output; k numbers depthwise channels, n filters.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "activate_kernel",
    "depthwise_gradients_kernel",
    "depthwise_kernel",
    "forward_kernel",
    "narrow_gradients_kernel",
    "pointwise_gradient_kernel",
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
def _pixels(
    tile, batch, height, width, BLOCK: tl.constexpr, TILE_WIDTH: tl.constexpr, WIDE: tl.constexpr
):
    """Image, row and column of the pixels of a tile, and which of them exist.

    A tile is BLOCK pixels one after the other, or a rectangle of TILE_WIDTH columns; its rows may
    go on in the next image. WIDE asks for numbers of 64 bits.
    """
    if WIDE:
        tile = tile.to(tl.int64)
    i = tl.arange(0, BLOCK)
    if TILE_WIDTH == 0:
        pixel = tile * BLOCK + i
        column = pixel % width
        row = pixel // width
    else:
        tiles = tl.cdiv(width, TILE_WIDTH)
        column = tile % tiles * TILE_WIDTH + i % TILE_WIDTH
        row = tile // tiles * (BLOCK // TILE_WIDTH) + i // TILE_WIDTH
    return row // height, row % height, column, (row < batch * height) & (column < width)


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
def _depthwise(
    x_ptr,
    kernel_ptr,
    depthwise_bias_ptr,
    image,
    out_row,
    out_column,
    valid,
    k,
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
    LAYOUT: tl.constexpr,
    INPUT_ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """U of some pixels and depthwise channels k, float32."""
    DEPTH: tl.constexpr = CHANNELS * MULTIPLIER
    PIXEL: tl.constexpr = CHANNELS if LAYOUT == 0 else 1
    top = out_row * STRIDE_HEIGHT - pad_top
    left = out_column * STRIDE_WIDTH - pad_left
    corner = _offset(image, top, left, height, width, CHANNELS, LAYOUT)
    plane = _plane(k // MULTIPLIER, height, width, LAYOUT, WIDE)
    u = tl.zeros([out_row.shape[0], k.shape[0]], tl.float32)
    if depthwise_bias_ptr is not None:
        u += tl.load(depthwise_bias_ptr + k, mask=k < DEPTH, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(KERNEL_HEIGHT * KERNEL_WIDTH):
        down = tap // KERNEL_WIDTH * DILATION_HEIGHT
        right = tap % KERNEL_WIDTH * DILATION_WIDTH
        row, column = top + down, left + right
        inside = valid & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        met = inside[:, None] & (k < DEPTH)[None, :]
        at = (corner + (down * width + right) * PIXEL)[:, None] + plane[None, :]
        a = _activate(_float32(tl.load(x_ptr + at, mask=met, other=0.0)), INPUT_ACTIVATION)
        if (INPUT_ACTIVATION == "sigmoid") | (INPUT_ACTIVATION == "hard_sigmoid"):
            a = tl.where(met, a, 0.0)  # Zeros are padded after the activation.
        # In two dimensions, so that it lies across threads as x does.
        w = tl.load(kernel_ptr + (tap * DEPTH + k)[None, :], mask=(k < DEPTH)[None, :], other=0.0)
        u += a * _float32(w)
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
    CHANNELS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    FILTERS: tl.constexpr,
    POINTWISE_ROW: tl.constexpr,
    POINTWISE_COLUMN: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    DILATION_HEIGHT: tl.constexpr,
    DILATION_WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr,
    INPUT_ACTIVATION: tl.constexpr,
    DEPTHWISE_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    BLOCK_FILTERS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Y of BLOCK_PIXELS pixels and BLOCK_FILTERS filters.

    Without a kernel (`kernel_ptr` None) x is v, and only the pointwise stage is computed.
    Grid: tiles of pixels x blocks of filters; programs of the same pixels are neighbours.
    """
    DEPTH: tl.constexpr = CHANNELS * MULTIPLIER
    blocks: tl.constexpr = (FILTERS + BLOCK_FILTERS - 1) // BLOCK_FILTERS
    program = tl.program_id(0)
    image, row, column, valid = _pixels(
        program // blocks, batch, out_height, out_width, BLOCK_PIXELS, TILE_WIDTH, WIDE
    )
    n = program % blocks * BLOCK_FILTERS + tl.arange(0, BLOCK_FILTERS)
    z = tl.zeros([BLOCK_PIXELS, BLOCK_FILTERS], tl.float32)
    for first in tl.range(0, DEPTH, BLOCK_DEPTH, num_stages=STAGES):
        k = first + tl.arange(0, BLOCK_DEPTH)
        if kernel_ptr is not None:
            u = _depthwise(
                x_ptr,
                kernel_ptr,
                depthwise_bias_ptr,
                image,
                row,
                column,
                valid,
                k,
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
                LAYOUT,
                INPUT_ACTIVATION,
                WIDE,
            )
            v = _settled(_round(_activate(u, DEPTHWISE_ACTIVATION), x_ptr.dtype.element_ty))
        else:
            pixel = _offset(image, row, column, out_height, out_width, DEPTH, LAYOUT)
            plane = _plane(k, out_height, out_width, LAYOUT, WIDE)
            v = tl.load(
                x_ptr + pixel[:, None] + plane[None, :],
                mask=valid[:, None] & (k < DEPTH)[None, :],
                other=0.0,
            )
        p = tl.load(
            pointwise_ptr + k[:, None] * POINTWISE_ROW + n[None, :] * POINTWISE_COLUMN,
            mask=(k < DEPTH)[:, None] & (n < FILTERS)[None, :],
            other=0.0,
        )
        z = _dot(v, p, z, PRECISION)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + n, mask=n < FILTERS, other=0.0).to(tl.float32)[None, :]
    y = _round(_activate(z, ACTIVATION), y_ptr.dtype.element_ty)
    pixel = _offset(image, row, column, out_height, out_width, FILTERS, LAYOUT)
    plane = _plane(n, out_height, out_width, LAYOUT, WIDE)
    tl.store(
        y_ptr + pixel[:, None] + plane[None, :], y, mask=valid[:, None] & (n < FILTERS)[None, :]
    )


@triton.jit
def depthwise_kernel(
    x_ptr,
    kernel_ptr,
    depthwise_bias_ptr,
    v_ptr,
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
    DEPTHWISE_ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """V of BLOCK_PIXELS pixels and BLOCK_DEPTH channels. Grid: tiles of pixels x channels."""
    DEPTH: tl.constexpr = CHANNELS * MULTIPLIER
    blocks: tl.constexpr = (DEPTH + BLOCK_DEPTH - 1) // BLOCK_DEPTH
    program = tl.program_id(0)
    image, row, column, valid = _pixels(
        program // blocks, batch, out_height, out_width, BLOCK_PIXELS, TILE_WIDTH, WIDE
    )
    k = program % blocks * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
    u = _depthwise(
        x_ptr,
        kernel_ptr,
        depthwise_bias_ptr,
        image,
        row,
        column,
        valid,
        k,
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
        LAYOUT,
        INPUT_ACTIVATION,
        WIDE,
    )
    v = _round(_activate(u, DEPTHWISE_ACTIVATION), v_ptr.dtype.element_ty)
    pixel = _offset(image, row, column, out_height, out_width, DEPTH, LAYOUT)
    plane = _plane(k, out_height, out_width, LAYOUT, WIDE)
    tl.store(v_ptr + pixel[:, None] + plane[None, :], v, mask=valid[:, None] & (k < DEPTH)[None, :])


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
    x_ptr,
    kernel_ptr,
    pointwise_ptr,
    depthwise_bias_ptr,
    du_ptr,
    d_pointwise_ptr,
    d_depthwise_bias_ptr,
    d_bias_ptr,
    batch,
    height,
    width,
    out_height,
    out_width,
    pad_top,
    pad_left,
    tiles,
    CHANNELS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    FILTERS: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    DILATION_HEIGHT: tl.constexpr,
    DILATION_WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr,
    INPUT_ACTIVATION: tl.constexpr,
    DEPTHWISE_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    BLOCK_FILTERS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    SLAB_TILES: tl.constexpr,
):
    """du, and partial sums of the gradients of pointwise kernel and biases, all filters at once.

    One program: BLOCK_DEPTH channels k, SLAB_TILES tiles of pixels one after the other. u is
    computed again and never stored. What is not asked for is None. Partial sums have the number of
    the slab in front; slabs depend on the shape alone, so that results do not depend on the device.
    """
    DEPTH: tl.constexpr = CHANNELS * MULTIPLIER
    blocks: tl.constexpr = (DEPTH + BLOCK_DEPTH - 1) // BLOCK_DEPTH
    program = tl.program_id(0)
    block, slab = program % blocks, program // blocks
    k = block * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
    n = tl.arange(0, BLOCK_FILTERS)
    stored = dy_ptr.dtype.element_ty
    if du_ptr is not None:
        p_t = tl.load(
            pointwise_ptr + k[None, :] * FILTERS + n[:, None],
            mask=(k < DEPTH)[None, :] & (n < FILTERS)[:, None],
            other=0.0,
        )
    d_pointwise = tl.zeros([BLOCK_DEPTH, BLOCK_FILTERS], tl.float32)
    d_depthwise_bias = tl.zeros([BLOCK_DEPTH], tl.float32)
    d_bias = tl.zeros([BLOCK_FILTERS], tl.float32)
    for tile in range(slab * SLAB_TILES, tl.minimum((slab + 1) * SLAB_TILES, tiles)):
        image, row, column, valid = _pixels(
            tile, batch, out_height, out_width, BLOCK_PIXELS, TILE_WIDTH, WIDE
        )
        pixel = _offset(image, row, column, out_height, out_width, FILTERS, LAYOUT)
        y_at = pixel[:, None] + _plane(n, out_height, out_width, LAYOUT, WIDE)[None, :]
        y_met = valid[:, None] & (n < FILTERS)[None, :]
        dz = tl.load(dy_ptr + y_at, mask=y_met, other=0.0)
        if ACTIVATION != "linear":
            reference = tl.load(reference_ptr + y_at, mask=y_met, other=0.0).to(tl.float32)
            dz = _times_slope(dz.to(tl.float32), reference, ACTIVATION, FROM_OUTPUT)
            dz = _settled(_round(dz, stored))
        if d_bias_ptr is not None:
            d_bias += tl.sum(dz.to(tl.float32), 0)
        if (d_pointwise_ptr is not None) | (DEPTHWISE_ACTIVATION != "linear"):
            u = _depthwise(
                x_ptr,
                kernel_ptr,
                depthwise_bias_ptr,
                image,
                row,
                column,
                valid,
                k,
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
                LAYOUT,
                INPUT_ACTIVATION,
                WIDE,
            )
        if du_ptr is not None:
            du = tl.zeros([BLOCK_PIXELS, BLOCK_DEPTH], tl.float32)
            du = _dot(dz, p_t, du, PRECISION)
            if DEPTHWISE_ACTIVATION != "linear":
                du = du * _slope(u, DEPTHWISE_ACTIVATION)
            pixel = _offset(image, row, column, out_height, out_width, DEPTH, LAYOUT)
            plane = _plane(k, out_height, out_width, LAYOUT, WIDE)
            u_met = valid[:, None] & (k < DEPTH)[None, :]
            du = _round(du, stored)
            tl.store(du_ptr + pixel[:, None] + plane[None, :], du, mask=u_met)
            if d_depthwise_bias_ptr is not None:
                d_depthwise_bias += tl.sum(du.to(tl.float32), 0)
        if d_pointwise_ptr is not None:
            # Pixels that do not exist have dz = 0.
            v = _settled(_round(_activate(u, DEPTHWISE_ACTIVATION), stored))
            d_pointwise = _dot(tl.trans(v), dz, d_pointwise, PRECISION)
    if WIDE:
        slab = slab.to(tl.int64)
    if d_pointwise_ptr is not None:
        tl.store(
            d_pointwise_ptr + (slab * DEPTH + k[:, None]) * FILTERS + n[None, :],
            d_pointwise,
            mask=(k < DEPTH)[:, None] & (n < FILTERS)[None, :],
        )
    if d_depthwise_bias_ptr is not None:
        tl.store(d_depthwise_bias_ptr + slab * DEPTH + k, d_depthwise_bias, mask=k < DEPTH)
    if d_bias_ptr is not None:
        tl.store(d_bias_ptr + slab * FILTERS + n, d_bias, mask=(n < FILTERS) & (block == 0))


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
    SLAB_TILES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Partial sums of d_pointwise = v^T dz. `area`: pixels of one image.

    Grid: (blocks of channels x blocks of filters, slabs of SLAB_TILES tiles of pixels).
    """
    blocks: tl.constexpr = (FILTERS + BLOCK_FILTERS - 1) // BLOCK_FILTERS
    k = tl.program_id(0) // blocks * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
    n = tl.program_id(0) % blocks * BLOCK_FILTERS + tl.arange(0, BLOCK_FILTERS)
    slab = tl.program_id(1)
    if WIDE:
        slab = slab.to(tl.int64)
        k, n = k.to(tl.int64), n.to(tl.int64)
    total = tl.zeros([BLOCK_DEPTH, BLOCK_FILTERS], tl.float32)
    for tile in tl.range(0, SLAB_TILES, num_stages=STAGES):
        pixel = (slab * SLAB_TILES + tile) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
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
        d_pointwise_ptr + (slab * DEPTH + k[:, None]) * FILTERS + n[None, :],
        total,
        mask=(k < DEPTH)[:, None] & (n < FILTERS)[None, :],
    )


@triton.jit
def _replaced(values, INDEX: tl.constexpr, value):
    return values[:INDEX] + (value,) + values[INDEX + 1 :]


@triton.jit
def _du_at(
    du_ptr,
    image,
    row,
    column,
    valid,
    k,
    tap_row,
    tap_column,
    out_height,
    out_width,
    pad_top,
    pad_left,
    DEPTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    DILATION_HEIGHT: tl.constexpr,
    DILATION_WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Du where a tap meets the pixels of x: 0 where it meets none."""
    down = row + pad_top - tap_row * DILATION_HEIGHT
    right = column + pad_left - tap_column * DILATION_WIDTH
    met = valid & (down >= 0) & (right >= 0)
    if STRIDE_HEIGHT > 1:
        met = met & (down % STRIDE_HEIGHT == 0)
        down = down // STRIDE_HEIGHT
    if STRIDE_WIDTH > 1:
        met = met & (right % STRIDE_WIDTH == 0)
        right = right // STRIDE_WIDTH
    met = met & (down < out_height) & (right < out_width)
    pixel = _offset(image, down, right, out_height, out_width, DEPTH, LAYOUT)
    plane = _plane(k, out_height, out_width, LAYOUT, WIDE)
    at = du_ptr + pixel[:, None] + plane[None, :]
    return _float32(tl.load(at, mask=met[:, None] & (k < DEPTH)[None, :], other=0.0))


@triton.jit
def depthwise_gradients_kernel(
    du_ptr,
    x_ptr,
    kernel_ptr,
    dx_ptr,
    d_kernel_ptr,
    batch,
    height,
    width,
    out_height,
    out_width,
    pad_top,
    pad_left,
    tiles,
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
    TAPS: tl.constexpr,
    SLAB_TILES: tl.constexpr,
):
    """dx, and partial sums of d_depthwise_kernel, from du; either may be None.

    Every pixel of x meets every tap once: dx gathers, and no sum crosses threads before the end.
    Grid: (blocks of channels, slabs of SLAB_TILES tiles of pixels of x, groups of TAPS taps).
    Channels are those of x for dx, and depthwise ones for the kernel alone; with both, they must
    be the same (MULTIPLIER 1) and TAPS all taps.
    """
    DEPTH: tl.constexpr = CHANNELS * MULTIPLIER
    ALL_TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    slab = tl.program_id(1)
    first_tap = tl.program_id(2) * TAPS
    c = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    if dx_ptr is not None:
        x_channel, there = c, c < CHANNELS
    else:
        x_channel, there = c // MULTIPLIER, c < DEPTH
    x_plane = _plane(x_channel, height, width, LAYOUT, WIDE)
    zeros = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    sums = (zeros,) * (TAPS if d_kernel_ptr is not None else 1)
    for tile in range(slab * SLAB_TILES, tl.minimum((slab + 1) * SLAB_TILES, tiles)):
        image, row, column, valid = _pixels(tile, batch, height, width, BLOCK_PIXELS, 0, WIDE)
        x_at = _offset(image, row, column, height, width, CHANNELS, LAYOUT)[:, None]
        x_at += x_plane[None, :]
        met = valid[:, None] & there[None, :]
        if (d_kernel_ptr is not None) | (INPUT_ACTIVATION != "linear"):
            x = _float32(tl.load(x_ptr + x_at, mask=met, other=0.0))
            a = _activate(x, INPUT_ACTIVATION)
        if dx_ptr is not None:
            dx = zeros
            for m in tl.static_range(MULTIPLIER):
                k = c * MULTIPLIER + m
                for tap in tl.static_range(TAPS):
                    w = tl.load(
                        kernel_ptr + (tap * DEPTH + k)[None, :], mask=there[None, :], other=0.0
                    )
                    du = _du_at(
                        du_ptr,
                        image,
                        row,
                        column,
                        valid,
                        k,
                        tap // KERNEL_WIDTH,
                        tap % KERNEL_WIDTH,
                        out_height,
                        out_width,
                        pad_top,
                        pad_left,
                        DEPTH,
                        STRIDE_HEIGHT,
                        STRIDE_WIDTH,
                        DILATION_HEIGHT,
                        DILATION_WIDTH,
                        LAYOUT,
                        WIDE,
                    )
                    dx += du * _float32(w)
                    if d_kernel_ptr is not None:
                        sums = _replaced(sums, tap, sums[tap] + a * du)
            if INPUT_ACTIVATION != "linear":
                dx = dx * _slope(x, INPUT_ACTIVATION)
            tl.store(dx_ptr + x_at, _round(dx, dx_ptr.dtype.element_ty), mask=met)
        else:
            for i in tl.static_range(TAPS):
                tap = first_tap + i
                du = _du_at(
                    du_ptr,
                    image,
                    row,
                    column,
                    valid & (tap < ALL_TAPS),
                    c,
                    tap // KERNEL_WIDTH,
                    tap % KERNEL_WIDTH,
                    out_height,
                    out_width,
                    pad_top,
                    pad_left,
                    DEPTH,
                    STRIDE_HEIGHT,
                    STRIDE_WIDTH,
                    DILATION_HEIGHT,
                    DILATION_WIDTH,
                    LAYOUT,
                    WIDE,
                )
                sums = _replaced(sums, i, sums[i] + a * du)
    if d_kernel_ptr is not None:
        for i in tl.static_range(TAPS):
            tap = first_tap + i
            tl.store(
                d_kernel_ptr + (slab * ALL_TAPS + tap) * DEPTH + c,
                tl.sum(sums[i], 0),
                mask=there & (tap < ALL_TAPS),
            )
