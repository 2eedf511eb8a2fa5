"""Beside Torch-Pruning: its importance with our groups, and our layers in its dependency graph.

``torch_pruning`` is imported where it is used and is no dependency of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dsp_kernels import GroupLayout

from .graph import clean_copy
from .nn import PackedConv2d, PermutedGroupedConv2d

__all__ = ["cut_channels", "cut_filters", "torch_pruning_importance", "torch_pruning_layers"]


def _kept(name: str, cut: Sequence[int], size: int) -> list[int]:
    gone = set(cut)
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < size for i in cut):
        raise ValueError(f"{name}: expected indices from 0 to {size - 1}, got {list(cut)!r}")
    kept = [i for i in range(size) if i not in gone]
    if not kept:
        raise ValueError(f"{name}: expected at least one to be left of {size}, got all of them")
    return kept


def _cut(layer: PermutedGroupedConv2d, filters: list[int], channels: list[int]) -> PermutedGroupedConv2d:
    """Keeps these filters and channels; a group that loses all its channels leaves its filters dead."""
    if layer.activation is not None:
        raise ValueError(
            "layer: BatchNorm, residual and activation are inside, so its channels depend on more than its "
            "input; prune a network packed with train=True, or prune before packing"
        )
    new_filter, new_channel = ({old: new for new, old in enumerate(kept)} for kept in (filters, channels))
    groups = []
    for of_channels, of_filters in layer.layout.groups:
        left = ([new_channel[c] for c in of_channels if c in new_channel],
                [new_filter[f] for f in of_filters if f in new_filter])  # fmt: skip
        if all(left):
            groups.append(left)
    layout = GroupLayout(len(channels), len(filters), groups)

    def packed(values: torch.Tensor) -> torch.Tensor:
        dense = layer.layout.unpack(values, layer.kernel_size)
        return layout.pack(dense[filters][:, channels])

    with torch.no_grad():
        weight = nn.Parameter(packed(layer.weight.detach()), layer.weight.requires_grad)
        if layer.weight.grad is not None:
            weight.grad = packed(layer.weight.grad)
        layer.weight = weight
        if layer.bias is not None:
            bias = nn.Parameter(layer.bias.detach()[filters].clone(), layer.bias.requires_grad)
            if layer.bias.grad is not None:
                bias.grad = layer.bias.grad[filters].clone()
            layer.bias = bias
    layer.layout, layer.plan = layout, layout.plan().clone().to(layer.plan.device)
    layer.in_channels, layer.out_channels = len(channels), len(filters)
    return layer


def cut_filters(layer: PermutedGroupedConv2d, filters: Sequence[int]) -> PermutedGroupedConv2d:
    """Takes filters (output channels, by number) out of a packed layer, in place.

    Raises ValueError for a number out of range, for all filters, and for a layer with an activation inside.
    """
    return _cut(layer, _kept("filters", filters, layer.out_channels), list(range(layer.in_channels)))


def cut_channels(layer: PermutedGroupedConv2d, channels: Sequence[int]) -> PermutedGroupedConv2d:
    """Takes input channels (by number) out of a packed layer, in place: each group loses those it reads.

    Raises as ``cut_filters`` does.
    """
    return _cut(layer, list(range(layer.out_channels)), _kept("channels", channels, layer.in_channels))


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(f"this needs Torch-Pruning: pip install torch-pruning ({error})") from error
    return torch_pruning


def torch_pruning_layers() -> dict[type[nn.Module], Any]:
    """Our layers for Torch-Pruning: pass as ``customized_pruners`` to its pruners and to
    ``DependencyGraph.build_dependency``.

    Without them it takes the packed weight of a ``PermutedGroupedConv2d`` for something else and cuts it
    wrongly. For networks packed with ``train=True``; a layer of a fused network is refused. Torch-Pruning
    then cuts whole channels; ``layout`` and weights of our layers follow, their groups stay.

    Raises ImportError where ``torch_pruning`` is not installed.
    """
    tp = _torch_pruning()

    class PackedPruner(tp.BasePruningFunc):  # type: ignore[name-defined]
        TARGET_MODULES: type[nn.Module] = PermutedGroupedConv2d

        def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
            return cut_filters(layer, idxs)

        def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
            return cut_channels(layer, idxs)

        def get_out_channels(self, layer: Any) -> int:
            return layer.out_channels

        def get_in_channels(self, layer: Any) -> int:
            return layer.in_channels

    plain = tp.pruner.function.ConvPruner()

    def planned(layer: Any) -> nn.Module:
        layout = GroupLayout(
            layer.in_channels, layer.out_channels, [(range(layer.in_channels), range(layer.out_channels))]
        )
        layer.plan = layout.plan().clone().to(layer.plan.device)
        return layer

    class DensePruner(PackedPruner):
        TARGET_MODULES = PackedConv2d

        def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
            return planned(plain.prune_out_channels(layer, idxs))

        def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
            return planned(plain.prune_in_channels(layer, idxs))

    return {PermutedGroupedConv2d: PackedPruner(), PackedConv2d: DensePruner()}


def torch_pruning_importance(
    model: nn.Module,
    assignment: Mapping[str, Any],
    importance: Callable[[Any], torch.Tensor | None] | None = None,
) -> dict[str, torch.Tensor]:
    """Torch-Pruning's importance of every input channel to every group of filters, for ``find_structure``.

    Args:
        model: the network; where the importance wants gradients (``TaylorImportance``), ``.grad`` holds those
            of the weights. Not changed.
        assignment: convolution name -> (O,) integer group of each filter.
        importance: one of ``torch_pruning.importance``; None: ``GroupMagnitudeImportance(p=2)``.

    Returns:
        Convolution name -> float64 (O, I): ``find_structure(..., importance=...)``. Summed over a group's
        filters, the importance of a channel to the group; over a filter's channels, a share of its group's in
        proportion to the filter's own importance.

    Raises:
        ImportError: ``torch_pruning`` is not installed. ValueError: a name that is no convolution, or an
        importance that gives none.
    """
    tp = _torch_pruning()
    measure = tp.importance.GroupMagnitudeImportance(p=2) if importance is None else importance
    masked = clean_copy(model)
    modules, originals = dict(masked.named_modules()), dict(model.named_modules())
    out: dict[str, torch.Tensor] = {}
    for name, groups in assignment.items():
        conv = modules.get(name)
        if not isinstance(conv, nn.Conv2d) or conv.groups != 1:
            raise ValueError(f"assignment: {name!r} is no plain convolution of the model")
        labels = torch.as_tensor(groups).cpu()
        original: Any = originals[name]
        parameter = getattr(original, "weight_orig", original.weight)
        gradient = parameter.grad
        result = torch.zeros(conv.weight.shape[:2], dtype=torch.float64)
        for group in labels.unique():
            rows = (labels == group).nonzero().flatten()
            size = (conv.kernel_size[0], conv.kernel_size[1])
            part = nn.Conv2d(conv.in_channels, len(rows), size, bias=False)
            part.weight = nn.Parameter(conv.weight.detach().cpu()[rows].clone())
            if gradient is not None:
                part.weight.grad = gradient.detach().cpu()[rows].clone()
            channels = _asked(tp, measure, part, tp.prune_conv_in_channels, conv.in_channels, name)
            filters = _asked(tp, measure, part, tp.prune_conv_out_channels, len(rows), name)
            total = filters.sum()
            shares = filters / total if bool(total > 0) else torch.full_like(filters, 1 / len(rows))
            result[rows] = shares[:, None] * channels
        out[name] = result
    return out


def _asked(tp: Any, measure: Any, part: nn.Conv2d, cut: Any, size: int, name: str) -> torch.Tensor:
    with torch.enable_grad():
        side = [(k - 1) * d + 1 for k, d in zip(part.kernel_size, part.dilation, strict=True)]
        graph = tp.DependencyGraph().build_dependency(
            nn.Sequential(part), example_inputs=torch.zeros(1, part.in_channels, *side)
        )
    try:
        given = measure(graph.get_pruning_group(part, cut, idxs=list(range(size))))
    except AttributeError:  # of the gradient that is None
        if part.weight.grad is not None:
            raise
        given = None
    if given is None or given.shape != (size,):
        raise ValueError(f"importance: gave nothing for {name!r}; does it want gradients?")
    return given.detach().double().clamp(min=0)
