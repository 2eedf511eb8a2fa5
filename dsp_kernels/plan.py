"""The plan: a layout written as one tensor of integers, and the order of channels that keeps it short.

An operator's schema takes no Python objects and a long ``int[]`` is slow to parse, so a layout travels to
the kernels as one contiguous 1-D ``int32`` tensor:

====================  ======================================================================================
position              meaning
====================  ======================================================================================
0                     magic number, ``0x44535031``
1, 2                  input channels, output channels
3                     number of groups, G
4                     pairs: the sum over groups of filters x channels
5                     length of the whole tensor
6                     number of live filters (the sum over groups of filters)
7                     0
8 + 5 g ... + 4       of group g: number of channels, number of filters, position of its channel list,
                      position of its filter list, pairs before it (times the kernel's taps: where its
                      weights start)
8 + 5 G ...           all channel lists in group order, then all filter lists in group order
====================  ======================================================================================
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import permutations
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layout import GroupLayout

__all__ = ["MAGIC", "GroupHeader", "PlanHeader", "decode", "encode", "gray_order", "read_header", "runs"]

MAGIC = 0x44535031
HEADER = 8
PER_GROUP = 5
INT32_MAX = 2**31 - 1

# Up to this many groups every assignment of groups to bits of the Gray code is tried (120 at five).
_MAX_PERMUTED_GROUPS = 5


class GroupHeader(NamedTuple):
    """Where one group's lists and weights are: positions in the plan, and ``weight_offset`` in pairs."""

    n_channels: int
    n_filters: int
    channel_offset: int
    filter_offset: int
    weight_offset: int


class PlanHeader(NamedTuple):
    """The fixed part of a plan, decoded."""

    in_channels: int
    out_channels: int
    pairs: int
    live_filters: int
    groups: tuple[GroupHeader, ...]


def encode(
    in_channels: int, out_channels: int, groups: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[int]:
    """The plan of a layout, as a list of ints (see the module's text for the format).

    ``groups`` are (channels, filters) index sequences, taken as valid: :class:`~dsp_kernels.GroupLayout` has
    checked them. Raises ValueError where a size does not fit 32 bits.
    """
    n_channels = sum(len(channels) for channels, _ in groups)
    n_filters = sum(len(filters) for _, filters in groups)
    lists = HEADER + PER_GROUP * len(groups)
    total = lists + n_channels + n_filters
    pairs = sum(len(channels) * len(filters) for channels, filters in groups)
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("pairs", pairs)):
        if value > INT32_MAX:
            raise ValueError(f"{name} is {value}; a plan holds at most {INT32_MAX}")
    out = [MAGIC, in_channels, out_channels, len(groups), pairs, total, n_filters, 0]
    channel_at, filter_at, pair_at = lists, lists + n_channels, 0
    for channels, filters in groups:
        out += (len(channels), len(filters), channel_at, filter_at, pair_at)
        channel_at += len(channels)
        filter_at += len(filters)
        pair_at += len(channels) * len(filters)
    for channels, _ in groups:
        out += channels
    for _, filters in groups:
        out += filters
    return out


def _refuse(what: str) -> ValueError:
    return ValueError(f"plan is not a plan made by GroupLayout.plan(): {what}")


def read_header(plan: Tensor) -> PlanHeader:
    """The fixed part of a plan tensor, checked so that every list lies inside the tensor.

    ``plan``: 1-D int32. On a GPU this waits for the device. Raises TypeError for another dtype and
    ValueError for anything that :func:`encode` would not have written; the indices in the lists are not read
    (:func:`decode` does).
    """
    if plan.dtype != torch.int32:
        raise TypeError(f"plan must be an int32 tensor, got {plan.dtype}")
    if plan.dim() != 1:
        raise ValueError(f"plan must be 1-D, got shape {tuple(plan.shape)}")
    size = plan.numel()
    if size < HEADER:
        raise _refuse(f"{size} elements, at least {HEADER} needed")
    magic, in_channels, out_channels, n_groups, pairs, total, live, reserved = plan[:HEADER].tolist()
    if magic != MAGIC:
        raise _refuse(f"it starts with {magic:#x}, not {MAGIC:#x}")
    if total != size:
        raise _refuse(f"it says {total} elements and has {size}")
    if in_channels < 1 or out_channels < 1 or reserved != 0:
        raise _refuse(f"header {[in_channels, out_channels, reserved]}, needs [>= 1, >= 1, 0]")
    lists = HEADER + PER_GROUP * n_groups
    if n_groups < 0 or lists > size:
        raise _refuse(f"{n_groups} groups do not fit {size} elements")
    rows = plan[HEADER:lists].view(n_groups, PER_GROUP).tolist()
    groups = tuple(GroupHeader(*row) for row in rows)
    if any(g.n_channels < 0 or g.n_filters < 0 or (g.n_filters > 0 and g.n_channels == 0) for g in groups):
        raise _refuse("a group has a negative size, or filters without channels")
    channel_at, pair_at = lists, 0
    filter_at = lists + sum(g.n_channels for g in groups)
    for g in groups:
        if (g.channel_offset, g.filter_offset, g.weight_offset) != (channel_at, filter_at, pair_at):
            raise _refuse(f"offsets {g[2:]}, expected {(channel_at, filter_at, pair_at)}")
        channel_at += g.n_channels
        filter_at += g.n_filters
        pair_at += g.n_channels * g.n_filters
    if filter_at != total or pair_at != pairs or sum(g.n_filters for g in groups) != live:
        raise _refuse("its sums do not agree with its groups")
    return PlanHeader(in_channels, out_channels, pairs, live, groups)


def decode(plan: Tensor) -> GroupLayout:
    """The layout that a plan tensor (1-D int32) was made from. The inverse of :meth:`GroupLayout.plan`.

    Raises TypeError for another dtype, ValueError for anything that is not a plan.
    """
    from .layout import GroupLayout

    header = read_header(plan)
    values = plan.tolist()
    groups = [
        (
            values[g.channel_offset : g.channel_offset + g.n_channels],
            values[g.filter_offset : g.filter_offset + g.n_filters],
        )
        for g in header.groups
    ]
    return GroupLayout(header.in_channels, header.out_channels, groups)


def runs(indices: Iterable[int]) -> list[tuple[int, int]]:
    """Maximal stretches of consecutive indices, in the given order, as (start, length).

    ``runs([4, 5, 6, 2, 3])`` is ``[(4, 3), (2, 2)]``.
    """
    out: list[tuple[int, int]] = []
    for i in indices:
        if out and out[-1][0] + out[-1][1] == i:
            out[-1] = (out[-1][0], out[-1][1] + 1)
        else:
            out.append((i, 1))
    return out


def _gray_rank(code: int) -> int:
    """The position of ``code`` in the reflected binary Gray code."""
    rank = 0
    while code:
        rank ^= code
        code >>= 1
    return rank


def _as_bits(membership: Sequence[int | Iterable[Hashable]]) -> tuple[list[int], int]:
    if all(isinstance(m, int) for m in membership):
        masks = [m for m in membership if isinstance(m, int)]
        if any(m < 0 for m in masks):
            raise ValueError(f"groups_membership: bit masks must not be negative, got {min(masks)}")
        return masks, max(masks, default=0).bit_length()
    if any(isinstance(m, int) for m in membership):
        raise TypeError("groups_membership must hold only bit masks or only sets of groups, got both")
    bit: dict[Hashable, int] = {}
    sets = [frozenset(m) for m in membership if not isinstance(m, int)]
    # Integers in their own order, anything else by first appearance: the result does not depend on hashing.
    names: list[Hashable] = [g for m in membership if not isinstance(m, int) for g in m]
    if all(isinstance(g, int) for g in names):
        names = sorted(set(names))  # type: ignore[type-var]
    for g in names:
        bit.setdefault(g, len(bit))
    return [sum(1 << bit[g] for g in s) for s in sets], len(bit)


def _total_runs(codes: Sequence[int], bits: int) -> int:
    """Runs of set bits, summed over bits, of a sequence of codes: each 0 -> 1 step of a bit starts one."""
    before, count = 0, 0
    for code in codes:
        count += (code & ~before).bit_count()
        before = code
    return count


def gray_order(groups_membership: Sequence[int | Iterable[Hashable]]) -> list[int]:
    """An order of channels in which each group's channels form few contiguous runs.

    ``groups_membership``: for each channel the groups that read it, as a bit mask or as a set. Channels with
    the same set (an *atom*) stay together in their old order; atoms follow a reflected Gray code, so
    neighbours differ in one group where all atoms are present: at most 2, 4, 8 runs over all groups for 2,
    3, 4 groups. Which group takes which bit is chosen to minimise the runs for up to five groups. Channels
    that nobody reads come last.

    Returns the old channel index for each new position. Raises TypeError or ValueError for negative or mixed
    masks.
    """
    masks, bits = _as_bits(groups_membership)
    atoms = sorted(set(masks) - {0})
    best = sorted(atoms, key=_gray_rank)
    if 2 <= bits <= _MAX_PERMUTED_GROUPS:
        fewest = _total_runs(best, bits)
        for permutation in permutations(range(bits)):
            position = {
                atom: _gray_rank(sum(1 << permutation[b] for b in range(bits) if atom >> b & 1))
                for atom in atoms
            }
            candidate = sorted(atoms, key=position.__getitem__)
            count = _total_runs(candidate, bits)
            if count < fewest:
                fewest, best = count, candidate
    rank = {atom: i for i, atom in enumerate(best)}
    rank[0] = len(best)
    return sorted(range(len(masks)), key=lambda i: rank[masks[i]])
