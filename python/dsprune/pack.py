"""Masked network in, fast network out, and back."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dsp_kernels import GroupLayout, available_backends

from .gpu import GraphCache
from .graph import ExportError, Limits, as_inputs, check_takes, clean_copy, evaluating, trace, unwrap
from .lower import lower
from .nn import PackedBatchNorm2d, PackedConv2d, PermutedGroupedConv2d
from .program import ProgramCache

__all__ = ["PackError", "PackedNetwork", "PackedState", "pack", "unpack"]


class PackError(RuntimeError):
    """The packed network does not compute what the dense one does."""


@dataclass(frozen=True)
class PackedState:
    """A dense network's state dict with its pruned convolution weights in packed form.

    ``tensors`` has the state dict's names; the weight of each convolution in ``layouts`` (by module name) is
    1-D there.
    """

    tensors: dict[str, torch.Tensor]
    layouts: dict[str, GroupLayout]

    @classmethod
    def of(cls, model: nn.Module) -> PackedState:
        """The state of a dense network, a copy."""
        tensors = {name: value.detach().clone() for name, value in model.state_dict(keep_vars=True).items()}
        layouts: dict[str, GroupLayout] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and (layout := prunable_layout(module)) is not None:
                layouts[name] = layout
                key = f"{name}.weight" if name else "weight"
                tensors[key] = layout.pack(module.weight.detach()).clone()
        return cls(tensors, layouts)

    def dense(self, kernel_sizes: Mapping[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
        """The dense state dict, zeros where pruned; ``kernel_sizes`` by module name."""
        out = dict(self.tensors)
        for name, layout in self.layouts.items():
            key = f"{name}.weight" if name else "weight"
            out[key] = layout.unpack(out[key], kernel_sizes[name])
        return out


def prunable_layout(conv: nn.Conv2d) -> GroupLayout | None:
    """The layout of a plain convolution that has zeros worth using; None where it is dense or too
    irregular.
    """
    if type(conv) is not nn.Conv2d or conv.groups != 1:
        return None
    mask = conv.weight.detach().flatten(2).ne(0).any(-1).cpu()
    if bool(mask.all()):
        return None
    try:
        return GroupLayout.from_mask(mask)
    except ValueError:
        return None


def hollow(model: nn.Module) -> nn.Module:
    """A copy of a network without its weights: every parameter and buffer is one zero seen through strides of
    zero.
    """
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    transient = [
        getattr(module, name) for module in model.modules() for name in module._non_persistent_buffers_set
    ]
    for tensor in transient:  # not in the state dict: nothing else would bring them back
        if tensor is not None:
            memo.pop(id(tensor), None)
    return copy.deepcopy(model, memo)


class PackedNetwork(nn.Module):
    """A pruned network in packed form; made by ``pack`` or ``load``, not directly.

    Takes what the dense network took, images (N, C, H, W) in the dtype of its weights at any batch and image
    size, and returns what it returned. An ordinary module otherwise: ``.to()``, hooks, ``state_dict`` and
    ``torch.compile`` work on it. Without gradients a fused one runs in one call (``program_reason`` says why
    not); the graph is planned again, and kept, for sizes that it is not good for.

    Attributes:
        network: the packed layers under the dense network's names.
        fused: whether BatchNorm, residuals and activations are inside the layers.
        unfused_reason: why not, where that is known.
        backend: the one that was asked for, or None.
        example_shapes, example_dtypes: of the inputs that it was packed for.

    Raises:
        TypeError, ValueError: in a call, for another number of arguments, keywords that were not in the
        example, a tensor of another rank, or sizes that the dense network does not take.
    """

    def __init__(
        self,
        network: nn.Module,
        skeleton: nn.Module,
        inputs: tuple[Any, ...],
        *,
        state: PackedState | None,
        limits: Limits | None,
        backend: str | None,
        unfused_reason: str | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.backend = backend
        self.unfused_reason = unfused_reason
        self.example_shapes: list[Any] = [
            tuple(v.shape) if isinstance(v, torch.Tensor) else v for v in inputs
        ]
        self.example_dtypes = [v.dtype if isinstance(v, torch.Tensor) else None for v in inputs]
        self._state, self._limits = state, limits
        # In a dictionary, so outside of the module tree: no part of the state dict, no memory to speak of.
        self._hidden: dict[str, nn.Module] = {"skeleton": skeleton}
        self._variants: dict[Any, nn.Module] = {}
        self._caches: dict[nn.Module, Any] = {}
        self._fitting: tuple[Any, Any] = (None, None)  # one tensor's sizes, and the network that they fitted
        self._names = list(inspect.signature(skeleton.forward).parameters)
        # DistributedDataParallel would send these to all processes in each forward pass, and so mark them as
        # changed.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_buffers() if name.endswith((".plan", ".blank"))
        ]

    @property
    def fused(self) -> bool:
        return self._limits is not None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the dense network's forward takes and gives."""
        if self._limits is None:
            return self.network(*args, **kwargs)
        if kwargs:
            args = self._positional(args, kwargs)
        if torch.compiler.is_compiling():
            return self.network_for(args)(*args)
        # Sizes that fitted are not looked at again. (Tracers' tensors have types of their own.)
        shape = args[0].shape if len(args) == 1 and type(args[0]) is torch.Tensor else None
        known, network = self._fitting
        if shape is None or shape != known or network is not self._modules["network"]:
            network = self.network_for(args)
            self._fitting = (shape, network) if network is self.network else (None, None)
        cache = self._programs(network)
        found = cache.find(args)
        return network(*args) if found is None else cache.run(found, args[0])

    def _programs(self, network: nn.Module) -> Any:
        """What runs a fused network in one call: native programs on the CPU, CUDA graphs on a GPU."""
        if network not in self._caches:
            first = next(network.parameters(), None)
            kind = GraphCache if first is not None and first.is_cuda else ProgramCache
            self._caches[network] = kind(network, self.backend)
        return self._caches[network]

    @property
    def program_reason(self) -> str | None:
        """Why the last call of the fused network ran layer by layer; None where it was one native program or
        one CUDA graph, or where there was none yet.
        """
        if self._limits is None:
            return self.unfused_reason or "layers were replaced one by one"
        return self._programs(self.network).reason

    def network_for(self, args: tuple[Any, ...]) -> nn.Module:
        """The network that runs for these positional arguments: ``network``, or one planned again for their
        sizes.
        """
        return self.network if self._limits is None or self._fits(args) else self._variant(args)

    def _positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        count = len(self.example_shapes)
        values = dict(zip(self._names, args, strict=False)) | kwargs
        extra = [
            name for name, value in values.items() if value is not None and name not in self._names[:count]
        ]
        if extra:
            raise TypeError(f"{extra[0]}: the network was packed for {self._names[:count]} alone")
        return tuple(values.get(name) for name in self._names[:count])

    def _fits(self, args: tuple[Any, ...]) -> bool:
        limits = self._limits
        assert limits is not None
        if len(args) != len(limits.ranges):
            raise TypeError(
                f"forward: expected {len(limits.ranges)} arguments, as in the example, got {len(args)}"
            )
        sizes = [value.shape if isinstance(value, torch.Tensor) else None for value in args]
        for shape, ranges in zip(sizes, limits.ranges, strict=True):
            if ranges is not None and (shape is None or len(shape) != len(ranges)):
                given = "no tensor" if shape is None else f"shape {tuple(shape)}"
                raise ValueError(
                    f"x: expected a tensor of {len(ranges)} dimensions, as in the example, got {given}"
                )
        return limits.admit(sizes)

    def _variant(self, args: tuple[Any, ...]) -> nn.Module:
        """The network planned again for other sizes than the graph allows; kept for the next call."""
        key = tuple(tuple(v.shape) if isinstance(v, torch.Tensor) else v for v in args)
        if key not in self._variants:
            reference = next(self.network.parameters(), None)
            with torch.inference_mode(False):  # as for pack
                try:
                    network = lower(trace(self.dense_model(), args), self.backend)
                except (ExportError, ValueError) as error:
                    raise ValueError(f"x: the network does not take sizes {list(key)} ({error})") from error
                if reference is not None:
                    network = network.to(device=reference.device, dtype=reference.dtype)
            self._variants[key] = network
        return self._variants[key]

    def __getstate__(self) -> dict[str, Any]:
        # What was made of the rest is made again where it is needed.
        return self.__dict__ | {"_variants": {}, "_caches": {}, "_fitting": (None, None)}

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> PackedNetwork:
        super()._apply(fn, recurse)
        self._caches.clear()
        for network in self._variants.values():
            network._apply(fn, recurse)
        return self

    def packed_state(self) -> PackedState:
        """The network's weights by the dense network's names, pruned convolutions in packed form.

        A fused network gives the weights as they were when it was packed; any other gives its present
        weights.
        """
        if self._state is not None:
            return self._state
        tensors = {name: value.detach() for name, value in self.network.state_dict(keep_vars=True).items()}
        layouts = {
            name: module.layout
            for name, module in self.network.named_modules()
            if isinstance(module, PermutedGroupedConv2d)
        }
        return PackedState(tensors, layouts)

    def dense_model(self) -> nn.Module:
        """A new dense network with this one's weights, zeros where pruned, in evaluation mode."""
        model = copy.deepcopy(self._hidden["skeleton"])
        state = self.packed_state()
        dense = {name: value.clone() for name, value in state.dense(_kernel_sizes(model, state)).items()}
        model.load_state_dict(dense, assign=True)
        return model.eval()

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """The packed layers by name."""
        for name, module in self.network.named_modules():
            if isinstance(module, PermutedGroupedConv2d):
                yield name, module


def _kernel_sizes(model: nn.Module, state: PackedState) -> dict[str, tuple[int, int]]:
    out = {}
    for name in state.layouts:
        shape = model.get_parameter(f"{name}.weight" if name else "weight").shape
        out[name] = (int(shape[2]), int(shape[3]))
    return out


def _replaced(module: nn.Module, backend: str | None, train: bool) -> nn.Module | None:
    """What runs in a module's place; None where it stays."""
    if isinstance(module, nn.Conv2d):
        if (layout := prunable_layout(module)) is not None:
            return PermutedGroupedConv2d.from_conv(module, layout, backend=backend)
        plain = type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros"
        if train and plain and not isinstance(module.padding, str):
            return PackedConv2d.from_conv(module, backend)
    if train and type(module) is nn.BatchNorm2d:
        return PackedBatchNorm2d.from_norm(module)
    return None


def _replace_layers(model: nn.Module, backend: str | None, train: bool) -> nn.Module:
    """Every pruned plain convolution replaced by its packed layer, in place; a module used twice stays one
    module. For training, dense convolutions and BatchNorm get our kernels too.
    """
    replaced: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) not in replaced:
                other = _replaced(child, backend, train)
                if other is None:
                    continue
                replaced[id(child)] = other
            setattr(parent, name, replaced[id(child)])
    return _replaced(model, backend, train) or model


def _leaves(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def _compare(dense: nn.Module, packed: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Raises PackError where the two networks differ on the example or on noise of its shape, ValueError
    where the dense one does not take it.
    """
    try:
        _differ(dense, packed, inputs)
    except PackError:
        raise
    except Exception:  # whose fault is it?
        with evaluating(dense):
            check_takes(dense, inputs)
        raise


def _differ(dense: nn.Module, packed: nn.Module, inputs: tuple[Any, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = tuple(
        torch.randn(v.shape, generator=generator).to(v)
        if isinstance(v, torch.Tensor) and v.is_floating_point()
        else v
        for v in inputs
    )
    # Where cuDNN may use TF32, which torch lets it by default, the dense network is the one that is off.
    exact = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)
    with torch.no_grad(), evaluating(dense), evaluating(packed), exact:
        for args in (inputs, noise):
            expected, given = _leaves(dense(*args)), _leaves(packed(*args))
            if [e.shape for e in expected] != [g.shape for g in given]:
                raise PackError(f"output shapes differ: {[tuple(g.shape) for g in given]}")
            for e, g in zip(expected, given, strict=True):
                if not e.is_floating_point() or e.numel() == 0:
                    continue
                finite = e.isfinite()
                bound = TOLERANCE.get(e.dtype, 1e-4) * max(
                    1.0, float(e[finite].abs().max()) if finite.any() else 1.0
                )
                difference = (e - g)[finite].abs().max() if finite.any() else torch.zeros(())
                if not bool(difference <= bound):
                    raise PackError(
                        f"outputs differ by {float(difference):.3g}, where {bound:.3g} is accepted"
                    )


@torch.inference_mode(False)  # weights made in that mode could not tell a program when they are written
def pack(
    model: nn.Module, example_input: Any, *, train: bool = False, backend: str | None = None
) -> PackedNetwork:
    """Turns a pruned network into a fast one with the same outputs; the argument is left alone.

    Args:
        model: any CNN with zeros in its convolution weights, or with the masks of ``torch.nn.utils.prune``.
        example_input: a tensor (N, C, H, W), or a tuple of positional arguments; the result takes other batch
            and image sizes too.
        train: True replaces layers one by one, so that the result can be trained like the dense network
            (``unpack`` brings the weights back): pruned convolutions by packed ones, dense ones and BatchNorm
            by the same layers on our kernels. False also folds BatchNorm, drops dead
            channels, and fuses residual and activation into the layers, where ``torch.export`` can trace the
            model; the weights then want no gradients.
        backend: which implementation the layers run on (``dsp_kernels.available_backends()``); None: chosen
            at each call.

    Returns:
        A ``PackedNetwork``, in evaluation mode for ``train=False``, else in the model's own mode.

    Raises:
        TypeError: ``model`` is no module, ``example_input`` holds no tensor, or ``train`` or ``backend`` is
        of another type. ValueError: the model does not take ``example_input``, or ``backend`` is unknown or
        cannot run here. PackError: packed and dense outputs differ on the example by more than rounding.
    """
    inner = unwrap(model)
    inputs = as_inputs(example_input)
    if not isinstance(train, bool):
        raise TypeError(f"train: expected True or False, got {train!r}")
    if backend is not None:
        backends = available_backends()
        if not isinstance(backend, str):
            raise TypeError(f"backend: expected one of {sorted(backends)} or None, got {backend!r}")
        if backend not in backends:
            raise ValueError(f"backend: expected one of {sorted(backends)} or None, got {backend!r}")
        if backends[backend] is not None:
            raise ValueError(f"backend: {backend!r} cannot run here: {backends[backend]}")
    clone = clean_copy(inner)
    skeleton = hollow(clone)
    if train:
        modes = inner.training
        network = _replace_layers(clone, backend, True)
        packed = PackedNetwork(network, skeleton, inputs, state=None, limits=None, backend=backend)
        packed.training = modes
        _compare(clean_copy(inner), packed, inputs)
        return packed
    clone.eval()
    reason: str | None = None
    limits: Limits | None
    state: PackedState | None
    try:
        graph = trace(clone, inputs)
        network, limits = lower(graph, backend), graph.limits
        state = PackedState.of(clone)
    except (ExportError, NotImplementedError) as error:
        reason = str(error)
        warnings.warn(f"layers are replaced one by one, nothing is fused or dropped: {reason}", stacklevel=2)
        network, limits, state = _replace_layers(copy.deepcopy(clone), backend, False), None, None
    packed = PackedNetwork(
        network, skeleton, inputs, state=state, limits=limits, backend=backend, unfused_reason=reason
    )
    packed.eval()
    _compare(clone, packed, inputs)
    return packed


def unpack(packed: PackedNetwork, model: nn.Module) -> nn.Module:
    """Writes a packed network's weights back into a dense one, zeros where pruned.

    Args:
        packed: from ``pack`` or ``load``. A fused one gives the weights that it was packed from; one packed
            with ``train=True`` those that it has now, (O, I, kh, kw) from 1-D, and BatchNorm's statistics.
        model: a network of the same architecture and dtypes, on any device, changed in place; where it
            carries prune masks, they are set too. Wrappers of ``torch.compile`` and
            ``DistributedDataParallel`` are looked through.

    Returns:
        ``model``.

    Raises:
        TypeError: ``packed`` is no ``PackedNetwork``, or ``model`` no module. ValueError: names, shapes or
            dtypes do not fit. ``model`` is then unchanged.
    """
    if not isinstance(packed, PackedNetwork):
        raise TypeError(f"packed: expected a PackedNetwork, got {type(packed).__name__}")
    fill(unwrap(model), packed.packed_state())
    return model


def fill(model: nn.Module, state: PackedState) -> None:
    """Checks a packed state against a dense network, then writes it there; nothing is written where anything
    is wrong.
    """
    own = model.state_dict(keep_vars=True)
    masked = {name.removesuffix("_orig") for name in own if name.endswith("_orig")}
    names = {
        name.removesuffix("_orig")
        for name in own
        if not (name.endswith("_mask") and name.removesuffix("_mask") in masked)
    }
    if names != set(state.tensors):
        missing, extra = sorted(names - set(state.tensors)), sorted(set(state.tensors) - names)
        raise ValueError(
            f"model: not the packed network's architecture; it lacks {extra[:3] or 'nothing'}, "
            f"and has besides {missing[:3] or 'nothing'}"
        )
    kernels: dict[str, tuple[int, int]] = {}
    for name, layout in state.layouts.items():
        key = f"{name}.weight" if name else "weight"
        shape = tuple(own[f"{key}_orig" if key in masked else key].shape)
        if len(shape) != 4 or shape[:2] != (layout.out_channels, layout.in_channels):
            raise ValueError(
                f"model: {key} has shape {shape}, where the packed network has "
                f"{layout.out_channels} filters and {layout.in_channels} channels"
            )
        kernels[name] = (shape[2], shape[3])
        expected = layout.weight_numel(kernels[name])
        if state.tensors[key].numel() != expected:
            raise ValueError(f"model: {key} needs {expected} packed values, got {state.tensors[key].numel()}")
    dense = state.dense(kernels)
    for name, value in dense.items():
        target = own[f"{name}_orig" if name in masked else name]
        if target.shape != value.shape:
            raise ValueError(
                f"model: {name} has shape {tuple(target.shape)}, the packed network's is {tuple(value.shape)}"
            )
        if target.dtype != value.dtype:
            raise ValueError(f"model: {name} is {target.dtype}, the packed network's is {value.dtype}")
    with torch.no_grad():
        for name, value in dense.items():
            if name in masked:
                own[f"{name}_orig"].copy_(value)
                layout_of = state.layouts.get(name.removesuffix(".weight"))
                mask = own[f"{name}_mask"]
                mask.copy_(
                    torch.ones_like(mask)
                    if layout_of is None
                    else layout_of.mask().to(mask)[:, :, None, None]
                )
            else:
                own[name].copy_(value)
