"""What runs a packed network on the CPU: plans of native segments, kept by the sizes of the arguments."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx, nn

from dsp_kernels import backends
from dsp_kernels._kept import Kept
from dsp_kernels.program import Program

from ..watch import Watch
from .segments import Mismatch, Plan, plan
from .shape_inference import batches

__all__ = ["NativeRunner", "to_program"]

PLAIN = (torch.Tensor, nn.Parameter)
KEPT_PLANS = 8  # sizes of the arguments; the least recently used goes first


def to_program(network: nn.Module, shape: tuple[int, ...]) -> tuple[Program | None, str | None]:
    """The one native program of a packed graph for images of ``shape`` (C, H, W), or None and the reason why
    it is none, or more than one.

    The network must take one image tensor and return one tensor; float32 on the CPU.
    """
    if not isinstance(network, fx.GraphModule):
        return None, "the network is no exported graph"
    if sum(node.op == "placeholder" for node in network.graph.nodes) != 1:
        return None, "the network takes more than one input"
    found = plan(network, [torch.empty(0, *shape)])
    if found.alone:
        return found.segments[0].program, None
    return None, found.reason or "the network does not return one tensor that it computes"


class NativeRunner:
    """The plans of one packed graph by the sizes of its arguments, made when first needed, dropped when
    weights change.

    They are used for plain inference: float32 on the CPU, no gradients, no hooks on inner layers, no tracer
    or dispatch mode that wants to see every operator. What is written unseen: see ``Watch``. ``reason`` says
    why not all of the last call was native.
    """

    def __init__(self, network: nn.Module, backend: str | None) -> None:
        self.network, self.backend = network, backend
        self.reason: str | None = None
        self._plans: Kept[Any, tuple[Plan | None, str | None]] = Kept(KEPT_PLANS)
        self._lock = threading.Lock()
        self._watch = Watch(network)
        self._broken: str | None = None  # why no plan is good for anything
        self._returns_tensor: bool | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (NativeRunner, (self.network, self.backend))  # plans are made again where they are needed

    def find(self, leaves: Sequence[Any]) -> Plan | None:
        """The plan for these arguments, flat; None where layers must run one by one (see ``reason``)."""
        found = self.plan(leaves)
        return found if found is not None and found.segments else None

    def plan(self, leaves: Sequence[Any]) -> Plan | None:
        """As ``find``, also where all of it would run in torch."""
        with self._lock:
            found, self.reason = self._find(leaves)
        return found

    def _find(self, leaves: Sequence[Any]) -> tuple[Plan | None, str | None]:
        x = leaves[0]
        if len(leaves) == 1 and type(x) is torch.Tensor and x.dim() > 0:
            tensors: Sequence[torch.Tensor] = leaves
            key: Any = x.shape[1:]
        else:
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            key = batches(tensors), *(t.shape[1:] if t.dim() else None for t in tensors)
        for t in tensors:
            if type(t) is not torch.Tensor:
                return None, f"an input is a {type(t).__name__}, no plain tensor"
            if not t.is_cpu or (t.dtype is not torch.float32 and (t is x or t.is_floating_point())):
                return None, f"the input is {t.dtype} on {t.device.type}; programs are float32 on the cpu"
        if self._watch.changed():
            self._plans.clear()
        refused = self._broken or self._watch.refuses(*tensors)
        if refused is not None:
            return None, refused
        known: tuple[Plan | None, str | None] | None = self._plans.get(key)
        if known is not None and known[0] is not None and known[0].exact:
            key = tuple(t.shape for t in tensors)
            known = self._plans.get(key)
        return known or self._keep(key, self._make(leaves), tensors)

    def _keep(
        self, key: Any, made: tuple[Plan | None, str | None], tensors: Sequence[torch.Tensor]
    ) -> tuple[Plan | None, str | None]:
        self._plans[key] = made
        if made[0] is not None and made[0].exact:  # the first key says so, the second finds it
            self._plans[tuple(t.shape for t in tensors)] = made
        return made

    def run(self, found: Plan, leaves: Sequence[Any]) -> Any:
        """The result of a plan in the form in which the network returns it."""
        if found.alone:
            result = found.segments[0].program.run(leaves, leaves[0].shape[0])
            return result[0] if self._bare(result) else self._graph.process_outputs(result)
        try:
            return self._graph.process_outputs(found.run(*leaves))
        except Mismatch as error:
            with self._lock:
                self._broken = str(error)
            layers = fx.Interpreter(cast(fx.GraphModule, self.network))
            return self._graph.process_outputs(layers.run(*leaves, enable_io_processing=False))

    @property
    def _graph(self) -> fx.Graph:
        return cast(fx.GraphModule, self.network).graph

    def _bare(self, result: list[torch.Tensor]) -> bool:
        """Whether the network returns its one output as it is."""
        if self._returns_tensor is None:
            output = next(n for n in reversed(self._graph.nodes) if n.op == "output").args[0]
            as_list = isinstance(output, (list, tuple))
            self._returns_tensor = not as_list or self._graph.process_outputs(result) is result[0]
        return self._returns_tensor

    def _make(self, leaves: Sequence[Any]) -> tuple[Plan | None, str | None]:
        unfit = self._unfit()
        if unfit is not None:
            return None, unfit
        try:
            found = plan(cast(fx.GraphModule, self.network), leaves)
        except (ValueError, RuntimeError, TypeError) as error:
            return None, str(error).partition("\n")[0]
        return found, found.reason

    def _unfit(self) -> str | None:
        """Why no plan is made, whatever the arguments."""
        if not isinstance(self.network, fx.GraphModule):
            return "the network is no exported graph"
        if any(p.dtype is not torch.float32 for p in self.network.parameters()):
            return "weights are not float32"
        other = [type(p).__name__ for p in self.network.parameters() if type(p) not in PLAIN]
        if other:
            return f"a weight is a {other[0]}"
        try:
            chosen = backends.choose(self.backend, "cpu", torch.float32)
        except ValueError as error:
            return str(error)
        if chosen != "native":
            return f"backend {chosen!r} runs layer by layer"
        return None
