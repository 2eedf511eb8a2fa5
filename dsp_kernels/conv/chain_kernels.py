"""The chain kernel in Triton: k x k convolution, ReLU, 1x1, + residual, ReLU, and the next block's 1x1, ReLU.

A tile is BLOCK_M output pixels. The k x k convolution runs group by group as in the grouped kernel, T tiles
of TILE_N filters, and stays in registers. The stream is then made BLOCK_S channels at a time: each part is
stored and at once multiplied into the next convolution's sums, so that neither the inner activation nor the
stream is read back.

RESIDENT: a program works on many tiles and holds the weights of both 1x1s in shared memory all the while;
those of the k x k are copied for each tile. Else a program works on one tile and copies all weights. Kept
parts are unrolled, and the residual of a part is loaded before the part ahead of it is made.

Importing this module needs Triton; :mod:`dsp_kernels.conv.chain` does it when a chain is run.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton knows no starred tuples)

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import masked

__all__ = ["chain_forward"]


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter's product of bfloat16 is wrong
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _steps(
    acc, x, w1, steps, valid, first, last, base, row, column, H, W, C8,
    HOLES: tl.constexpr, TILE_N: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds the products of steps ``first`` to ``last``. HOLES: chunks hold channels that are not read.

    A step's entry is loaded one step ahead and carried, as in the grouped kernel; the table has one more.
    """
    k = tl.arange(0, BLOCK_K)
    n = tl.arange(0, TILE_N)
    entry = steps + first * 2
    word = tl.load(entry)
    tap = tl.load(entry + 1)
    for step in tl.range(first, last):
        start8 = word >> 8
        chunks = word & 0xFF
        dy = tap >> 16
        dx = tap & 0xFFFF
        inside = (row + dy >= 0) & (row + dy < H) & (column + dx >= 0) & (column + dx < W)
        offset = ((dy * W + dx) * C8 + start8) * 8
        offset = tl.max_contiguous(tl.multiple_of(offset + k, ALIGN), ALIGN)
        # Constant over 8 channels, so that copies stay whole.
        wanted = tl.max_constancy(((chunks >> (k // 8)) & 1) != 0, 8)
        mask = inside[:, None] & wanted[None, :]
        a = tl.load(x + (base[:, None] + offset[None, :]), mask=mask, other=0.0)
        entry += 2
        word = tl.load(entry)
        tap = tl.load(entry + 1)
        if HOLES:
            bits = tl.load(valid + step * BLOCK_K + k)
            a = masked(a, bits[None, :])
        b = tl.load(w1 + step * BLOCK_K * TILE_N + k[:, None] * TILE_N + n[None, :])
        acc = _dot(a, b, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def _inner(
    tile: tl.constexpr, x, w1, b1, steps, valid, ranges, base, row, column, H, W, C8,
    HOLES: tl.constexpr, TILE_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The inner activation of one tile of filters, rounded as if it had been stored."""
    acc = tl.zeros((BLOCK_M, TILE_N), dtype=tl.float32)
    first = tl.load(ranges + tile * 3)
    middle = tl.load(ranges + tile * 3 + 1)
    last = tl.load(ranges + tile * 3 + 2)
    acc = _steps(
        acc, x, w1, steps, valid, first, middle, base, row, column, H, W, C8,
        False, TILE_N, BLOCK_K, ALIGN, PRECISION, UPCAST,
    )  # fmt: skip
    if HOLES:
        acc = _steps(
            acc, x, w1, steps, valid, middle, last, base, row, column, H, W, C8,
            True, TILE_N, BLOCK_K, ALIGN, PRECISION, UPCAST,
        )  # fmt: skip
    bias = tl.load(b1 + tile * TILE_N + tl.arange(0, TILE_N))
    acc += bias[None, :]
    # ReLU that lets NaN through.
    return tl.where(acc < 0, 0.0, acc).to(x.dtype.element_ty)


@triton.jit
def _second(w2, tile: tl.constexpr, s, CS: tl.constexpr, TILE_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """The second convolution's weights of a tile of inner filters and a part of the stream."""
    n = tile * TILE_N + tl.arange(0, TILE_N)
    return tl.load(w2 + n[:, None] * CS + (s + tl.arange(0, BLOCK_S))[None, :])


@triton.jit
def _third(w3, s, N3: tl.constexpr, BLOCK_S: tl.constexpr):
    """The third convolution's weights of a part of the stream."""
    return tl.load(w3 + (s + tl.arange(0, BLOCK_S))[:, None] * N3 + tl.arange(0, N3)[None, :])


@triton.jit
def _begin(old, b2, c):
    """What a part of the stream begins with. Added at the end it would need registers beside the sums."""
    return old.to(tl.float32) + tl.load(b2 + c)[None, :]


@triton.jit
def _tile(
    tile, x, residual, stream, following, w1, w2, w3, b1, b2, b3, steps, valid, ranges,
    M, H, W, OH, OW, C8, stride_y, stride_x, pad_y, pad_x,
    CS: tl.constexpr, C3: tl.constexpr, T: tl.constexpr, HOLES: tl.constexpr,
    TILE_N: tl.constexpr, N3: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, RESIDENT: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of pixels. ``w2``, ``w3``: what was loaded (RESIDENT), part by part, or pointers."""
    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    there = pixel < M
    image = pixel // (OH * OW)
    place = pixel % (OH * OW)
    row = place // OW * stride_y - pad_y
    column = place % OW * stride_x - pad_x
    row = tl.where(there, row, -(1 << 24))  # no tap brings it back: nothing is read
    base = ((image.to(tl.int64) * H + row) * W + column) * C8 * 8
    h = ()
    for t in tl.static_range(T):
        h = h + (
            _inner(t, x, w1, b1, steps, valid, ranges, base, row, column, H, W, C8,
                   HOLES, TILE_N, BLOCK_M, BLOCK_K, ALIGN, PRECISION, UPCAST),
        )  # fmt: skip
    wide = pixel.to(tl.int64)
    n3 = tl.arange(0, N3)
    part = tl.arange(0, BLOCK_S)
    lines = wide[:, None] * CS
    dtype: tl.constexpr = x.dtype.element_ty
    total = tl.zeros((BLOCK_M, N3), dtype=tl.float32)
    if RESIDENT:
        ahead = tl.load(residual + (lines + part[None, :]), mask=there[:, None], other=0.0)
        for i in tl.static_range(CS // BLOCK_S):
            old = ahead
            c = i * BLOCK_S + part
            if i + 1 < CS // BLOCK_S:
                ahead = tl.load(residual + (lines + (c + BLOCK_S)[None, :]), mask=there[:, None], other=0.0)
            acc = _begin(old, b2, c)
            for t in tl.static_range(T):
                acc = _dot(h[t], w2[i * T + t], acc, PRECISION, UPCAST)
            y = tl.where(acc < 0, 0.0, acc).to(dtype)
            tl.store(stream + (lines + c[None, :]), y, mask=there[:, None])
            total = _dot(y, w3[i], total, PRECISION, UPCAST)
    else:
        for s in range(0, CS, BLOCK_S):
            c = s + part
            old = tl.load(residual + (lines + c[None, :]), mask=there[:, None], other=0.0)
            acc = _begin(old, b2, c)
            for t in tl.static_range(T):
                acc = _dot(h[t], _second(w2, t, s, CS, TILE_N, BLOCK_S), acc, PRECISION, UPCAST)
            y = tl.where(acc < 0, 0.0, acc).to(dtype)
            tl.store(stream + (lines + c[None, :]), y, mask=there[:, None])
            total = _dot(y, _third(w3, s, N3, BLOCK_S), total, PRECISION, UPCAST)
    total += tl.load(b3 + n3)[None, :]
    z = tl.where(total < 0, 0.0, total).to(dtype)
    tl.store(following + wide[:, None] * C3 + n3[None, :], z, mask=there[:, None] & (n3 < C3)[None, :])


@triton.jit(
    do_not_specialize=["M", "H", "W", "OH", "OW", "C8", "stride_y", "stride_x", "pad_y", "pad_x", "n_tiles"]
)
def chain_forward(
    x, residual, stream, following, w1, w2, w3, b1, b2, b3, steps, valid, ranges,
    M, H, W, OH, OW, C8, stride_y, stride_x, pad_y, pad_x, n_tiles,
    CS: tl.constexpr, C3: tl.constexpr, T: tl.constexpr, HOLES: tl.constexpr,
    TILE_N: tl.constexpr, N3: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, RESIDENT: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_M pixels of ``stream`` (M, CS) and ``following`` (M, C3), all NHWC, a tile; ``n_tiles`` of them.

    ``x``: (images, H, W, 8 C8). ``w1``: (steps, BLOCK_K, TILE_N); ``w2``: (T TILE_N, CS); ``w3``: (CS, N3).
    ``steps``: (first channel / 8 << 8 | bits of the chunks read, rows << 16 | columns), one more than there
    are; ``valid``: int16, all ones where a channel is read; ``ranges``: for each tile of filters its first
    step, its first step with holes, its end. CS is a multiple of BLOCK_S. Biases are float32.
    """
    if RESIDENT:
        seconds = ()
        thirds = ()
        for i in tl.static_range(CS // BLOCK_S):
            thirds = thirds + (_third(w3, i * BLOCK_S, N3, BLOCK_S),)
            for t in tl.static_range(T):
                seconds = seconds + (_second(w2, t, i * BLOCK_S, CS, TILE_N, BLOCK_S),)
        for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0)):
            _tile(
                tile, x, residual, stream, following, w1, seconds, thirds, b1, b2, b3, steps, valid, ranges,
                M, H, W, OH, OW, C8, stride_y, stride_x, pad_y, pad_x, CS, C3, T, HOLES, TILE_N, N3,
                BLOCK_M, BLOCK_K, BLOCK_S, RESIDENT, ALIGN, PRECISION, UPCAST,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), x, residual, stream, following, w1, w2, w3, b1, b2, b3, steps, valid, ranges,
            M, H, W, OH, OW, C8, stride_y, stride_x, pad_y, pad_x, CS, C3, T, HOLES, TILE_N, N3,
            BLOCK_M, BLOCK_K, BLOCK_S, RESIDENT, ALIGN, PRECISION, UPCAST,
        )  # fmt: skip
