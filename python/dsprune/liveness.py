"""Which channels and filters still matter, computed on the exported graph.

Every value of the graph is described by a small *state*: a tensor shaped like the value, but of size one in
every dimension along which nothing differs. A forward sweep finds the positions that are a known constant
whatever the input; a backward sweep finds the positions that somebody reads. An operator that is not known
here reads everything and produces values that may be anything: it keeps what it touches.

A constant that is not zero (a dead filter with a bias) is never dropped: a consumer without padding, or a
linear layer, folds it into its bias, and every other consumer keeps reading it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .graph import NetworkGraph, Site, arguments, hint, named, shape_of
from .operators import find

__all__ = ["Liveness", "analyse"]

NAN = float("nan")
MAX_STATE = 1 << 22  # larger parameters are not followed position by position

State = Any  # a float64 tensor (NaN: not constant), a tuple of them, or None for values that are no tensors


@dataclass
class Liveness:
    """What ``analyse`` found.

    ``constant[node]`` and ``needed[node]`` have the node's state shape. ``pairs[site.node]`` is the bool (O,
    I) mask of the products that a convolution or linear layer still has to compute; ``folded[site.node]`` is
    the bool (I,) mask of the constant, non-zero channels that the layer's bias absorbs. ``unknown`` names the
    operators that kept everything.
    """

    constant: dict[fx.Node, State]
    needed: dict[fx.Node, State]
    pairs: dict[fx.Node, torch.Tensor]
    folded: dict[fx.Node, torch.Tensor]
    unknown: tuple[str, ...]

    def channels(self, which: dict[fx.Node, State], node: fx.Node, size: int, dim: int = 1) -> torch.Tensor:
        """One value per channel of a node's state; ``dim`` is where its channels lie."""
        return along(which[node], size, dim)


def along(state: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """A state reduced to one dimension; positions that differ elsewhere count as varying, or as needed."""
    if state.dim() == 0:
        return state.expand(size).clone()
    dim = dim % state.dim()
    other = [d for d in range(state.dim()) if d != dim and state.shape[d] != 1]
    if other:
        if state.dtype == torch.bool:
            state = state.any(dim=other, keepdim=True)
        else:
            same = (state == state.select(other[0], 0).unsqueeze(other[0])).all(dim=other[0], keepdim=True)
            first = state.narrow(other[0], 0, 1)
            state = torch.where(same, first, torch.full_like(first, NAN))
            return along(state, size, dim)
    shape = [1] * state.dim()
    shape[dim] = state.shape[dim]
    return state.reshape(shape).flatten().expand(size).clone()


def kernel_sums(weight: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """(O, n) in float64: the sum of each kernel over the ``n`` channels that are true in the bool (I,)
    ``channels``; of a linear layer, its weights there.
    """
    chosen = weight.detach()[:, channels.to(weight.device)].double()
    return chosen.flatten(2).sum(-1) if chosen.dim() > 2 else chosen


def _varying(rank: int) -> torch.Tensor:
    return torch.full((1,) * rank, NAN, dtype=torch.float64)


def _compress(state: torch.Tensor) -> torch.Tensor:
    for dim in range(state.dim()):
        if state.shape[dim] > 1:
            first = state.narrow(dim, 0, 1)
            if bool((state == first).all()):  # NaN differs from itself, which only keeps a dimension
                state = first
    return state.clone()


def _reduce_to(needed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """``any`` over the dimensions that ``shape`` lacks, as broadcasting would need them."""
    while needed.dim() > len(shape):
        needed = needed.any(dim=0)
    dims = [d for d in range(needed.dim()) if shape[d] == 1 and needed.shape[d] != 1]
    if dims:
        needed = needed.any(dim=dims, keepdim=True)
    return needed.expand(shape)


def _is_size(value: Any) -> bool:
    """Whether an argument is a number that is computed from the input's sizes: another at another size."""
    return (
        isinstance(value, fx.Node)
        and value.op != "get_attr"
        and not isinstance(value.meta.get("val"), (torch.Tensor, list, tuple))
    )


def _reads_sizes(node: fx.Node) -> bool:
    return any(map(_is_size, node.all_input_nodes))


def _concrete(value: Any) -> Any:
    """An argument with symbolic sizes replaced by the example's."""
    if isinstance(value, fx.Node):
        return hint(value.meta["val"]) if not isinstance(value.meta.get("val"), torch.Tensor) else value
    if isinstance(value, (list, tuple)):
        return type(value)(_concrete(v) for v in value)
    return value


class _Analysis:
    def __init__(self, graph: NetworkGraph, masks: Mapping[str, torch.Tensor]) -> None:
        self.graph = graph
        self.nodes = list(graph.module.graph.nodes)
        self.sites = {site.node: site for site in graph.sites}
        self.weights = {
            site.weight_name: self._weight(site, masks.get(site.weight_name)) for site in graph.sites
        }
        self.constant: dict[fx.Node, State] = {}
        self.needed: dict[fx.Node, State] = {}
        self.pairs: dict[fx.Node, torch.Tensor] = {}
        self.folded: dict[fx.Node, torch.Tensor] = {}
        self.unknown: set[str] = set()
        self.back: dict[fx.Node, Callable[[Any], None]] = {}

    def _weight(self, site: Site, mask: torch.Tensor | None) -> torch.Tensor:
        """(O, I): which channels each filter reads; grouped weights spread over all channels."""
        key = ("weight", site.weight_name)
        if key not in self.graph.cache:
            nonzero = self.graph.tensors[site.weight_name].detach().ne(0)
            self.graph.cache[key] = (nonzero.flatten(2).any(-1) if site.kind == "conv" else nonzero).cpu()
        nonzero = self.graph.cache[key]
        if mask is not None:
            nonzero = nonzero & mask
        if site.groups == 1:
            return nonzero
        wide = torch.zeros((site.out_channels, site.in_channels), dtype=torch.bool)
        per_o, per_i = site.out_channels // site.groups, site.in_channels // site.groups
        for g in range(site.groups):
            rows, columns = slice(g * per_o, (g + 1) * per_o), slice(g * per_i, (g + 1) * per_i)
            wide[rows, columns] = nonzero[rows]
        return wide

    # forward ------------------------------------------------------------------------------------------------

    def run(self) -> Liveness:
        for node in self.nodes:
            self.constant[node] = self._forward(node)
        for node in self.nodes:
            state = self.constant[node]
            if isinstance(state, tuple):
                self.needed[node] = tuple(torch.zeros(s.shape, dtype=torch.bool) for s in state)
            elif isinstance(state, torch.Tensor):
                self.needed[node] = torch.zeros(state.shape, dtype=torch.bool)
            else:
                self.needed[node] = None
        for node in reversed(self.nodes):
            if node.op == "output":
                for parent in node.all_input_nodes:
                    self._need_all(parent)
            elif node in self.back:
                self.back[node](self.needed[node])
            else:
                self._keep_inputs(node)
        return Liveness(self.constant, self.needed, self.pairs, self.folded, tuple(sorted(self.unknown)))

    def _keep_inputs(self, node: fx.Node) -> None:
        for parent in node.all_input_nodes:
            self._need_all(parent)

    def _need_all(self, node: fx.Node) -> None:
        needed = self.needed[node]
        if isinstance(needed, tuple):
            self.needed[node] = tuple(torch.ones_like(n) for n in needed)
        elif needed is not None:
            self.needed[node] = torch.ones_like(needed)

    def _need(self, node: Any, needed: torch.Tensor) -> None:
        if isinstance(node, fx.Node) and isinstance(self.needed[node], torch.Tensor):
            self.needed[node] = self.needed[node] | _reduce_to(needed, self.needed[node].shape)

    def _forward(self, node: fx.Node) -> State:
        value = node.meta.get("val")
        if node.op == "get_attr":
            tensor = self.graph.tensors.get(str(node.target))
            if tensor is None:
                return None
            if all(user in self.sites for user in node.users):
                return _varying(tensor.dim())  # a layer's weight or bias: read there
            if ("parameter", node) not in self.graph.cache:
                follow = tensor.numel() <= MAX_STATE and tensor.is_floating_point()
                state = (
                    _compress(tensor.detach().to("cpu", torch.float64)) if follow else _varying(tensor.dim())
                )
                self.graph.cache["parameter", node] = state
            return self.graph.cache["parameter", node]
        if node.op == "placeholder" or node.op == "output":
            return _varying(value.dim()) if isinstance(value, torch.Tensor) else None
        if not isinstance(value, (torch.Tensor, tuple, list)):
            return None  # a size
        if node in self.sites:
            return self._layer(node, self.sites[node])
        rule = RULES.get(find(node).kind)
        return self._unknown(node) if rule is None else rule(self, node)

    def _unknown(self, node: fx.Node) -> State:
        self.unknown.add(str(node.target))
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            return tuple(_varying(v.dim() if isinstance(v, torch.Tensor) else 0) for v in value)
        return _varying(value.dim()) if isinstance(value, torch.Tensor) else None

    def _evaluate(self, node: fx.Node, inputs: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
        """The node's operator on constant states; positions that varied stay NaN. Sizes count as one: what
        they lead to is no constant.
        """

        def swap(value: Any) -> Any:
            if _is_size(value):
                return 1
            if isinstance(value, fx.Node):
                return inputs[value] if value in inputs else _concrete(value)
            return [swap(v) for v in value] if isinstance(value, (list, tuple)) else value

        kwargs = {
            k: swap(v)
            for k, v in node.kwargs.items()
            if k not in ("memory_format", "device", "dtype", "layout")
        }
        if find(node).cast:
            return next(iter(inputs.values())).to(node.meta["val"].dtype).to(torch.float64)
        return node.target(*[swap(a) for a in node.args], **kwargs)  # type: ignore[operator]

    def _unary(self, node: fx.Node) -> State:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        state = self.constant[x]
        if not isinstance(state, torch.Tensor):
            return self._unknown(node)
        result = self._evaluate(node, {x: state})
        # A constant that becomes an integer or a boolean follows other rules from there: it is not followed.
        if _reads_sizes(node) or not node.meta["val"].is_floating_point():
            result = torch.full_like(result, NAN)
        self.back[node] = lambda needed: self._need(x, needed)
        return torch.where(state.isnan(), NAN, result)

    def _binary(self, node: fx.Node) -> State:
        operands = [a for a in node.args[:2] if isinstance(a, fx.Node)]
        states = {a: self.constant[a] for a in operands}
        if any(s is None for s in states.values()):  # a size among the operands
            states = {a: s for a, s in states.items() if s is not None}
            operands = list(states)
        if not operands or any(not isinstance(s, torch.Tensor) for s in states.values()):
            return self._unknown(node)
        result = self._evaluate(node, states)
        nan = torch.full(result.shape, _reads_sizes(node))
        for state in states.values():
            nan = nan | state.isnan()
        result = torch.where(nan, NAN, result)
        zero = torch.zeros_like(nan)
        product = find(node).product
        if product:
            for state in states.values():
                zero = zero | state.eq(0)
            result = torch.where(zero, 0.0, result)

        def back(needed: torch.Tensor) -> None:
            for operand in operands:
                if product:
                    live = torch.zeros_like(zero)
                    own = states[operand].eq(0) & torch.ones_like(zero)
                    live = needed & (
                        ~zero | own
                    )  # the factor that is zero must be read, its partner need not
                    self._need(operand, live)
                else:
                    self._need(operand, needed)

        self.back[node] = back
        return result

    def _batch_norm(self, node: fx.Node) -> State:
        x, weight, bias, mean, var = node.args[:5]
        eps = float(named(node)["eps"])
        assert isinstance(x, fx.Node)
        state, value = self.constant[x], shape_of(x)
        vectors = [
            self.graph.tensors.get(str(v.target)) if isinstance(v, fx.Node) and v.op == "get_attr" else None
            for v in (weight, bias, mean, var)
        ]
        computed = any(v is not None and t is None for v, t in zip(node.args[1:5], vectors, strict=True))
        if not isinstance(state, torch.Tensor) or value is None or computed:
            return self._unknown(node)
        shape = [1, value[1]] + [1] * (len(value) - 2)
        w, b, m, v = (None if t is None else t.detach().to("cpu", torch.float64).view(shape) for t in vectors)
        assert m is not None and v is not None
        scale = torch.rsqrt(v + eps) * (1.0 if w is None else w)
        shift = torch.zeros(shape, dtype=torch.float64) if b is None else b
        result = torch.where(scale.eq(0), shift, (state - m) * scale + shift)
        self.back[node] = lambda needed: self._need(
            x, (needed[0] if isinstance(needed, tuple) else needed) & scale.ne(0)
        )
        if find(node).tuple:
            return (result, _varying(1), _varying(1))
        return result

    def _pool(self, node: fx.Node) -> State:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        state = self.constant[x]
        if not isinstance(state, torch.Tensor) or any(s != 1 for s in state.shape[2:]) or state.dim() != 4:
            return self._unknown(node)
        result = state.clone()
        if find(node).average:
            given = named(node)
            pads = given.get("count_include_pad", True) and any(p != 0 for p in given.get("padding", ()))
            if pads or given.get("divisor_override") is not None:
                result = torch.where(result.eq(0), 0.0, NAN)

        def back(needed: Any) -> None:
            for part in needed if isinstance(needed, tuple) else (needed,):  # values, indices
                self._need(x, part)

        self.back[node] = back
        if isinstance(node.meta.get("val"), (tuple, list)):
            return (result, _varying(4))
        return result

    def _reduction(self, node: fx.Node) -> State:
        x, dims, keep = arguments(node, [None, [], False])[:3]
        state = self.constant[x]
        if not isinstance(state, torch.Tensor) or not dims:
            return self._unknown(node)
        dims = [dims] if isinstance(dims, int) else list(dims)
        if any(state.shape[d] != 1 for d in dims):
            return self._unknown(node)
        shape = state.shape
        self.back[node] = lambda needed: self._need(x, needed.reshape(shape))
        dims = {d % state.dim() for d in dims}
        kept = [s for d, s in enumerate(shape) if keep or d not in dims]
        return state.reshape(kept).clone()

    def _pad(self, node: fx.Node) -> State:
        given = named(node)
        x, pads, fill = node.args[0], given["pad"], given.get("value")
        assert isinstance(x, fx.Node)
        state = self.constant[x]
        if not isinstance(state, torch.Tensor) or len(pads) > 4 or state.dim() != 4:
            return self._unknown(node)
        result = state.clone()
        if given.get("mode", "constant") == "constant":
            border = NAN if _is_size(fill) else float(fill or 0)
            result = torch.where(result == border, result, NAN)
        self.back[node] = lambda needed: self._need(x, needed)
        return result

    # movement -----------------------------------------------------------------------------------------------

    def _move(self, node: fx.Node) -> State:
        sources: list[fx.Node] = []
        for argument in node.args:
            for item in argument if isinstance(argument, (list, tuple)) else [argument]:
                if isinstance(item, fx.Node) and isinstance(self.constant[item], torch.Tensor):
                    sources.append(item)
        if not sources or any(shape_of(s) is None for s in sources):
            return self._unknown(node)
        states = [self.constant[s] for s in sources]
        key = (node, tuple(tuple(s.shape) for s in states))
        if key not in self.graph.cache:
            self.graph.cache[key] = self._labels(node, sources, states)
        labels = self.graph.cache[key]
        if not self._at_every_size(node, sources, labels):
            return self._unknown(node)
        flat = torch.cat([s.reshape(-1) for s in states])

        def back(needed: Any) -> None:
            outs = zip(labels, needed, strict=True) if isinstance(needed, tuple) else [(labels, needed)]
            total = torch.zeros(flat.numel(), dtype=torch.bool)
            for label, need in outs:
                total[label[need]] = True
            offset = 0
            for source, state in zip(sources, states, strict=True):
                self._need(source, total[offset : offset + state.numel()].reshape(state.shape))
                offset += state.numel()

        self.back[node] = back
        if isinstance(labels, tuple):
            return tuple(flat[label] for label in labels)
        return flat[labels]

    def _at_every_size(self, node: fx.Node, sources: list[fx.Node], labels: Any) -> bool:
        """Whether positions go where they go in the example at other sizes too."""
        row = find(node)
        if _reads_sizes(node) and not row.resized:  # where it starts and ends, and by how much
            state = self.constant[sources[0]]
            dim = arguments(node, [None, 0])[1] if row.cut else None
            if not isinstance(dim, int) or state.dim() == 0 or state.shape[dim] != 1:
                return False
        values = node.meta["val"]
        pairs = zip(labels, values, strict=True) if isinstance(labels, tuple) else [(labels, values)]
        return all(
            count == 1 or not isinstance(size, torch.SymInt) or statically_known_true(size == hint(size))
            for label, value in pairs
            for count, size in zip(label.shape, value.shape, strict=True)
        )

    def _labels(self, node: fx.Node, sources: list[fx.Node], states: list[torch.Tensor]) -> Any:
        """Where each position of the result comes from, found by running the operator on numbered
        positions.
        """
        numbered: dict[fx.Node, torch.Tensor] = {}
        offset = 0
        for source, state in zip(sources, states, strict=True):
            shape = shape_of(source)
            assert shape is not None
            numbered[source] = torch.arange(offset, offset + state.numel()).reshape(state.shape).expand(shape)
            offset += state.numel()

        def swap(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return numbered[value] if value in numbered else _concrete(value)
            return [swap(v) for v in value] if isinstance(value, (list, tuple)) else value

        # Numbers that are expanded have no strides that a view could keep.
        target = cast(Callable[..., Any], find(node).copying or node.target)
        result = target(*[swap(a) for a in node.args], **{k: swap(v) for k, v in node.kwargs.items()})
        if isinstance(result, (list, tuple)):
            return tuple(_compress(r) for r in result)
        return _compress(result)

    def _getitem(self, node: fx.Node) -> State:
        source, index = node.args
        assert isinstance(source, fx.Node)
        state = self.constant[source]
        if not isinstance(state, tuple) or not isinstance(index, int):
            return self._unknown(node)

        def back(needed: torch.Tensor) -> None:
            parts = list(self.needed[source])
            parts[index] = parts[index] | needed
            self.needed[source] = tuple(parts)

        self.back[node] = back
        return state[index].clone()

    # layers -------------------------------------------------------------------------------------------------

    def _layer(self, node: fx.Node, site: Site) -> State:
        x_state = self.constant[site.x]
        if not isinstance(x_state, torch.Tensor):
            return self._unknown(node)
        conv = site.kind == "conv"
        dim = 1 if conv else x_state.dim() - 1
        x = along(x_state, site.in_channels, dim)
        tensors = self.graph.tensors
        nonzero = self.weights[site.weight_name]
        bias = torch.zeros(site.out_channels, dtype=torch.float64)
        if site.bias_name is not None:
            bias = tensors[site.bias_name].detach().to("cpu", torch.float64)
        foldable = site.uses == 1 and site.groups == 1 and (not conv or site.padding == (0, 0))
        known = ~x.isnan()
        zero = x.eq(0)
        absorbed = known & ~zero if foldable else torch.zeros_like(zero)
        # (O, I): products that depend on the image. What nothing is taken from is no copy: it may be large.
        dropped = zero | absorbed
        reads = nonzero & ~dropped if bool(dropped.any()) else nonzero
        known_part = bias
        if bool(absorbed.any()):
            sums = kernel_sums(tensors[site.weight_name], absorbed).cpu()
            known_part = bias + torch.where(nonzero[:, absorbed], sums * x[absorbed], 0.0).sum(1)
        out = torch.where(reads.any(1), NAN, known_part)
        state = out.view(1, -1, 1, 1) if conv else out.view([1] * (x_state.dim() - 1) + [-1])

        def back(needed: torch.Tensor) -> None:
            live = along(needed, site.out_channels, dim)
            pairs = reads if bool(live.all()) else reads & live[:, None]
            self.pairs[node] = pairs
            self.folded[node] = absorbed.clone()
            self.folded[node][absorbed] = (nonzero[:, absorbed] & live[:, None]).any(0)
            shape = [1] * x_state.dim()
            shape[dim] = site.in_channels
            self._need(site.x, pairs.any(0).view(shape))

        self.back[node] = back
        return state.clone()


# By the kinds of ``operators``; layers with a weight are found by their sites.
RULES: dict[str | None, Callable[[_Analysis, fx.Node], State]] = {
    "pointwise": _Analysis._unary,
    "elementwise": _Analysis._binary,
    "move": _Analysis._move,
    "item": _Analysis._getitem,
    "pool": _Analysis._pool,
    "reduction": _Analysis._reduction,
    "pad": _Analysis._pad,
    "norm": _Analysis._batch_norm,
}


def analyse(graph: NetworkGraph, masks: Mapping[str, torch.Tensor] | None = None) -> Liveness:
    """Finds what still matters in ``graph``, whose tensors must not change between calls.

    Args:
        graph: from ``dsprune.graph.trace``.
        masks: weight name -> bool (O, I) on the CPU, laid over the zeros that the weights have already.

    Zero times infinity counts as zero here, as in every pruned network.
    """
    with torch.no_grad():
        return _Analysis(graph, masks or {}).run()
