"""One view of the exported graph, shared by structure search, liveness, packing and the summary.

``trace`` exports a model in evaluation mode with ``torch.export``, functionalises it and names every
convolution and linear layer by the module that owns its weight. Batch and image size stay symbolic wherever
the model allows it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map, tree_map_only

from dsp_kernels.geometry import Geometry, pair

from .functional import is_simple, make_functional
from .guards import Expression, evaluate, parse
from .inputs import Signature, describe, own_tensors, tensors_of
from .masks import copies_of_results, holding, settle, settle_parametrizations
from .operators import find
from .state import containers_in, preserved, where_changed

__all__ = ["ConvInfo", "ExportError", "NetworkGraph", "prunable_convs", "trace"]


class ExportError(RuntimeError):
    """The model cannot be exported; the text says why."""


@dataclass(frozen=True)
class ConvInfo:
    """A convolution of a network, as seen at one example input.

    ``macs`` counts multiply-accumulates of one image with dense weights. ``uses`` is how often the module is
    called. The roles come from the graph: ``is_stem`` reads the network's input, ``is_shortcut`` is the
    projection on the short branch of a residual addition, ``last_in_block`` is the last convolution on its
    long branch.
    """

    name: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    groups: int
    output_size: tuple[int, int]
    macs: int
    uses: int = 1
    is_stem: bool = False
    is_shortcut: bool = False
    last_in_block: bool = False
    is_module: bool = True

    @property
    def prunable(self) -> bool:
        """Every plain ``Conv2d`` except the stem, shortcut projections, depthwise and grouped ones."""
        plain = self.is_module and self.groups == 1 and self.in_channels > 1
        return plain and not self.is_stem and not self.is_shortcut


@dataclass
class Site:
    """One call of a convolution or linear layer whose weight is a parameter of the model."""

    node: fx.Node
    kind: str  # "conv", "linear"
    name: str  # the module that owns the weight, or the weight itself where it is no module's "weight"
    weight_name: str
    bias_name: str | None
    x: fx.Node
    out_channels: int
    in_channels: int  # of the whole convolution, groups included
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    output_size: tuple[int, int] = (1, 1)
    positions: int = 1  # output positions of one image
    uses: int = 1
    is_module: bool = True

    @property
    def dense_macs(self) -> int:
        taps = self.kernel_size[0] * self.kernel_size[1]
        return self.out_channels * (self.in_channels // self.groups) * taps * self.positions


@dataclass(frozen=True)
class Limits:
    """Input sizes that an exported graph is good for.

    ``ranges`` holds, per argument in the flat order of their nest, the least and greatest size (None: no
    limit) of each dimension; None for one that is no tensor. ``guard`` holds the tracer's further assumptions
    on the arguments' sizes.
    """

    ranges: tuple[tuple[tuple[int, int | None], ...] | None, ...]
    guard: Expression | None = None

    def admit(self, sizes: Sequence[Any]) -> bool:
        """Whether inputs of these sizes (None: no tensor) may run."""
        for shape, ranges in zip(sizes, self.ranges, strict=True):
            if ranges is None:
                continue
            if len(shape) != len(ranges):
                return False
            for size, (least, most) in zip(shape, ranges, strict=True):
                if size < least or (most is not None and size > most):
                    return False
        return self.guard is None or bool(evaluate(self.guard, sizes))


@dataclass
class NetworkGraph:
    """The functional graph of a model with its layers; see ``trace``.

    ``module`` is a flat ``torch.fx.GraphModule`` over ATen calls, whose ``get_attr`` nodes carry the model's
    own parameter names. ``tensors`` maps these names to the tensors. ``sites`` are the layers in execution
    order.
    """

    module: fx.GraphModule
    tensors: dict[str, torch.Tensor]
    sites: list[Site]
    limits: Limits
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def convs(self) -> list[Site]:
        return [site for site in self.sites if site.kind == "conv"]

    def infos(self) -> list[ConvInfo]:
        """One ``ConvInfo`` per convolution module, in the order of first execution."""
        roles = _roles(self)
        out: dict[str, ConvInfo] = {}
        for site in self.convs:
            known = out.get(site.name)
            stem, shortcut, last = roles[site.node]
            out[site.name] = ConvInfo(
                name=site.name,
                in_channels=site.in_channels,
                out_channels=site.out_channels,
                kernel_size=site.kernel_size,
                groups=site.groups,
                output_size=site.output_size if known is None else known.output_size,
                macs=site.dense_macs + (0 if known is None else known.macs),
                uses=site.uses,
                is_stem=stem or (known is not None and known.is_stem),
                is_shortcut=shortcut or (known is not None and known.is_shortcut),
                last_in_block=last or (known is not None and known.last_in_block),
                is_module=site.is_module,
            )
        return list(out.values())


def as_inputs(example_input: Any) -> tuple[Any, ...]:
    """The positional arguments that ``example_input`` stands for: a tensor, or a tuple or list of arguments,
    with tensors in any nest.
    """
    if isinstance(example_input, torch.Tensor):
        return (example_input,)
    if isinstance(example_input, (tuple, list)) and tensors_of(example_input):
        return tuple(example_input)
    raise TypeError(
        "example_input: expected a tensor, or a tuple of positional arguments with at least one tensor, "
        f"got {type(example_input).__name__}"
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile`` and ``DistributedDataParallel`` wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def masked_copy(model: nn.Module, kept: Mapping[int, Any] = MappingProxyType({})) -> nn.Module:
    """A deep copy with its prune masks on and its parametrizations applied for good; the argument is left
    alone. ``kept``: what of it is not copied, as a memo of ``copy.deepcopy``.

    ``copy.deepcopy`` alone raises on a model that carries prune masks: its ``weight`` is then not a graph
    leaf.
    """
    model = unwrap(model)
    clone = copy.deepcopy(model, copies_of_results(model) | dict(kept))
    for module in clone.modules():
        if "_original_forward" in vars(module):  # Accelerate's autocast around the forward method
            del module.forward, module._original_forward
    settle_parametrizations(clone)
    return clone


def clean_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose prune masks and parametrizations are applied for good; the argument is left alone.

    Modules that share a weight share it in the copy too where their masks leave the same of it.
    """
    clone = masked_copy(model, holding(unwrap(model)))
    settle(clone)
    return clone


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def quiet() -> Iterator[None]:
    """No log lines or warnings of the tracer: where an attempt fails, the next one or the error says what
    matters.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def hint(size: Any) -> int:
    """The example's value of a size that may be symbolic."""
    if isinstance(size, torch.SymInt):
        value = size.node.hint
        return int(value if value is not None else size)
    return int(size)


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The example shape of a node's value, or None where it is not one tensor, or goes by what is in one."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    if any(isinstance(size, torch.SymInt) and size.node.hint is None for size in value.shape):
        return None
    return tuple(hint(size) for size in value.shape)


def widen_batch(inputs: Any) -> Any:
    """The nest with two images in the place of one: export treats a size of one as a constant."""
    return tree_map_only(
        torch.Tensor,
        lambda value: torch.cat([value, value]) if value.dim() >= 2 and value.shape[0] == 1 else value,
        inputs,
    )


def dynamic_shapes(inputs: Any, spatial: bool) -> Any:
    """The nest with the sizes that shall stay free in the place of tensors, None in that of others."""
    auto = torch.export.Dim.AUTO

    def sizes(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        if value.dim() == 4 and spatial:
            return {0: auto, 2: auto, 3: auto}
        return {0: auto} if value.dim() >= 1 else None

    return tree_map(sizes, inputs)


def _guard(program: torch.export.ExportedProgram, named: Mapping[str, Any]) -> Expression | None:
    """The tracer's assumptions on sizes. Raises ExportError where they cannot be had or understood, or do not
    hold. ``named``: the arguments by name, in the order in which they are flattened.
    """
    written = getattr(program, "_guards_code", None)
    if written is None:
        raise ExportError("this torch does not tell the tracer's assumptions on sizes")
    paths, _ = tree_flatten_with_path(dict(named))
    try:
        guard = parse(written, {f"L{keystr(path)}": i for i, (path, _) in enumerate(paths)})
    except ValueError as error:
        raise ExportError(str(error)) from error
    sizes = [tuple(v.shape) if isinstance(v, torch.Tensor) else None for _, v in paths]
    if guard is not None and not evaluate(guard, sizes):
        raise ExportError("the tracer's assumptions do not hold for the example")
    return guard


def _ranges(program: torch.export.ExportedProgram, leaves: Sequence[Any]) -> tuple[Any, ...]:
    names = set(program.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    tensors = iter([value for value in values if isinstance(value, torch.Tensor)])
    out: list[Any] = []
    for value in leaves:
        if not isinstance(value, torch.Tensor):
            out.append(None)
            continue
        sizes: list[tuple[int, int | None]] = []
        for size in next(tensors).shape:
            bounds = program.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
            if bounds is None:
                sizes.append((hint(size), hint(size)))
                continue
            least, most = int(bounds.lower), bounds.upper
            finite = isinstance(most, int) or getattr(most, "is_Integer", False)
            # Export never tells 0 and 1 apart from "2 and more"; a bound of 2 is no bound.
            sizes.append((0 if least <= 2 else least, int(most) if finite and int(most) < 1 << 30 else None))
        out.append(tuple(sizes))
    return tuple(out)


MOST_TERMS = 64  # of one symbolic size; plain networks have some four for each strided layer at most


class _Budget(TorchFunctionMode):
    """Gives an export up where symbolic sizes become long expressions.

    "Same" padding computed from the size mentions it three times a layer: after n strided layers 3^n terms,
    in each of which the tracer reasons, for assumptions that are as long.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[Any] = set()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            for size in value.shape if isinstance(value, torch.Tensor) else ():
                if isinstance(size, torch.SymInt) and size.node.expr not in self._seen:
                    self._seen.add(size.node.expr)
                    if size.node.expr.count_ops() > MOST_TERMS:
                        raise ExportError(f"a size of more than {MOST_TERMS} terms")
        return out


def _export(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.export.ExportedProgram, Limits, bool]:
    """The exported program, its limits, and whether it is left to ``make_functional``.

    Sizes are as free as the model allows, in three attempts.
    """
    signature = Signature(model.forward)
    wide = widen_batch((inputs, kwargs))
    attempts = [(wide, True), (wide, False), ((inputs, kwargs), None)]
    error = ""
    for (args, named), spatial in attempts:
        given = signature.arguments(args, named)
        shapes = None if spatial is None else dynamic_shapes(given, spatial)
        try:
            with quiet(), torch.no_grad(), _no_autocast(), _watched(model) as changed:
                with _Budget():
                    program = torch.export.export(model, args, named, dynamic_shapes=shapes)
                if changed:
                    raise _Stateful(f"forward changes {changed[0]!r}, which a graph would not")
                ranges = _ranges(program, tree_leaves((args, named)))
                limits = Limits(ranges, None if shapes is None else _guard(program, given))
                free = [r[0][0] != r[0][1] for r in ranges if r]  # the first size of each tensor
                own = [
                    v.shape if isinstance(v, torch.Tensor) else None for v in tree_leaves((inputs, kwargs))
                ]
                if shapes is not None and not (all(free) or (any(free) and limits.admit(own))):
                    error = "the batch size became a constant"
                    continue
                simple = is_simple(program.graph)
                if not simple:
                    program = program.run_decompositions({})
                written = _written(program)
                if written is not None:
                    raise _Stateful(f"forward changes {written!r}, which a graph would not")
                return program, limits, simple
        except _Stateful:
            raise
        except Exception as failure:  # any failure of the tracer means: try a plainer export
            lines = str(failure).strip().splitlines()
            error = f"{type(failure).__name__}: {lines[0] if lines else ''}"
    raise ExportError(f"torch.export failed: {error}")


class _Stateful(ExportError):
    """The model remembers something from one call to the next."""


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """What forward changes besides tensors, in the model or in dictionaries and lists of its arguments, by
    name; the model is brought back afterwards.

    Export itself brings back attributes that are no tensors, so it is looked at where forward ends.
    """
    found: list[str] = []
    given: list[tuple[str, Any, Any]] = []

    def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
        given[:] = containers_in((args, kwargs))

    def look(*_: Any) -> None:
        name = state.changed(tensors=False) or where_changed(given)
        if name is not None:
            found.append(name)

    handles = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(look),
    ]
    try:
        with preserved(model) as state:
            yield found
    finally:
        for handle in handles:
            handle.remove()


def _written(program: torch.export.ExportedProgram) -> str | None:
    """The name of a buffer or parameter that forward writes; None where there is none."""
    signature = program.graph_signature
    names = [
        *signature.buffers_to_mutate.values(),
        *getattr(signature, "parameters_to_mutate", {}).values(),
    ]
    return names[0] if names else None


@contextmanager
def _no_autocast() -> Iterator[None]:
    """A graph has the dtypes that the network has by itself; who runs it casts, or not."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def check_takes(model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
    """Raises ValueError where the model does not run on these inputs: no fault of the tracer's."""
    args, named = own_tensors((inputs, dict(kwargs or {})))
    try:
        with quiet(), torch.no_grad(), preserved(model):
            model(*args, **named)
    except Exception as failure:
        lines = str(failure).strip().splitlines()
        raise ValueError(
            f"example_input: the model does not take {describe(inputs, kwargs)}: "
            f"{lines[0] if lines else type(failure).__name__}"
        ) from failure


def trace(model: nn.Module, example_input: Any, keywords: Mapping[str, Any] | None = None) -> NetworkGraph:
    """Exports ``model`` (evaluation mode, masks applied by the caller) into a ``NetworkGraph``.

    Args:
        model: a module without prune masks (see ``clean_copy``); its mode is restored afterwards.
        example_input: a tensor (N, C, H, W), or a tuple of positional arguments.
        keywords: further arguments by name.

    Raises:
        ExportError: the model cannot be exported.
        TypeError: ``example_input`` holds no tensor.
        ValueError: the model itself fails on ``example_input``.
    """
    kwargs = dict(keywords or {})
    inputs = tuple(example_input) if tensors_of(kwargs) else as_inputs(example_input)
    with evaluating(model):
        try:
            program, limits, simple = _export(model, inputs, kwargs)
        except ExportError:
            check_takes(model, inputs, kwargs)
            raise
    with quiet():
        module = program.module()
    assert isinstance(module, fx.GraphModule)
    for node in list(module.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            module.graph.erase_node(node)  # the limits say the same
    if simple:  # else it was traced again; what is written in place then are arguments
        make_functional(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    tensors = {
        node.target: _attribute(module, node.target) for node in module.graph.nodes if node.op == "get_attr"
    }
    tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    return NetworkGraph(module, tensors, _sites(module, tensors), limits)


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def arguments(node: fx.Node, defaults: Sequence[Any]) -> list[Any]:
    """Positional arguments of an ATen call, filled up from its keywords and ``defaults``."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    out = list(node.args)
    for position in range(len(out), len(defaults)):
        out.append(node.kwargs.get(names[position], defaults[position]))
    return out


def named(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by their names; those that it leaves out have their defaults."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in schema), node.args, strict=False))
    defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
    return defaults | given | dict(node.kwargs)


def owner_of(weight_name: str) -> str:
    """The module that a weight belongs to, or the tensor itself where it is no module's ``weight``."""
    owner, _, attribute = weight_name.rpartition(".")
    return owner if attribute == "weight" and owner else weight_name


def _sites(module: fx.GraphModule, tensors: dict[str, torch.Tensor]) -> list[Site]:
    sites: list[Site] = []

    def parameter(node: Any) -> str | None:
        if isinstance(node, fx.Node) and node.op == "get_attr" and node.target in tensors:
            return str(node.target)
        return None

    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        kind = find(node).kind
        if kind == "conv":
            x, weight, bias, stride, padding, dilation, groups = arguments(
                node, [None, None, None, [1, 1], [0, 0], [1, 1], 1]
            )
            weight_name, shape = parameter(weight), shape_of(node)
            if weight_name is None or shape is None or len(shape) != 4:
                continue
            if bias is not None and parameter(bias) is None:
                continue
            if any(isinstance(v, fx.Node) for v in tree_leaves((stride, padding, dilation))):
                continue  # computed from the input's size: left to torch
            w = tensors[weight_name]
            geometry = Geometry.of((int(w.shape[2]), int(w.shape[3])), stride, padding, dilation)
            if geometry.padding is None:
                continue  # asymmetric padding: left to torch
            sites.append(
                Site(
                    node,
                    "conv",
                    owner_of(weight_name),
                    weight_name,
                    parameter(bias),
                    x,
                    out_channels=int(w.shape[0]),
                    in_channels=int(w.shape[1]) * groups,
                    kernel_size=geometry.kernel,
                    stride=geometry.stride,
                    padding=geometry.padding,
                    dilation=geometry.dilation,
                    groups=int(groups),
                    output_size=(shape[2], shape[3]),
                    positions=shape[2] * shape[3],
                )
            )
        elif kind == "linear":
            x, weight, bias = arguments(node, [None, None, None])
            weight_name, shape = parameter(weight), shape_of(node)
            if weight_name is None or shape is None or (bias is not None and parameter(bias) is None):
                continue
            w = tensors[weight_name]
            sites.append(
                Site(
                    node,
                    "linear",
                    owner_of(weight_name),
                    weight_name,
                    parameter(bias),
                    x,
                    out_channels=int(w.shape[0]),
                    in_channels=int(w.shape[1]),
                    positions=math.prod(shape[1:-1]) if len(shape) > 2 else 1,
                )
            )
    for site in sites:
        site.is_module = site.name != site.weight_name
        site.uses = sum(other.weight_name == site.weight_name for other in sites)
    return sites


def _roles(graph: NetworkGraph) -> dict[fx.Node, tuple[bool, bool, bool]]:
    """(stem, shortcut, last in block) of every convolution, from the shape of the graph alone."""
    nodes = list(graph.module.graph.nodes)
    index = {node: i for i, node in enumerate(nodes)}
    ancestors = [0] * len(nodes)  # bit sets over node indices, the node itself included
    for i, node in enumerate(nodes):
        bits = 1 << i
        for parent in node.all_input_nodes:
            bits |= ancestors[index[parent]]
        ancestors[i] = bits
    sites = {site.node: site for site in graph.convs}
    conv_bits = sum(1 << index[node] for node in sites)

    def nearest(start: fx.Node, within: int) -> set[fx.Node]:
        """Convolutions that reach ``start`` through no other convolution."""
        found: set[fx.Node] = set()
        queue, seen = [start], {start}
        while queue:
            node = queue.pop()
            if node in sites:
                found.add(node)
                continue
            for parent in node.all_input_nodes:
                if parent not in seen and within >> index[parent] & 1:
                    seen.add(parent)
                    queue.append(parent)
        return found

    stems: set[fx.Node] = set()
    for node in sites:
        if not (ancestors[index[node]] & conv_bits & ~(1 << index[node])):
            stems.add(node)
    shortcuts: set[fx.Node] = set()
    last: set[fx.Node] = set()
    for node in nodes:
        if not find(node).sum:
            continue
        a, b = node.args[:2]
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
            continue
        shapes = shape_of(a), shape_of(b)
        if shapes[0] is None or shapes[0] != shapes[1] or len(shapes[0]) != 4:
            continue
        bits_a, bits_b = ancestors[index[a]], ancestors[index[b]]
        only_a, only_b = bits_a & ~bits_b, bits_b & ~bits_a
        count_a, count_b = (only_a & conv_bits).bit_count(), (only_b & conv_bits).bit_count()
        if count_a == count_b:  # two branches of one convolution each: the smaller kernel is the projection
            if count_a != 1:
                continue
            kernels = [
                sites[next(iter(nearest(n, bits)))].kernel_size for n, bits in ((a, only_a), (b, only_b))
            ]
            if kernels[0] == kernels[1]:
                continue
            a_is_main = kernels[0] > kernels[1]
        else:
            a_is_main = count_a > count_b
        main, main_bits = (a, only_a) if a_is_main else (b, only_b)
        short, short_bits = (b, only_b) if a_is_main else (a, only_a)
        short_count = (short_bits & conv_bits).bit_count()
        if short_count > 1:
            continue
        if short_count == 1:
            shortcuts |= nearest(short, short_bits)
        ends = nearest(main, main_bits)
        if len(ends) == 1:
            last |= ends
    return {node: (node in stems, node in shortcuts, node in last) for node in sites}


def hooked_infos(model: nn.Module, inputs: tuple[Any, ...]) -> list[ConvInfo]:
    """What a forward pass shows where export fails: no roles but the first convolution's."""
    seen: dict[str, ConvInfo] = {}
    handles = []

    def watch(name: str, conv: nn.Conv2d) -> None:
        def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
            h, w = int(output.shape[-2]), int(output.shape[-1])
            kernel = pair("kernel_size", conv.kernel_size, 1, expand=True)
            macs = conv.weight.shape[0] * conv.weight.shape[1] * kernel[0] * kernel[1] * h * w
            known = seen.get(name)
            seen[name] = ConvInfo(
                name,
                conv.in_channels,
                conv.out_channels,
                kernel,
                conv.groups,
                (h, w),
                macs + (known.macs if known else 0),
                1 + (known.uses if known else 0),
                is_stem=not seen or (known is not None and known.is_stem),
            )

        handles.append(conv.register_forward_hook(hook))

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            watch(name, module)
    try:
        with evaluating(model), torch.no_grad(), preserved(model):
            model(*own_tensors(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return list(seen.values())


def conv_infos(model: nn.Module, example_input: Any) -> list[ConvInfo]:
    """Every convolution that ``example_input`` reaches, in execution order; works without export, with fewer
    roles.
    """
    clone = clean_copy(model)
    inputs = as_inputs(example_input)
    try:
        return trace(clone, inputs).infos()
    except ExportError as error:
        warnings.warn(f"{error}; only the first convolution is taken for a stem", stacklevel=2)
        return hooked_infos(clone, inputs)


def prunable_convs(model: nn.Module, example_input: Any) -> list[ConvInfo]:
    """The convolutions that the method groups and prunes, in execution order.

    Prunable is every ``Conv2d`` except the stem, shortcut projections, depthwise and already grouped ones;
    the roles are found in the exported graph, not from names.

    Args:
        model: any ``torch.nn.Module``; it is not changed.
        example_input: a tensor (N, C, H, W), or a tuple of positional arguments.

    Raises:
        TypeError: ``model`` is no module, or ``example_input`` holds no tensor. ValueError: the model does
        not take ``example_input``.
    """
    return [info for info in conv_infos(model, example_input) if info.prunable]
