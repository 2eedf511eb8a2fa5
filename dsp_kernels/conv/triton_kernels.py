"""The convolution's Triton kernels. :mod:`dsp_kernels.conv.tiles` describes the tables that they read, and
:mod:`dsp_kernels.conv.triton` launches them. The only module of the family that imports Triton.

Sizes are not specialised on, so a new image size compiles nothing; what alignment is known travels as
compile-time constants, and is told to the compiler where a value is made, because hints on arguments are
lost. ``do_not_specialize`` still lets pointers be specialised on 16-byte alignment.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsp_kernels.backends import interpreted

__all__ = [
    "conv_kernel",
    "conv_reduce_kernel",
    "grad_weight_kernel",
    "grad_weight_reduce_kernel",
    "masked",
    "prepare_weight_kernel",
]

# Words of an item, dsp_kernels.conv.tiles.ITEM.
ITEM = tl.constexpr(12)
# Triton's interpreter has no assembly.
COMPILED = tl.constexpr(not interpreted())


@triton.jit
def _pixels(m, item, batch, out_h, out_w, out_step_h, out_step_w, in_step_h, in_step_w):
    """Of positions ``m`` of an item's phase: image, output row and column, input row and column, inside."""
    first_h = tl.load(item + 5)
    first_w = tl.load(item + 6)
    rows = (out_h - first_h + out_step_h - 1) // out_step_h
    columns = (out_w - first_w + out_step_w - 1) // out_step_w
    inside = m < batch * rows * columns
    # An empty phase has no position inside; the division must still be defined.
    columns = tl.maximum(columns, 1)
    rows = tl.maximum(rows, 1)
    line = m // columns
    x = (m - line * columns).to(tl.int32)
    n = line // rows
    y = (line - n * rows).to(tl.int32)
    return (
        n.to(tl.int64),
        first_h + y * out_step_h,
        first_w + x * out_step_w,
        tl.load(item + 7) + y * in_step_h,
        tl.load(item + 8) + x * in_step_w,
        inside,
    )


@triton.jit
def masked(a, bits):
    """``a`` where ``bits`` (int16) are all ones, 0 where they are none."""
    if a.dtype == tl.float32:
        out = a.to(tl.int32, bitcast=True) & bits.to(tl.int32)
    elif COMPILED:
        # Two to a register: the compiler would take pairs apart, mask each and put them together again.
        whole, bits = tl.broadcast(a.to(tl.int16, bitcast=True), bits)
        out = tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,r", [whole, bits], dtype=tl.int16, is_pure=True, pack=2
        )
    else:
        out = a.to(tl.int16, bitcast=True) & bits
    return out.to(a.dtype, bitcast=True)


@triton.jit
def _accumulate(
    acc,
    x,
    row,
    in_y,
    in_x,
    inside,
    weight,
    entries,
    read,
    first,
    last,
    channels,
    in_h,
    in_w,
    x_h,
    x_w,
    HOLES: tl.constexpr,
    POINTWISE: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``acc`` plus the products of steps ``first`` to ``last``; ``weight`` is the tile of step 0.

    A step's entries are loaded one step ahead and carried: loaded where they are used, each level of
    indirection halves the copy pipeline. The tables have a step more than there are.
    """
    k = tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    first = tl.minimum(first, last)
    tile = weight + first.to(tl.int64) * (BLOCK_K * BLOCK_N)
    # Eight neighbours read the same entry. With the hints the loads below are vectors of ALIGN channels.
    entry = entries + (first * (BLOCK_K // 8) + k // 8) * 2
    start = tl.load(entry)
    tap = 0 if POINTWISE else tl.load(entry + 1)
    for step in tl.range(first, last):
        live = tl.max_constancy(start >= 0, 8)
        if POINTWISE:
            offset = tl.max_contiguous(tl.multiple_of(start + k % 8, ALIGN), ALIGN)
            mask = inside[:, None] & live[None, :]
        else:
            dy = tl.max_constancy(tap >> 16, 8)
            dx = tl.max_constancy((tap << 16) >> 16, 8)
            offset = tl.max_contiguous(tl.multiple_of(dy * x_h + dx * x_w + start + k % 8, ALIGN), ALIGN)
            py = in_y[:, None] + dy[None, :]
            px = in_x[:, None] + dx[None, :]
            mask = inside[:, None] & live[None, :] & (py >= 0) & (py < in_h) & (px >= 0) & (px < in_w)
        if TAIL:
            mask = mask & (start + k % 8 < channels)[None, :]
        a = tl.load(x + (row[:, None] + offset[None, :]), mask=mask, other=0.0)
        entry += BLOCK_K // 4
        start = tl.load(entry)
        if not POINTWISE:
            tap = tl.load(entry + 1)
        if HOLES:
            # In registers: as a mask of the load it would cut the load into single channels.
            bits = tl.load(read + step * BLOCK_K + k)
            a = masked(a, bits[None, :])
        b = tl.load(tile + k[:, None] * BLOCK_N + n[None, :])
        tile += BLOCK_K * BLOCK_N
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _place(f, image, out_y, out_x, s_n, s_h, s_w, s_c, ALIGN: tl.constexpr):
    """Offsets of an item's outputs in a tensor of these strides. An alignment of 0: channels are strided."""
    pixel = image * s_n + out_y.to(tl.int64) * s_h + out_x.to(tl.int64) * s_w
    if ALIGN > 0:
        return tl.multiple_of(pixel, ALIGN)[:, None] + f[None, :]
    return pixel[:, None] + (f.to(tl.int64) * s_c)[None, :]


@triton.jit
def _begin(
    f,
    image,
    out_y,
    out_x,
    inside,
    bias,
    residual,
    r_n,
    r_h,
    r_w,
    r_c,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    RESIDUAL_ALIGN: tl.constexpr,
):
    """What products are added to: bias and residual. Added at the end they would need registers beside the
    sums, for which there is no room where a thread holds 128 of them.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    column = tl.max_constancy(f >= 0, OUT_ALIGN if OUT_ALIGN > 0 else 1)
    if HAS_RESIDUAL:
        place = _place(f, image, out_y, out_x, r_n, r_h, r_w, r_c, RESIDUAL_ALIGN)
        mask = inside[:, None] & column[None, :]
        acc = tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + f, mask=column, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _finish(
    acc,
    f,
    image,
    out_y,
    out_x,
    inside,
    out,
    y_n,
    y_h,
    y_w,
    y_c,
    ACTIVATION: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Applies the activation and stores."""
    column = tl.max_constancy(f >= 0, OUT_ALIGN if OUT_ALIGN > 0 else 1)
    # Comparisons let NaN through.
    if ACTIVATION >= 1:
        acc = tl.where(acc < 0.0, 0.0, acc)
    if ACTIVATION == 2:
        acc = tl.where(acc > 6.0, 6.0, acc)
    if ROUND:
        # The interpreter cuts float32 to bfloat16 instead of rounding it.
        bits = acc.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        acc = tl.where(acc == acc, rounded.to(tl.float32, bitcast=True), acc)
    place = _place(f, image, out_y, out_x, y_n, y_h, y_w, y_c, OUT_ALIGN)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside[:, None] & column[None, :])


_SIZES = [
    "n_items",
    "m_tiles",
    "batch",
    "in_h",
    "in_w",
    "channels",
    "x_n",
    "x_h",
    "x_w",
    "out_h",
    "out_w",
    "y_n",
    "y_h",
    "y_w",
    "y_c",
    "r_n",
    "r_h",
    "r_w",
    "r_c",
    "out_step_h",
    "out_step_w",
    "in_step_h",
    "in_step_w",
]


@triton.jit(do_not_specialize=_SIZES)
def conv_kernel(
    x,
    weight,
    bias,
    residual,
    out,
    sums,
    items,
    entries,
    read,
    outputs,
    n_items,
    m_tiles,
    batch,
    in_h,
    in_w,
    channels,
    x_n,
    x_h,
    x_w,
    out_h,
    out_w,
    y_n,
    y_h,
    y_w,
    y_c,
    r_n,
    r_h,
    r_w,
    r_c,
    out_step_h,
    out_step_w,
    in_step_h,
    in_step_w,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    ALIGN: tl.constexpr,
    TAIL: tl.constexpr,
    POINTWISE: tl.constexpr,
    PARTIAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    RESIDUAL_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Forward, and gradient for the input: one program an item, a tile of pixels and a share of the steps.

    Strides in elements; x's channels are neighbours. With ``SPLIT`` above 1 the share's sums go to ``sums``,
    float32 (SPLIT, m_tiles, n_items, BLOCK_M, BLOCK_N), for :func:`conv_reduce_kernel`.
    """
    pid = tl.program_id(0)
    # Items vary fastest: those of one tile of pixels share what they read in the second-level cache.
    item_at = pid % n_items
    tile = pid // n_items
    m_tile = tile % m_tiles
    share = tile // m_tiles
    item = items + item_at * ITEM
    if WIDE:
        m = m_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        batch = batch.to(tl.int64)
    else:
        m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    image, out_y, out_x, in_y, in_x, inside = _pixels(
        m, item, batch, out_h, out_w, out_step_h, out_step_w, in_step_h, in_step_w
    )
    first = tl.load(item)
    full = tl.load(item + 1)
    count = full + tl.load(item + 2)
    low = 0
    high = count
    if SPLIT > 1:
        part = (count + SPLIT - 1) // SPLIT
        low = share * part
        high = tl.minimum(low + part, count)
    row = image * x_n + in_y.to(tl.int64) * x_h + in_x.to(tl.int64) * x_w
    row = tl.multiple_of(row, ALIGN)
    tiles = weight + (tl.load(item + 3) - first).to(tl.int64) * (BLOCK_K * BLOCK_N)
    n = tl.arange(0, BLOCK_N)
    f = tl.load(outputs + tl.load(item + 4) * BLOCK_N + n)
    if OUT_ALIGN > 1:
        f = tl.max_contiguous(tl.multiple_of(f, OUT_ALIGN), OUT_ALIGN)
    if SPLIT > 1:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    else:
        acc = _begin(
            f,
            image,
            out_y,
            out_x,
            inside,
            bias,
            residual,
            r_n,
            r_h,
            r_w,
            r_c,
            BLOCK_M,
            BLOCK_N,
            HAS_BIAS,
            HAS_RESIDUAL,
            OUT_ALIGN,
            RESIDUAL_ALIGN,
        )
    acc = _accumulate(
        acc,
        x,
        row,
        in_y,
        in_x,
        inside,
        tiles,
        entries,
        read,
        first + low,
        first + tl.minimum(high, full),
        channels,
        in_h,
        in_w,
        x_h,
        x_w,
        False,
        POINTWISE,
        TAIL,
        ALIGN,
        BLOCK_N,
        BLOCK_K,
        PRECISION,
        UPCAST,
    )
    if PARTIAL:
        acc = _accumulate(
            acc,
            x,
            row,
            in_y,
            in_x,
            inside,
            tiles,
            entries,
            read,
            first + tl.maximum(low, full),
            first + high,
            channels,
            in_h,
            in_w,
            x_h,
            x_w,
            True,
            POINTWISE,
            TAIL,
            ALIGN,
            BLOCK_N,
            BLOCK_K,
            PRECISION,
            UPCAST,
        )
    if SPLIT > 1:
        k = tl.arange(0, BLOCK_M)
        to = sums + pid.to(tl.int64) * (BLOCK_M * BLOCK_N)
        tl.store(to + k[:, None] * BLOCK_N + n[None, :], acc)
    else:
        _finish(acc, f, image, out_y, out_x, inside, out, y_n, y_h, y_w, y_c, ACTIVATION, OUT_ALIGN, UPCAST)


_REDUCE_SIZES = [
    name
    for name in _SIZES
    if name not in ("in_h", "in_w", "channels", "x_n", "x_h", "x_w", "in_step_h", "in_step_w")
]


@triton.jit(do_not_specialize=_REDUCE_SIZES)
def conv_reduce_kernel(
    sums,
    bias,
    residual,
    out,
    items,
    outputs,
    n_items,
    m_tiles,
    batch,
    out_h,
    out_w,
    y_n,
    y_h,
    y_w,
    y_c,
    r_n,
    r_h,
    r_w,
    r_c,
    out_step_h,
    out_step_w,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    RESIDUAL_ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Adds the shares of :func:`conv_kernel` in their order and finishes; one program an item and tile."""
    pid = tl.program_id(0)
    item = items + pid % n_items * ITEM
    m_tile = pid // n_items
    if WIDE:
        m = m_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        batch = batch.to(tl.int64)
    else:
        m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    image, out_y, out_x, _, _, inside = _pixels(m, item, batch, out_h, out_w, out_step_h, out_step_w, 1, 1)
    k = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    tile = sums + pid.to(tl.int64) * (BLOCK_M * BLOCK_N)
    f = tl.load(outputs + tl.load(item + 4) * BLOCK_N + n)
    if OUT_ALIGN > 1:
        f = tl.max_contiguous(tl.multiple_of(f, OUT_ALIGN), OUT_ALIGN)
    acc = _begin(
        f,
        image,
        out_y,
        out_x,
        inside,
        bias,
        residual,
        r_n,
        r_h,
        r_w,
        r_c,
        BLOCK_M,
        BLOCK_N,
        HAS_BIAS,
        HAS_RESIDUAL,
        OUT_ALIGN,
        RESIDUAL_ALIGN,
    )
    size = n_items.to(tl.int64) * m_tiles * (BLOCK_M * BLOCK_N)
    for _ in range(SPLIT):
        acc += tl.load(tile + k[:, None] * BLOCK_N + n[None, :])
        tile += size
    _finish(acc, f, image, out_y, out_x, inside, out, y_n, y_h, y_w, y_c, ACTIVATION, OUT_ALIGN, UPCAST)


@triton.jit(do_not_specialize=["size"])
def prepare_weight_kernel(packed, index, tiles, size, BLOCK: tl.constexpr):
    """The weight tiles: ``tiles[i] = packed[index[i]]``, 0 where the index is negative."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    at = tl.load(index + i, mask=mask, other=-1)
    value = tl.load(packed + at, mask=mask & (at >= 0), other=0.0)
    tl.store(tiles + i, value, mask=mask)


@triton.jit(
    do_not_specialize=[
        "n_items",
        "blocks",
        "batch",
        "in_h",
        "in_w",
        "channels",
        "x_n",
        "x_h",
        "x_w",
        "out_h",
        "out_w",
        "filters",
        "g_n",
        "g_h",
        "g_w",
        "stride_h",
        "stride_w",
        "padding_h",
        "padding_w",
    ]
)
def grad_weight_kernel(
    x,
    grad,
    sums,
    items,
    entries,
    filter_chunks,
    n_items,
    blocks,
    batch,
    in_h,
    in_w,
    channels,
    x_n,
    x_h,
    x_w,
    out_h,
    out_w,
    filters,
    g_n,
    g_h,
    g_w,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
    TAIL: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    GRAD_TAIL: tl.constexpr,
    POINTWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Of one item and one slice of ``blocks`` blocks of pixels: the products of x and the output's gradient.

    ``sums``: float32 (slices, n_items, BLOCK_K, BLOCK_N).
    """
    pid = tl.program_id(0)
    item = items + pid % n_items * 2
    slice_at = pid // n_items
    k = tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    entry = entries + (tl.load(item) * (BLOCK_K // 8) + k // 8) * 2
    start = tl.load(entry)
    tap = tl.load(entry + 1)
    live = tl.max_constancy(start >= 0, 8)
    dy = tl.max_constancy(tap >> 16, 8)
    dx = tl.max_constancy((tap << 16) >> 16, 8)
    offset = tl.max_contiguous(tl.multiple_of(dy * x_h + dx * x_w + start + k % 8, ALIGN), ALIGN)
    if TAIL:
        live = live & (start + k % 8 < channels)
    chunk = tl.load(filter_chunks + tl.load(item + 1) * (BLOCK_N // 8) + n // 8)
    column = tl.max_constancy(chunk >= 0, 8)
    f = tl.max_contiguous(tl.multiple_of(chunk + n % 8, GRAD_ALIGN), GRAD_ALIGN)
    if GRAD_TAIL:
        column = column & (f < filters)
    total = batch * out_h * out_w
    if WIDE:
        total = batch.to(tl.int64) * out_h * out_w
    acc = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    if WIDE:
        m = slice_at.to(tl.int64) * blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    else:
        m = slice_at * blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    for _ in tl.range(0, blocks):
        inside = m < total
        line = m // out_w
        out_x = (m - line * out_w).to(tl.int32)
        image = line // out_h
        out_y = (line - image * out_h).to(tl.int32)
        image = image.to(tl.int64)
        in_y = out_y * stride_h - padding_h
        in_x = out_x * stride_w - padding_w
        row = image * x_n + in_y.to(tl.int64) * x_h + in_x.to(tl.int64) * x_w
        row = tl.multiple_of(row, ALIGN)
        mask = inside[:, None] & live[None, :]
        if not POINTWISE:
            py = in_y[:, None] + dy[None, :]
            px = in_x[:, None] + dx[None, :]
            mask = mask & (py >= 0) & (py < in_h) & (px >= 0) & (px < in_w)
        a = tl.load(x + (row[:, None] + offset[None, :]), mask=mask, other=0.0)
        pixel = image * g_n + out_y.to(tl.int64) * g_h + out_x.to(tl.int64) * g_w
        pixel = tl.multiple_of(pixel, GRAD_ALIGN)
        place = grad + (pixel[:, None] + f[None, :])
        g = tl.load(place, mask=inside[:, None] & column[None, :], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            g = g.to(tl.float32)
        acc = tl.dot(tl.trans(a), g, acc, input_precision=PRECISION)
        m += BLOCK_M
    to = sums + pid.to(tl.int64) * (BLOCK_K * BLOCK_N)
    tl.store(to + k[:, None] * BLOCK_N + n[None, :], acc)


@triton.jit(do_not_specialize=["size", "slices", "slice_size"])
def grad_weight_reduce_kernel(
    sums, position, out, size, slices, slice_size, BLOCK: tl.constexpr, ROUND: tl.constexpr
):
    """The packed gradient: the slices of :func:`grad_weight_kernel` added in their order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    at = tl.load(position + i, mask=mask, other=0).to(tl.int64)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(slices):
        acc += tl.load(sums + at, mask=mask, other=0.0)
        at += slice_size
    if ROUND:
        bits = acc.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        acc = tl.where(acc == acc, rounded.to(tl.float32, bitcast=True), acc)
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=mask)
