"""A packed network on a GPU: a form for each layer, chosen by cost or by measurement, and the whole under a
CUDA graph.

Everything but the capture itself is ordinary host code: what a capture does is behind :class:`Capturer`.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dsp_kernels import GroupLayout, activations, backends, cost
from dsp_kernels._kept import Kept
from dsp_kernels.conv import chain as chains
from dsp_kernels.conv.prepared import recording

from .nn import PermutedGroupedConv2d
from .operators import find
from .watch import Watch

__all__ = [
    "Capturer",
    "CudaCapturer",
    "DenseConv2d",
    "GraphCache",
    "Prediction",
    "Row",
    "Step",
    "form_table",
    "pad_channels",
    "predict",
    "rewrite",
    "trace_steps",
]

FORMS_ENVIRONMENT = "DSP_KERNELS_FORMS"
KEPT_GRAPHS = 8  # input shapes; the least recently used goes first
ALIGNMENT = 8  # channels of a 16-byte copy in half precision


# ---- what a packed network does, step by step ----


@dataclass(frozen=True)
class Step:
    """One node of a packed network at one input size: a packed layer with its ``conv``, or something else.

    ``bytes`` and ``flops`` are those of the other operators (nothing for views); ``name`` is the dense
    network's name of a layer.
    """

    node: fx.Node
    name: str
    kind: str
    conv: cost.Conv | None
    bytes: float
    flops: float


def _layer(network: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def _conv_of(layer: PermutedGroupedConv2d, x: torch.Size, residual: bool) -> cost.Conv:
    height, width = int(x[2]), int(x[3])
    if layer._outer_padding is not None:  # F.pad goes before the layer
        left, right, top, bottom = layer._outer_padding
        height, width = height + top + bottom, width + left + right
    return cost.Conv(
        layer.layout,
        int(x[0]),
        (height, width),
        layer.kernel_size,
        layer.stride,
        layer._inner_padding,
        layer.dilation,
        residual,
        layer.activation,
    )


class _Walker(fx.Interpreter):
    """Runs the graph on tensors without data and writes down what each node does."""

    def __init__(self, network: fx.GraphModule, size: int) -> None:
        super().__init__(network, garbage_collect_values=False)
        self.size = size
        self.steps: list[Step] = []

    def run_node(self, n: fx.Node) -> Any:
        layer = _layer(cast(fx.GraphModule, self.module), n)
        if isinstance(layer, PermutedGroupedConv2d):
            args, _ = self.fetch_args_kwargs_from_env(n)
            conv = _conv_of(layer, args[0].shape, len(args) > 1)
            name = str(getattr(layer, "dense_name", n.target))
            self.steps.append(Step(n, name, "packed", conv, 0.0, float(conv.flops)))
            return args[0].new_empty((conv.batch, conv.layout.out_channels, *conv.out_size))
        out = super().run_node(n)
        if n.op not in ("call_function", "call_module", "call_method") or not isinstance(out, torch.Tensor):
            return out
        inputs = [v for p in n.all_input_nodes if isinstance(v := self.env.get(p), torch.Tensor)]
        if any(v.untyped_storage()._cdata == out.untyped_storage()._cdata for v in inputs):
            return out
        moved = float(self.size * (out.numel() + sum(v.numel() for v in inputs)))
        flops, kind = 0.0, "other"
        if isinstance(layer, nn.Linear):
            kind, flops = "linear", 2.0 * out.numel() * layer.in_features
            moved += self.size * layer.weight.numel()
        elif isinstance(layer, nn.Conv2d):
            kind, flops = "conv", 2.0 * out.numel() * layer.weight[0].numel()
            moved += self.size * layer.weight.numel()
        name = str(getattr(layer, "dense_name", n.target if layer is not None else n.name))
        self.steps.append(Step(n, name, kind, None, moved, flops))
        return out


def trace_steps(network: fx.GraphModule, shape: Sequence[int], dtype: torch.dtype) -> list[Step]:
    """The steps of a packed graph for one image tensor of ``shape`` (N, C, H, W), in order, without running
    it. ``dtype`` is that of its activations, for the bytes.

    Raises whatever an operator of the graph raises for that shape.
    """
    walker = _Walker(network, torch.empty(0, dtype=dtype, device="meta").element_size())
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0, device="meta"))
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
        walker.run(x, enable_io_processing=False)
    return walker.steps


# ---- choosing ----


@dataclass(frozen=True)
class Row:
    """One launch of a network in the form chosen for it: predicted seconds, floor, and why. ``predicted``:
    the model's seconds of every form that was weighed; empty for chains and what is no packed layer.
    """

    names: tuple[str, ...]
    nodes: tuple[str, ...]
    form: str
    seconds: float
    floor: float
    waste: float
    runs: int
    bound: str
    reason: str
    predicted: Mapping[str, float] = field(hash=False, default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """What a packed network should take on a device; ``str()`` is a table. Nothing in it is measured, but
    where ``reason`` of a row says so.
    """

    rows: tuple[Row, ...]
    device: cost.Device
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.rows)

    @property
    def floor(self) -> float:
        """The floor of the fusion that is in use."""
        return sum(row.floor for row in self.rows)

    def __str__(self) -> str:
        names = [" + ".join(row.names) for row in self.rows]
        width = max([len(name) for name in names] + [len("whole network")])
        forms = list(dict.fromkeys(form for row in self.rows for form in row.predicted))
        head = (
            f"{'layer':<{width}}  {'form':<7}  {'us':>8}  {'floor us':>8}  {'waste %':>7}  {'runs':>4}  "
            f"{'bound':<7}  {''.join(f'{form:>8}  ' for form in forms)}reason"
        )
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [
            f"predicted for {self.device.name} ({self.device.arch}), {dtype}, input {self.shape}; "
            "the columns before the reason: microseconds of each form by the model",
            head,
            "-" * len(head),
        ]
        for name, row in zip(names, self.rows, strict=True):
            each = [f"{1e6 * row.predicted[f]:>8.1f}  " if f in row.predicted else " " * 10 for f in forms]
            lines.append(
                f"{name:<{width}}  {row.form:<7}  {1e6 * row.seconds:>8.1f}  {1e6 * row.floor:>8.1f}  "
                f"{100 * row.waste:>7.1f}  {row.runs:>4}  {row.bound:<7}  {''.join(each)}{row.reason}"
            )
        lines.append("-" * len(head))
        lines.append(
            f"{'whole network':<{width}}  {'':<7}  {1e6 * self.seconds:>8.1f}  {1e6 * self.floor:>8.1f}"
        )
        return "\n".join(lines)


_tables: dict[tuple[str, float], cost.FormTable] = {}


def form_table() -> cost.FormTable:
    """The measured forms that packing goes by: the file that ``DSP_KERNELS_FORMS`` names, or the shipped one.

    Raises ValueError for a file that is no such table, OSError for one that cannot be read.
    """
    named = os.environ.get(FORMS_ENVIRONMENT)
    if not named:
        return cost.FormTable.shipped()
    key = (named, os.stat(named).st_mtime)
    if key not in _tables:
        _tables.clear()
        _tables[key] = cost.FormTable.load(named)
    return _tables[key]


def _other(step: Step, where: cost.Device, dtype: torch.dtype, eager: bool) -> Row:
    work = step.flops / where.flops_per_second(dtype) if step.flops else 0.0
    memory = step.bytes / where.bytes_per_second()
    launch = where.launch_eager if eager else where.launch
    bottom = max(work, memory)
    bound = "launch" if launch > bottom else "compute" if work > memory else "memory"
    return Row(
        (step.name,), (step.node.name,), "torch", bottom + launch, bottom, 0.0, 0, bound, "not a packed layer"
    )


def _triples(steps: Sequence[Step]) -> list[tuple[Step, Step, Step]]:
    """Chains in a graph: k x k with ReLU, read by one 1x1 with residual and ReLU alone, read by a 1x1."""
    packed = {step.node: step for step in steps if step.conv is not None}
    order = {step.node: i for i, step in enumerate(steps)}
    found, taken = [], set()
    for first in steps:
        if first.node not in packed or first.node in taken or len(first.node.users) != 1:
            continue
        second = packed.get(next(iter(first.node.users)))
        if second is None or second.conv is None or first.conv is None:
            continue
        residual = second.node.args[1] if len(second.node.args) > 1 else None
        plain = first.conv.residual is False and first.conv.activation == "relu"
        if not plain or second.node.args[0] is not first.node or residual is None or residual is first.node:
            continue
        if not _pointwise(second.conv) or second.conv.activation != "relu":
            continue
        # The residual's other users do not matter; it has to be there before the chain is.
        for user in sorted((u for u in second.node.users if u in packed), key=order.__getitem__):
            third = packed[user]
            assert third.conv is not None
            reads = third.node.args[0] is second.node and len(third.node.args) == 1
            if reads and _pointwise(third.conv) and third.conv.activation == "relu" and user not in taken:
                found.append((first, second, third))
                taken |= {first.node, second.node, third.node}
                break
    return found


def _pointwise(conv: cost.Conv) -> bool:
    return conv.kernel == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0)


def _chain_row(
    triple: tuple[Step, Step, Step],
    alone: Sequence[cost.Choice],
    where: cost.Device,
    dtype: torch.dtype,
    table: cost.FormTable | None,
    arch_only: bool,
) -> Row | None:
    """The row of a chain where the kernel takes it and it should be faster than its three layers."""
    convs = [cast(cost.Conv, step.conv) for step in triple]
    if not arch_only and chains.refuses(convs, dtype, where.shared_memory) is not None:
        return None
    # Of a chain that no kernel makes yet, weights are taken to stay where they are.
    macs, copied = chains.padded_macs(convs), 0.0
    if not arch_only:
        layouts = [conv.layout for conv in convs]
        config = chains.config_of(layouts, dtype, shared_memory=where.shared_memory, arch=where.arch)
        copied = chains.copied(convs, config)
    estimate = cost.chain_estimate(convs, (False, True, True), where, dtype, macs=macs, copied=copied)
    bottom = cost.chain_estimate(convs, (False, True, True), where, dtype, exact=True).seconds
    separate = sum(choice.seconds for choice in alone)
    seconds, reason = estimate.seconds, f"predicted; {separate / estimate.seconds:.2f}x against three layers"
    better = estimate.seconds < separate
    key = " + ".join(conv.key(dtype) for conv in convs)
    times = table.find(where.arch, key) if table is not None else {}
    if "chain" in times and "layers" in times:
        better = times["chain"] < times["layers"]
        seconds = 1e-6 * times["chain"]
        reason = f"measured: chain {times['chain']:.1f} us, layers {times['layers']:.1f} us"
    if not better:
        return None
    return Row(
        tuple(step.name for step in triple),
        tuple(step.node.name for step in triple),
        "chain",
        seconds,
        bottom,
        estimate.waste,
        sum(choice.padding.runs for choice in alone),
        estimate.bound,
        reason,
    )


def _rows(
    network: fx.GraphModule,
    shape: Sequence[int],
    dtype: torch.dtype,
    where: cost.Device,
    table: cost.FormTable | None,
    forms: Sequence[str],
    chain: str,
    eager: bool,
    within: str = "",
    refused: Mapping[str, str] | None = None,
) -> list[Row]:
    steps = trace_steps(network, shape, dtype)
    choices = {
        step.node: cost.choose_form(
            step.conv, where, dtype, table=table, forms=forms, refused=refused, eager=eager
        )
        for step in steps
        if step.conv is not None
    }
    at: dict[fx.Node, Row | None] = {}
    if chain != "off":
        for triple in _triples(steps):
            alone = [choices[step.node] for step in triple]
            first = _layer(network, triple[0].node)
            assert isinstance(first, PermutedGroupedConv2d)
            if first._outer_padding is not None or not triple[0].name.startswith(tuple(within.split(","))):
                continue
            row = _chain_row(triple, alone, where, dtype, table, chain == "unlimited")
            if row is not None:
                at.update({triple[0].node: None, triple[1].node: row, triple[2].node: None})
    rows = []
    for step in steps:
        if step.node in at:
            found = at[step.node]
            if found is not None:
                rows.append(found)
        elif step.node in choices:
            choice = choices[step.node]
            estimate = choice.estimates[choice.form]
            rows.append(
                Row(
                    (step.name,),
                    (step.node.name,),
                    choice.form,
                    choice.seconds,
                    choice.floor,
                    estimate.waste,
                    choice.padding.runs,
                    estimate.bound,
                    choice.reason,
                    {form: one.seconds for form, one in choice.estimates.items()},
                )
            )
        else:
            rows.append(_other(step, where, dtype, eager))
    return rows


def predict(
    packed: nn.Module,
    shape: Sequence[int],
    *,
    device: str | torch.device | cost.Device = "H200",
    dtype: torch.dtype = torch.bfloat16,
    table: cost.FormTable | None = None,
    forms: Sequence[str] = cost.FORMS,
    chain: str = "auto",
    within: str = "",
    eager: bool = False,
) -> Prediction:
    """What a packed network should take on a GPU, layer by layer, by the cost model (and by ``table``, where
    that has measurements), with private activations padded as :func:`rewrite` pads them.

    Args:
        packed: a fused ``PackedNetwork``, or its graph.
        shape: of the input, (N, C, H, W).
        device: a name or architecture of ``dsp_kernels.cost.devices()``, a CUDA device, or a ``Device``.
        dtype: of weights and activations there.
        forms: the forms to choose from.
        chain: "auto" where the chain kernel takes the shapes and should gain; "off"; "unlimited", wherever
            the graph has the pattern, whatever the kernel takes.
        within: chains only where the first layer's name starts with this (several: with commas between).
        eager: kernels launched from Python instead of by a CUDA graph.

    Raises:
        TypeError: ``packed`` is not a fused packed network. ValueError: another argument is not of this form.
    """
    network = getattr(packed, "network", packed)
    if not isinstance(network, fx.GraphModule):
        raise TypeError("packed: expected a fused PackedNetwork: an unfused one has no graph to predict from")
    if chain not in ("auto", "off", "unlimited"):
        raise ValueError(f"chain: expected 'auto', 'off' or 'unlimited', got {chain!r}")
    where = device if isinstance(device, cost.Device) else cost.device(device)
    rows = _rows(pad_channels(network), shape, dtype, where, table, forms, chain, eager, within)
    return Prediction(tuple(rows), where, dtype, tuple(shape))


# ---- rewriting ----


class DenseConv2d(nn.Module):
    """A packed layer in the form ``torch``: torch's own convolution over the dense weight, zeros included,
    then residual and activation. ``forward`` takes and gives what the packed layer does.

    On CUDA a float32 convolution is float32, unless ``torch.backends.cuda.matmul`` allows TF32. Its bits are
    cuDNN's.
    """

    bias: nn.Parameter | None

    def __init__(self, layer: PermutedGroupedConv2d) -> None:
        super().__init__()
        weight = layer.dense_weight().detach().contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(weight, requires_grad=False)
        bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), False)
        self.register_parameter("bias", bias)
        self.stride, self.dilation = layer.stride, layer.dilation
        self.padding, self.outer, self.mode = layer._inner_padding, layer._outer_padding, layer.padding_mode
        self.activation = layer.activation

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if self.outer is not None:
            x = F.pad(x, self.outer, mode="constant" if self.mode == "zeros" else self.mode)
        if x.dtype is torch.float32 and x.device.type == "cuda":
            tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
            with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=tf32):
                y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)
        else:
            y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)
        if residual is not None:
            y = y.add_(residual)
        return activations.find(self.activation).apply(y)


def _relayered(
    layer: PermutedGroupedConv2d, layout: GroupLayout, weight: torch.Tensor, backend: str | None = None
) -> nn.Module:
    """The same layer with another layout, and on ``backend`` if that is named; ``bias`` grows by zeros where
    filters were added.
    """
    out = PermutedGroupedConv2d(
        layout,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
        activation=layer.activation,
        backend=backend or layer.backend,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
    out.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if layer.bias is not None:
        added = layout.out_channels - layer.out_channels
        out.bias = nn.Parameter(F.pad(layer.bias.detach(), (0, added)), requires_grad=False)
    if hasattr(layer, "dense_name"):
        out.dense_name = layer.dense_name
    return out.eval()


def _uses(network: fx.GraphModule) -> dict[str, int]:
    count: dict[str, int] = {}
    for node in network.graph.nodes:
        if node.op == "call_module":
            count[str(node.target)] = count.get(str(node.target), 0) + 1
    return count


def _set(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(network.get_submodule(parent), leaf, module)


def _shallow(network: fx.GraphModule) -> fx.GraphModule:
    """A graph module of its own over the same layers: what is changed in one is not seen in the other."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(network.graph, values)
    if result is not None:
        graph.output(result)
    graph.set_codegen(copy.copy(network.graph._codegen))
    return fx.GraphModule(network, graph, "PackedGraph").eval()


def pad_channels(network: fx.GraphModule, multiple: int = ALIGNMENT) -> fx.GraphModule:
    """The network with private activations padded to a multiple of ``multiple`` channels, so that every pixel
    starts on a 16-byte boundary in half precision.

    Padded is what one packed layer writes without residual and packed layers alone read: the writer gets dead
    filters with a bias of zero, the readers channels that no group reads; packed weights stay as they are.
    """
    network = _shallow(network)
    uses = _uses(network)
    for node in network.graph.nodes:
        layer = _layer(network, node)
        if not isinstance(layer, PermutedGroupedConv2d) or len(node.args) > 1 or uses[str(node.target)] > 1:
            continue
        missing = -layer.out_channels % multiple
        readers = [(user, _layer(network, user)) for user in node.users]
        simple = all(
            isinstance(reader, PermutedGroupedConv2d)
            and user.args[0] is node
            and node not in user.args[1:]
            and uses[str(user.target)] == 1
            for user, reader in readers
        )
        if not missing or not readers or not simple:
            continue
        layout = layer.layout
        wider = GroupLayout(layout.in_channels, layout.out_channels + missing, layout.groups)
        _set(network, str(node.target), _relayered(layer, wider, layer.weight))
        for user, reader in readers:
            assert isinstance(reader, PermutedGroupedConv2d)
            theirs = reader.layout
            taller = GroupLayout(theirs.in_channels + missing, theirs.out_channels, theirs.groups)
            _set(network, str(user.target), _relayered(reader, taller, reader.weight))
    return network


def _refused(network: fx.GraphModule, dtype: torch.dtype) -> dict[str, str]:
    """The forms that this network cannot run in where it is, with reasons."""
    device = next((p.device.type for p in network.parameters()), "cpu")
    reason = backends.can_run("cuda", device, dtype)
    return {} if reason is None else {"cuda": reason}


def rewrite(
    network: fx.GraphModule,
    shape: Sequence[int],
    dtype: torch.dtype,
    where: cost.Device,
    *,
    table: cost.FormTable | None = None,
    chain: str = "auto",
    forms: Sequence[str] = cost.FORMS,
) -> tuple[fx.GraphModule, Prediction]:
    """A packed graph in the forms chosen for inputs of ``shape`` on a device, and the prediction it goes by.

    The argument is left alone. Layers that stay grouped (``grouped``, ``cuda``) share its weights; the others
    hold copies in their own form, as they were at this call. Where a layer was measured to be fastest as
    ``cuda`` and the CUDA kernels cannot run here, it gets the next best form, and its reason says why. Raises
    ValueError for arguments of another form, and for ``forms`` none of which can be chosen.
    """
    if chain not in ("auto", "off"):
        raise ValueError(f"chain: expected 'auto' or 'off', got {chain!r}")
    network = pad_channels(network)
    with torch.no_grad():
        rows = _rows(
            network, shape, dtype, where, table, forms, chain, False, refused=_refused(network, dtype)
        )
        nodes = {node.name: node for node in network.graph.nodes}
        uses = _uses(network)
        for row in rows:
            if row.form == "chain":
                _insert_chain(network, [nodes[name] for name in row.nodes], where.shared_memory)
                continue
            node = nodes[row.nodes[0]]
            layer = _layer(network, node)
            if not isinstance(layer, PermutedGroupedConv2d) or uses[str(node.target)] > 1:
                continue
            if row.form == "cuda":
                _set(network, str(node.target), _relayered(layer, layer.layout, layer.weight, "cuda"))
            elif row.form == "torch":
                _set(network, str(node.target), DenseConv2d(layer))
            elif row.form == "merged" and len(layer.layout.groups) > 1:
                layout = cost.merged_layout(layer.layout)
                _set(network, str(node.target), _relayered(layer, layout, layout.pack(layer.dense_weight())))
        network.delete_all_unused_submodules()
        network.graph.lint()
        network.recompile()
    return network.eval(), Prediction(tuple(rows), where, dtype, tuple(shape))


def _insert_chain(network: fx.GraphModule, nodes: Sequence[fx.Node], shared_memory: int) -> None:
    """Puts one chain layer in the place of three; it returns (stream, next)."""
    first, second, third = nodes
    layers = [cast(PermutedGroupedConv2d, _layer(network, node)) for node in nodes]
    name = f"chain_{second.name}"
    network.add_submodule(name, ChainLayer(layers, shared_memory))
    graph = network.graph
    with graph.inserting_before(second):
        both = graph.call_module(name, (first.args[0], second.args[1]))
        stream = graph.call_function(_item, (both, 0))
        following = graph.call_function(_item, (both, 1))
    third.replace_all_uses_with(following)
    graph.erase_node(third)
    second.replace_all_uses_with(stream)
    graph.erase_node(second)
    graph.erase_node(first)


def _item(values: Sequence[torch.Tensor], index: int) -> torch.Tensor:
    return values[index]


class ChainLayer(nn.Module):
    """Three packed layers in one kernel: k x k with ReLU, 1x1 with residual and ReLU, 1x1 with ReLU.

    ``forward(x, residual)`` returns the second layer's and the third layer's output.
    """

    def __init__(self, layers: Sequence[PermutedGroupedConv2d], shared_memory: int | None = None) -> None:
        super().__init__()
        first = layers[0]
        self.chain = chains.Chain(
            [layer.layout for layer in layers],
            [layer.weight.detach() for layer in layers],
            [None if layer.bias is None else layer.bias.detach() for layer in layers],
            kernel=first.kernel_size,
            stride=first.stride,
            padding=first._inner_padding,
            dilation=first.dilation,
            shared_memory=shared_memory,
        )

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.chain(x, residual)


# ---- graphs ----


class Replay(Protocol):
    """A captured call: write ``input``, call it, read ``outputs``."""

    input: torch.Tensor
    outputs: Any

    def __call__(self) -> None: ...

    def enter(self) -> None:
        """Before ``input`` is written: whoever used the buffers last, on any stream, has to be done."""

    def leave(self) -> None:
        """After ``outputs`` were read."""


class Capturer(Protocol):
    """What turns a call on fixed buffers into something that can be replayed."""

    takes: tuple[str, ...]  # the backends whose layers can be captured

    def refuses(self, x: torch.Tensor) -> str | None:
        """Why a call with ``x`` cannot be captured at present; None where it can."""

    def device(self, x: torch.Tensor) -> cost.Device:
        """The device as the cost model sees it."""

    def capture(self, call: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Replay:
        """Captures ``call`` on a buffer like ``x``. Raises RuntimeError where that fails."""


_capturing = threading.Lock()  # one capture at a time in a process
WARM_UP = 3


class _CudaReplay:
    def __init__(self, graph: Any, buffer: torch.Tensor, outputs: Any, held: list[Any]) -> None:
        self.graph, self.input, self.outputs, self.held = graph, buffer, outputs, held
        self.done = torch.cuda.Event()

    def __call__(self) -> None:
        self.graph.replay()

    def enter(self) -> None:
        torch.cuda.current_stream(self.input.device).wait_event(self.done)

    def leave(self) -> None:
        self.done.record(torch.cuda.current_stream(self.input.device))


class CudaCapturer:
    """Captures on a CUDA device by ``torch.cuda.graph``, after warming up on a stream of its own.

    Images (N, C, H, W) of any dtype, on any CUDA device; the buffer that a graph reads is in channels_last.
    One capture at a time in a process, in the mode ``thread_local``: other threads may go on launching. Not
    yet run on a device. Source: torch's notes on CUDA graphs (``torch.cuda.graph``).
    """

    takes: tuple[str, ...] = ("triton",)

    def refuses(self, x: torch.Tensor) -> str | None:
        """Why a call with ``x`` cannot be captured at present (another device, a capture under way); None
        where it can.
        """
        if x.device.type != "cuda":
            return f"the input is on {x.device.type}; graphs are for cuda"
        if torch.cuda.is_current_stream_capturing():
            return "the stream is being captured by somebody else"
        return None

    def device(self, x: torch.Tensor) -> cost.Device:
        """The device of ``x`` as the cost model knows it; ValueError where that is no CUDA device."""
        return cost.device(x.device)

    def capture(self, call: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Replay:
        """Calls ``call`` three times on a copy of ``x``, then captures one more call.

        Args:
            call: launches kernels that read its argument and returns what they write, tensors in any nest; it
                may not wait for the device.
            x: (N, C, H, W), an example; its values are the buffer's first.

        Returns:
            The replay. It holds the graph, its buffers, and what the kernels were given.

        Raises:
            RuntimeError: the capture fails, such as by a synchronisation inside. What ``call`` raises.
        """
        with _capturing, torch.cuda.device(x.device):
            buffer = torch.empty(
                x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
            ).copy_(x)
            side = torch.cuda.Stream(x.device)
            side.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    call(buffer)
            torch.cuda.current_stream(x.device).wait_stream(side)
            torch.cuda.synchronize(x.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"), recording() as held:
                outputs = call(buffer)
            return _CudaReplay(graph, buffer, outputs, held)


@dataclass
class Captured:
    """One input shape: the network in its forms (kept alive for its weights), its replay and a lock."""

    network: fx.GraphModule
    prediction: Prediction
    replay: Replay
    lock: threading.Lock


def _new_cache(
    network: nn.Module, backend: str | None, capturer: Capturer, kept: int, chain: str
) -> GraphCache:
    return GraphCache(network, backend, capturer=capturer, kept=kept, chain=chain)


class GraphCache:
    """The CUDA graphs of one packed graph by input shape and dtype; made when first needed, dropped when
    weights change, the least recently used first out.

    Used for plain inference: no gradients, no hooks on inner layers, no autocast, no tracer or dispatch mode
    that wants to see every operator. What is written unseen: see ``Watch``. ``reason`` says why the last call
    had no graph. Callers on several threads and streams take turns on one graph's buffers.
    """

    def __init__(
        self,
        network: nn.Module,
        backend: str | None,
        *,
        capturer: Capturer | None = None,
        kept: int = KEPT_GRAPHS,
        chain: str = "auto",
    ) -> None:
        if kept < 1:
            raise ValueError(f"kept: expected at least 1, got {kept}")
        self.network, self.backend, self.kept, self.chain = network, backend, kept, chain
        self.capturer: Capturer = capturer or CudaCapturer()
        self.reason: str | None = None
        self._graphs: Kept[Any, tuple[Captured | None, str | None]] = Kept(kept)
        self._lock = threading.RLock()
        self._watch = Watch(network)

    def __reduce__(self) -> tuple[Any, ...]:
        # Graphs are made again where they are needed.
        return (_new_cache, (self.network, self.backend, self.capturer, self.kept, self.chain))

    def find(self, leaves: Sequence[Any]) -> Captured | None:
        """The graph to replay for these arguments, flat; None where layers run one by one (``reason``)."""
        with self._lock:
            captured, self.reason = self._find(leaves)
        return captured

    def run(self, captured: Captured, leaves: Sequence[Any]) -> Any:
        """The graph's result, in memory of its own and in the form in which the network returns it."""
        with captured.lock, torch.no_grad():
            replay = captured.replay
            replay.enter()
            replay.input.copy_(leaves[0])
            replay()
            outputs = tree_map_only(torch.Tensor, torch.clone, replay.outputs)
            replay.leave()
        return outputs

    def prediction(self, x: torch.Tensor) -> Prediction | None:
        """What the graph kept for inputs like ``x`` goes by; None where none is kept."""
        with self._lock:
            found = self._graphs.get(self._key(x))
        return None if found is None or found[0] is None else found[0].prediction

    def _key(self, x: torch.Tensor) -> Any:
        return tuple(x.shape), x.dtype, x.device

    def _find(self, leaves: Sequence[Any]) -> tuple[Captured | None, str | None]:
        x = leaves[0]
        if len(leaves) != 1 or type(x) is not torch.Tensor or x.dim() != 4 or x.numel() == 0:
            return None, "the input is not one plain tensor of images"
        refused = self.capturer.refuses(x)
        if refused is not None:
            return None, refused
        if self._watch.changed():
            self._graphs.clear()
        refused = self._watch.refuses(x)
        if refused is not None:
            return None, refused
        key = self._key(x)
        known: tuple[Captured | None, str | None] | None = self._graphs.get(key)
        return known or self._graphs.put(key, self._make(x))

    def _make(self, x: torch.Tensor) -> tuple[Captured | None, str | None]:
        if not isinstance(self.network, fx.GraphModule):
            return None, "the network is no exported graph"
        if any(find(node).writes for node in self.network.graph.nodes):
            return None, "the network writes into its input"
        try:
            chosen = backends.choose(self.backend, x.device.type, x.dtype)
        except ValueError as error:
            return None, str(error)
        if chosen not in self.capturer.takes:
            return None, f"backend {chosen!r} runs layer by layer"
        try:
            with torch.inference_mode(False), torch.no_grad():
                network, prediction = rewrite(
                    self.network,
                    x.shape,
                    x.dtype,
                    self.capturer.device(x),
                    table=form_table(),
                    chain=self.chain,
                )
                replay = self.capturer.capture(network, x.detach())
        except (RuntimeError, ValueError, TypeError, NotImplementedError, OSError) as error:
            return None, f"no graph could be made: {str(error).partition(chr(10))[0]}"
        if not all(isinstance(leaf, torch.Tensor) or leaf is None for leaf in tree_leaves(replay.outputs)):
            return None, "the network returns something else than tensors"
        return Captured(network, prediction, replay, threading.Lock()), None
