"""What to remove for a target, and how to mask a network accordingly (design of Park et al., AAAI 2023).

Importance of channel c to group g is the sum of W² over the group's filters, normalised over c. Channels are
sorted, their shares summed up from the least, and those whose sum stays below one threshold β, common to the
whole network, are dropped. The last convolution of a residual block loses whole filters by the same rule. β
follows from the target by bisection, with liveness counted in. A latency target has a threshold a layer, by
the times that ``latency.py`` measures.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from dsp_kernels import GroupLayout
from dsp_kernels.geometry import Geometry

from . import calibration
from . import latency as timing
from .counting import one_image
from .graph import (
    ConvInfo,
    ExportError,
    NetworkGraph,
    as_inputs,
    clean_copy,
    hooked_infos,
    owner_of,
    trace,
    unwrap,
)
from .liveness import Liveness, analyse

__all__ = ["Structure", "apply_structure", "find_structure"]

PRECISION = 1e-6  # of the threshold


@dataclass(frozen=True)
class Structure(Mapping[str, GroupLayout]):
    """Who reads what, per convolution name; made by ``find_structure``.

    ``flops_cut`` and ``params_cut`` are the fractions removed, by the way of counting asked for;
    ``threshold`` is β. For a latency target ``latency`` says what was predicted and measured, β is one a
    layer, in ``thresholds``, and ``threshold`` the largest of them.
    """

    layouts: dict[str, GroupLayout]
    threshold: float
    flops_cut: float
    params_cut: float
    count: str
    thresholds: dict[str, float] | None = None
    latency: timing.Latency | None = None

    def __getitem__(self, name: str) -> GroupLayout:
        return self.layouts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layouts)

    def __len__(self) -> int:
        return len(self.layouts)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain types, for ``json.dump``; ``from_json`` is its inverse."""
        data: dict[str, Any] = {
            "threshold": self.threshold,
            "flops_cut": self.flops_cut,
            "params_cut": self.params_cut,
            "count": self.count,
            "layouts": {name: layout.to_json() for name, layout in self.layouts.items()},
        }
        if self.latency is not None:
            data |= {"thresholds": self.thresholds, "latency": self.latency.to_json()}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Structure:
        """Raises ValueError where ``data`` does not describe a structure."""
        try:
            layouts = {str(name): GroupLayout.from_json(value) for name, value in data["layouts"].items()}
            return cls(
                layouts,
                float(data["threshold"]),
                float(data["flops_cut"]),
                float(data["params_cut"]),
                str(data["count"]),
                {str(k): float(v) for k, v in data["thresholds"].items()} if "thresholds" in data else None,
                timing.Latency.from_json(data["latency"]) if "latency" in data else None,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"data: not a structure ({error!r})") from error


def drop_below(importance: torch.Tensor, threshold: float) -> torch.Tensor:
    """Bool (n,): what to keep of n importances (non-negative) at threshold β in [0, 1).

    The least important go first, as long as the sum of their shares stays below β. The most important one
    stays unless all importances are zero.
    """
    total = importance.sum()
    if not bool(total > 0):
        return torch.zeros(importance.shape, dtype=torch.bool)
    order = torch.argsort(importance, stable=True)
    shares = torch.cumsum(importance[order] / total, 0)
    keep = torch.ones(importance.shape, dtype=torch.bool)
    keep[order] = shares >= threshold
    keep[order[-1]] = True
    return keep & importance.gt(0)


class MaskCounter:
    """MACs and weights of a masked network, with liveness; traced once, counted often."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.graph: NetworkGraph | None = None
        try:
            self.graph = trace(model, inputs)
            self.infos = self.graph.infos()
        except ExportError:
            self.infos = hooked_infos(model, inputs)
        self.prunable = {info.name for info in self.infos if info.prunable}
        self.model = model
        self.all_params = sum(p.numel() for p in model.parameters())
        self.image, self.work = one_image(model, inputs)

    def weight_name(self, name: str) -> str:
        return f"{name}.weight" if name else "weight"

    def pairs(self, masks: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Liveness | None]:
        """Live (O, I) products per layer name (convolutions and linear layers)."""
        if self.graph is None:
            out = {}
            for info in self.infos:
                weight = self.model.get_parameter(self.weight_name(info.name)).detach()
                out[info.name] = weight.flatten(2).ne(0).any(-1).cpu()
                if self.weight_name(info.name) in masks:
                    out[info.name] &= masks[self.weight_name(info.name)]
            return out, None
        live = analyse(self.graph, masks)
        pairs: dict[str, torch.Tensor] = {}
        for site in self.graph.sites:
            mask = live.pairs[site.node]
            pairs[site.name] = pairs[site.name] | mask if site.name in pairs else mask
        return pairs, live

    def count(self, masks: Mapping[str, torch.Tensor]) -> Count:
        pairs, _ = self.pairs(masks)
        full: dict[str, tuple[int, int]] = {}  # products of a filter and a channel, and taps
        for layer in self.infos if self.graph is None else self.graph.sites:
            taps = layer.kernel_size[0] * layer.kernel_size[1]
            full[layer.name] = (layer.out_channels * layer.in_channels // layer.groups, taps)
        dense = dict.fromkeys(full, 0)
        for names, count in self.work.macs.items():
            owners = [owner_of(name) for name in names]
            name = next((owner for owner in owners if owner in full), owners[0])
            dense[name] = dense.get(name, 0) + count
        macs, weights, dense_weights = dict(dense), {}, {}
        sizes = {owner_of(name): p.numel() for name, p in self.model.named_parameters()}
        for name in dense:
            if name in full:
                (products, taps), live = full[name], int(pairs[name].sum())
                macs[name] = dense[name] * live // products
                weights[name], dense_weights[name] = live * taps, products * taps
            else:
                weights[name] = dense_weights[name] = sizes.get(name, 0)
        return Count(macs, dense, weights, dense_weights, self.all_params, frozenset(self.prunable))


@dataclass(frozen=True)
class Count:
    """MACs of one image and weights per layer name, as the structure needs them and dense.

    Products whose factors are both computed stand under their operator's name, in brackets.
    """

    macs: dict[str, int]
    dense_macs: dict[str, int]
    weights: dict[str, int]
    dense_weights: dict[str, int]
    all_params: int
    prunable: frozenset[str]

    def flops_cut(self, count: str) -> float:
        names = self.prunable if count == "prunable" else self.macs.keys()
        dense = sum(self.dense_macs[n] for n in names)
        return 1 - sum(self.macs[n] for n in names) / dense if dense else 0.0

    def params_cut(self, count: str) -> float:
        names = self.prunable if count == "prunable" else self.weights.keys()
        removed = sum(self.dense_weights[n] - self.weights[n] for n in names)
        dense = sum(self.dense_weights[n] for n in names) if count == "prunable" else self.all_params
        return removed / dense if dense else 0.0


def counted(model: nn.Module, example_input: Any) -> tuple[MaskCounter, Count]:
    """The counter of a network and its count as it stands."""
    counter = MaskCounter(clean_copy(model), as_inputs(example_input))
    return counter, counter.count({})


def _check_target(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number between 0 and 1, got {value!r}")
    if not 0 < value < 1:
        raise ValueError(
            f"{name}: expected the fraction {'left' if name == 'latency' else 'to remove'}, between 0 and 1 "
            f"(both excluded), got {value!r}"
        )
    return float(value)


def _check_assignment(
    assignment: Mapping[str, Any], infos: Mapping[str, ConvInfo], exclude: Sequence[str]
) -> dict[str, torch.Tensor]:
    if not isinstance(assignment, Mapping):
        raise TypeError(
            f"assignment: expected a mapping of convolution names, got {type(assignment).__name__}"
        )
    if isinstance(exclude, str):
        raise TypeError(f"exclude: expected a sequence of convolution names, got the string {exclude!r}")
    for name in exclude:
        if name not in infos:
            raise ValueError(f"exclude: {name!r} is no convolution of the model; there are {sorted(infos)}")
    checked: dict[str, torch.Tensor] = {}
    for name, value in assignment.items():
        if name not in infos:
            raise ValueError(
                f"assignment: {name!r} is no convolution of the model; there are {sorted(infos)}"
            )
        info = infos[name]
        if info.groups != 1:
            raise ValueError(
                f"assignment: {name!r} has {info.groups} groups already; only plain convolutions are pruned"
            )
        groups = torch.as_tensor(value).detach().cpu()
        if groups.is_floating_point() or groups.dtype == torch.bool or groups.is_complex():
            raise TypeError(f"assignment[{name!r}]: expected integer group numbers, got {groups.dtype}")
        if tuple(groups.shape) != (info.out_channels,):
            raise ValueError(
                f"assignment[{name!r}]: expected shape ({info.out_channels},), one group a filter, "
                f"got {tuple(groups.shape)}"
            )
        if bool((groups < 0).any()):
            raise ValueError(f"assignment[{name!r}]: expected group numbers from 0, got {int(groups.min())}")
        if name not in exclude:
            checked[name] = groups.long()
    if not checked:
        raise ValueError("assignment: names no convolution to prune")
    return checked


def _check_importance(name: str, value: Any, shape: torch.Size) -> torch.Tensor:
    given = torch.as_tensor(value).detach().double().cpu()
    if given.shape != shape:
        raise ValueError(
            f"importance[{name!r}]: expected shape {tuple(shape)}, filters and channels, "
            f"got {tuple(given.shape)}"
        )
    if not bool((given.isfinite() & given.ge(0)).all()):
        raise ValueError(f"importance[{name!r}]: expected finite numbers of at least 0")
    return given


def find_structure(
    model: nn.Module,
    example_input: Any,
    assignment: Mapping[str, Any],
    *,
    flops: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    count: str = "network",
    exclude: Sequence[str] = (),
    importance: str | Mapping[str, torch.Tensor] = "magnitude",
    batches: Any = None,
    closure: calibration.Closure | None = None,
    against: str = "eager",
    cache: bool | str | os.PathLike[str] = True,
) -> Structure:
    """Finds what to remove so that a target is met: exactly one of ``flops``, ``params`` and ``latency``.

    FLOPs and parameters have one threshold for the whole network. For a latency each layer has its own: the
    structure that keeps the most importance in that time, by times of the layers measured here. The network
    is then packed and timed beside the dense one, and the search corrected until they agree within a
    twentieth or eight rounds are over.

    Args:
        model: the network, float; zeros and prune masks that it has already stay. Not changed.
        example_input: a tensor (N, C, H, W), or a tuple of positional arguments; FLOPs are counted at this
            image size.
        assignment: convolution name -> (O,) integer group of each filter, as ``GroupLearner.assignment()``
            gives it.
        flops: the fraction of multiply-accumulates to remove, in (0, 1).
        params: the fraction of parameters to remove, in (0, 1).
        latency: the time that the packed network may take, as a fraction of the dense network's, in (0, 1);
            on the model's device, with the threads that are set, at the batch and image size of
            ``example_input``.
        count: ``"network"`` counts the whole network, ``"prunable"`` the prunable convolutions only.
        exclude: names of convolutions to leave dense.
        importance: of each product of a filter and a channel. ``"magnitude"``: the sum of W² over the taps.
            ``"activation"``: that times the mean of x² of the channel over ``batches``. ``"taylor"``: the
            mean over ``batches`` of (Σ_taps W ∂loss/∂W)². Or convolution name -> (O, I) importances of your
            own, not negative; convolutions that these lack keep the sum of W².
        batches: for ``"activation"`` an iterable of inputs, as ``example_input``; for ``"taylor"`` of
            whatever ``closure`` takes. The model runs on them in evaluation mode.
        closure: for ``"taylor"``: a function from a batch to the loss of ``model`` on it, forward only.
        against: what the dense network's time is, for ``latency``: ``"eager"``: the model as it is;
            ``"packed"``: the model packed without pruning.
        cache: the JSON file that keeps layers' times, by device, dtype, threads and shape; True: one in the
            user's cache folder (``dsprune.latency.cache_file()``), False: none.

    Returns:
        A ``Structure``: ``structure[name]`` is the ``GroupLayout`` of each convolution in ``assignment``. The
        least cut that reaches the target. ``structure.latency`` holds what was predicted and measured; a
        warning says where the measured time is not within a tenth of the target.

    Raises:
        ValueError, TypeError: bad arguments, or a target beyond what the rule can remove (the text says how
            far it goes).
        PackError: for ``latency``, the packed network does not compute what the dense one does.

    Source: Park et al., "Dynamic Structure Pruning for Compressing CNNs", AAAI 2023, section on group channel
    pruning. Activation: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR
    2024, squared. Taylor: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019.
    """
    targets = {"flops": flops, "params": params, "latency": latency}
    if sum(value is not None for value in targets.values()) != 1:
        given = ", ".join(f"{name}={value!r}" for name, value in targets.items())
        raise ValueError(f"flops, params, latency: expected exactly one of them, got {given}")
    kind, value = next((name, value) for name, value in targets.items() if value is not None)
    goal = _check_target(kind, value)
    if against not in timing.AGAINST:
        raise ValueError(f"against: expected one of {list(timing.AGAINST)}, got {against!r}")
    kept_curves = timing.as_cache(cache)
    if count not in ("network", "prunable"):
        raise ValueError(f"count: expected 'network' or 'prunable', got {count!r}")
    inputs = as_inputs(example_input)
    counter = MaskCounter(clean_copy(model), inputs)
    infos = {info.name: info for info in counter.infos}
    groups = _check_assignment(assignment, infos, exclude)
    if flops is not None and count == "network" and counter.work.uncounted:
        warnings.warn(
            f"flops: the network's multiply-adds are counted without {sorted(counter.work.uncounted)}, for "
            "which torch has no formula",
            stacklevel=2,
        )

    def squares_of(name: str) -> torch.Tensor:
        return calibration.squared_sums(counter.model.get_parameter(counter.weight_name(name)))

    for name in groups:
        if not bool(squares_of(name).isfinite().all()):
            raise ValueError(f"model: the weight of {name!r} is not finite")
    if isinstance(importance, str):
        given_importance = calibration.importances(
            importance, unwrap(model), counter.model, list(groups), batches, closure
        )
    elif not isinstance(importance, Mapping):
        raise TypeError(
            f"importance: expected a mapping of names, or one of {list(calibration.KINDS)}, "
            f"got {type(importance).__name__}"
        )
    elif batches is not None or closure is not None:
        raise ValueError("batches, closure: expected none where importances are given")
    else:
        given_importance = {
            name: _check_importance(name, importance[name], squares_of(name).shape)
            for name in groups
            if name in importance
        }
    energy: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
    for name in groups:
        squares = given_importance[name] if name in given_importance else squares_of(name)
        labels, member = groups[name].unique(return_inverse=True)
        of_groups = torch.stack([squares[member == group].sum(0) for group in range(len(labels))])
        energy[name] = (member, of_groups, squares.sum(1))

    def masks_at(threshold: float) -> dict[str, torch.Tensor]:
        masks = {}
        for name, of_layer in energy.items():
            masks[counter.weight_name(name)] = _layer_mask(of_layer, threshold, infos[name].last_in_block)
        return masks

    if kind == "latency":
        chosen, report = _by_latency(counter, inputs, energy, goal, against, kept_curves)
        masks = {counter.weight_name(name): candidate.mask for name, candidate in chosen.items()}
        thresholds = {name: candidate.threshold for name, candidate in chosen.items()}
        return _structure(counter, masks, groups, count, max(thresholds.values()), thresholds, report)

    def cut_at(threshold: float) -> float:
        counts = counter.count(masks_at(threshold))
        return counts.flops_cut(count) if flops is not None else counts.params_cut(count)

    low, high = 0.0, 1.0 - 1e-9
    furthest = cut_at(high)
    if furthest < goal:
        raise ValueError(
            f"{kind}: expected at most {furthest:.4f}, what this assignment can remove, got {goal!r}"
        )
    while high - low > PRECISION:
        middle = (low + high) / 2
        if cut_at(middle) >= goal:
            high = middle
        else:
            low = middle
    return _structure(counter, masks_at(high), groups, count, high)


def _structure(
    counter: MaskCounter,
    masks: Mapping[str, torch.Tensor],
    groups: Mapping[str, torch.Tensor],
    count: str,
    threshold: float,
    thresholds: dict[str, float] | None = None,
    latency: timing.Latency | None = None,
) -> Structure:
    counts = counter.count(masks)
    live, _ = counter.pairs(masks)
    layouts = {name: _layout(live[name], assigned) for name, assigned in groups.items()}
    return Structure(
        layouts, threshold, counts.flops_cut(count), counts.params_cut(count), count, thresholds, latency
    )


def _layer_mask(
    energy: tuple[torch.Tensor, torch.Tensor, torch.Tensor], threshold: float, last_in_block: bool
) -> torch.Tensor:
    """Bool (O, I): what one layer keeps at a threshold."""
    member, of_groups, of_filters = energy
    mask = torch.stack([drop_below(importance, threshold) for importance in of_groups])[member]
    return mask & drop_below(of_filters, threshold)[:, None] if last_in_block else mask


def _layer_shape(
    counter: MaskCounter, info: ConvInfo, member: torch.Tensor, inputs: tuple[Any, ...]
) -> timing.LayerShape:
    """The layer as it is timed: at the example's batch, with the input size that gives its output size."""
    conv = counter.model.get_submodule(info.name) if info.name else counter.model
    assert isinstance(conv, nn.Conv2d)
    batch = next(int(v.shape[0]) for v in inputs if isinstance(v, torch.Tensor))
    given = Geometry.of(conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    padding = (given.pads[0][0], given.pads[1][0])
    geometry = Geometry.of(given.kernel, given.stride, padding, given.dilation)
    return timing.LayerShape(
        conv.in_channels,
        conv.out_channels,
        (batch, *geometry.input_size(*info.output_size)),
        geometry.kernel,
        geometry.stride,
        padding,
        geometry.dilation,
        tuple(sorted(int((member == group).sum()) for group in range(int(member.max()) + 1))),
    )


def _by_latency(
    counter: MaskCounter,
    inputs: tuple[Any, ...],
    energy: Mapping[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    target: float,
    against: str,
    cache: timing.CurveCache,
) -> tuple[dict[str, timing.Candidate], timing.Latency]:
    from .lower import lower
    from .pack import PackedNetwork, PackedState, hollow, pack

    first = next(counter.model.parameters())
    infos = {info.name: info for info in counter.infos}
    curves: dict[str, timing.Curve] = {}
    for name, (member, _, _) in energy.items():
        curves[name] = cache.curve(
            _layer_shape(counter, infos[name], member, inputs), first.device, first.dtype
        )
    cache.write()

    def layer_ms(name: str, pairs: torch.Tensor) -> float:
        return infos[name].uses * curves[name](float(pairs.float().mean()))

    layers: dict[str, list[timing.Candidate]] = {}
    for name, (member, of_groups, of_filters) in energy.items():
        last = infos[name].last_in_block
        sizes = torch.bincount(member).double() / len(member)
        options: list[timing.Candidate] = []
        for threshold in timing.THRESHOLDS:
            mask = _layer_mask((member, of_groups, of_filters), threshold, last)
            if options and torch.equal(options[-1].mask, mask):
                continue
            groups = range(len(of_groups))
            keeps = [drop_below(of_groups[g], threshold) for g in groups]
            kept = sum(float(sizes[g]) * timing.log_kept(of_groups[g], keeps[g]) for g in groups)
            if last:
                kept += timing.log_kept(of_filters, drop_below(of_filters, threshold))
            options.append(timing.Candidate(threshold, mask, kept, layer_ms(name, mask)))
        layers[name] = options

    def weights(masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {counter.weight_name(name): mask for name, mask in masks.items()}

    def time_of(masks: Mapping[str, torch.Tensor]) -> float:
        live, _ = counter.pairs(weights(masks))
        return sum(layer_ms(name, live[name]) for name in masks)

    def build(masks: Mapping[str, torch.Tensor]) -> nn.Module:
        if counter.graph is not None:  # as pack does it, without tracing again
            tensors = dict(counter.graph.tensors)
            for name, mask in weights(masks).items():
                tensors[name] = tensors[name].detach() * mask.to(tensors[name])[:, :, None, None]
            graph = dataclasses.replace(counter.graph, tensors=tensors, cache={})
            try:
                network = lower(graph)
            except NotImplementedError:
                pass
            else:
                state = PackedState({}, {})
                return PackedNetwork(
                    network, skeleton, inputs, state=state, limits=graph.limits, backend=None
                ).eval()
        pruned = clean_copy(counter.model)
        with torch.no_grad():
            for name, mask in weights(masks).items():
                weight = pruned.get_parameter(name)
                weight.mul_(mask.to(weight)[:, :, None, None])
        return pack(pruned, inputs)

    skeleton = hollow(counter.model)
    search = timing.Search(layers, time_of, build, counter.model.eval(), inputs, against, first.device)
    return search.run(target)


def _layout(pairs: torch.Tensor, assigned: torch.Tensor) -> GroupLayout:
    """The groups of the assignment, without dead filters and channels; filters of a group that differ are
    split.
    """
    groups: list[tuple[list[int], list[int]]] = []
    for group in assigned.unique().tolist():
        rows = [o for o in (assigned == group).nonzero().flatten().tolist() if bool(pairs[o].any())]
        by_channels: dict[tuple[int, ...], list[int]] = {}
        for o in rows:
            by_channels.setdefault(tuple(pairs[o].nonzero().flatten().tolist()), []).append(o)
        groups += [(list(channels), filters) for channels, filters in by_channels.items()]
    return GroupLayout(pairs.shape[1], pairs.shape[0], groups)


def apply_structure(model: nn.Module, structure: Mapping[str, GroupLayout]) -> nn.Module:
    """Masks a model's convolutions by ``torch.nn.utils.prune``'s convention (``weight_orig``,
    ``weight_mask``).

    Args:
        model: the network, changed in place: pruned weights read as zero from now on, and get no gradient.
        structure: convolution name -> ``GroupLayout``. A layer masked before keeps its zeros as well.

    Returns:
        ``model``.

    Raises:
        ValueError, TypeError: a name that is no convolution of the model, or a layout of another shape. The
        model is then unchanged.
    """
    inner = unwrap(model)
    if not isinstance(structure, Mapping):
        raise TypeError(
            "structure: expected a mapping of convolution names to GroupLayout, "
            f"got {type(structure).__name__}"
        )
    modules = dict(inner.named_modules())
    todo: list[tuple[nn.Conv2d, torch.Tensor]] = []
    for name, layout in structure.items():
        module = modules.get(name)
        if not isinstance(module, nn.Conv2d):
            raise ValueError(f"structure: {name!r} is no Conv2d of the model")
        if not isinstance(layout, GroupLayout):
            raise TypeError(f"structure[{name!r}]: expected a GroupLayout, got {type(layout).__name__}")
        if not module._parameters.keys() & {"weight", "weight_orig"}:
            raise ValueError(f"structure: the weight of {name!r} is parametrized; remove the parametrization")
        expected = tuple(module.weight.shape[:2])
        if (layout.out_channels, layout.in_channels) != expected:
            raise ValueError(
                f"structure[{name!r}]: expected a layout of {expected[0]} filters and {expected[1]} "
                f"channels, got {layout.out_channels} and {layout.in_channels}"
            )
        mask = layout.mask().to(module.weight.device)[:, :, None, None].expand_as(module.weight)
        todo.append((module, mask.to(module.weight.dtype)))
    # Without gradients the masked weight is no result of autograd until the first forward pass in training:
    # the model can still be copied, as torch.optim.swa_utils.AveragedModel does.
    with torch.no_grad():
        for module, mask in todo:
            prune.custom_from_mask(module, "weight", mask.contiguous())
    return model
