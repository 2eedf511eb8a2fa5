"""A packed graph cut into native segments and torch's operators between them.

What each operator can be is asked of its row in ``operators``: one that has no step, or whose step refuses
the arguments, runs in torch, and nothing else does for its sake. What is left is cut into as few segments as
can be: torch's operators run as soon as their inputs are there, and when none is left, all of the native ones
that can run, and so on. So no path leaves a segment and comes back to it.

A segment that multiplies little pays for its call and for copies at its ends with nothing: one of fewer than
``LEAST_MACS`` multiply-adds for each number that it takes or gives runs in torch, unless the whole network is
one segment. So does one whose only work is linear layers with more than ``MOST_WEIGHTS`` weights: it would
read them from memory as torch does, and keep a copy of them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from dsp_kernels.program import Program, Value

from ..operators import find
from ..steps import Moved, Refused, settled
from .builder import Builder
from .shape_inference import Shapes, batch_of, image_of

__all__ = ["LEAST_MACS", "Mismatch", "Plan", "Segment", "plan"]

LEAST_MACS = 4
MOST_WEIGHTS = 1 << 18  # a mebibyte


class Mismatch(RuntimeError):
    """A value has another shape than was found without computing it."""


class Segment(nn.Module):
    """A part of a packed graph as one native program.

    Attributes:
        program: what runs.
        macs: its multiply-adds, as torch counts them; ``steps``: the nodes that it stands for.
    """

    def __init__(self, program: Program, macs: int, steps: int) -> None:
        super().__init__()
        self.program, self.macs, self.steps = program, macs, steps
        self._sizes = [len(shape) + 1 for shape in program.input_shapes]

    def forward(self, *inputs: torch.Tensor) -> Any:
        """(N, ...) of each input to that of the output, or a list of several."""
        batch = inputs[0].shape[0]
        for x, shape in zip(inputs, self.program.input_shapes, strict=True):
            if x.shape[0] != batch or x.shape[1:] != shape or x.dtype is not torch.float32:
                raise Mismatch(
                    f"a value of shape {tuple(x.shape)}, where (N, {', '.join(map(str, shape))}) was due"
                )
        results = self.program.run(inputs, batch)
        return results[0] if len(results) == 1 else results


@dataclass
class Plan:
    """What runs for arguments of certain sizes.

    Attributes:
        run: takes the flat arguments, and gives the flat outputs as the network's graph does.
        segments: the native ones, in order.
        whole: whether nothing runs in torch; then there is one segment, or none where nothing is computed.
        macs: the multiply-adds of the network.
        torch: the operators that run there, by how often, without those that compute sizes.
        reason: why the first of them does; None where the network is whole.
        exact: whether it holds for this batch alone.
        alone: whether one program takes the one argument and gives the one output.
    """

    run: Callable[..., Any]
    segments: list[Segment]
    whole: bool
    macs: int
    torch: dict[str, int]
    reason: str | None
    exact: bool
    alone: bool = False


class _NoStep(Exception):
    """Values that a segment would give are its inputs; of these nodes."""

    def __init__(self, nodes: list[fx.Node]) -> None:
        super().__init__()
        self.nodes = nodes


class _Other:
    """Stands for a value that no program has: of another rank, dtype, or not known."""


OTHER = _Other()


class _Part:
    """Nodes that may become a segment."""

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        self.nodes = list(nodes)
        own = set(self.nodes)
        inputs = (p for n in self.nodes for p in n.all_input_nodes if p not in own)
        self.inputs = list(dict.fromkeys(inputs))
        self.outputs: list[fx.Node] = []

    @property
    def key(self) -> Any:
        return tuple(self.nodes), tuple(self.inputs), tuple(self.outputs)


class _Planner:
    def __init__(self, network: fx.GraphModule, shapes: Shapes) -> None:
        self.network, self.shapes = network, shapes
        self.nodes = [n for n in network.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
        self.values = shapes.values
        # What a program's value can stand for; constants are given to steps as they are.
        self.images = {n: None if n.op == "get_attr" else image_of(v) for n, v in self.values.items()}
        self.arguments = self._first_sizes()
        self.reasons: dict[fx.Node, str] = {}  # why a node is no step; others are
        self.programs: dict[Any, Program] = {}
        self.constants: dict[fx.Node, torch.Tensor] = {}  # copies of parameters, as these
        self._ask()
        self.nodes = [n for n in self.nodes if n not in self.constants]

    # which operators are steps ------------------------------------------------------------------------------

    def is_size(self, node: fx.Node) -> bool:
        """Whether a node is arithmetic on sizes."""
        value = self.values.get(node)
        return isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))

    def number(self, node: fx.Node) -> Any:
        """A size's value, where it is the same in every call; else None."""
        value = self.values[node]
        return value if isinstance(value, (int, float, bool)) else None

    def _first_sizes(self) -> dict[fx.Node, fx.Node]:
        """By node that reads a first size: the argument that has it too."""
        sources: dict[Any, fx.Node] = {}
        for node, value in self.values.items():
            if node.op == "placeholder" and isinstance(value, torch.Tensor) and value.dim() > 0:
                sources.setdefault(batch_of(value), node)
        return {
            node: sources[value.node.expr]
            for node, value in self.values.items()
            if node.op == "call_function"
            and find(node.target).kind == "size"
            and isinstance(value, torch.SymInt)
            and value.node.expr in sources
        }

    def is_given(self, node: fx.Node) -> bool:
        """Whether a node is a size that is known, or the first one of an argument."""
        size = self.is_size(node) and (self.number(node) is not None or node in self.arguments)
        return size or node in self.constants

    def _ask(self) -> None:
        """Asks each operator by itself; a first program gets a step for each, and is not built."""
        places = [n for n in self.values if self.images[n] is not None]
        if not places:
            self.reasons = {n: "no value is an image" for n in self.nodes}
            return
        program = Program(*(cast(tuple[int, ...], self.images[n]) for n in places))
        builder = Builder(self.network, program, self.images)
        for node, value in zip(places, program.inputs, strict=True):
            builder.env[node] = value
        self._give_constants(builder)
        for node in self.values:
            builder.env.setdefault(node, OTHER)
        for node in self.nodes:
            if self.is_size(node):
                continue
            reason, result = self._tried(builder, node)
            if reason is not None:
                self.reasons[node] = reason
            elif isinstance(result, torch.Tensor):
                builder.env[node] = self.constants[node] = result
            elif self.images[node] is None or isinstance(result, Moved):
                builder.env[node] = result

    def _give_constants(self, builder: Builder) -> None:
        for node, known in self.values.items():
            if node.op == "get_attr" or self.is_size(node):
                builder.env[node] = known
        builder.env.update(self.constants)

    def _tried(self, builder: Builder, node: fx.Node) -> tuple[str | None, Any]:
        name = f"operator {_name(self.network, node)}"
        try:
            result = builder.step(node)
        except Refused as refused:
            return str(refused).partition("\n")[0], None
        except Exception as error:  # whatever a step finds wrong is that operator's alone
            return f"{name}: {_line(error)}", None
        if isinstance(result, torch.Tensor):
            return None, result
        value = self.values[node]
        image = self.images[node]
        if image is None:  # parts of one, or what only the next step makes an image of
            return (None, result) if not isinstance(result, Value) else (f"{name} gives no image", None)
        if not isinstance(result, (Value, Moved)) or len(result.sizes) != len(image):
            return f"{name} gives what no program has", None
        inputs = [n for n in node.all_input_nodes if self.images.get(n) is not None]
        if any(batch_of(self.values[n]) != batch_of(value) for n in inputs):
            return f"{name} changes the batch", None
        return None, result

    # the cut ------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        while True:
            order = self._schedule()
            parts = [part for part in order if isinstance(part, _Part)]
            failed = next((bad for part in parts if (bad := self._build(part))), None)
            if failed is None:
                return self._assembled(order)
            self.reasons.update(failed)

    def _dependencies(self) -> dict[fx.Node, list[fx.Node]]:
        """What must run before each node. One that writes into a tensor keeps its place among all others."""
        needs: dict[fx.Node, list[fx.Node]] = {}
        writer: fx.Node | None = None
        before: list[fx.Node] = []
        for node in self.nodes:
            needs[node] = [] if self.is_given(node) else list(node.all_input_nodes)
            if writer is not None:
                needs[node].append(writer)
            if _writes(node):
                needs[node] += before
                writer, before = node, []
            before.append(node)
        return needs

    def _schedule(self) -> list[fx.Node | _Part]:
        """Nodes that run in torch, and parts, in the order in which they run."""
        needs = self._dependencies()
        waiting = {node: len(set(needs[node]) & needs.keys()) for node in self.nodes}
        users: dict[fx.Node, list[fx.Node]] = {}
        for node, parents in needs.items():
            for parent in set(parents):
                users.setdefault(parent, []).append(node)
        position = {node: i for i, node in enumerate(self.nodes)}
        ready = {True: [], False: []}  # type: dict[bool, list[fx.Node]]

        def native(node: fx.Node) -> bool:
            if node in self.reasons or self.is_size(node):
                return False
            return not any(p in self.reasons and self.images[p] is None for p in node.all_input_nodes)

        def done(node: fx.Node) -> None:
            for user in users.get(node, []):
                waiting[user] -= 1
                if waiting[user] == 0:
                    ready[native(user)].append(user)

        for node in self.nodes:
            if waiting[node] == 0:
                ready[native(node)].append(node)
        order: list[fx.Node | _Part] = []
        while ready[True] or ready[False]:
            while ready[False]:
                node = ready[False].pop(0)
                order.append(node)
                done(node)
            wave: list[fx.Node] = []
            while ready[True]:
                node = ready[True].pop(0)
                wave.append(node)
                done(node)
            groups: dict[Any, list[fx.Node]] = {}
            for node in sorted(wave, key=position.__getitem__):
                value = self.values[node]
                first = value[0] if isinstance(value, (list, tuple)) else value
                groups.setdefault(batch_of(first), []).append(node)
            order += [_Part(nodes) for nodes in groups.values()]
        return self._paying(order)

    def _paying(self, order: list[fx.Node | _Part]) -> list[fx.Node | _Part]:
        """The same without parts that are too small to pay."""
        parts = [part for part in order if isinstance(part, _Part)]
        for part in parts:
            self._ends(part)
        if len(parts) == 1 and all(p is parts[0] or self.is_size(cast(fx.Node, p)) for p in order):
            return order  # the whole network
        kept: list[fx.Node | _Part] = []
        for item in order:
            if isinstance(item, _Part):
                if not item.outputs:
                    continue  # read for sizes alone
                ends = sum(_numel(self.images[n]) for n in (*item.inputs, *item.outputs))
                macs = sum(self.shapes.macs.get(n, 0) for n in item.nodes)
                if macs < LEAST_MACS * ends or self._reads_weights_alone(item):
                    kept += item.nodes
                    continue
            kept.append(item)
        return kept

    def _reads_weights_alone(self, part: _Part) -> bool:
        working = [n for n in part.nodes if self.shapes.macs.get(n, 0)]
        layers = [self.network.get_submodule(str(n.target)) for n in working if n.op == "call_module"]
        if len(layers) < len(working) or not all(isinstance(layer, nn.Linear) for layer in layers):
            return False
        return sum(cast(torch.Tensor, layer.weight).numel() for layer in layers) > MOST_WEIGHTS

    def _ends(self, part: _Part) -> None:
        """What a part takes and gives. Sizes of its values are known without it."""
        own = set(part.nodes)
        part.inputs = [
            n
            for n in part.inputs
            if self.images.get(n) is not None and n.op != "get_attr" and n not in self.constants
        ]
        part.outputs = [
            node
            for node in part.nodes
            if any(user not in own and not self.is_given(user) for user in node.users)
        ]

    # programs -----------------------------------------------------------------------------------------------

    def _made(
        self, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
    ) -> Program:
        """Raises ValueError, TypeError or RuntimeError where that is no program."""
        program = Program(*(cast(tuple[int, ...], self.images[n]) for n in inputs))
        builder = Builder(self.network, program, self.images)
        self._give_constants(builder)
        builder.env.update(zip(inputs, program.inputs, strict=True))
        for node in nodes:
            builder.env[node] = builder.step(node)
        results = [settled(program, builder.env[node]) for node in outputs]
        given = [node for node, made in zip(outputs, results, strict=True) if made.number < len(inputs)]
        if given:
            raise _NoStep(given)
        program.build(*results)
        for node, shape in zip(outputs, program.output_shapes, strict=True):
            if shape != self.images[node]:
                raise ValueError(f"the step gives {shape}, the operator {self.images[node]}")
        return program

    def _build(self, part: _Part) -> dict[fx.Node, str]:
        """Makes a part's program. Returns the nodes that keep it from being one, with why."""
        if part.key in self.programs:
            return {}
        bad = {
            node: f"operator {_name(self.network, node)} with results that no program gives"
            for node in part.outputs
            if self.images[node] is None
        }
        if bad:
            return bad
        try:
            self.programs[part.key] = self._made(part.nodes, part.inputs, part.outputs)
            return {}
        except _NoStep as found:
            return {
                node: f"operator {_name(self.network, node)} at an end of a segment" for node in found.nodes
            }
        except Exception as error:
            text = _line(error)
        bad = {node: reason for node in part.nodes if (reason := self._alone(node)) is not None}
        return bad or {node: f"operator {_name(self.network, node)}: {text}" for node in part.nodes}

    def _alone(self, node: fx.Node) -> str | None:
        """Why a node by itself is no program."""
        inputs = [n for n in dict.fromkeys(node.all_input_nodes) if self.images.get(n) is not None]
        if self.images[node] is None or not inputs:
            return None
        try:
            self._made([node], inputs, [node])
        except _NoStep:
            return None
        except Exception as error:
            return f"operator {_name(self.network, node)}: {_line(error)}"
        return None

    # the whole ----------------------------------------------------------------------------------------------

    def _assembled(self, order: list[fx.Node | _Part]) -> Plan:
        """The plan of an order whose programs are made: a graph with a module for each segment."""
        graph, env = fx.Graph(), dict[fx.Node, Any]()
        modules: dict[str, Any] = {}
        segments: list[Segment] = []
        counts: dict[str, int] = {}
        reason: str | None = None
        for node in self.network.graph.nodes:
            if node.op == "placeholder":
                env[node] = graph.placeholder(node.name)

        def value(node: fx.Node) -> Any:
            if node.op == "get_attr" and node not in env:
                path = str(node.target)
                env[node], modules[path] = graph.get_attr(path), self.values[node]
            elif self.is_size(node) and self.number(node) is not None:
                return self.number(node)
            elif node in self.arguments and node not in env:
                source = env[self.arguments[node]]
                env[node] = graph.call_function(cast(Callable[..., Any], node.target), (source, 0))
            elif node in self.constants and node not in env:
                args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
                env[node] = graph.create_node(node.op, node.target, args, kwargs)
            return env[node]

        for item in order:
            if isinstance(item, _Part):
                macs = sum(self.shapes.macs.get(n, 0) for n in item.nodes)
                segment = Segment(self.programs[item.key], macs, len(item.nodes))
                name = f"segment_{len(segments)}"
                modules[name] = segment
                segments.append(segment)
                made = graph.call_module(name, tuple(env[n] for n in item.inputs))
                for i, node in enumerate(item.outputs):
                    alone = len(item.outputs) == 1
                    env[node] = made if alone else graph.call_function(operator.getitem, (made, i))
                continue
            if self.is_given(item):
                continue
            if not self.is_size(item) and item.target is not operator.getitem:
                name = _name(self.network, item)
                counts[name] = counts.get(name, 0) + 1
                reason = reason or self.reasons.get(item, f"operator {name} is too little work for a segment")
            if item.op == "call_module":
                modules[str(item.target)] = self.network.get_submodule(str(item.target))
            args, kwargs = map_arg(item.args, value), map_arg(item.kwargs, value)
            env[item] = graph.create_node(item.op, item.target, args, kwargs)
        output = next(n for n in reversed(self.network.graph.nodes) if n.op == "output")
        graph.output(map_arg(output.args[0], value))
        module = fx.GraphModule(modules, graph, "Segments").eval()
        graph.eliminate_dead_code()
        module.recompile()
        total = sum(self.shapes.macs.values())
        plan = Plan(module.forward, segments, not counts, total, counts, reason, self.shapes.exact)
        ends = list(output.args[0]) if isinstance(output.args[0], (list, tuple)) else [output.args[0]]
        plan.alone = (
            plan.whole
            and len(segments) == 1
            and [n.op for n in self.values].count("placeholder") == 1
            and len(ends) == 1
            and isinstance(ends[0], fx.Node)
            and ends[0].op != "placeholder"
        )
        return plan


def plan(network: fx.GraphModule, leaves: Sequence[Any]) -> Plan:
    """Cuts a packed graph for arguments of these sizes, given flat.

    Raises ValueError where the graph takes another number of them.
    """
    count = sum(node.op == "placeholder" for node in network.graph.nodes)
    if count != len(leaves):
        raise ValueError(f"the graph takes {count} arguments, {len(leaves)} were given")
    with torch.inference_mode(False), torch.no_grad():
        made: Plan | None = None
        shapes = Shapes(network, leaves)
        if shapes.hold():
            made = _Planner(network, shapes).plan()
        if made is None or not shapes.hold():  # a step may ask for a size, too
            made = _Planner(network, Shapes(network, leaves, exact=True)).plan()
    return made


def _name(network: fx.GraphModule, node: fx.Node) -> str:
    """An operator's name, or the type of a layer."""
    if node.op == "call_module":
        return type(network.get_submodule(str(node.target))).__name__
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _numel(shape: tuple[int, ...] | None) -> int:
    return math.prod(shape) if shape is not None else 0
