"""Accuracy without finetuning: each pruned layer's weights by least squares, from a few inputs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_kernels import GroupLayout

from .calibration import input_batches
from .graph import ExportError, clean_copy, evaluating, trace, unwrap
from .operators import find
from .structure import apply_structure

__all__ = ["reconstruct"]

BLOCK_BYTES = 1 << 25  # of gathered input pixels in float64 at a time


class _Stop(Exception):
    """The layer has run: the rest of the network is not needed."""


def reconstruct(
    model: nn.Module,
    structure: Mapping[str, GroupLayout],
    batches: Any,
    *,
    dense: nn.Module | None = None,
    ridge: float = 1e-3,
) -> nn.Module:
    """Makes each pruned convolution's output closest to the dense one's on calibration inputs.

    Layer by layer in the order in which they run, group by group, with X (positions x the group's channels
    and taps) what the pruned network gives the layer, as far as it has been reconstructed, and Y (positions x
    filters) what the dense network's layer gives on the same images:

        minimise |X W + b - Y|² + λ |W - W₀|²        W₀: the present weights

    by the normal equations, over all output positions, in float64; λ is ``ridge`` times the mean of X's
    squared column norms. The intercept b, which is not held back, goes to the convolution's bias. A
    convolution without one has it taken off the running mean of the BatchNorm that reads it; where no such
    BatchNorm is found (the model cannot be exported, or something else reads the convolution too), there is
    no intercept. The BatchNorms' variances stay: what is fitted is what they normalise. A filter without
    channels becomes the mean of its dense output.

    Args:
        model: the network, float, changed in place; masked with ``structure`` as ``apply_structure`` does it,
            which is done first where it has not been.
        structure: convolution name -> ``GroupLayout``.
        batches: inputs to calibrate on, an iterable whose entries are tensors (N, C, H, W) or tuples of
            positional arguments. A few hundred images are enough for small networks; all of them are read
            once and kept.
        dense: the network to come close to, with the same module names. By default the model as it is given,
            without prune masks on the convolutions of ``structure`` (their ``weight_orig``).
        ridge: not negative.

    Returns:
        ``model``. In float64 memory one layer needs the squares of its groups' (channels x taps), and 32 MiB
        for gathered pixels.

    Raises:
        ValueError, TypeError: bad arguments, inputs that are not finite, a convolution that does not run or
        whose weight another module shares. The model is then as it was.

    Source: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, and Luo et
    al., "ThiNet", ICCV 2017 (least squares after the channels are chosen); inputs of the pruned network
    against outputs of the dense one as in Zhang et al., "Accelerating Very Deep Convolutional Networks for
    Classification and Detection", TPAMI 2016. Frantar and Alistarh, "Optimal Brain Compression", NeurIPS
    2022, solve the same problem for other structures.
    """
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)):
        raise TypeError(f"ridge: expected a number of at least 0, got {ridge!r}")
    if not math.isfinite(ridge) or ridge < 0:
        raise ValueError(f"ridge: expected a finite number of at least 0, got {ridge!r}")
    inner = unwrap(model)
    if dense is not None and not isinstance(dense, nn.Module):
        raise TypeError(f"dense: expected a torch.nn.Module, got {type(dense).__name__}")
    if not isinstance(structure, Mapping):
        raise TypeError(
            "structure: expected a mapping of convolution names to GroupLayout, "
            f"got {type(structure).__name__}"
        )
    inputs = list(input_batches(batches))
    pruned = clean_copy(inner)  # what is solved goes here first
    reference = clean_copy(inner if dense is None else dense)
    modules = dict(inner.named_modules())
    users: dict[int, list[str]] = {}
    for name, module in inner.named_modules():
        for parameter in module._parameters.values():
            users.setdefault(id(parameter), []).append(name)
    apply_structure(pruned, structure)  # checks the structure
    for name in structure:
        twin = dict(reference.named_modules()).get(name)
        kept = modules[name]
        assert isinstance(kept, nn.Conv2d)
        if kept.groups != 1:
            raise ValueError(f"structure: {name!r} has {kept.groups} groups; expected a plain convolution")
        if not isinstance(twin, nn.Conv2d) or twin.weight.shape != kept.weight.shape:
            raise ValueError(f"dense: {name!r} is no Conv2d of the shape {tuple(kept.weight.shape)}")
        whole = kept._parameters.get("weight_orig", kept._parameters.get("weight"))
        assert whole is not None
        if len(users[id(whole)]) > 1:
            raise ValueError(f"model: the weight of {name!r} is shared by {users[id(whole)]}")
        if dense is None:
            with torch.no_grad():
                twin.weight.copy_(whole)
    norms = _norms(clean_copy(pruned), inputs[0])

    with evaluating(pruned), evaluating(reference), torch.no_grad():
        uses = _order(pruned, list(structure), inputs[0])
        for name, count in uses.items():
            _solve(pruned, reference, name, count, structure[name], inputs, norms.get(name), float(ridge))
    _put_back(inner, pruned, structure, norms)
    return model


def _norms(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, str]:
    """Convolution name -> name of the BatchNorm that alone reads it, for convolutions that run once."""
    try:
        graph = trace(model, inputs)
    except ExportError:
        return {}
    modules = dict(model.named_modules())
    found: dict[str, str] = {}
    readers = Counter(
        str(getattr(node.args[3], "target", "")).rpartition(".")[0]
        for node in graph.module.graph.nodes
        if find(node).kind == "norm"
    )
    for site in graph.convs:
        users = list(site.node.users)
        if site.uses != 1 or len(users) != 1 or find(users[0]).kind != "norm":
            continue
        if users[0].args[0] is not site.node:
            continue
        name, _, leaf = str(getattr(users[0].args[3], "target", "")).rpartition(".")
        if leaf == "running_mean" and isinstance(modules.get(name), nn.modules.batchnorm._BatchNorm):
            found[site.name] = name
    return {conv: norm for conv, norm in found.items() if readers[norm] == 1}


def _order(model: nn.Module, names: list[str], inputs: tuple[Any, ...]) -> dict[str, int]:
    """How often each convolution runs, in the order of their first runs."""
    uses: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            uses[name] = uses.get(name, 0) + 1

        return count

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        if name not in uses:
            raise ValueError(f"structure: {name!r} does not run on batches[0]")
    return uses


def _seen(model: nn.Module, name: str, uses: int, inputs: tuple[Any, ...], output: bool) -> list[Tensor]:
    """The inputs or outputs (N, C, H, W) of one module, of each of its runs."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], result: Tensor) -> None:
        value = result if output else args[0] if args else named["input"]
        seen.append(value if value.dim() == 4 else value[None])
        if len(seen) == uses:
            raise _Stop

    handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    try:
        model(*inputs)
    except _Stop:
        pass
    finally:
        handle.remove()
    return seen


class _Equations:
    """X'X and X'Y of one group, float64, with the intercept's column of ones last."""

    def __init__(self, columns: Tensor, filters: Tensor, intercept: bool, device: torch.device) -> None:
        self.columns, self.filters = columns.to(device), filters.to(device)
        size = len(columns) + intercept
        self.intercept = intercept
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.right = torch.zeros(size, len(filters), dtype=torch.float64, device=device)

    def add(self, pixels: Tensor, targets: Tensor) -> None:
        """``pixels`` (rows, channels x taps of the layer), ``targets`` (rows, O), float64."""
        x = pixels[:, self.columns]
        if self.intercept:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        self.gram.addmm_(x.t(), x)
        self.right.addmm_(x.t(), targets[:, self.filters])

    def solve(self, start: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """The weights (columns, filters) and the intercepts (filters,); ``start``: W₀."""
        count = len(self.columns)
        penalty = torch.zeros_like(self.gram.diagonal())
        penalty[:count] = ridge * self.gram.diagonal()[:count].mean() if count else 0.0
        right = self.right.clone()
        right[:count] += penalty[:count, None] * start
        matrix = self.gram + torch.diag(penalty)
        factor, info = torch.linalg.cholesky_ex(matrix)
        # Where the matrix is singular, at least but for rounding: the step of least norm from W₀.
        if int(info) == 0 and bool(factor.diagonal().square().min() > 1e-13 * matrix.diagonal().max()):
            found = torch.cholesky_solve(right, factor)
        else:
            base = torch.cat([start, start.new_zeros(int(self.intercept), start.shape[1])])
            found = base + torch.linalg.pinv(matrix, rtol=1e-13, hermitian=True) @ (right - matrix @ base)
        return found[:count], found[count] if self.intercept else found.new_zeros(len(self.filters))


def _solve(
    pruned: nn.Module,
    reference: nn.Module,
    name: str,
    uses: int,
    layout: GroupLayout,
    inputs: list[tuple[Any, ...]],
    norm_name: str | None,
    ridge: float,
) -> None:
    conv = pruned.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    norm = None if norm_name is None or conv.bias is not None else pruned.get_submodule(norm_name)
    intercept = conv.bias is not None or norm is not None
    weight = conv._parameters["weight_orig"]
    assert weight is not None
    taps = weight[0, 0].numel()
    device = weight.device
    groups = [(list(channels), list(filters)) for channels, filters in layout.groups]
    if intercept:
        alive = {o for _, filters in groups for o in filters}
        dead = [o for o in range(conv.out_channels) if o not in alive]
        groups += [([], dead)] if dead else []
    equations = []
    for channels, filters in groups:
        first = torch.tensor(channels, dtype=torch.int64) * taps
        columns = (first[:, None] + torch.arange(taps)).flatten()
        equations.append(_Equations(columns, torch.tensor(filters), intercept, device))
    for batch in inputs:
        given = _seen(pruned, name, uses, batch, False)
        wanted = _seen(reference, name, uses, batch, True)
        if len(given) != len(wanted):
            raise ValueError(
                f"dense: {name!r} runs {len(wanted)} times where the model's runs {len(given)} times"
            )
        for x, y in zip(given, wanted, strict=True):
            _accumulate(conv, x, y, equations)
    solved = weight.detach().clone()
    shift = torch.zeros(conv.out_channels, dtype=torch.float64, device=device)
    for equation, (channels, filters) in zip(equations, groups, strict=True):
        if not bool(equation.gram.isfinite().all() and equation.right.isfinite().all()):
            raise ValueError(f"batches: the input or output of {name!r} is not finite")
        own = weight.detach()[filters][:, channels].double().reshape(len(filters), -1)
        found, constant = equation.solve(own.t(), ridge)
        block = found.t().reshape(len(filters), len(channels), *weight.shape[2:]).to(weight.dtype)
        solved[torch.tensor(filters)[:, None], torch.tensor(channels, dtype=torch.int64)] = block
        shift[filters] = constant
    weight.copy_(solved)
    if conv.bias is not None:
        conv.bias.copy_(shift)
    elif norm is not None:
        assert isinstance(norm.running_mean, Tensor)
        norm.running_mean.sub_(shift.to(norm.running_mean.dtype))


def _accumulate(conv: nn.Conv2d, x: Tensor, y: Tensor, equations: list[_Equations]) -> None:
    """Adds one batch, a block of images at a time, and of rows of one image where that is too much."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    pads = conv._reversed_padding_repeated_twice
    kernel = (int(conv.kernel_size[0]), int(conv.kernel_size[1]))
    stride, dilation = (
        (int(conv.stride[0]), int(conv.stride[1])),
        (int(conv.dilation[0]), int(conv.dilation[1])),
    )
    height, width = y.shape[2:]
    row_bytes = 8 * width * conv.in_channels * kernel[0] * kernel[1]
    rows = max(1, min(height, BLOCK_BYTES // row_bytes))
    images = max(1, BLOCK_BYTES // (row_bytes * rows))
    reach = dilation[0] * (kernel[0] - 1) + 1
    for start in range(0, len(x), images):
        padded = F.pad(x[start : start + images], pads, mode=mode)
        for top in range(0, height, rows):
            count = min(rows, height - top)
            part = padded[:, :, top * stride[0] : (top + count - 1) * stride[0] + reach]
            pixels = F.unfold(part, kernel, dilation, 0, stride)  # (n, channels x taps, positions)
            pixels = pixels.transpose(1, 2).reshape(-1, pixels.shape[1]).double()
            targets = y[start : start + images, :, top : top + count].permute(0, 2, 3, 1)
            targets = targets.reshape(-1, y.shape[1]).double()
            for equation in equations:
                equation.add(pixels, targets)


def _put_back(
    model: nn.Module, solved: nn.Module, structure: Mapping[str, GroupLayout], norms: Mapping[str, str]
) -> None:
    """The results into the user's model, masked where it was not."""
    modules, found = dict(model.named_modules()), dict(solved.named_modules())
    bare = {}
    for name, layout in structure.items():
        mask = getattr(modules[name], "weight_mask", None)
        wanted = layout.mask().to(modules[name].weight.device)[:, :, None, None]
        if not isinstance(mask, Tensor) or bool((mask.ne(0) & ~wanted).any()):
            bare[name] = layout
    apply_structure(model, bare)
    with torch.no_grad():
        for name in structure:
            conv, source = modules[name], found[name]
            original, bias = conv._parameters["weight_orig"], conv._parameters.get("bias")
            assert original is not None and isinstance(conv.weight_mask, Tensor)
            kept = source._parameters["weight_orig"]
            assert kept is not None
            original.copy_(torch.where(conv.weight_mask.ne(0), kept, original))
            conv.weight = original * conv.weight_mask
            if bias is not None:
                bias.copy_(source._parameters["bias"])
            elif name in norms:
                mean = modules[norms[name]].running_mean
                assert isinstance(mean, Tensor)
                mean.copy_(found[norms[name]].running_mean)
