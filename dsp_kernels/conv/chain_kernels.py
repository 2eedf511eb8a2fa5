"""The chain kernel in Triton: k x k convolution, ReLU, 1x1, + residual, ReLU, and the next block's 1x1, ReLU.

A program works on BLOCK_M output pixels. The k x k convolution runs group by group as in the grouped kernel,
T tiles of TILE_N filters, and stays in registers. The stream is then made BLOCK_S channels at a time: each
part is stored and at once multiplied into the next convolution's sums, so that neither the inner activation
nor the stream is read back. Weights come from the cache for each tile of pixels.

Importing this module needs Triton; :mod:`dsp_kernels.conv.chain` does it when a chain is run.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

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
    HOLES: tl.constexpr, TILE_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds the products of steps ``first`` to ``last``. HOLES: chunks hold channels that are not read."""
    k = tl.arange(0, BLOCK_K)
    n = tl.arange(0, TILE_N)
    for step in range(first, last):
        word = tl.load(steps + step * 2)
        tap = tl.load(steps + step * 2 + 1)
        start8 = word >> 8
        chunks = word & 0xFF
        dy = tap >> 16
        dx = tap & 0xFFFF
        inside = (row + dy >= 0) & (row + dy < H) & (column + dx >= 0) & (column + dx < W)
        offset = ((dy * W + dx) * C8 + start8) * 8
        # Constant over 8 channels, so copies of 16 bytes stay whole.
        wanted = ((chunks >> (k // 8)) & 1) != 0
        a = tl.load(
            x + base[:, None] + (offset + k)[None, :], mask=inside[:, None] & wanted[None, :], other=0.0
        )
        if HOLES:
            read = tl.load(valid + step * BLOCK_K + k) != 0
            a = tl.where(read[None, :], a, 0.0)
        b = tl.load(w1 + step * BLOCK_K * TILE_N + k[:, None] * TILE_N + n[None, :])
        acc = _dot(a, b, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def _inner(
    tile: tl.constexpr, x, w1, b1, steps, valid, ranges, base, row, column, H, W, C8,
    HOLES: tl.constexpr, TILE_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The inner activation of one tile of filters, rounded as if it had been stored."""
    acc = tl.zeros((BLOCK_M, TILE_N), dtype=tl.float32)
    first = tl.load(ranges + tile * 3)
    middle = tl.load(ranges + tile * 3 + 1)
    last = tl.load(ranges + tile * 3 + 2)
    acc = _steps(
        acc, x, w1, steps, valid, first, middle, base, row, column, H, W, C8,
        False, TILE_N, BLOCK_K, PRECISION, UPCAST,
    )  # fmt: skip
    if HOLES:
        acc = _steps(
            acc, x, w1, steps, valid, middle, last, base, row, column, H, W, C8,
            True, TILE_N, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
    bias = tl.load(b1 + tile * TILE_N + tl.arange(0, TILE_N))
    acc += bias[None, :]
    # ReLU that lets NaN through.
    return tl.where(acc < 0, 0.0, acc).to(x.dtype.element_ty)


@triton.jit
def _part(h, tile: tl.constexpr, w2, s, acc, CS: tl.constexpr, TILE_N: tl.constexpr, BLOCK_S: tl.constexpr,
          PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    n = tile * TILE_N + tl.arange(0, TILE_N)
    c = s + tl.arange(0, BLOCK_S)
    b = tl.load(w2 + n[:, None] * CS + c[None, :])
    return _dot(h, b, acc, PRECISION, UPCAST)


@triton.jit
def chain_forward(
    x, residual, stream, following, w1, w2, w3, b1, b2, b3, steps, valid, ranges,
    M, H, W, OH, OW, C8, stride_y, stride_x, pad_y, pad_x,
    CS: tl.constexpr, C3: tl.constexpr, T: tl.constexpr, HOLES: tl.constexpr,
    TILE_N: tl.constexpr, N3: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M pixels of ``stream`` (M, CS) and ``following`` (M, C3), all NHWC.

    ``x``: (images, H, W, 8 C8). ``w1``: (steps, BLOCK_K, TILE_N); ``w2``: (T TILE_N, CS); ``w3``: (CS, N3).
    ``steps``: (first channel / 8 << 8 | bits of the chunks read, rows << 16 | columns); ``ranges``: for each
    tile its first step, its first step with holes, its end. CS is a multiple of BLOCK_S. Biases are float32.
    """
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = pixel < M
    image = pixel // (OH * OW)
    place = pixel % (OH * OW)
    row = place // OW * stride_y - pad_y
    column = place % OW * stride_x - pad_x
    row = tl.where(there, row, -(1 << 24))  # no tap brings it back: nothing is read
    base = ((image.to(tl.int64) * H + row) * W + column) * C8 * 8
    h0 = _inner(0, x, w1, b1, steps, valid, ranges, base, row, column, H, W, C8,
                HOLES, TILE_N, BLOCK_M, BLOCK_K, PRECISION, UPCAST)  # fmt: skip
    if T > 1:
        h1 = _inner(1, x, w1, b1, steps, valid, ranges, base, row, column, H, W, C8,
                    HOLES, TILE_N, BLOCK_M, BLOCK_K, PRECISION, UPCAST)  # fmt: skip
    if T > 2:
        h2 = _inner(2, x, w1, b1, steps, valid, ranges, base, row, column, H, W, C8,
                    HOLES, TILE_N, BLOCK_M, BLOCK_K, PRECISION, UPCAST)  # fmt: skip
    if T > 3:
        h3 = _inner(3, x, w1, b1, steps, valid, ranges, base, row, column, H, W, C8,
                    HOLES, TILE_N, BLOCK_M, BLOCK_K, PRECISION, UPCAST)  # fmt: skip
    wide = pixel.to(tl.int64)
    n3 = tl.arange(0, N3)
    total = tl.zeros((BLOCK_M, N3), dtype=tl.float32)
    for s in range(0, CS, BLOCK_S):
        c = s + tl.arange(0, BLOCK_S)
        at = wide[:, None] * CS + c[None, :]
        old = tl.load(residual + at, mask=there[:, None], other=0.0)
        acc = tl.zeros((BLOCK_M, BLOCK_S), dtype=tl.float32)
        acc = _part(h0, 0, w2, s, acc, CS, TILE_N, BLOCK_S, PRECISION, UPCAST)
        if T > 1:
            acc = _part(h1, 1, w2, s, acc, CS, TILE_N, BLOCK_S, PRECISION, UPCAST)
        if T > 2:
            acc = _part(h2, 2, w2, s, acc, CS, TILE_N, BLOCK_S, PRECISION, UPCAST)
        if T > 3:
            acc = _part(h3, 3, w2, s, acc, CS, TILE_N, BLOCK_S, PRECISION, UPCAST)
        acc += tl.load(b2 + c)[None, :] + old.to(tl.float32)
        y = tl.where(acc < 0, 0.0, acc).to(x.dtype.element_ty)
        tl.store(stream + at, y, mask=there[:, None])
        b = tl.load(w3 + c[:, None] * N3 + n3[None, :])
        total = _dot(y, b, total, PRECISION, UPCAST)
    total += tl.load(b3 + n3)[None, :]
    z = tl.where(total < 0, 0.0, total).to(x.dtype.element_ty)
    tl.store(following + wide[:, None] * C3 + n3[None, :], z, mask=there[:, None] & (n3 < C3)[None, :])
