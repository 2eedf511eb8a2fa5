"""A packed network as one native program: lowered from its graph, run in one call, kept by image size."""

from __future__ import annotations

import threading
from typing import Any, cast

import torch
from torch import fx, nn

from dsp_kernels import backends
from dsp_kernels._kept import Kept
from dsp_kernels.program import Program, Value

from .nn import PermutedGroupedConv2d
from .operators import find
from .steps import Refused, value
from .watch import Watch

__all__ = ["ProgramCache", "to_program"]

PLAIN = (torch.Tensor, nn.Parameter)
KEPT_PROGRAMS = 8  # image sizes; the least recently used goes first


class _Builder(fx.Interpreter):
    """Walks the graph with program values in place of tensors."""

    def __init__(self, network: fx.GraphModule, shape: tuple[int, ...]) -> None:
        super().__init__(network, garbage_collect_values=False)
        self.program = Program(shape)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.program.input

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().get_attr(target, args, kwargs)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(args[0]) if leaf is not None]
        if len(leaves) != 1 or not isinstance(leaves[0], Value):
            raise Refused("the network does not return one tensor")
        return leaves[0]

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        layer = self.fetch_attr(target)
        program = self.program
        try:
            x = value(args[0])
        except Refused as reason:
            raise Refused(f"{target} {reason}") from None
        if isinstance(layer, PermutedGroupedConv2d) and layer._outer_padding is None:
            return program.conv(
                x,
                layer.weight,
                layer.layout,
                layer.bias,
                kernel_size=layer.kernel_size,
                stride=layer.stride,
                padding=layer._inner_padding,
                dilation=layer.dilation,
                residual=args[1] if len(args) > 1 else None,
                activation=layer.activation,
            )
        if (
            isinstance(layer, nn.Conv2d)
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        ):
            return program.conv2d(
                x,
                layer.weight,
                layer.bias,
                stride=layer.stride,
                padding=layer.padding,
                dilation=layer.dilation,
                groups=layer.groups,
            )
        if isinstance(layer, nn.Linear):
            if not x.flat:
                raise Refused(f"{target} is a linear layer on more than a vector")
            return program.linear(x, layer.weight, layer.bias)
        raise Refused(f"{target} is a {type(layer).__name__}")

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        row = find(target)
        if row.step is None:
            raise Refused(f"operator {target}")
        try:
            return row.step(self.program, *args, **kwargs)
        except Refused as reason:
            raise Refused(f"operator {target} {reason}") from None


def to_program(network: nn.Module, shape: tuple[int, ...]) -> tuple[Program | None, str | None]:
    """The native program of a packed graph for images of ``shape`` (C, H, W), or None and the reason why not.

    The network must take one image tensor and return one tensor; float32 on the CPU.
    """
    if not isinstance(network, fx.GraphModule):
        return None, "the network is no exported graph"
    if sum(node.op == "placeholder" for node in network.graph.nodes) != 1:
        return None, "the network takes more than one input"
    try:
        builder = _Builder(network, shape)
        with torch.no_grad():
            output = fx.Interpreter.run(builder, None, enable_io_processing=False)
            return builder.program.build(cast(Value, output)), None
    except Refused as reason:
        return None, str(reason.args[0]).partition("\n")[0]  # fx adds where in the graph it was
    except (ValueError, RuntimeError, TypeError) as error:
        return None, str(error).partition("\n")[0]


class ProgramCache:
    """The programs of one packed graph by image size, made when first needed, dropped when weights change.

    A program is used for plain inference: float32 on the CPU, no gradients, no hooks on inner layers, no
    tracer or dispatch mode that wants to see every operator. What is written unseen: see ``Watch``.
    ``reason`` says why the last call had no program.
    """

    def __init__(self, network: nn.Module, backend: str | None) -> None:
        self.network, self.backend = network, backend
        self.reason: str | None = None
        self._programs: Kept[tuple[int, ...], tuple[Program | None, str | None]] = Kept(KEPT_PROGRAMS)
        self._lock = threading.Lock()
        self._watch = Watch(network)
        self._place: tuple[int, int] | None = None
        self._alone = False  # the network returns the tensor itself

    def __reduce__(self) -> tuple[Any, ...]:
        return (ProgramCache, (self.network, self.backend))  # programs are made again where they are needed

    def find(self, args: tuple[Any, ...]) -> Program | None:
        """The program to run for these arguments; None where layers must run one by one (see ``reason``)."""
        with self._lock:
            program, self.reason = self._find(args)
        return program

    def _find(self, args: tuple[Any, ...]) -> tuple[Program | None, str | None]:
        x = args[0]
        if len(args) != 1 or type(x) is not torch.Tensor or len(shape := x.shape) != 4:
            return None, "the input is not one plain tensor of images"
        if x.dtype is not torch.float32 or not x.is_cpu:
            return None, f"the input is {x.dtype} on {x.device.type}; programs are float32 on the cpu"
        if self._watch.changed():
            self._programs.clear()
        refused = self._watch.refuses(x)
        if refused is not None:
            return None, refused
        image = shape[1:]
        known: tuple[Program | None, str | None] | None = self._programs.get(image)
        return known or self._programs.put(image, self._make(tuple(image)))

    def run(self, program: Program, x: torch.Tensor) -> Any:
        """The program's result in the form in which the network returns it."""
        graph = cast(fx.GraphModule, self.network).graph
        if self._place is None:
            output = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
            leaves = list(output) if isinstance(output, (list, tuple)) else [output]
            self._place = (next(i for i, leaf in enumerate(leaves) if leaf is not None), len(leaves))
            self._alone = len(leaves) == 1 and graph.process_outputs([x]) is x
        result = program.run((x,), x.shape[0])[0]  # find() has seen to x
        if self._alone:
            return result
        place, count = self._place
        values: list[Any] = [None] * count
        values[place] = result
        return graph.process_outputs(values)

    def _make(self, shape: tuple[int, ...]) -> tuple[Program | None, str | None]:
        if any(p.dtype is not torch.float32 for p in self.network.parameters()):
            return None, "weights are not float32"
        other = [type(p).__name__ for p in self.network.parameters() if type(p) not in PLAIN]
        if other:
            return None, f"a weight is a {other[0]}"
        try:
            chosen = backends.choose(self.backend, "cpu", torch.float32)
        except ValueError as error:
            return None, str(error)
        if chosen != "native":
            return None, f"backend {chosen!r} runs layer by layer"
        return to_program(self.network, shape)
