"""Masked network in, fast network out, and back."""

from __future__ import annotations

import copy
import gc
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from dsp_kernels import GroupLayout, available_backends
from dsp_kernels._kept import Kept
from dsp_kernels._written import written

from .compare import differs, no_worse
from .gpu import GraphCache
from .graph import (
    ExportError,
    Limits,
    as_inputs,
    check_takes,
    clean_copy,
    evaluating,
    masked_copy,
    trace,
    unwrap,
)
from .inputs import Signature, describe, form_of, noise_like, own_tensors, tensors_of
from .lower import iterate_layers, lower
from .masks import applied, bare, copies_of_results, hold, masked, masks_of, renew_results, without_results
from .nn import PackedBatchNorm2d, PackedConv2d, PermutedGroupedConv2d
from .run import Runner
from .run.native import NativeRunner
from .state import preserved, tensors_in
from .watch import Watch

EXTRA = "_extra_state"  # torch's key for what ``get_extra_state`` gives

__all__ = ["PackError", "PackedNetwork", "PackedState", "pack", "unpack"]


LARGE = 32 << 20  # bytes of weights: their memory is wanted back at once
KEPT_VARIANTS = 8  # plans for other sizes; the least recently used goes first


class PackError(RuntimeError):
    """The packed network does not compute what the dense one does."""


@dataclass(frozen=True)
class PackedState:
    """A dense network's state dict with its pruned convolution weights in packed form.

    ``tensors`` has the state dict's names; the weight of each convolution in ``layouts`` (by module name) is
    1-D there. ``masks`` has, by tensor name, the prune masks that do not follow from the layouts: bool, or of
    the mask's own dtype, in the dense shape. ``extra`` has, by the state dict's names, what modules'
    ``get_extra_state`` gave.
    """

    tensors: dict[str, torch.Tensor]
    layouts: dict[str, GroupLayout]
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, masks: Mapping[str, torch.Tensor]) -> PackedState:
        """The state of a dense network; ``masks`` are those that were applied to it. What is not pruned is
        the network's own memory.
        """
        values, extra = _split(model)
        tensors = {name: value.detach() for name, value in values.items()}
        layouts: dict[str, GroupLayout] = {}
        known: dict[nn.Module, tuple[GroupLayout, torch.Tensor] | None] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if not isinstance(module, nn.Conv2d):
                continue
            if module not in known:
                layout = prunable_layout(module)
                known[module] = None if layout is None else (layout, layout.pack(module.weight.detach()))
            if (found := known[module]) is not None:
                layouts[name], tensors[f"{name}.weight" if name else "weight"] = found
        return cls(tensors, layouts, dict(masks), copy.deepcopy(extra))

    def dense(self, kernel_sizes: Mapping[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
        """The dense state dict, zeros where pruned; ``kernel_sizes`` by module name."""
        out = dict(self.tensors)
        for name, layout in self.layouts.items():
            key = f"{name}.weight" if name else "weight"
            out[key] = layout.unpack(out[key], kernel_sizes[name])
        return out

    def mask(self, name: str) -> torch.Tensor | None:
        """What of a dense tensor may be other than zero, broadcastable to it; None: all."""
        if name in self.masks:
            return self.masks[name]
        layout = self.layouts.get(name.removesuffix("weight").removesuffix("."))
        return layout.mask()[:, :, None, None] if layout is not None and name.endswith("weight") else None


def _split(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A state dict as parameters and buffers, and the rest: extra state, which may be anything."""
    values: dict[str, torch.Tensor] = {}
    extra: dict[str, Any] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        (extra if name.rpartition(".")[2] == EXTRA else values)[name] = value
    return values, extra


def prunable_layout(conv: nn.Conv2d) -> GroupLayout | None:
    """The layout of a plain convolution that has zeros worth using; None where it is dense or too
    irregular.
    """
    if type(conv) is not nn.Conv2d or conv.groups != 1 or "weight" not in conv._parameters:
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
    size, and further arguments in any nest, and returns what it returned. An ordinary module otherwise:
    ``.to()``, hooks, ``state_dict`` and ``torch.compile`` work on it. Without gradients a fused one runs in
    one call (``program_reason`` says why not); the graph is planned again, and kept, for sizes that it is not
    good for, and for flags, numbers and the like other than the example's.

    Attributes:
        network: the packed layers under the dense network's names.
        fused: whether BatchNorm, residuals and activations are inside the layers.
        unfused_reason: why not, where that is known.
        backend: the one that was asked for, or None.
        example_shapes, example_dtypes: of the inputs that it was packed for, without defaults at the end.

    Raises:
        TypeError: in a call, for arguments that the dense network's forward does not have, and for ones that
            are neither tensors nor plain values (numbers, strings, None, ...) in tuples, lists, dictionaries.
        ValueError: for a tensor of another rank than the example's, or what the dense network does not take.
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
        masks: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.backend = backend
        self.unfused_reason = unfused_reason
        self._signature = Signature(skeleton.forward)
        self.example_shapes: list[Any] = [
            tree_map_only(torch.Tensor, lambda v: tuple(v.shape), value) for value in inputs
        ]
        self.example_dtypes = [v.dtype if isinstance(v, torch.Tensor) else None for v in inputs]
        self._state, self._limits = state, limits
        self._masks = dict(masks or {})  # of the dense network, where the layers' own do not say it all
        # What the layers of a fused network held when ``state`` was theirs; "" where they may have changed.
        self._seal = None if state is None or not state.tensors else _seal(network)
        self._watch = Watch(network)
        # In a dictionary, so outside of the module tree: no part of the state dict, no memory to speak of.
        self._hidden: dict[str, nn.Module] = {"skeleton": skeleton}
        self._form = None if limits is None else form_of(inputs, {}, self._dtype())[0]
        # Planned again for other arguments, by these: the network and what it is good for.
        self._variants: Kept[Any, tuple[nn.Module, Limits]] = Kept(KEPT_VARIANTS)
        self._caches: dict[nn.Module, Runner] = {}
        # One tensor's shape and dtype, and the network that they fitted.
        self._fitting: tuple[Any, Any] = (None, None)
        # DistributedDataParallel would send these to all processes in each forward pass, and so mark them as
        # changed.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_buffers() if name.endswith((".plan", ".blank"))
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedNetwork:
        memo |= copies_of_results(self)
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    @property
    def fused(self) -> bool:
        return self._limits is not None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the dense network's forward takes and gives."""
        if self._limits is None:
            return self.network(*args, **kwargs)
        if torch.compiler.is_compiling():
            args, kwargs = self.bind(args, kwargs)
            return self.network_for(args, kwargs)(*args, **kwargs)
        # Arguments that fitted are not looked at again. (Tracers' tensors have types of their own.)
        x = args[0] if len(args) == 1 and not kwargs and type(args[0]) is torch.Tensor else None
        known, network = self._fitting
        if x is None or (x.shape, x.dtype) != known or network is not self._modules["network"]:
            args, kwargs = self.bind(args, kwargs)
            network = self.network_for(args, kwargs)
            fits = x is not None and network is self.network and not torch.is_autocast_enabled(x.device.type)
            self._fitting = ((x.shape, x.dtype), network) if fits and x is not None else (None, None)
        leaves = args if x is not None else tree_leaves((args, kwargs))
        runner = self._runner(network)
        found = runner.find(leaves)
        return network(*args, **kwargs) if found is None else runner.run(found, leaves)

    def bind(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments as the networks inside take them: without defaults at the end.

        Raises TypeError for arguments that the dense network's forward does not have.
        """
        return self._signature.bind(args, kwargs or {})

    def _dtype(self) -> torch.dtype | None:
        """That of the weights."""
        return next((p.dtype for p in self.network.parameters() if p.is_floating_point()), None)

    def _runner(self, network: nn.Module) -> Runner:
        """What runs a fused network without gradients: native segments on the CPU, CUDA graphs on a GPU."""
        if network not in self._caches:
            first = next(network.parameters(), None)
            kind = GraphCache if first is not None and first.is_cuda else NativeRunner
            self._caches[network] = kind(network, self.backend)
        return self._caches[network]

    def runner_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Runner:
        """What runs a fused network for arguments as ``bind`` gives them. Raises as ``network_for``."""
        return self._runner(self.network_for(args, kwargs))

    @property
    def program_reason(self) -> str | None:
        """Why not all of the fused network's last call was one native program or one CUDA graph; None where
        it was, or where there was none yet. What ran where: ``coverage``.
        """
        if self._limits is None:
            return self.unfused_reason or "layers were replaced one by one"
        return self._runner(self.network).reason

    def network_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> nn.Module:
        """The network that runs for these arguments, as ``bind`` gives them: ``network``, or one planned
        again for their sizes, and for arguments that are no tensors other than the example's.

        Raises TypeError, ValueError: see :class:`PackedNetwork`.
        """
        if self._limits is None:
            return self.network
        kwargs = kwargs or {}
        form, leaves = form_of(args, kwargs, self._dtype())
        sizes = [value.shape if isinstance(value, torch.Tensor) else None for value in leaves]
        if form == self._form and _admits(self._limits, sizes):
            return self.network
        if self._watch.changed():
            self._check_sealed()
        key = form, tuple(None if shape is None else tuple(shape) for shape in sizes)
        if key in self._variants:
            return self._variants[key][0]
        for (other, _), (network, limits) in self._variants.items():
            if other == form and limits.admit(sizes):
                return network
        return self._variant(key, args, kwargs)

    def _variant(self, key: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> nn.Module:
        """The network planned again for arguments that the graph is not good for; kept for the next call."""
        reference = next(self.network.parameters(), None)
        with torch.inference_mode(False):  # as for pack
            try:
                graph = trace(self.dense_model(), args, kwargs)
                network: nn.Module = lower(graph, self.backend)
            except (ExportError, NotImplementedError, TypeError, ValueError) as error:
                alone = not kwargs and all(isinstance(v, torch.Tensor) for v in args)
                given = f"sizes {list(key[1])}" if alone else describe(args, kwargs)
                raise ValueError(f"x: the network does not take {given} ({error})") from error
            if reference is not None:
                network = network.to(device=reference.device, dtype=reference.dtype)
        self._variants[key] = network, graph.limits
        kept = {self.network, *(planned for planned, _ in self._variants.values())}
        self._caches = {planned: cache for planned, cache in self._caches.items() if planned in kept}
        return network

    def __getstate__(self) -> dict[str, Any]:
        # What was made of the rest is made again where it is needed.
        made = {
            "_variants": Kept(KEPT_VARIANTS),
            "_caches": {},
            "_fitting": (None, None),
            "_watch": Watch(self.network),
        }
        return self.__dict__ | made

    def refresh(self) -> None:
        """Makes programs and CUDA graphs again at the next call.

        Needed after weights were written in a way that torch does not count: through ``.data``,
        ``vector_to_parameters`` (which goes through it), NumPy, DLPack, ``torch._fused_*`` called directly.
        Seen without it: writes in place, ``load_state_dict``, new parameters and layers, the step of any
        ``torch.optim.Optimizer``, fused ones included.
        """
        written(tensor for tensor in (*self.network.parameters(), *self.network.buffers()))
        self._caches.clear()

    def train(self, mode: bool = True) -> PackedNetwork:
        """As ``nn.Module.train``; a fused network computes the same in either mode, and says so once."""
        if mode and self.fused and not self._told:
            self._told = True
            warnings.warn(
                "this packed network is fused for inference: BatchNorm is folded in, dropout is gone, and "
                "train() changes nothing in it. To train, pack the dense network with pack(..., train=True).",
                stacklevel=2,
            )
        super().train(mode)
        return self

    _told = False  # that train() changes nothing

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> PackedNetwork:
        whole = self._seal is not None and self._seal == _seal(self.network)
        super()._apply(fn, recurse)
        if self._seal is not None:
            self._seal = _seal(self.network) if whole else ""
        self._caches.clear()
        self._fitting = (None, None)
        for network, _ in self._variants.values():
            network._apply(fn, recurse)
        return self

    def _check_sealed(self) -> None:
        if self._seal is not None and self._seal != _seal(self.network):
            raise ValueError(
                "packed: the layers of this fused network were changed after it was packed, and the dense "
                "network's weights cannot be told from them; change a network packed with train=True, or the "
                "dense one, and pack that"
            )

    def packed_state(self) -> PackedState:
        """The network's weights by the dense network's names, pruned convolutions in packed form.

        A fused network gives the weights as they were when it was packed; any other gives its present
        weights, those that prune masks have taken away as zeros.

        Raises ValueError where the layers of a fused network hold other values than when it was packed, and
        where those of another one were changed so that they are none of the dense network's any more.
        """
        if self._state is not None:
            self._check_sealed()
            return self._state
        values, extra = _split(self.network)
        tensors = {name: value.detach() for name, value in values.items()}
        layouts = {
            name: module.layout
            for name, module in self.network.named_modules(remove_duplicate=False)
            if isinstance(module, PermutedGroupedConv2d)
        }
        masks = dict(self._masks)
        for name, (module, tensor) in masked(self.network).items():
            mask = tensors.pop(f"{name}_mask")
            original = tensors.pop(f"{name}_orig")
            tensors[name] = applied(original, mask)
            kept = mask.ne(0).cpu()
            if isinstance(module, PermutedGroupedConv2d) and tensor == "weight":
                kept = module.layout.unpack(kept, module.kernel_size)
                if name in masks:
                    kept = kept | ~module.layout.mask()[:, :, None, None]
            if name in masks:
                masks[name] = torch.where(kept, masks[name], torch.zeros_like(masks[name]))
            else:
                masks[name] = kept
        state = PackedState(tensors, layouts, masks, extra)
        try:
            _checked(self._hidden["skeleton"], state, dtypes=False)
        except ValueError as error:
            raise ValueError(
                f"packed: its layers were changed, and are none of the dense network's ({error})"
            ) from error
        return state

    def dense_model(self) -> nn.Module:
        """A new dense network with this one's weights, zeros where pruned, in evaluation mode, without masks.
        Raises as ``packed_state`` does.
        """
        model = copy.deepcopy(self._hidden["skeleton"])
        state = self.packed_state()
        dense = {name: value.clone() for name, value in state.dense(_kernel_sizes(model, state)).items()}
        shared: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                shared.setdefault(id(parameter), []).append((module, name))
        # Extra state is in the skeleton's own attributes, as it was when that was made, or is set below.
        missing, unexpected = model.load_state_dict(dense, strict=False, assign=True)
        assert not unexpected and all(name in state.extra for name in missing), (missing, unexpected)
        _set_extra(model, state.extra)
        for (owner, first), *others in shared.values():
            for module, name in others:
                module._parameters[name] = owner._parameters[first]
        return model.eval()

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """The packed layers by name."""
        for name, module in self.network.named_modules():
            if isinstance(module, PermutedGroupedConv2d):
                yield name, module


def _set_extra(model: nn.Module, extra: Mapping[str, Any]) -> None:
    """Gives modules their extra state, where they can take one."""
    for name, value in extra.items():
        module = model.get_submodule(name.rpartition(".")[0])
        if type(module).set_extra_state is not nn.Module.set_extra_state:
            module.set_extra_state(copy.deepcopy(value))


def _admits(limits: Limits, sizes: Sequence[Any]) -> bool:
    """Whether a graph is good for these sizes. Raises ValueError for a tensor of another rank."""
    for shape, ranges in zip(sizes, limits.ranges, strict=True):
        if ranges is not None and len(shape) != len(ranges):
            raise ValueError(
                f"x: expected a tensor of {len(ranges)} dimensions, as in the example, "
                f"got shape {tuple(shape)}"
            )
    return limits.admit(sizes)


def _kernel_sizes(model: nn.Module, state: PackedState) -> dict[str, tuple[int, int]]:
    out = {}
    for name in state.layouts:
        shape = model.get_parameter(f"{name}.weight" if name else "weight").shape
        out[name] = (int(shape[2]), int(shape[3]))
    return out


def _seal(network: nn.Module) -> str:
    """A short text that differs where any tensor of a network's state does."""
    state = network.state_dict(keep_vars=True)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return f"{_sum(tensors.values(), ' '.join(tensors)):08x}"


def _sum(tensors: Iterable[torch.Tensor], text: str = "") -> int:
    """A number that is another where any of the tensors, or the text, is."""
    total = zlib.crc32(text.encode())
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        total = zlib.crc32(f"{plain.dtype} {tuple(plain.shape)}".encode(), total)
        total = zlib.crc32(plain.reshape(-1).view(torch.uint8).numpy(), total)  # type: ignore[arg-type]
    return total


def _shared(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Who holds each parameter that several modules hold: the modules, and its name there without a mask's
    ending.
    """
    held: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                held.setdefault(id(parameter), []).append((module, name.removesuffix("_orig")))
    return [holders for holders in held.values() if len(holders) > 1]


def _replaced(module: nn.Module, backend: str | None, train: bool) -> nn.Module | None:
    """What runs in a module's place, with the masks that its layout does not hold by itself; None where it
    stays.
    """
    if train and type(module) is nn.BatchNorm2d and not module._forward_pre_hooks:
        return PackedBatchNorm2d.from_norm(module)
    if not isinstance(module, nn.Conv2d):
        return None
    conv, masks = bare(module)
    assert isinstance(conv, nn.Conv2d)
    layout = prunable_layout(conv)
    layer: nn.Module
    if layout is not None:
        layer = PermutedGroupedConv2d.from_conv(conv, layout, backend=backend)
        if "weight" in masks:
            masks["weight"] = layout.pack(masks["weight"])
    else:
        plain = type(conv) is nn.Conv2d and conv.groups == 1 and "weight" in conv._parameters
        if not train or not plain or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return None
        layer = PackedConv2d.from_conv(conv, backend)
    for name, mask in masks.items():
        if not bool(mask.eq(1).all()):
            hold(layer, name, mask)
    return layer


def _replace_layers(model: nn.Module, backend: str | None, train: bool) -> nn.Module:
    """A model over the same tensors with a packed layer in the place of every pruned plain convolution,
    wherever it is referred to; a module used twice stays one module. For training, dense convolutions and
    BatchNorm get our kernels too. Prune masks stay.

    Convolutions that share a weight share its packed form; where masks leave them different parts of it, or
    something else reads it too, they stay as they are.
    """
    packed: dict[int, nn.Module | None] = {}
    for holders in _shared(model):
        _replace_sharing(holders, packed, backend, train)
    for module in model.modules():
        if id(module) not in packed:
            packed[id(module)] = _replaced(module, backend, train)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors_in(model)}
    memo.update((key, layer) for key, layer in packed.items() if layer is not None)
    return copy.deepcopy(model, memo)


def _replace_sharing(
    holders: list[tuple[nn.Module, str]],
    packed: dict[int, nn.Module | None],
    backend: str | None,
    train: bool,
) -> None:
    """Puts the layers for modules that hold one parameter into ``packed``; None for each convolution where
    they cannot share it in packed form.
    """
    convs = [module for module, _ in holders if isinstance(module, nn.Conv2d)]
    if not convs:
        return  # other layers keep the very parameter
    tensor, (first, masks) = holders[0][1], bare(convs[0])
    for module, name in holders:
        plain, others = bare(module)
        alike = (
            isinstance(module, nn.Conv2d)
            and name == tensor
            and torch.equal(getattr(plain, name), getattr(first, name))
            and masks.keys() == others.keys()
            and all(torch.equal(mask, others[key]) for key, mask in masks.items())
        )
        if id(module) not in packed:
            packed[id(module)] = _replaced(module, backend, train)
        if not alike or packed[id(module)] is None:
            packed.update((id(conv), None) for conv in convs)
            return
    key = tensor
    for conv in convs:
        layer = packed[id(conv)]
        assert layer is not None
        if conv is convs[0]:
            key, source = (tensor if tensor in layer._parameters else f"{tensor}_orig"), layer
        layer._parameters[key] = source._parameters[key]


PACKED_LAYERS = (PermutedGroupedConv2d, PackedConv2d, PackedBatchNorm2d)


@contextmanager
def _trials(network: nn.Module) -> Iterator[None]:
    """Evaluation without gradients in the weights' own precision: where cuDNN may use TF32, which torch lets
    it by default, the dense network is the one that is off.
    """
    exact = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)
    with torch.no_grad(), evaluating(network), exact:
        yield


def _trial(network: nn.Module, args: tuple[Any, ...], again: Callable[[], nn.Module]) -> list[torch.Tensor]:
    """The outputs from the state, and on the arguments, as they were; both stay so. ``again`` makes the
    network once more, for its parameters where the forward pass writes them: a copy of all takes much memory.
    """
    if (
        isinstance(network, PackedNetwork) and network.fused
    ):  # has no state, and keeps what it plans in a trial
        return [out.clone() for out in tensors_of(network(*own_tensors(args)))]
    parameters = list(network.parameters())
    before = _sum(parameters)
    with preserved(network):
        outputs = [out.clone() for out in tensors_of(network(*own_tensors(args)))]
    if _sum(parameters) != before:
        for parameter, value in zip(parameters, again().parameters(), strict=True):
            parameter.copy_(value)
    return outputs


def _expected(
    dense: nn.Module, inputs: tuple[Any, ...], again: Callable[[], nn.Module]
) -> list[list[torch.Tensor]]:
    """What a dense network computes on the example and on noise of its shape. It runs before anything is
    packed, so that its weights need not be there when the packed network's are. ValueError where it does not
    take them.
    """
    try:
        with _trials(dense):
            return [_trial(dense, args, again) for args in (inputs, noise_like(inputs))]
    except Exception:  # whose fault is it?
        with evaluating(dense):
            check_takes(dense, inputs)
        raise


def _compare(
    packed: PackedNetwork,
    inputs: tuple[Any, ...],
    expected: list[list[torch.Tensor]],
    dense: Callable[[], nn.Module],
    again: Callable[[], nn.Module],
) -> None:
    """Raises PackError where a packed network's outputs are other than ``_expected``. ``dense`` makes the
    dense network once more, ``again`` the layers of one that is not fused.
    """
    with _trials(packed):
        for args, right in zip((inputs, noise_like(inputs)), expected, strict=True):
            given = _trial(packed, args, again)
            if len(right) != len(given):
                raise PackError(f"{len(given)} outputs for {len(right)}")
            finite = all(bool(v.isfinite().all()) for v in tensors_of(args))
            for e, g in zip(right, given, strict=True):
                reason = differs(e, g, finite_inputs=finite)
                if reason is not None and not no_worse(dense().eval(), args, right, given):
                    raise PackError(reason)


def _fused(
    dense: nn.Module, inputs: tuple[Any, ...], backend: str | None
) -> tuple[nn.Module, Limits, set[str]]:
    """The graph of fused layers, what it is good for, and the weights of the layers that it knows."""
    graph = trace(dense, inputs)
    return lower(graph, backend), graph.limits, {site.weight_name for site in graph.sites}


@torch.inference_mode(False)  # weights made in that mode could not tell a program when they are written
def pack(
    model: nn.Module, example_input: Any, *, train: bool = False, backend: str | None = None
) -> PackedNetwork:
    """Turns a pruned network into a fast one with the same outputs; the argument is left alone.

    Args:
        model: any CNN with zeros in its convolution weights, or with the masks of ``torch.nn.utils.prune``,
            which are obeyed on every layer; a packed one is packed as the dense network that it stands for.
        example_input: a tensor (N, C, H, W), or a tuple of positional arguments, with tensors in any nest;
            it is left alone. The result takes other batch and image sizes too, and other arguments.
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

    def dense() -> nn.Module:
        """The network to pack: made when it is wanted, so that no more weights are there than needed."""
        if isinstance(inner, PackedNetwork):
            return _unpacked(inner)
        return _with_dense_layers(inner) if _has_packed_layers(inner) else inner

    given = dense()
    clone, masks, mode = clean_copy(given), masks_of(given), given.training
    del given
    try:
        inputs, _ = Signature(clone.forward).bind(inputs, {})
    except TypeError as error:
        raise ValueError(f"example_input: the model does not take {describe(inputs)}: {error}") from error

    def copied() -> nn.Module:
        return clean_copy(dense())

    def replaced() -> nn.Module:
        """The network with its layers replaced one by one."""
        model = dense()
        model = masked_copy(model, without_results(model))
        network = _replace_layers(model if train else model.eval(), backend, train)
        renew_results(network)
        return network

    skeleton, expected = hollow(clone), _expected(clone, inputs, copied)
    if train:
        del clone
        packed = PackedNetwork(
            replaced(), skeleton, inputs, state=None, limits=None, backend=backend, masks=masks
        )
        packed.training = mode
        _compare(packed, inputs, expected, copied, replaced)
        _name_unused(masks, packed.network)
        return packed
    clone.eval()
    reason: str | None = None
    limits: Limits | None
    state: PackedState | None
    read: set[str] | None
    try:
        network, limits, read = _fused(clone, inputs, backend)
        state = PackedState.of(clone, masks)
    except (ExportError, NotImplementedError) as error:
        reason, read = str(error), None
    large = sum(tensor.nbytes for tensor in clone.parameters()) >= LARGE
    del clone
    if large:
        gc.collect()  # the graph is a circle of references, with all the weights that were dropped
    if reason is not None:
        warnings.warn(f"layers are replaced one by one, nothing is fused or dropped: {reason}", stacklevel=2)
        network, limits, state = replaced(), None, None
    packed = PackedNetwork(
        network,
        skeleton,
        inputs,
        state=state,
        limits=limits,
        backend=backend,
        unfused_reason=reason,
        masks=masks,
    )
    packed.eval()
    _compare(packed, inputs, expected, copied, replaced)
    _name_unused(masks, network, read)
    return packed


def _unpacked(packed: PackedNetwork) -> nn.Module:
    """The dense network of a packed one, with its masks on and in its mode."""
    model, state = packed.dense_model(), packed.packed_state()
    fill(model, state, hold_all=True)
    return model.train(packed.training)


def _has_packed_layers(model: nn.Module) -> bool:
    return any(isinstance(module, PACKED_LAYERS) for module in model.modules())


def _with_dense_layers(model: nn.Module) -> nn.Module:
    """A copy with the layers of a training form replaced by those that they stand for; fused ones stay."""
    clone = masked_copy(model)
    fused = {
        layer
        for module in clone.modules()
        if isinstance(module, fx.GraphModule)
        for layer in module.modules()
    }
    made: dict[nn.Module, nn.Module] = {}
    for module in set(clone.modules()) - fused:
        if isinstance(module, PackedBatchNorm2d):
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
        elif isinstance(module, PackedConv2d):
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
            delattr(module, "plan")
            del module.backend
        elif isinstance(module, PermutedGroupedConv2d) and module.activation is None:
            made[module] = _dense_layer(module)
    for parent in list(clone.modules()):
        for name, child in list(parent.named_children()):
            if child in made:
                setattr(parent, name, made[child])
    return made.get(clone, clone)


def _dense_layer(layer: PermutedGroupedConv2d) -> nn.Conv2d:
    plain, masks = bare(layer)
    assert isinstance(plain, PermutedGroupedConv2d)
    conv = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        bias=plain.bias is not None,
        padding_mode=layer.padding_mode,  # type: ignore[arg-type]
        device=plain.weight.device,
        dtype=plain.weight.dtype,
    )
    with torch.no_grad():
        conv.weight.copy_(plain.dense_weight())
        if conv.bias is not None and plain.bias is not None:
            conv.bias.copy_(plain.bias)
    conv.weight.requires_grad_(plain.weight.requires_grad)
    for name, mask in masks.items():
        hold(conv, name, layer.layout.unpack(mask, layer.kernel_size) if name == "weight" else mask)
    return conv.train(layer.training)


def _name_unused(masks: Mapping[str, torch.Tensor], network: nn.Module, read: set[str] | None = None) -> None:
    """Warns of the weights whose masks take away values and save no work.

    ``read``: the weights that the graph of a fused network knew for those of a convolution or a linear layer.
    """
    left: dict[str, int] = {}
    for name, layer in iterate_layers(network):
        if isinstance(layer, PermutedGroupedConv2d) or read is not None:
            key = f"{name}.weight" if name else "weight"
            left[key] = left.get(key, 0) + layer.weight.numel()  # type: ignore[operator]
    unused = [
        name
        for name, mask in masks.items()
        if mask.dim() > 1
        and not bool(mask.ne(0).all())
        and left.get(name, 0 if read is not None and name in read else mask.numel()) >= mask.numel()
    ]
    if unused:
        warnings.warn(
            f"the masks of {unused} are obeyed and save nothing: what is dropped are whole (filter, channel) "
            "kernels of a Conv2d where many filters agree, and dead channels, of weights that the module "
            "does not compute",
            stacklevel=4,
        )


def unpack(packed: PackedNetwork, model: nn.Module) -> nn.Module:
    """Writes a packed network's weights back into a dense one, zeros where pruned.

    Args:
        packed: from ``pack`` or ``load``. A fused one gives the weights that it was packed from; one packed
            with ``train=True`` those that it has now, (O, I, kh, kw) from 1-D, and BatchNorm's statistics.
        model: a network of the same architecture and dtypes, on any device, changed in place; where it
            carries prune masks, they are set to those of the network that was packed, of any layer and grain.
            Without masks it gets one only where it shares a weight of which the packed network reads less in
            one place than in another. Wrappers of ``torch.compile`` and ``DistributedDataParallel`` are
            looked through.

    Returns:
        ``model``.

    Raises:
        TypeError: ``packed`` is no ``PackedNetwork``, or ``model`` no module. ValueError: names, shapes or
            dtypes do not fit, a weight that is shared in ``model`` has several values in ``packed``, or a
            fused network's layers were changed after it was packed. ``model`` is then unchanged.
    """
    if not isinstance(packed, PackedNetwork):
        raise TypeError(f"packed: expected a PackedNetwork, got {type(packed).__name__}")
    fill(unwrap(model), packed.packed_state())
    return model


def _checked(model: nn.Module, state: PackedState, *, dtypes: bool = True) -> dict[str, torch.Tensor]:
    """The dense tensors of a packed state, by name. Raises ValueError where they are not those of a network,
    masked or not.
    """
    (own, extras), on = _split(model), masked(model)
    for name in on:
        own[name] = own.pop(f"{name}_orig")
        del own[f"{name}_mask"]
    given = state.tensors.keys() | state.extra.keys()
    names = own.keys() | (extras.keys() & state.extra.keys())
    if names != given:
        missing, extra = sorted(names - given), sorted(given - names)
        raise ValueError(
            f"model: not the packed network's architecture; it lacks {extra[:3] or 'nothing'}, "
            f"and has besides {missing[:3] or 'nothing'}"
        )
    kernels: dict[str, tuple[int, int]] = {}
    for name, layout in state.layouts.items():
        key = f"{name}.weight" if name else "weight"
        shape = tuple(own[key].shape) if key in own else ()
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
        target = own[name]
        if target.shape != value.shape:
            raise ValueError(
                f"model: {name} has shape {tuple(target.shape)}, the packed network's is {tuple(value.shape)}"
            )
        if dtypes and target.dtype != value.dtype:
            raise ValueError(f"model: {name} is {target.dtype}, the packed network's is {value.dtype}")
    for name, mask in state.masks.items():
        if name not in own or own[name].shape != mask.shape:
            raise ValueError(f"model: has no {name} of shape {tuple(mask.shape)}, which a mask is on")
    return dense


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, tensor = name.rpartition(".")
    return model.get_submodule(path), tensor


def fill(model: nn.Module, state: PackedState, *, hold_all: bool = False) -> None:
    """Checks a packed state against a dense network, then writes it there; nothing is written where anything
    is wrong.

    Masks that the network carries are set. Where it has none, one is put on a weight that is shared with a
    layer which reads more of it; with ``hold_all`` on every weight that had one.
    """
    dense, own, on = _checked(model, state), _split(model)[0], masked(model)
    targets = {name: own[f"{name}_orig" if name in on else name] for name in dense}
    holders: dict[int, list[str]] = {}
    for name, target in targets.items():
        holders.setdefault(id(target), []).append(name)
    needed = set(state.masks if hold_all else ())
    for names in holders.values():
        if len(names) > 1:
            needed |= _agree(names, dense, state)
    _set_extra(model, state.extra)
    with torch.no_grad():
        for name, value in dense.items():
            targets[name].copy_(value)
        for name in [*on, *(needed - on.keys())]:
            mask = state.mask(name)
            shape = targets[name].shape
            hold(*_owner(model, name), torch.ones(shape) if mask is None else mask.expand(shape))


def _agree(names: list[str], dense: dict[str, torch.Tensor], state: PackedState) -> set[str]:
    """Gives the names of one shared tensor its one value, in place; those that must be masked to read theirs.
    Raises ValueError where there is none.
    """
    whole, known = dense[names[0]].clone(), torch.zeros_like(dense[names[0]], dtype=torch.bool)
    for name in names:
        mask, value = state.mask(name), dense[name]
        read = (torch.ones(()) if mask is None else mask).ne(0).to(value.device).expand(value.shape)
        if not bool((whole == value)[known & read].all()):
            raise ValueError(
                f"model: {names[0]} and {name} are one tensor, and the packed network has different values "
                "for them"
            )
        whole, known = torch.where(read, value, whole), known | read
    masks = {name for name in names if not torch.equal(dense[name], whole)}
    dense.update((name, whole) for name in names)
    return masks
