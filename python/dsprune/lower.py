"""Rewrites the exported graph of a pruned network into one of fused, packed layers.

BatchNorm goes into weights and biases, residual addition and ReLU into the layer, constants of dead filters
into the biases of those who read them. Activations whose producers and consumers are all known here lose
their dead channels, and are ordered so that each group of their consumer reads few contiguous runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from dsp_kernels import GroupLayout
from dsp_kernels.layout import gray_order

from .graph import NetworkGraph, Site, named, shape_of
from .liveness import Liveness, analyse, kernel_sums
from .nn import PermutedGroupedConv2d
from .operators import find
from .packed_graph import PackedGraph

__all__ = ["lower"]


class _Classes:
    """Union-find over values that must keep the same channels; a pinned class keeps all of them in order."""

    def __init__(self) -> None:
        self.parent: dict[fx.Node, fx.Node] = {}
        self.pinned: set[fx.Node] = set()

    def find(self, node: fx.Node) -> fx.Node:
        root = node
        while self.parent.get(root, root) is not root:
            root = self.parent[root]
        while self.parent.get(node, node) is not root:
            self.parent[node], node = root, self.parent[node]
        return root

    def union(self, *nodes: fx.Node) -> None:
        first = self.find(nodes[0])
        for node in nodes[1:]:
            other = self.find(node)
            if other is not first:
                self.parent[other] = first
                if other in self.pinned:
                    self.pinned.add(first)

    def pin(self, *nodes: Any) -> None:
        for node in nodes:
            if isinstance(node, fx.Node):
                self.pinned.add(self.find(node))

    def is_pinned(self, node: fx.Node) -> bool:
        return self.find(node) in self.pinned


@dataclass
class _Chain:
    """A convolution with what follows it and is computed inside it; ``end`` is the last node it replaces."""

    site: Site
    end: fx.Node
    batch_norm: fx.Node | None = None
    residual: fx.Node | None = None
    activation: str | None = None
    inner: list[fx.Node] = field(default_factory=list)


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values have the same shape and dtype."""
    return shape_of(a) == shape_of(b) and a.meta["val"].dtype == b.meta["val"].dtype


def _sole_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


class _Lowering:
    def __init__(self, graph: NetworkGraph, live: Liveness, backend: str | None) -> None:
        self.graph, self.live, self.backend = graph, live, backend
        self.nodes: list[fx.Node] = list(graph.module.graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.sites = {site.node: site for site in graph.sites}
        self.classes = _Classes()
        self.pairs = dict(live.pairs)
        self._share_pairs()
        self._unite()
        self.kept: dict[fx.Node, torch.Tensor] = {}
        self._choose_channels()
        self.chains = self._find_chains()

    # channels -----------------------------------------------------------------------------------------------

    def _share_pairs(self) -> None:
        """A layer called twice has one weight: it computes what either call needs."""
        for site in self.graph.sites:
            if site.uses > 1:
                same = [s.node for s in self.graph.sites if s.weight_name == site.weight_name]
                for other in same:
                    self.pairs[site.node] = self.pairs[site.node] | self.live.pairs[other]

    def _plain(self, site: Site) -> bool:
        return site.kind == "conv" and site.groups == 1

    def _depthwise(self, site: Site) -> bool:
        return site.kind == "conv" and site.groups == site.in_channels == site.out_channels and site.uses == 1

    def _is_flatten(self, node: fx.Node) -> bool:
        """(N, C, 1, 1) -> (N, C), whatever it is spelled like."""
        if not find(node).flattens:
            return False
        source, result = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
        return source is not None and result is not None and source[2:] == (1, 1) and result == source[:2]

    def _unite(self) -> None:
        classes = self.classes
        for node in self.nodes:
            site = self.sites.get(node)
            parents = [p for p in node.all_input_nodes if p.op != "get_attr"]
            shape, kind = shape_of(node), find(node).kind
            if site is not None:
                if self._depthwise(site):
                    classes.union(site.x, node)
                elif site.uses > 1 or (site.kind == "conv" and site.groups > 1):
                    classes.pin(site.x, node)
                elif site.kind == "linear":
                    classes.pin(node)
                continue
            if node.op in ("placeholder", "output", "get_attr") or not parents:  # of weights alone
                classes.pin(node, *parents)
            elif self._known_norm(node) and self._followed(parents[0]):
                classes.union(parents[0], node)
            elif kind == "item" and find(node.args[0]).kind == "norm":
                classes.union(node.args[0], node)  # type: ignore[arg-type]
                if node.args[1] != 0:
                    classes.pin(node)
            elif kind == "pointwise" and len(parents) == 1 and self._followed(parents[0]):
                classes.union(parents[0], node)
            elif kind == "elementwise" and self._followed(node):
                if any(p.op == "get_attr" for p in node.all_input_nodes):
                    classes.pin(node, *parents)
                elif all(
                    (s := shape_of(p)) is not None
                    and len(s) == len(shape or ())
                    and s[1] == (shape or (0, 0))[1]
                    for p in parents
                ):
                    classes.union(node, *parents)
                else:
                    classes.pin(node, *parents)
            elif kind == "pool" and shape is not None and len(shape) == 4:
                classes.union(node, parents[0])
                classes.pin(*parents[1:])
            elif self._is_spatial_mean(node) or self._is_spatial_pad(node) or self._is_flatten(node):
                classes.union(node, parents[0])
            else:
                classes.pin(node, *parents)

    def _is_spatial_pad(self, node: fx.Node) -> bool:
        return find(node).kind == "pad" and self._followed(node) and len(cast(list[int], node.args[1])) <= 4

    def _followed(self, node: fx.Node) -> bool:
        shape = shape_of(node)
        return shape is not None and len(shape) in (2, 4)

    def _is_spatial_mean(self, node: fx.Node) -> bool:
        """A reduction over height and width, and nothing else."""
        if find(node).kind != "reduction":
            return False
        source = shape_of(node.args[0])  # type: ignore[arg-type]
        given = named(node).get("dim")
        dims = [given] if isinstance(given, int) else list(given or [])
        return source is not None and len(source) == 4 and {d % 4 for d in dims} == {2, 3}

    def _choose_channels(self) -> None:
        members: dict[fx.Node, list[fx.Node]] = {}
        for node in self.nodes:
            if not self.classes.is_pinned(node):
                members.setdefault(self.classes.find(node), []).append(node)
        readers: dict[fx.Node, list[Site]] = {}
        for site in self.graph.sites:
            readers.setdefault(self.classes.find(site.x), []).append(site)
        for root, nodes in members.items():
            values = [n for n in nodes if shape_of(n) is not None]
            if not values:
                continue
            size = shape_of(values[0])[1]  # type: ignore[index]
            needed = torch.zeros(size, dtype=torch.bool)
            for node in values:
                needed |= self.live.channels(self.live.needed, node, size)
            indices = needed.nonzero().flatten()
            if indices.numel() == 0:
                indices = torch.zeros(1, dtype=torch.long)  # a layer has one channel at least
            consumers = [s for s in readers.get(root, []) if self._plain(s)]
            if len(consumers) == 1 and len(readers.get(root, [])) == 1:
                rows = self.pairs[consumers[0].node][:, indices].unique(dim=0)
                rows = rows[rows.any(1)]
                if 1 < len(rows) <= 32:
                    membership = [frozenset(column.nonzero().flatten().tolist()) for column in rows.T]
                    indices = indices[torch.tensor(gray_order(membership))]
            self.kept[root] = indices

    def channels(self, node: fx.Node, size: int) -> torch.Tensor:
        """The original numbers of a value's channels, in the order in which they are stored."""
        return self.kept.get(self.classes.find(node), torch.arange(size))

    # fusion -------------------------------------------------------------------------------------------------

    def _find_chains(self) -> dict[fx.Node, _Chain]:
        """Fused layers by their last node. Later convolutions choose first: the other branch is ready by
        then.
        """
        chains: dict[fx.Node, _Chain] = {}
        claimed: set[fx.Node] = set()
        for site in sorted(self.graph.convs, key=lambda s: self.position[s.node], reverse=True):
            chain = _Chain(site, site.node)
            if site.uses == 1:
                self._extend(chain, claimed)
            claimed.update(chain.inner)
            claimed.add(chain.end)
            chains[chain.end] = chain
        return chains

    def _extend(self, chain: _Chain, claimed: set[fx.Node]) -> None:
        user = _sole_user(chain.end)
        if user is not None and self._known_norm(user) and user.args[0] is chain.end:
            item = _sole_user(user)
            if item is not None and find(item).kind == "item" and item.args[1] == 0:
                chain.inner += [chain.end, user]
                chain.batch_norm, chain.end = user, item
        if not self._plain(chain.site):
            return
        user = _sole_user(chain.end)
        if user is not None and find(user).sum and user not in claimed and not user.kwargs:
            a, b = user.args[0], user.args[1]
            other = b if a is chain.end else a
            same = isinstance(other, fx.Node) and other is not chain.end and other.op != "get_attr"
            if same and _alike(cast(fx.Node, other), chain.end):
                chain.inner.append(chain.end)
                chain.residual, chain.end = other, user  # type: ignore[assignment]
        user = _sole_user(chain.end)
        if user is None or user in claimed:
            return
        name_of = find(user).activation
        activation = None if name_of is None else name_of(*user.args[1:], **user.kwargs)
        if activation is None:
            return
        chain.inner.append(chain.end)
        chain.activation, chain.end = activation, user

    def _known_norm(self, node: fx.Node) -> bool:
        """Whether a node is a BatchNorm whose four vectors, as far as it has them, are the model's own."""
        row = find(node)
        return (
            row.kind == "norm"
            and row.tuple
            and all(
                v is None
                or (isinstance(v, fx.Node) and v.op == "get_attr" and v.target in self.graph.tensors)
                for v in node.args[1:5]
            )
        )

    # layers -------------------------------------------------------------------------------------------------

    def _norm(self, node: fx.Node) -> tuple[torch.Tensor, torch.Tensor]:
        """BatchNorm as (scale, shift) in float64."""
        weight, bias, mean, var = (
            None if v is None else self.graph.tensors[str(v.target)].detach().double()  # type: ignore[union-attr]
            for v in node.args[1:5]
        )
        assert mean is not None and var is not None
        scale = torch.rsqrt(var + float(node.args[-1]))  # type: ignore[arg-type]
        if weight is not None:
            scale = scale * weight
        shift = -mean * scale
        return scale, shift if bias is None else shift + bias

    def _folded(self, chain: _Chain) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """By what each filter of a layer is multiplied, and its bias, BatchNorm and constant channels folded
        in: float64 of all filters, None where there is none.
        """
        site, tensors = chain.site, self.graph.tensors
        bias = None if site.bias_name is None else tensors[site.bias_name].detach().double()
        constant = self._constants(site)
        if constant is not None:
            bias = constant if bias is None else bias + constant
        if chain.batch_norm is None:
            return None, bias
        scale, shift = self._norm(chain.batch_norm)
        return scale, shift if bias is None else bias * scale + shift

    def _constants(self, site: Site) -> torch.Tensor | None:
        """What the constant channels add to each filter's result, in float64; None where there are none."""
        folded = self.live.folded[site.node]
        if not bool(folded.any()):
            return None
        x = self.live.constant[site.x]
        dim = 1 if site.kind == "conv" else x.dim() - 1
        values = self.live.channels(self.live.constant, site.x, site.in_channels, dim)[folded]
        sums = kernel_sums(self.graph.tensors[site.weight_name], folded)
        return (sums * values.to(sums.device)).sum(1)

    def _plain_layer(self, chain: _Chain) -> nn.Module:
        site = chain.site
        scale, bias = self._folded(chain)
        like = self.graph.tensors[site.weight_name].detach()
        rows, columns = self.channels(site.node, site.out_channels), self.channels(site.x, site.in_channels)
        pairs = self.pairs[site.node][rows][:, columns]
        layer = PermutedGroupedConv2d(
            _layout(pairs),
            site.kernel_size,
            stride=site.stride,
            padding=site.padding,
            dilation=site.dilation,
            bias=bias is not None,
            activation=chain.activation,
            backend=self.backend,
            device="meta",
        )
        sets = layer.layout.groups
        taps = site.kernel_size[0] * site.kernel_size[1]
        if scale is None and len(sets) == 1 and _in_order(rows[list(sets[0][1])], site.out_channels):
            whole = _in_order(columns[list(sets[0][0])], site.in_channels)
        else:
            whole = False
        if whole:
            weight = like.reshape(-1)  # the dense network's own memory
        else:
            weight, at = like.new_empty(layer.layout.weight_numel(site.kernel_size)), 0
            for channels, filters in sets:
                end = at + len(channels) * len(filters) * taps
                part = weight[at:end].view(len(filters), len(channels), *site.kernel_size)
                _write_rows(part, like, rows[list(filters)], columns[list(channels)], scale)
                at = end
        return _with_tensors(layer, weight, None if bias is None else bias[rows.to(bias.device)])

    def _grouped_layer(self, chain: _Chain) -> nn.Module:
        site = chain.site
        scale, bias = self._folded(chain)
        like, groups = self.graph.tensors[site.weight_name].detach(), site.groups
        rows = torch.arange(site.out_channels)
        if self._depthwise(site):
            rows = self.channels(site.node, site.out_channels)
            groups = len(rows)
        layer = nn.Conv2d(
            groups if self._depthwise(site) else site.in_channels,
            len(rows),
            site.kernel_size,
            site.stride,
            site.padding,
            site.dilation,
            groups,
            bias is not None,
            device="meta",
        )
        weight = like
        if scale is not None or not _in_order(rows, site.out_channels):
            weight = like.new_empty((len(rows), *like.shape[1:]))
            _write_rows(weight, like, rows, None, scale)
        return _with_tensors(layer, weight, None if bias is None else bias[rows.to(bias.device)])

    def _linear_layer(self, site: Site) -> nn.Module:
        like = self.graph.tensors[site.weight_name].detach()
        constant = self._constants(site)
        columns = torch.arange(site.in_channels)
        shape = shape_of(site.x)
        if shape is not None and len(shape) == 2:
            columns = self.channels(site.x, site.in_channels)
        bias = constant
        if site.bias_name is not None:
            own = self.graph.tensors[site.bias_name].detach().double()
            bias = own if constant is None else constant + own
        layer = nn.Linear(len(columns), site.out_channels, bias is not None, device="meta")
        folded = self.live.folded[site.node][columns].to(like.device)
        weight = like
        if bool(folded.any()) or not _in_order(columns, site.in_channels):
            weight = torch.index_select(like, 1, columns.to(like.device)).masked_fill_(folded, 0)
        return _with_tensors(layer, weight, bias)

    # emission -----------------------------------------------------------------------------------------------

    def run(self) -> fx.GraphModule:
        root, graph = nn.Module(), fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        inner = {node for chain in self.chains.values() for node in chain.inner}
        placed: set[str] = set()

        def place(path: str, value: nn.Module | torch.Tensor) -> None:
            *parents, leaf = path.split(".")
            owner = root
            for part in parents:
                if not isinstance(getattr(owner, part, None), nn.Module):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            if isinstance(value, nn.Module):
                value.requires_grad_(False)  # for inference: a plain call is then one native program
                value.training = False
                owner.add_module(leaf, value)
            elif isinstance(value, nn.Parameter):
                owner.register_parameter(leaf, value)
            else:
                owner.register_buffer(leaf, value)
            placed.add(path)

        def attribute(node: fx.Node) -> fx.Node:
            """A parameter that stays: fetched where it is first used."""
            if node not in env:
                path = str(node.target)
                if path not in placed:
                    value = self.graph.tensors.get(path)
                    if value is None:
                        raise NotImplementedError(f"the graph reads {path!r}, which is no tensor")
                    if isinstance(value, nn.Parameter):
                        place(path, nn.Parameter(value.detach(), requires_grad=False))
                    else:
                        place(path, value.detach().clone())
                env[node] = graph.get_attr(path)
            return env[node]

        def mapped(node: fx.Node) -> fx.Node:
            return attribute(node) if node.op == "get_attr" else env[node]

        names: dict[tuple[Any, ...], str] = {}
        # Where the tensors of norms are, by name and channels; those that others read too keep their own.
        norms: dict[Any, str] = {
            (str(n.target),): str(n.target)
            for n in self.nodes
            if n.op == "get_attr" and any(not self._known_norm(u) and u not in self.sites for u in n.users)
        }
        read = {n.target for n in self.nodes if n.op == "get_attr" and not set(n.users) <= self.sites.keys()}

        def placed_layer(site: Site, make: Callable[[], nn.Module]) -> str:
            """The path of a site's layer. Calls that share a weight share a layer where they agree in all
            else; a weight that somebody else reads too keeps its own path.
            """
            key = (site.weight_name, site.bias_name, site.stride, site.padding, site.dilation, site.groups)
            if key not in names:
                apart = not (site.is_module or "." in site.name) or {site.weight_name, site.bias_name} & read
                path = f"layer_{site.name.replace('.', '_')}" if apart else site.name
                count = sum(used == path or used.startswith(f"{path}_call") for used in names.values())
                names[key] = f"{path}_call{count + 1}" if count else path
                layer = make()
                layer.dense_name = site.name  # type: ignore[assignment]
                place(names[key], layer)
            return names[key]

        for node in self.nodes:
            if node.op == "get_attr" or node in inner:
                continue
            if node in self.chains:
                chain = self.chains[node]
                build = self._plain_layer if self._plain(chain.site) else self._grouped_layer
                name = placed_layer(chain.site, partial(build, chain))
                args = (mapped(chain.site.x),)
                if chain.residual is not None:
                    args += (mapped(chain.residual),)  # type: ignore[assignment]
                env[node] = graph.call_module(name, args)
            elif node in self.sites:
                name = placed_layer(self.sites[node], partial(self._linear_layer, self.sites[node]))
                env[node] = graph.call_module(name, (mapped(self.sites[node].x),))
            elif self._known_norm(node):
                env[node] = self._emit_norm(graph, node, mapped, place, norms)
            elif find(node).kind == "item" and self._known_norm(norm := cast(fx.Node, node.args[0])):
                env[node] = env[norm]  # of its results, only the first can be read
            elif self._is_flatten(node):
                env[node] = graph.call_function(torch.flatten, (mapped(node.args[0]), 1))  # type: ignore[arg-type]
            else:
                env[node] = graph.node_copy(node, mapped)
            env[node].meta = {}
        graph.set_codegen(copy.copy(self.graph.module.graph._codegen))
        module = PackedGraph(root, graph)
        graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        graph.lint()
        module.recompile()
        module.eval()
        return module

    def _emit_norm(
        self, graph: fx.Graph, node: fx.Node, mapped: Any, place: Any, norms: dict[Any, str]
    ) -> fx.Node:
        """A BatchNorm that follows no convolution, on the channels that are left. ``norms``: where its
        tensors are, by name and channels.
        """
        x = node.args[0]
        assert isinstance(x, fx.Node)
        size = shape_of(x)[1]  # type: ignore[index]
        keep = self.channels(x, size)
        values: list[fx.Node | None] = []
        for v in node.args[1:5]:
            if v is None:
                values.append(None)
                continue
            path = str(v.target)  # type: ignore[union-attr]
            tensor = self.graph.tensors[path].detach()
            # One that is called several times may have lost other channels each time.
            key = path, *keep.tolist()
            if key not in norms:
                norms[key] = path if all(known[0] != path for known in norms) else f"{path}_call{len(norms)}"
                place(norms[key], tensor[keep.to(tensor.device)].clone())
            values.append(graph.get_attr(norms[key]))
        weight, bias, mean, var = values
        return graph.call_function(
            F.batch_norm,
            (mapped(x), mean, var, weight, bias, False, 0.0, float(node.args[-1])),  # type: ignore[arg-type]
        )


def _in_order(indices: torch.Tensor, count: int) -> bool:
    """Whether indices are 0, 1, ... to ``count``."""
    return torch.equal(indices, torch.arange(count))


BLOCK = 1 << 18  # values that are in float64 at the same time


def _write_rows(
    to: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> None:
    """Writes the named filters of a weight, of the named channels, times their scales; a few at a time, as
    whole copies in float64 would be the most memory that packing needs.
    """
    rows = rows.to(weight.device)
    step = max(1, BLOCK // max(1, weight[:1].numel()))
    for begin in range(0, len(rows), step):
        some = rows[begin : begin + step]
        values = weight.index_select(0, some)
        if columns is not None:
            values = values.index_select(1, columns.to(weight.device))
        if scale is not None:
            values = values.double() * scale[some].view(-1, *[1] * (weight.dim() - 1))
        to[begin : begin + step].copy_(values)


def _with_tensors(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """A layer that was made without memory, with these tensors; the bias in the weight's dtype."""
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(weight), requires_grad=False)
    return layer


def _layout(pairs: torch.Tensor) -> GroupLayout:
    """Groups of filters with equal channels; one group over all of them where too many filters differ."""
    try:
        return GroupLayout.from_mask(pairs)
    except ValueError:
        channels, filters = (
            pairs.any(0).nonzero().flatten().tolist(),
            pairs.any(1).nonzero().flatten().tolist(),
        )
        return GroupLayout(pairs.shape[1], pairs.shape[0], [(channels, filters)])


def lower(graph: NetworkGraph, backend: str | None = None) -> fx.GraphModule:
    """The packed form of a traced network: a graph module of fused layers, named like the dense network's.

    Weights that stay as they are, are the traced model's own memory.

    Args:
        graph: from ``dsprune.graph.trace``, of a model in evaluation mode.
        backend: what the packed layers run on; None: chosen at each call.
    """
    with torch.no_grad():
        return _Lowering(graph, analyse(graph), backend).run()


def iterate_layers(module: nn.Module, *, dense_names: bool = True) -> Iterable[tuple[str, nn.Module]]:
    """The layers that multiply, by the name that they have in the dense network, or by their own."""
    for name, layer in module.named_modules():
        if isinstance(layer, (PermutedGroupedConv2d, nn.Conv2d, nn.Linear, nn.ConvTranspose2d)):
            yield getattr(layer, "dense_name", name) if dense_names else name, layer
