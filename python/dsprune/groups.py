"""Groups of filters without training: filters that need the same channels belong together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import second_moments, squared_sums
from .graph import as_inputs, clean_copy, prunable_convs

__all__ = ["group_filters"]

STARTS = 16
ROUNDS = 100  # at most; every round but the last one gains
MOVED = 1 << 16  # filters x groups x channels of a layer up to which single filters move


def group_filters(
    model: nn.Module,
    example_input: Any,
    groups: int,
    batches: Any = None,
    *,
    cut: float = 0.5,
    exclude: Sequence[str] = (),
    starts: int = STARTS,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Groups the filters of each prunable convolution by the channels that they need, with no training.

    With E (O filters, I channels) the sum of W² over the taps, times the mean of x² over the calibration
    inputs of each channel where ``batches`` are given, and k channels left to each group, the groups maximise

        Σ_g max over sets C of k channels of Σ_{c in C} Σ_{o in g} E[o, c],

    what is kept of E. Filters and channel sets take turns as in k-means: each set is the k best channels of
    its group, each filter goes where most of its row is kept. Neither lowers the sum, which is exact. In
    small layers single filters then move as long as that gains. The best of ``starts`` beginnings is taken.

    Args:
        model: the trained network, float; not changed.
        example_input: a tensor (N, C, H, W), or a tuple of positional arguments.
        groups: the number of groups in each layer; a layer with fewer filters has one filter in each.
        batches: inputs to calibrate on, an iterable whose entries are as ``example_input``.
        cut: the share of channels that each group is to lose, in (0, 1); k is what is left, 1 at least.
        exclude: names of convolutions to leave out.
        starts: how many beginnings to try: half of them random balanced groups, half the channel sets of
            random filters.
        seed: of what is random. The result depends on nothing else.

    Returns:
        Convolution name -> (O,) int64 group of each filter, for ``find_structure``. Every group has a filter;
        groups are numbered by their first one.

    Raises:
        ValueError, TypeError: bad arguments, or weights or inputs that are not finite.

    Source: the importance is that of Park et al., AAAI 2023, at equal shares for all groups; weighted by
    activations as in Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR
    2024; the alternation is Lloyd's.
    """
    groups, starts = _count("groups", groups), _count("starts", starts)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an integer, got {type(seed).__name__}")
    if isinstance(cut, bool) or not isinstance(cut, (int, float)):
        raise TypeError(f"cut: expected a number between 0 and 1, got {cut!r}")
    if not 0 < cut < 1:
        raise ValueError(f"cut: expected the share of channels to lose, between 0 and 1, got {cut!r}")
    if isinstance(exclude, str):
        raise TypeError(f"exclude: expected a sequence of convolution names, got the string {exclude!r}")
    inner = clean_copy(model)
    inputs = as_inputs(example_input)
    infos = {info.name: info for info in prunable_convs(inner, inputs)}
    for name in exclude:
        if name not in infos:
            raise ValueError(
                f"exclude: {name!r} is no prunable convolution of the model; there are {sorted(infos)}"
            )
    names = [name for name in infos if name not in exclude]
    if not names:
        raise ValueError("model: no convolution to group")
    energies = {}
    for name in names:
        weight = inner.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        if not bool(weight.isfinite().all()):
            raise ValueError(f"model: the weight of {name!r} is not finite")
        energies[name] = squared_sums(weight)
    if batches is not None:
        moments = second_moments(inner, names, batches)
        energies = {name: energy * moments[name] for name, energy in energies.items()}
    generator = torch.Generator().manual_seed(seed)
    return {name: cluster(energies[name], groups, cut, starts, generator) for name in names}


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value}")
    return value


def kept_channels(channels: int, cut: float) -> int:
    """k: how many channels a group keeps."""
    return max(1, round((1 - cut) * channels))


def kept_energy(energy: Tensor, member: Tensor, groups: int, keep: int) -> Tensor:
    """The objective (R,): what groupings ``member`` (R, O) keep of ``energy`` (O, I), k = ``keep``."""
    sums = _one_hot(member, groups) @ energy
    return sums.topk(keep, dim=2).values.sum((1, 2))


def _one_hot(member: Tensor, groups: int) -> Tensor:
    """(R, G, O) in float64."""
    return (member[:, None, :] == torch.arange(groups)[:, None]).double()


def cluster(energy: Tensor, groups: int, cut: float, starts: int, generator: torch.Generator) -> Tensor:
    """(O,) the best grouping found of the rows of ``energy`` (O, I), float64, not negative."""
    filters, channels = energy.shape
    groups = min(groups, filters)
    keep = kept_channels(channels, cut)
    if groups == 1 or keep == channels:
        order = torch.arange(filters)
        return (order * groups) // filters
    peak = float(energy.max())
    energy = energy / peak if peak > 0 else energy
    order = torch.rand(starts, filters, generator=generator, dtype=torch.float64).argsort(1)
    # Half of the starts: balanced groups. The others: the best channels of as many filters.
    member = torch.empty_like(order).scatter_(1, order, (torch.arange(filters) % groups).expand_as(order))
    seeds = energy[order[starts // 2 :, :groups]].topk(keep, dim=2).indices
    member[starts // 2 :] = _nearest(energy, seeds)
    best = torch.full((starts,), -1.0, dtype=torch.float64)
    found = member = _filled(member, energy, groups, keep)
    for _ in range(ROUNDS):
        kept = (_one_hot(member, groups) @ energy).topk(keep, dim=2)
        value = kept.values.sum((1, 2))
        better = value > best * (1 + 1e-12)
        if not bool(better.any()):
            break
        found = torch.where(better[:, None], member, found)
        best = torch.where(better, value, best)
        member = _filled(_nearest(energy, kept.indices), energy, groups, keep)
    if filters * groups * channels <= MOVED:
        found = torch.stack([_moved(energy, row, groups, keep) for row in found.unique(dim=0)])
        best = kept_energy(energy, found, groups, keep)
    return _renumbered(found[int(best.argmax())])


def _nearest(energy: Tensor, sets: Tensor) -> Tensor:
    """(R, O): for each filter the first of the channel sets (R, G, k) that keeps most of it."""
    mask = torch.zeros(*sets.shape[:2], energy.shape[1], dtype=energy.dtype).scatter_(2, sets, 1.0)
    return (mask @ energy.t()).argmax(1)


def _filled(member: Tensor, energy: Tensor, groups: int, keep: int) -> Tensor:
    """``member`` with a filter in every group: an empty one takes the filter that gains most alone."""
    counts = _one_hot(member, groups).sum(2)
    member = member.clone()
    alone = energy.topk(keep, dim=1).values.sum(1)
    for row in (counts == 0).any(1).nonzero().flatten().tolist():
        for group in (counts[row] == 0).nonzero().flatten().tolist():
            own = member[row : row + 1]
            sums = (_one_hot(own, groups) @ energy)[0]
            mask = torch.zeros_like(sums).scatter_(1, sums.topk(keep, dim=1).indices, 1.0)
            gain = alone - (mask[own[0]] * energy).sum(1)
            gain[counts[row][own[0]] < 2] = -1.0  # the last one of its group stays
            taken = int(gain.argmax())
            counts[row, own[0, taken]] -= 1
            member[row, taken] = group
            counts[row, group] += 1
    return member


def _moved(energy: Tensor, member: Tensor, groups: int, keep: int) -> Tensor:
    """``member`` (O,) after moving single filters as long as the objective gains by it, both groups' channels
    chosen anew for each move: the exchanges that taking turns does not see."""
    filters = len(member)
    member = member.clone()
    for _ in range(4 * filters):
        hot = _one_hot(member[None], groups)[0]
        sums = hot @ energy
        now = sums.topk(keep, dim=1).values.sum(1)
        without = (sums[member] - energy).topk(keep, dim=1).values.sum(1)  # of each filter's own group
        joined = (sums[None] + energy[:, None]).topk(keep, dim=2).values.sum(2)  # (O, G)
        gain = joined - now + (without - now[member])[:, None]
        gain[torch.arange(filters), member] = 0.0
        gain[hot.sum(1)[member] < 2] = 0.0
        place = int(gain.argmax())
        if float(gain.flatten()[place]) <= 1e-12 * float(now.sum()):
            break
        member[place // groups] = place % groups
    return member


def _renumbered(member: Tensor) -> Tensor:
    """Groups numbered in the order of their first filters."""
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(group, len(numbers)) for group in member.tolist()])
