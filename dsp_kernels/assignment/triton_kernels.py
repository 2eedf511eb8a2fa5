"""Triton kernels of group assignment: all layers of a network in each launch.

A network is described by tables in device memory (``plan.py``): one row of numbers a layer, the addresses
of its weights, and for each kernel the tiles into which the layers are cut. A program takes one tile. Sums
that cross tiles are left as partial sums, one a tile, and added up in tile order by the next kernel: no
atomics, the same bits in each run.

The symbols are those of ``reference.py``. In memory a weight is O rows of J = C K elements. *Lanes* are
neighbouring elements of a row. In contiguous weights a channel is ``inner`` = K neighbouring lanes, and
``outer`` = 1; in channels-last ones ``inner`` = 1, and the ``outer`` = K taps of a channel lie ``jump`` = C
apart. (FLAT_INNER is ``inner`` where the first pass walks contiguous weights tap by tap all the same.)
Everything is computed in ``ACC``, float32 or float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INTEGERS = ["stride", "out_stride", "groups", "pitch", "noise_pitch", "log_pitch", "count"]

# Columns of the table of layers; plan.py fills it. Sizes that end in _V are in units of VEC elements, so that
# the compiler sees the alignment.
FILTERS = tl.constexpr(0)
CHANNELS_V = tl.constexpr(1)
TAPS = tl.constexpr(2)
INNER = tl.constexpr(3)
OUTER = tl.constexpr(4)
JUMP_V = tl.constexpr(5)
STEP = tl.constexpr(6)
FILTER_AT = tl.constexpr(7)
CHANNEL_AT = tl.constexpr(8)
COLUMNS_AT = tl.constexpr(9)
CHUNKS = tl.constexpr(10)
ROWS_AT = tl.constexpr(11)
SQUARES_AT_V = tl.constexpr(12)
CHANNELS = tl.constexpr(13)
FLAT_INNER = tl.constexpr(14)
FIELDS = tl.constexpr(15)

# Columns of the table of addresses.
WEIGHT = tl.constexpr(0)
DIRECTION = tl.constexpr(1)
OUT = tl.constexpr(2)
KEEP = tl.constexpr(3)
ADDRESSES = tl.constexpr(4)

# Numbers of a tile: the layer, where it begins (rows, lanes / VEC), lanes / VEC, and its place among the
# partial sums.
TILE = tl.constexpr(5)

# Scalars of a (layer, group): the coefficients of sqrt(p) and of sqrt(p) E in the gradient for l.
SCALARS = tl.constexpr(2)


@triton.jit
def _field(layers, layer, field):
    return tl.load(layers + layer * FIELDS + field)


@triton.jit
def _weights(pointers, layer, which, ELEMENT: tl.constexpr, ALIGN: tl.constexpr):
    address = tl.load(pointers + layer * ADDRESSES + which)
    # On the pointer, not on the integer: that is what vector loads go by.
    return tl.multiple_of(address.to(tl.pointer_type(ELEMENT)), ALIGN)


@triton.jit
def _join(left_begins, left, right_begins, right):
    return left_begins | right_begins, tl.where(right_begins != 0, right, left + right)


@triton.jit
def _by_channel(values, lane, inner):
    """Running sums of each channel along the lanes: the sum over its taps stands at its last lane."""
    begins = tl.broadcast_to((lane % inner == 0).to(tl.int32)[None, :], values.shape)
    _, sums = tl.associative_scan((begins, values), 1, _join)
    return sums


@triton.jit
def _inverse(squares, FLOOR: tl.constexpr):
    """L and 1/L from L^2; a norm below the floor counts as 0. A NaN is live and comes through."""
    dead = squares <= FLOOR
    norm = tl.where(dead, 0.0, tl.sqrt(squares))
    return norm, tl.where(dead, 0.0, 1.0 / tl.where(dead, 1.0, norm))


@triton.jit(do_not_specialize=_INTEGERS)
def squares_forward(
    layers,
    tiles,
    pointers,
    logs,
    towards,
    columns,
    squares,
    products,
    stride,
    groups,
    ELEMENT: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDED: tl.constexpr,
    DIRECTED: tl.constexpr,
    TOWARDS: tl.constexpr,
    STORE: tl.constexpr,
):
    """The pass over W: the sums over a tile's filters of p^2 S for each channel.

    DIRECTED: D is read in the same pass. TOWARDS (with DIRECTED): then come the sums of p^2 T and of p^2 E S,
    E being ``towards``, laid out as ``logs``. STORE: S itself goes to ``squares``, and T to ``products``.
    BLOCK groups are summed at a time.
    """
    tile = tiles + tl.program_id(0) * TILE
    layer = tl.load(tile)
    row0 = tl.load(tile + 1)
    start = tl.load(tile + 2) * VEC
    lanes = tl.load(tile + 3) * VEC
    chunk = tl.load(tile + 4)
    filters = _field(layers, layer, FILTERS).to(tl.int32)
    channels = _field(layers, layer, CHANNELS_V) * VEC
    taps = _field(layers, layer, TAPS)
    inner = _field(layers, layer, INNER).to(tl.int32)
    outer = _field(layers, layer, OUTER).to(tl.int32)
    jump = _field(layers, layer, JUMP_V) * VEC
    first = _field(layers, layer, FILTER_AT)
    weight = _weights(pointers, layer, WEIGHT, ELEMENT, ALIGN)
    if DIRECTED:
        direction = _weights(pointers, layer, DIRECTION, ELEMENT, ALIGN)

    lane = tl.arange(0, LANES)
    live = lane < lanes
    # STRIDED: taps one after the other at the stride of a channel, for any kernel size, without vectors.
    place = (start + lane) * _field(layers, layer, STEP) if STRIDED else start + lane
    channel = start // inner + lane // inner
    last = live & (lane % inner == inner - 1)
    width = channels * taps
    quantities: tl.constexpr = 3 if TOWARDS else 1
    out = columns + _field(layers, layer, COLUMNS_AT) + chunk * (quantities * groups) * channels
    for group0 in range(0, groups, BLOCK):
        member = group0 + tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK, LANES), ACC)
        if TOWARDS:
            directed = tl.zeros((BLOCK, LANES), ACC)
            turned = tl.zeros((BLOCK, LANES), ACC)
        for row in range(row0, tl.minimum(row0 + ROWS * REPEAT, filters), ROWS):
            filter = row + tl.arange(0, ROWS)
            exists = filter < filters
            mask = exists[:, None] & live[None, :]
            at = (filter.to(tl.int64) * width)[:, None] + place[None, :]
            s = tl.zeros((ROWS, LANES), ACC)
            if DIRECTED:
                t = tl.zeros((ROWS, LANES), ACC)
            for tap in range(outer):
                w = tl.load(weight + at + tap * jump, mask=mask, other=0.0).to(ACC)
                s += w * w
                if DIRECTED:
                    d = tl.load(direction + at + tap * jump, mask=mask, other=0.0).to(ACC)
                    t += w * d
            for offset in range(BLOCK):
                group = group0 + offset
                known = exists & (group < groups)
                log_at = group * stride + first + filter
                log = tl.load(logs + log_at, mask=known, other=float("-inf"))
                chosen = tl.arange(0, BLOCK)[:, None] == offset
                p2 = tl.exp(2 * log)[:, None]
                sums += tl.where(chosen, tl.sum(p2 * s, 0)[None, :], 0.0)
                if TOWARDS:
                    directed += tl.where(chosen, tl.sum(p2 * t, 0)[None, :], 0.0)
                    e = tl.load(towards + log_at, mask=known, other=0.0)[:, None]
                    turned += tl.where(chosen, tl.sum(p2 * e * s, 0)[None, :], 0.0)
            if STORE:  # noqa: SIM102 (one is known to the compiler, the other is not)
                if taps > 1:  # a layer with one tap is read again instead
                    if inner > 1:
                        s = _by_channel(s, lane, inner)
                        if DIRECTED:
                            t = _by_channel(t, lane, inner)
                    place_s = (
                        _field(layers, layer, SQUARES_AT_V) * VEC + (filter.to(tl.int64) * channels)[:, None]
                    )
                    ends = exists[:, None] & last[None, :]
                    tl.store(squares + place_s + channel[None, :], s, mask=ends)
                    if DIRECTED:
                        tl.store(products + place_s + channel[None, :], t, mask=ends)
        if inner > 1:
            sums = _by_channel(sums, lane, inner)
            if TOWARDS:
                directed = _by_channel(directed, lane, inner)
                turned = _by_channel(turned, lane, inner)
        here = out + (member * channels)[:, None] + channel[None, :]
        wanted = (member < groups)[:, None] & last[None, :]
        tl.store(here, sums, mask=wanted)
        if TOWARDS:
            tl.store(here + groups * channels, directed, mask=wanted)
            tl.store(here + 2 * groups * channels, turned, mask=wanted)


@triton.jit
def _column(
    source, chunks, pitch, channel, exists, DEPTH: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr
):
    """The sum of one quantity's partial sums over the chunks of filters, in their order."""
    total = tl.zeros((WIDTH,), ACC)
    for chunk0 in range(0, chunks, DEPTH):
        chunk = chunk0 + tl.arange(0, DEPTH)
        mask = (chunk < chunks)[:, None] & exists[None, :]
        total += tl.sum(
            tl.load(source + (chunk * pitch)[:, None] + channel[None, :], mask=mask, other=0.0), 0
        )
    return total


@triton.jit(do_not_specialize=_INTEGERS)
def columns_forward(
    layers,
    columns,
    logs,
    towards,
    rates,
    scales,
    ratios,
    changes,
    inverses,
    scalars,
    penalties,
    stride,
    groups,
    pitch,
    ACC: tl.constexpr,
    FLOOR: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    MODE: tl.constexpr,
):
    """From column sums to what the next pass multiplies with; one program for each (layer, group).

    MODE "norm": ratios s/L, penalties; "step" the same with 1/L kept in ``inverses``; "proximal": ratios
    max(0, 1 - amount s/L); "hessian": ratios, their changes, and the penalties' derivative along (D, E);
    "moved": ratios at the moved weights; "mixed": changes of the ratios for the mixed product, given ratios
    and inverses. ``scalars`` receive what the gradient for l takes of each group.
    """
    layer = tl.program_id(0)
    group = tl.program_id(1)
    filters = _field(layers, layer, FILTERS).to(tl.int32)
    channels = _field(layers, layer, CHANNELS).to(tl.int32)
    chunks = _field(layers, layer, CHUNKS).to(tl.int32)
    first = _field(layers, layer, FILTER_AT)
    source = columns + _field(layers, layer, COLUMNS_AT) + group * channels
    target = group * pitch + _field(layers, layer, CHANNEL_AT)
    scale = tl.load(scales + layer)

    root_sum = tl.zeros((WIDTH,), ACC)
    root_turn = tl.zeros((WIDTH,), ACC)
    for filter0 in range(0, filters, WIDTH):
        filter = filter0 + tl.arange(0, WIDTH)
        exists = filter < filters
        at = group * stride + first + filter
        root = tl.exp(tl.load(logs + at, mask=exists, other=float("-inf")) * 0.5)
        root_sum += root
        if MODE == "hessian":
            root_turn += root * tl.load(towards + at, mask=exists, other=0.0) * 0.5
    q = tl.sum(root_sum, 0)
    turn = tl.sum(root_turn, 0)
    size = q * q

    between = (3 if MODE == "hessian" else 1) * groups * channels
    norms = tl.zeros((WIDTH,), ACC)
    moves = tl.zeros((WIDTH,), ACC)
    for channel0 in range(0, channels, WIDTH):
        channel = channel0 + tl.arange(0, WIDTH)
        exists = channel < channels
        n = _column(source, chunks, between, channel, exists, DEPTH, WIDTH, ACC)
        if MODE == "mixed":
            ratio = tl.load(ratios + target + channel, mask=exists, other=0.0)
            inverse = tl.load(inverses + target + channel, mask=exists, other=0.0)
            change = n * inverse
            moves += change
            tl.store(changes + target + channel, -ratio * change * inverse, mask=exists)
        else:
            norm, inverse = _inverse(n, FLOOR)
            norms += tl.where(exists, norm, 0.0)
            if MODE == "proximal":
                amount = tl.load(rates + layer) * scale
                left = 1.0 - amount * size * inverse
                # Written so that a NaN comes through.
                left = tl.where(left < 0.0, 0.0, left)
                tl.store(ratios + target + channel, tl.where(norm == 0.0, 0.0, left), mask=exists)
            else:
                tl.store(ratios + target + channel, size * inverse, mask=exists)
            if MODE == "step":
                tl.store(inverses + target + channel, inverse, mask=exists)
            if MODE == "hessian":
                t = _column(source + groups * channels, chunks, between, channel, exists, DEPTH, WIDTH, ACC)
                e = _column(
                    source + 2 * groups * channels, chunks, between, channel, exists, DEPTH, WIDTH, ACC
                )
                change = (t + e) * inverse
                moves += change
                ratio_change = 2.0 * q * turn * inverse - size * inverse * change * inverse
                tl.store(changes + target + channel, ratio_change, mask=exists)
    norm_sum = tl.sum(norms, 0)
    move_sum = tl.sum(moves, 0)
    own = scalars + (layer * groups + group) * SCALARS
    if MODE == "hessian":
        tl.store(own, move_sum * q + norm_sum * turn)
        tl.store(own + 1, norm_sum * q * 0.5)
        tl.store(penalties + layer * groups + group, scale * (size * move_sum + 2.0 * q * turn * norm_sum))
    elif MODE == "mixed":
        tl.store(own, tl.load(own) + move_sum * q)
    elif MODE != "proximal":
        tl.store(own, norm_sum * q)
        if MODE == "norm":
            tl.store(penalties + layer * groups + group, scale * size * norm_sum)


@triton.jit(do_not_specialize=_INTEGERS)
def apply_forward(
    layers,
    tiles,
    pointers,
    logs,
    towards,
    rates,
    scales,
    ratios,
    changes,
    rows,
    stride,
    groups,
    pitch,
    ELEMENT: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    MODE: tl.constexpr,
    KEEPING: tl.constexpr,
):
    """The second pass over W: every (filter, channel) is multiplied by its factor.

    MODE "shrink": W (1 - amount M); "proximal": W times the mixture of what is left; "backward": amount W M,
    and the sums over a tile's lanes of ratio S in ``rows``; "hessian": amount (D M + W dM), and the sums of
    (change S + 2 ratio T) and of ratio S. KEEPING: W itself goes to KEEP as well.
    """
    tile = tiles + tl.program_id(0) * TILE
    layer = tl.load(tile)
    row0 = tl.load(tile + 1)
    start = tl.load(tile + 2) * VEC
    lanes = tl.load(tile + 3) * VEC
    block = tl.load(tile + 4)
    filters = _field(layers, layer, FILTERS).to(tl.int32)
    channels = _field(layers, layer, CHANNELS_V).to(tl.int32) * VEC
    width = channels * _field(layers, layer, TAPS)
    inner = _field(layers, layer, FLAT_INNER).to(tl.int32)
    first = _field(layers, layer, FILTER_AT)
    column_at = _field(layers, layer, CHANNEL_AT)
    weight = _weights(pointers, layer, WEIGHT, ELEMENT, ALIGN)
    out = _weights(pointers, layer, OUT, ELEMENT, ALIGN)
    amount = tl.load(rates + layer) * tl.load(scales + layer)

    filter = row0 + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    exists = filter < filters
    live = lane < lanes
    channel = ((start + lane) // inner) % channels
    mask = exists[:, None] & live[None, :]
    at = (filter.to(tl.int64) * width)[:, None] + (start + lane)[None, :]
    w = tl.load(weight + at, mask=mask, other=0.0)
    if KEEPING:
        tl.store(_weights(pointers, layer, KEEP, ELEMENT, ALIGN) + at, w, mask=mask)
    w = w.to(ACC)
    factor = tl.zeros((ROWS, LANES), ACC)
    if MODE == "hessian":
        d = tl.load(_weights(pointers, layer, DIRECTION, ELEMENT, ALIGN) + at, mask=mask, other=0.0).to(ACC)
        turned = tl.zeros((ROWS, LANES), ACC)
    quantities: tl.constexpr = 2 if MODE == "hessian" else 1
    sums = rows + _field(layers, layer, ROWS_AT) + block * (quantities * groups) * filters + filter
    for group in range(groups):
        log_at = group * stride + first + filter
        log = tl.load(logs + log_at, mask=exists, other=float("-inf"))
        ratio = tl.load(ratios + group * pitch + column_at + channel, mask=live, other=0.0)[None, :]
        if MODE == "proximal":
            factor += tl.exp(log)[:, None] * ratio
        else:
            p2 = tl.exp(2 * log)[:, None]
            factor += p2 * ratio
        if MODE == "backward":
            tl.store(sums + group * filters, tl.sum(ratio * (w * w), 1), mask=exists)
        if MODE == "hessian":
            change = tl.load(changes + group * pitch + column_at + channel, mask=live, other=0.0)[None, :]
            e = tl.load(towards + log_at, mask=exists, other=0.0)[:, None]
            turned += p2 * change + 2.0 * p2 * e * ratio
            tl.store(sums + group * filters, tl.sum(change * (w * w) + 2.0 * ratio * (w * d), 1), mask=exists)
            tl.store(sums + (groups + group) * filters, tl.sum(ratio * (w * w), 1), mask=exists)
    if MODE == "shrink":
        result = w * (1.0 - amount * factor)
    elif MODE == "proximal":
        result = w * factor
    elif MODE == "backward":
        result = amount * (w * factor)
    else:
        result = amount * (d * factor + w * turned)
    tl.store(out + at, result.to(ELEMENT), mask=mask)


@triton.jit
def _moved(
    layers,
    layer,
    pointers,
    squares,
    products,
    logs,
    ratios,
    moved_ratios,
    rates,
    scales,
    stride,
    groups,
    pitch,
    filter,
    exists,
    start,
    live,
    lane,
    ELEMENT: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    MIXED: tl.constexpr,
):
    """S, S' at the moved weights, and, where MIXED, T minus the penalty's own move there."""
    channels = _field(layers, layer, CHANNELS_V) * VEC
    first = _field(layers, layer, FILTER_AT)
    column_at = _field(layers, layer, CHANNEL_AT)
    amount = tl.load(rates + layer) * tl.load(scales + layer)
    mask = exists[:, None] & live[None, :]
    at = (filter.to(tl.int64) * channels)[:, None] + (start + lane)[None, :]
    t = tl.zeros((ROWS, LANES), ACC)
    if _field(layers, layer, TAPS) == 1:
        w = tl.load(_weights(pointers, layer, WEIGHT, ELEMENT, ALIGN) + at, mask=mask, other=0.0).to(ACC)
        s = w * w
        if MIXED:
            d = tl.load(_weights(pointers, layer, DIRECTION, ELEMENT, ALIGN) + at, mask=mask, other=0.0)
            t = w * d.to(ACC)
    else:
        at += _field(layers, layer, SQUARES_AT_V) * VEC
        s = tl.load(squares + at, mask=mask, other=0.0)
        if MIXED:
            t = tl.load(products + at, mask=mask, other=0.0)
    factor = tl.zeros((ROWS, LANES), ACC)
    moved_factor = tl.zeros((ROWS, LANES), ACC)
    for group in range(groups):
        log = tl.load(logs + group * stride + first + filter, mask=exists, other=float("-inf"))
        p2 = tl.exp(2 * log)[:, None]
        column = group * pitch + column_at + start + lane
        factor += p2 * tl.load(ratios + column, mask=live, other=0.0)[None, :]
        if MIXED:
            moved_factor += p2 * tl.load(moved_ratios + column, mask=live, other=0.0)[None, :]
    factor = 1.0 - amount * factor
    if MIXED:
        t -= amount * (s * factor * moved_factor)
    return s, s * factor * factor, t


@triton.jit(do_not_specialize=_INTEGERS)
def moved_columns_forward(
    layers,
    tiles,
    pointers,
    squares,
    products,
    logs,
    ratios,
    moved_ratios,
    rates,
    scales,
    columns,
    stride,
    groups,
    pitch,
    ELEMENT: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
    BLOCK: tl.constexpr,
    MIXED: tl.constexpr,
):
    """Sums over a tile's filters, for each channel: of p^2 S' at the moved weights, or, where MIXED, of p^2
    (T - amount S f M')."""
    tile = tiles + tl.program_id(0) * TILE
    layer = tl.load(tile)
    row0 = tl.load(tile + 1)
    start = tl.load(tile + 2) * VEC
    lanes = tl.load(tile + 3) * VEC
    chunk = tl.load(tile + 4)
    filters = _field(layers, layer, FILTERS).to(tl.int32)
    channels = _field(layers, layer, CHANNELS_V) * VEC
    first = _field(layers, layer, FILTER_AT)
    lane = tl.arange(0, LANES)
    live = lane < lanes
    out = columns + _field(layers, layer, COLUMNS_AT) + chunk * groups * channels
    for group0 in range(0, groups, BLOCK):
        member = group0 + tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK, LANES), ACC)
        for row in range(row0, tl.minimum(row0 + ROWS * REPEAT, filters), ROWS):
            filter = row + tl.arange(0, ROWS)
            exists = filter < filters
            _, moved, t = _moved(
                layers, layer, pointers, squares, products, logs, ratios, moved_ratios, rates, scales, stride,
                groups, pitch, filter, exists, start, live, lane, ELEMENT, ACC, VEC, ALIGN, ROWS, LANES,
                MIXED,
            )  # fmt: skip
            value = t if MIXED else moved
            for offset in range(BLOCK):
                group = group0 + offset
                known = exists & (group < groups)
                log = tl.load(logs + group * stride + first + filter, mask=known, other=float("-inf"))
                column = tl.sum(tl.exp(2 * log)[:, None] * value, 0)
                sums += tl.where(tl.arange(0, BLOCK)[:, None] == offset, column[None, :], 0.0)
        here = out + (member * channels)[:, None] + (start + lane)[None, :]
        tl.store(here, sums, mask=(member < groups)[:, None] & live[None, :])


@triton.jit(do_not_specialize=_INTEGERS)
def moved_rows_forward(
    layers,
    tiles,
    pointers,
    squares,
    products,
    logs,
    ratios,
    moved_ratios,
    changes,
    rates,
    scales,
    rows,
    stride,
    groups,
    pitch,
    ELEMENT: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    MIXED: tl.constexpr,
):
    """Sums over a tile's channels, for each (group, filter): of ratio' S', and, where MIXED, of change S + 2
    ratio (T - amount S f M')."""
    tile = tiles + tl.program_id(0) * TILE
    layer = tl.load(tile)
    row0 = tl.load(tile + 1)
    start = tl.load(tile + 2) * VEC
    lanes = tl.load(tile + 3) * VEC
    block = tl.load(tile + 4)
    filters = _field(layers, layer, FILTERS).to(tl.int32)
    column_at = _field(layers, layer, CHANNEL_AT)
    lane = tl.arange(0, LANES)
    live = lane < lanes
    filter = row0 + tl.arange(0, ROWS)
    exists = filter < filters
    s, moved, t = _moved(
        layers, layer, pointers, squares, products, logs, ratios, moved_ratios, rates, scales, stride,
        groups, pitch, filter, exists, start, live, lane, ELEMENT, ACC, VEC, ALIGN, ROWS, LANES, MIXED,
    )  # fmt: skip
    sums = rows + _field(layers, layer, ROWS_AT) + block * groups * filters + filter
    for group in range(groups):
        column = group * pitch + column_at + start + lane
        value = tl.load(moved_ratios + column, mask=live, other=0.0)[None, :] * moved
        if MIXED:
            value += tl.load(changes + column, mask=live, other=0.0)[None, :] * s
            value += 2.0 * tl.load(ratios + column, mask=live, other=0.0)[None, :] * t
        tl.store(sums + group * filters, tl.sum(value, 1), mask=exists)


@triton.jit(do_not_specialize=_INTEGERS)
def rows_backward(
    layers,
    tiles,
    rows,
    scalars,
    logs,
    towards,
    rates,
    scales,
    out,
    stride,
    out_stride,
    groups,
    ACC: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    MODE: tl.constexpr,
):
    """The gradient for l from the row sums: factor (p^2 A + c sqrt(p)), and for MODE "hessian" also factor (2
    p^2 E B + c' sqrt(p) E). The factor is the scale for MODE "moved", else the amount."""
    tile = tiles + tl.program_id(0) * TILE
    group = tl.program_id(1)
    layer = tl.load(tile)
    blocks = tl.load(tile + 3)
    filters = _field(layers, layer, FILTERS).to(tl.int32)
    first = _field(layers, layer, FILTER_AT)
    filter = tl.load(tile + 1) + tl.arange(0, WIDTH)
    exists = filter < filters
    between = (2 if MODE == "hessian" else 1) * groups * filters
    source = rows + _field(layers, layer, ROWS_AT) + group * filters
    log = tl.load(logs + group * stride + first + filter, mask=exists, other=float("-inf"))
    p2 = tl.exp(2 * log)
    root = tl.exp(log * 0.5)
    own = scalars + (layer * groups + group) * SCALARS
    result = p2 * _column(source, blocks, between, filter, exists, DEPTH, WIDTH, ACC) + tl.load(own) * root
    factor = tl.load(scales + layer)
    if MODE != "moved":
        factor *= tl.load(rates + layer)
    if MODE == "hessian":
        e = tl.load(towards + group * stride + first + filter, mask=exists, other=0.0)
        b = _column(source + groups * filters, blocks, between, filter, exists, DEPTH, WIDTH, ACC)
        result += 2.0 * p2 * e * b + tl.load(own + 1) * root * e
    tl.store(out + group * out_stride + first + filter, factor * result, mask=exists)


@triton.jit
def copy_forward(
    layers,
    tiles,
    pointers,
    ELEMENT: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """WEIGHT <- KEEP."""
    tile = tiles + tl.program_id(0) * TILE
    layer = tl.load(tile)
    start = tl.load(tile + 2) * VEC
    width = _field(layers, layer, CHANNELS_V) * VEC * _field(layers, layer, TAPS)
    filter = tl.load(tile + 1) + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    mask = (filter < _field(layers, layer, FILTERS).to(tl.int32))[:, None]
    mask = mask & (lane < tl.load(tile + 3) * VEC)[None, :]
    at = (filter.to(tl.int64) * width)[:, None] + (start + lane)[None, :]
    kept = tl.load(_weights(pointers, layer, KEEP, ELEMENT, ALIGN) + at, mask=mask, other=0.0)
    tl.store(_weights(pointers, layer, WEIGHT, ELEMENT, ALIGN) + at, kept, mask=mask)


@triton.jit
def _log_softmax_sum(
    logits, noise, at, pitch, noise_pitch, groups, exists, temperature,
    DIVIDE: tl.constexpr, ACC: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The largest score of each column and the logarithm of the sum of exp(score - largest)."""
    largest = tl.full((WIDTH,), float("-inf"), ACC)
    for group in range(groups):
        score = _score(logits, noise, at, pitch, noise_pitch, group, exists, temperature, DIVIDE)
        # A NaN comes through the comparison.
        largest = tl.where(score <= largest, largest, score)
    total = tl.zeros((WIDTH,), ACC)
    for group in range(groups):
        score = _score(logits, noise, at, pitch, noise_pitch, group, exists, temperature, DIVIDE)
        total += tl.exp(score - largest)
    return largest, tl.log(total)


@triton.jit
def _score(logits, noise, at, pitch, noise_pitch, group, exists, temperature, DIVIDE: tl.constexpr):
    x = tl.load(logits + group * pitch + at, mask=exists, other=0.0)
    n = tl.load(noise + group * noise_pitch + at, mask=exists, other=0.0)
    return (x + n) / temperature if DIVIDE else x / temperature + n


@triton.jit(do_not_specialize=_INTEGERS)
def sample_forward(
    logits,
    noise,
    temperature,
    out,
    count,
    pitch,
    noise_pitch,
    groups,
    DIVIDE: tl.constexpr,
    ACC: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The log-softmax over the groups of logits / temperature + noise, or of (logits + noise) / temperature.
    ``temperature`` is a pointer, so that it has the precision of the rest."""
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    exists = at < count
    value = tl.load(temperature)
    largest, log_sum = _log_softmax_sum(
        logits, noise, at, pitch, noise_pitch, groups, exists, value, DIVIDE, ACC, WIDTH
    )
    for group in range(groups):
        score = _score(logits, noise, at, pitch, noise_pitch, group, exists, value, DIVIDE)
        tl.store(out + group * count + at, score - largest - log_sum, mask=exists)


@triton.jit
def _total(grad, at, pitch, groups, exists, ACC: tl.constexpr, WIDTH: tl.constexpr):
    total = tl.zeros((WIDTH,), ACC)
    for group in range(groups):
        total += tl.load(grad + group * pitch + at, mask=exists, other=0.0)
    return total


@triton.jit(do_not_specialize=_INTEGERS)
def sample_backward(
    grad,
    logs,
    temperature,
    out,
    count,
    pitch,
    log_pitch,
    groups,
    ACC: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(grad - p sum over the groups of grad) / temperature."""
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    exists = at < count
    value = tl.load(temperature)
    total = _total(grad, at, pitch, groups, exists, ACC, WIDTH)
    for group in range(groups):
        g = tl.load(grad + group * pitch + at, mask=exists, other=0.0)
        p = tl.exp(tl.load(logs + group * log_pitch + at, mask=exists, other=0.0))
        tl.store(out + group * count + at, (g - p * total) / value, mask=exists)


@triton.jit(do_not_specialize=_INTEGERS)
def update_logits(
    log_gradient,
    logs,
    numbers,
    gradient,
    moment,
    square_moment,
    logits,
    hard,
    count,
    groups,
    ACC: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Through the softmax to the logits' gradient, a step of Adam on the logits in place, and the hard
    assignment of the result. All matrices are contiguous (G, N).

    ``numbers``: temperature, 1 - beta1, beta2, 1 - beta2, epsilon, sqrt(1 - beta2^t), lr / (1 - beta1^t).
    """
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    exists = at < count
    temperature = tl.load(numbers)
    new = tl.load(numbers + 1)
    keep = tl.load(numbers + 2)
    add = tl.load(numbers + 3)
    epsilon = tl.load(numbers + 4)
    correction = tl.load(numbers + 5)
    rate = tl.load(numbers + 6)
    total = _total(log_gradient, at, count, groups, exists, ACC, WIDTH)
    largest = tl.full((WIDTH,), float("-inf"), ACC)
    best = tl.zeros((WIDTH,), tl.int32)
    for group in range(groups):
        here = group * count + at
        g = tl.load(log_gradient + here, mask=exists, other=0.0)
        p = tl.exp(tl.load(logs + here, mask=exists, other=0.0))
        g = (g - p * total) / temperature
        m = tl.load(moment + here, mask=exists, other=0.0)
        v = tl.load(square_moment + here, mask=exists, other=0.0)
        a = tl.load(logits + here, mask=exists, other=0.0)
        m += new * (g - m)
        v = v * keep + add * g * g
        a -= rate * m / (tl.sqrt(v) / correction + epsilon)
        tl.store(gradient + here, g, mask=exists)
        tl.store(moment + here, m, mask=exists)
        tl.store(square_moment + here, v, mask=exists)
        tl.store(logits + here, a, mask=exists)
        # The first largest; a NaN counts as larger than any number, as in torch.argmax.
        wins = (a > largest) | ((a != a) & (largest == largest))
        best = tl.where(wins, group, best)
        largest = tl.where(wins, a, largest)
    for group in range(groups):
        tl.store(hard + group * count + at, tl.where(best == group, 0.0, float("-inf")), mask=exists)
