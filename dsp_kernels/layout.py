"""Who reads what: the layout of a permuted, uneven grouped convolution, as pure data."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .plan import encode

__all__ = ["GroupLayout"]

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


def _kernel_size(kernel_size: object) -> tuple[int, int]:
    if isinstance(kernel_size, Sequence) and not isinstance(kernel_size, str | bytes):
        if len(kernel_size) != 2:
            raise ValueError(f"kernel_size must be an int or two ints, got {kernel_size!r}")
        return _positive("kernel_size", kernel_size[0]), _positive("kernel_size", kernel_size[1])
    size = _positive("kernel_size", kernel_size)
    return size, size


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
        kh, kw = _kernel_size(kernel_size)
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
        kh, kw = _kernel_size(kernel_size)
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
        """The layout as one 1-D int32 CPU tensor (:mod:`dsp_kernels.plan` describes it).

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
