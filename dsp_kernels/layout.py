"""Who reads what: the layout of a permuted, uneven grouped convolution, as pure data; and its plan, the same
as one tensor of integers.

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

import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .geometry import pair

__all__ = [
    "MAGIC",
    "GroupLayout",
    "decode",
    "encode",
    "gray_order",
    "read_header",
    "runs",
]

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


Indices = tuple[int, ...]


def _positive(name: str, value: object) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int of at least 1, got {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int of at least 1, got {value!r}") from None
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def _indices(name: str, values: object, limit: int) -> Indices:
    """``values`` as a tuple of distinct ints in [0, limit)."""
    if isinstance(values, Tensor | np.ndarray):
        kind = values.dtype
        if isinstance(kind, torch.dtype):
            integral = not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
        else:
            integral = np.issubdtype(kind, np.integer)
        if values.ndim != 1 or not (integral or values.shape[0] == 0):
            raise TypeError(
                f"{name} must be a 1-D sequence of integers, got {kind} of shape {tuple(values.shape)}"
            )
        values = values.tolist()
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of integers, got {values!r}")
    out = []
    for value in values:
        if isinstance(value, bool | np.bool_):
            raise TypeError(f"{name} must hold integers, got {value!r}")
        try:
            out.append(operator.index(value))
        except TypeError:
            raise TypeError(f"{name} must hold integers, got {value!r}") from None
    if out and not (min(out) >= 0 and max(out) < limit):
        bad = next(i for i in out if not 0 <= i < limit)
        raise ValueError(f"{name} holds index {bad}; accepted are 0 to {limit - 1}")
    if len(set(out)) != len(out):
        seen: set[int] = set()
        bad = next(i for i in out if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise ValueError(f"{name} holds index {bad} more than once")
    return tuple(out)


def _check_weight(name: str, weight: object) -> Tensor:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(weight).__name__}")
    return weight


def _check_groups(groups: object) -> None:
    if isinstance(groups, str | bytes) or not isinstance(groups, Iterable):
        raise TypeError(f"groups must be a sequence of (channels, filters), got {groups!r}")


def _bool_array(mask: object) -> np.ndarray:
    """A bool mask (filters, channels), tensor or array, as an array."""
    if not isinstance(mask, Tensor | np.ndarray):
        raise TypeError(f"mask must be a bool tensor, got {type(mask).__name__}")
    if mask.dtype not in (torch.bool, np.bool_):
        raise TypeError(f"mask must be a bool tensor, got {mask.dtype}")
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else mask
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"mask must have shape (out_channels, in_channels), each at least 1, got {tuple(array.shape)}"
        )
    return array


class GroupLayout:
    """Which input channels each group of filters reads. Immutable and hashable.

    ``in_channels``, ``out_channels``: ints, at least 1.
    ``groups``: a sequence of (channels, filters), each an index sequence (list, tuple, range, array or
    integer tensor), kept in the given order. Channel sets may overlap; a filter belongs to at most one
    group; a filter in no group is *dead*: its output is the bias (and residual) alone. A group without
    filters is allowed and has no weights.

    Raises ValueError or TypeError, naming the argument, for a size below 1, an index that is no integer, out
    of range or repeated in its group, a filter in two groups, and a group with filters but no channels.
    """

    in_channels: int
    out_channels: int
    groups: tuple[tuple[Indices, Indices], ...]
    pairs: int
    live_filters: Indices
    dead_filters: Indices
    used_channels: Indices
    _hash: int
    _plan: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, groups: Iterable[tuple[Iterable[int], Iterable[int]]]
    ) -> None:
        in_channels = _positive("in_channels", in_channels)
        out_channels = _positive("out_channels", out_channels)
        _check_groups(groups)
        checked: list[tuple[Indices, Indices]] = []
        owner: dict[int, int] = {}
        for g, group in enumerate(groups):
            if isinstance(group, str | bytes) or not isinstance(group, Sequence) or len(group) != 2:
                raise TypeError(f"groups[{g}] must be a pair (channels, filters), got {group!r}")
            channels = _indices(f"groups[{g}] channels", group[0], in_channels)
            filters = _indices(f"groups[{g}] filters", group[1], out_channels)
            if filters and not channels:
                raise ValueError(
                    f"groups[{g}] has filters {_short(filters)} but no channels; "
                    "dead filters belong to no group"
                )
            for f in filters:
                if f in owner:
                    raise ValueError(
                        f"groups[{g}] holds filter {f}, which groups[{owner[f]}] holds too; "
                        "a filter belongs to one group at most"
                    )
                owner[f] = g
            checked.append((channels, filters))
        values = encode(in_channels, out_channels, checked)
        fields = self.__dict__  # past __setattr__, which refuses
        fields["in_channels"] = in_channels
        fields["out_channels"] = out_channels
        fields["groups"] = tuple(checked)
        fields["pairs"] = sum(len(c) * len(f) for c, f in checked)
        fields["live_filters"] = tuple(sorted(owner))
        fields["dead_filters"] = tuple(f for f in range(out_channels) if f not in owner)
        fields["used_channels"] = tuple(
            sorted({c for channels, filters in checked if filters for c in channels})
        )
        fields["_hash"] = hash((in_channels, out_channels, fields["groups"]))
        # A real tensor whatever surrounds this call: kernels refuse fake ones, autograd refuses to save
        # those made in inference mode.
        with torch.inference_mode(False), unset_fake_temporarily():
            fields["_plan"] = torch.tensor(values, dtype=torch.int32, device="cpu")

    @classmethod
    def from_mask(cls, mask: Tensor, max_groups: int = 32) -> GroupLayout:
        """The layout of a mask: filters with equal rows form a group, in the order of their first filter.

        ``mask``: bool (out_channels, in_channels), tensor or array; True where a filter reads a channel.
        Filters with an empty row are dead. Raises TypeError for another dtype, ValueError for another shape
        and for more than ``max_groups`` distinct rows that are not empty.
        """
        max_groups = _positive("max_groups", max_groups)
        mask_array = _bool_array(mask)
        out_channels, in_channels = mask_array.shape
        rows: dict[bytes, list[int]] = {}
        for f, row in enumerate(np.packbits(mask_array, axis=1)):
            rows.setdefault(row.tobytes(), []).append(f)
        groups = [
            (np.flatnonzero(mask_array[fs[0]]).tolist(), fs)
            for fs in rows.values()
            if mask_array[fs[0]].any()
        ]
        if len(groups) > max_groups:
            raise ValueError(
                f"mask has {len(groups)} distinct rows that are not empty, max_groups is {max_groups}: "
                "it is not structured by groups, or max_groups must be raised"
            )
        return cls(in_channels, out_channels, groups)

    @classmethod
    def from_json(cls, obj: Any) -> GroupLayout:
        """The layout written by :meth:`to_json`. Raises ValueError or TypeError for anything else."""
        keys = {"in_channels", "out_channels", "groups"}
        if not isinstance(obj, dict) or set(obj) != keys:
            got = sorted(obj) if isinstance(obj, dict) else type(obj).__name__
            raise ValueError(f"a layout must be a dictionary with the keys {sorted(keys)}, got {got}")
        return cls(obj["in_channels"], obj["out_channels"], obj["groups"])

    def to_json(self) -> dict[str, Any]:
        """As lists and ints: ``{"in_channels", "out_channels", "groups": [[channels, filters], ...]}``."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "groups": [[list(channels), list(filters)] for channels, filters in self.groups],
        }

    def mask(self) -> Tensor:
        """bool (out_channels, in_channels): True where a filter reads a channel. A fresh CPU tensor."""
        out = torch.zeros(self.out_channels, self.in_channels, dtype=torch.bool, device="cpu")
        for channels, filters in self.groups:
            if channels and filters:
                rows = torch.tensor(filters, device="cpu")
                out[rows[:, None], torch.tensor(channels, device="cpu")] = True
        return out

    def weight_numel(self, kernel_size: int | Sequence[int]) -> int:
        """The length of the packed weight for a kernel size (int, or (height, width)).

        Raises TypeError or ValueError for another kernel size.
        """
        kh, kw = pair("kernel_size", kernel_size, 1)
        return self.pairs * kh * kw

    def _pair_index(self, device: torch.device) -> Tensor:
        """int64 (pairs,): filter * in_channels + channel of every pair, in packed order."""
        parts = [
            torch.tensor(filters, dtype=torch.int64, device="cpu")[:, None] * self.in_channels
            + torch.tensor(channels, dtype=torch.int64, device="cpu")
            for channels, filters in self.groups
            if filters
        ]
        flat = [p.reshape(-1) for p in parts] or [torch.empty(0, dtype=torch.int64, device="cpu")]
        return torch.cat(flat).to(device)

    def pack(self, weight: Tensor) -> Tensor:
        """The weights that are read, in the order the kernels expect.

        ``weight``: (out_channels, in_channels, kh, kw), any dtype and device. Returns a new 1-D tensor of
        ``weight_numel((kh, kw))`` elements, same dtype and device: groups in order, each (filters, channels,
        kh, kw) row-major. Differentiable. Raises TypeError for something that is no tensor, ValueError for
        another shape.
        """
        weight = _check_weight("weight", weight)
        expected = (self.out_channels, self.in_channels)
        if weight.dim() != 4 or tuple(weight.shape[:2]) != expected:
            raise ValueError(
                f"weight must have shape ({expected[0]}, {expected[1]}, kh, kw), got {tuple(weight.shape)}"
            )
        kh, kw = weight.shape[2:]
        rows = weight.reshape(expected[0] * expected[1], kh * kw)
        return rows.index_select(0, self._pair_index(weight.device)).reshape(-1)

    def unpack(self, packed: Tensor, kernel_size: int | Sequence[int]) -> Tensor:
        """The dense weight (out_channels, in_channels, kh, kw) of a packed one, zeros where pruned.

        ``packed``: 1-D of ``weight_numel(kernel_size)`` elements, any dtype and device. The inverse of
        :meth:`pack`; differentiable. Raises TypeError for something that is no tensor, ValueError for
        another shape.
        """
        packed = _check_weight("packed", packed)
        kh, kw = pair("kernel_size", kernel_size, 1)
        if packed.dim() != 1 or packed.numel() != self.pairs * kh * kw:
            raise ValueError(
                f"packed must be 1-D with {self.pairs * kh * kw} elements ({self.pairs} pairs, "
                f"kernel {kh}x{kw}), got shape {tuple(packed.shape)}"
            )
        dense = packed.new_zeros(self.out_channels * self.in_channels, kh * kw)
        index = self._pair_index(packed.device)
        dense = dense.index_copy(0, index, packed.reshape(self.pairs, kh * kw))
        return dense.reshape(self.out_channels, self.in_channels, kh, kw)

    def plan(self) -> Tensor:
        """The layout as one 1-D int32 CPU tensor (the module's text describes it).

        The same tensor at each call; do not write to it. A module that keeps it as a buffer should keep a
        clone.
        """
        return self._plan

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"GroupLayout is immutable: {name} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"GroupLayout is immutable: {name} cannot be deleted")

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, GroupLayout):
            return NotImplemented
        return (
            self._hash == other._hash
            and self.in_channels == other.in_channels
            and self.out_channels == other.out_channels
            and self.groups == other.groups
        )

    def __hash__(self) -> int:
        return self._hash

    def __copy__(self) -> GroupLayout:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupLayout:
        return self

    def __reduce__(self) -> tuple[Callable[..., GroupLayout], tuple[Any, ...]]:
        return GroupLayout, (self.in_channels, self.out_channels, self.groups)

    def __repr__(self) -> str:
        shown = ", ".join(f"{len(channels)}->{len(filters)}" for channels, filters in self.groups)
        dead = f", {len(self.dead_filters)} dead" if self.dead_filters else ""
        return f"GroupLayout({self.in_channels}, {self.out_channels}, groups=[{shown}]{dead})"


def _short(values: Sequence[int]) -> str:
    shown = ", ".join(str(v) for v in values[:4])
    return f"[{shown}, ... {len(values)} in all]" if len(values) > 4 else f"[{shown}]"


def decode(plan: Tensor) -> GroupLayout:
    """The layout that a plan tensor (1-D int32) was made from. The inverse of :meth:`GroupLayout.plan`.

    Raises TypeError for another dtype, ValueError for anything that is not a plan.
    """
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
