"""What a network needs: multiply-accumulates and parameters, layer by layer, dense, masked or packed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .counting import work_of
from .graph import as_inputs, clean_copy, owner_of, unwrap
from .latency import Latency
from .lower import iterate_layers
from .nn import PermutedGroupedConv2d
from .pack import PackedNetwork
from .structure import MaskCounter, Structure

__all__ = ["LayerSummary", "Summary", "summary"]


@dataclass(frozen=True)
class LayerSummary:
    """One layer: MACs of one image and weights, dense and left. ``groups`` counts its groups of filters.

    ``kind`` is ``"conv"`` (a ``Conv2d``), ``"linear"`` or ``"other"``, from which nothing is removed.
    Products whose factors are both computed stand under their operator's name, in brackets.
    """

    name: str
    kind: str
    dense_macs: int
    macs: int
    dense_weights: int
    weights: int
    groups: int
    prunable: bool


@dataclass(frozen=True)
class Summary:
    """MACs of one image and parameters of a network; ``str()`` is a table.

    ``macs`` and ``params`` are what the structure needs, ``dense_macs`` and ``dense_params`` what the dense
    network has. Multiply-accumulates are those of ``torch.utils.flop_counter.FlopCounterMode``, halved:
    convolutions, linear layers and matrix products of any kind; ``uncounted`` names the operators that
    multiply and that torch has no formula for, with how often each runs. ``params`` takes the removed weights
    of convolutions and linear layers off all parameters. ``latency`` is what a latency target came to, where
    a structure found for one was given.
    """

    layers: tuple[LayerSummary, ...]
    dense_params: int
    packed: bool
    latency: Latency | None = None
    uncounted: dict[str, int] = field(default_factory=dict)

    def _of(self, count: str) -> Iterator[LayerSummary]:
        if count not in ("network", "prunable"):
            raise ValueError(f"count: expected 'network' or 'prunable', got {count!r}")
        return (layer for layer in self.layers if count == "network" or layer.prunable)

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def dense_macs(self) -> int:
        return sum(layer.dense_macs for layer in self.layers)

    @property
    def params(self) -> int:
        return self.dense_params - sum(layer.dense_weights - layer.weights for layer in self.layers)

    def flops_cut(self, count: str = "network") -> float:
        """The fraction of MACs removed, of the whole ``"network"`` or of its ``"prunable"`` convolutions."""
        dense = sum(layer.dense_macs for layer in self._of(count))
        return 1 - sum(layer.macs for layer in self._of(count)) / dense if dense else 0.0

    def params_cut(self, count: str = "network") -> float:
        """The fraction of parameters removed, of the whole ``"network"`` or of its ``"prunable"``
        convolutions.
        """
        if count == "network":
            return 1 - self.params / self.dense_params if self.dense_params else 0.0
        dense = sum(layer.dense_weights for layer in self._of(count))
        return 1 - sum(layer.weights for layer in self._of(count)) / dense if dense else 0.0

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [len("prunable convolutions")])
        head = (
            f"{'layer':<{width}}  {'groups':>6}  {'dense MACs':>14}  {'MACs':>14}  {'cut %':>6}  "
            f"{'weights':>11}  {'cut %':>6}"
        )
        lines = [head, "-" * len(head)]

        def row(name: str, groups: str, dense: int, macs: int, dense_weights: int, weights: int) -> str:
            cuts = [
                100 * (1 - left / full) if full else 0.0
                for left, full in ((macs, dense), (weights, dense_weights))
            ]
            return (
                f"{name:<{width}}  {groups:>6}  {dense:>14,}  {macs:>14,}  {cuts[0]:>6.2f}  "
                f"{weights:>11,}  {cuts[1]:>6.2f}"
            )

        for layer in self.layers:
            lines.append(
                row(
                    layer.name or "(model)",
                    str(layer.groups),
                    layer.dense_macs,
                    layer.macs,
                    layer.dense_weights,
                    layer.weights,
                )
            )
        lines.append("-" * len(head))
        prunable = list(self._of("prunable"))
        totals = [
            sum(getattr(layer, key) for layer in prunable)
            for key in ("dense_macs", "macs", "dense_weights", "weights")
        ]
        lines.append(row("prunable convolutions", "", *totals))
        lines.append(row("whole network", "", self.dense_macs, self.macs, self.dense_params, self.params))
        if self.uncounted:
            named = ", ".join(f"{name} ({times})" for name, times in sorted(self.uncounted.items()))
            lines.append(f"not counted, torch has no formula: {named}")
        if self.latency is not None:
            lines += ["", str(self.latency)]
        return "\n".join(lines)


def _groups_of(mask: torch.Tensor) -> int:
    rows = mask[mask.any(1)]
    return int(rows.unique(dim=0).shape[0]) if rows.numel() else 0


def _measured(
    packed: PackedNetwork, image: tuple[Any, ...], names: set[str]
) -> dict[str, tuple[int, int, int]]:
    """(MACs of one image, weights, groups) of each packed layer by its dense name, as its layers run."""
    image, _ = packed.bind(image)
    network = packed.network_for(image)
    layers = dict(iterate_layers(network, dense_names=False))
    found: dict[str, tuple[int, int, int]] = {}
    with torch.no_grad():
        work = work_of(network, image)
    for owners, macs in work.macs.items():
        paths = [owner_of(owner) for owner in owners]
        layer = next((layers[path] for path in paths if path in layers), None)
        name = getattr(layer, "dense_name", next((path for path in paths if path in names), paths[0]))
        groups, weights = 1, 0
        if isinstance(layer, PermutedGroupedConv2d):
            groups = len(layer.layout.groups)
        elif layer is not None:
            groups = int(getattr(layer, "groups", 1))
        if layer is not None:
            weights = layer.weight.numel()  # type: ignore[operator]
        elif not name.startswith("("):
            weights = next(p.numel() for n, p in network.named_parameters() if n in owners)
        known = found.get(name, (0, 0, 0))
        found[name] = (known[0] + macs, weights, groups)
    return found


def summary(model: nn.Module, example_input: Any, *, structure: Structure | None = None) -> Summary:
    """Counts what a network needs at the image size of ``example_input``.

    Args:
        model: a dense, masked (``torch.nn.utils.prune`` or plain zeros) or packed network. For the first two,
            what its zeros leave to compute is counted, dead filters and channels left out; for a packed one,
            what its layers do.
        example_input: a tensor (N, C, H, W), or a tuple of positional arguments.
        structure: what ``find_structure`` gave; where its target was a latency, the table ends with what was
            predicted and measured.

    Returns:
        A ``Summary``: ``.macs``, ``.dense_macs`` (multiply-accumulates of one image), ``.params``,
        ``.dense_params``, ``.flops_cut(count)``, ``.params_cut(count)``; ``str()`` is a table with both ways
        of counting.

    Raises:
        TypeError: ``model`` is no module, ``example_input`` holds no tensor, or ``structure`` is none.
    """
    inner = unwrap(model)
    inputs = as_inputs(example_input)
    if structure is not None and not isinstance(structure, Structure):
        raise TypeError(f"structure: expected a Structure, got {type(structure).__name__}")
    dense = inner.dense_model() if isinstance(inner, PackedNetwork) else clean_copy(inner)
    counter = MaskCounter(dense, inputs)
    counts = counter.count({})
    pairs, _ = counter.pairs({})
    measured = _measured(inner, counter.image, set(counts.macs)) if isinstance(inner, PackedNetwork) else None
    linear = {site.name for site in counter.graph.sites if site.kind == "linear"} if counter.graph else set()
    convs = pairs.keys() - linear
    rows = []
    for name in [*counts.macs, *((measured or {}).keys() - counts.macs.keys())]:
        groups = _groups_of(pairs[name]) if name in pairs else 1
        macs, weights = counts.macs.get(name, 0), counts.weights.get(name, 0)
        if measured is not None:
            macs, weights, groups = measured.get(name, (0, 0, 0))
        rows.append(
            LayerSummary(
                name,
                "linear" if name in linear else "conv" if name in convs else "other",
                counts.dense_macs.get(name, 0),
                macs,
                counts.dense_weights.get(name, 0),
                weights,
                groups,
                name in counts.prunable,
            )
        )
    latency = None if structure is None else structure.latency
    return Summary(
        tuple(rows), counts.all_params, measured is not None, latency, dict(counter.work.uncounted)
    )
