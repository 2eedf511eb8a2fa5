"""Packed networks for other runtimes: ``torch.export`` programs, AOTInductor packages, and ONNX.

The first two keep the fused operators and need this package where they run. ONNX, and ``standard_network``
for any other converter, have plain convolutions in their place: one a layer, or one a group.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._pytree import tree_map

from dsp_kernels import activations, tail
from dsp_kernels.backends import choose

from .compare import differs
from .graph import as_inputs, dynamic_shapes, evaluating, quiet, unwrap, widen_batch
from .inputs import noise_like, own_tensors, tensors_of
from .io import target_file, write_atomically
from .nn import PackedConv2d, PermutedGroupedConv2d
from .operators import find
from .pack import PackedNetwork

__all__ = ["FORMS", "export_aoti", "export_onnx", "export_torch", "standard_network"]

FORMS = ("dense", "groups")
ONNX_TOLERANCE = 1e-4
OPSET = 18  # the oldest that torch's exporter writes


class _ProgramLinear(nn.Linear):
    """``nn.Linear`` on vectors in the arithmetic of native programs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return tail.linear(x, self.weight, self.bias)


def _as_programs(network: nn.Module, backend: str | None) -> nn.Module:
    """Pooling and linear layers of a packed graph on the native backend as operators that sum as programs do.

    For the CPU and float32; elsewhere, and in a network that is no graph, nothing changes.
    """
    first = next(network.parameters(), None)
    if (
        not isinstance(network, fx.GraphModule)
        or first is None
        or first.device.type != "cpu"
        or any(p.dtype != torch.float32 for p in network.parameters())
        or choose(backend, "cpu", torch.float32) != "native"
    ):
        return network
    for node in list(network.graph.nodes):
        export = find(node).export
        if export is not None:
            export(network.graph, node)
    vectors: set[fx.Node] = set()
    for node in network.graph.nodes:
        row = find(node)
        pointwise = row.kind == "pointwise" and not row.cast
        if row.kind == "flatten" or (pointwise and node.args[0] in vectors):
            vectors.add(node)
        if node.op != "call_module" or node.args[0] not in vectors:
            continue
        layer = network.get_submodule(node.target)
        if type(layer) is nn.Linear:
            replaced = _ProgramLinear(1, 1)
            replaced.in_features, replaced.out_features = layer.in_features, layer.out_features
            replaced._parameters = dict(layer._parameters)
            parent, _, child = node.target.rpartition(".")
            setattr(network.get_submodule(parent), child, replaced)
            vectors.add(node)
    network.graph.lint()
    network.recompile()
    return network


class StandardConv2d(nn.Module):
    """A packed layer in standard operators.

    ``form="groups"``: per group a slice of the input (a gather where its channels are no run), a convolution,
    and a concatenation of the results, put in order where filters are not numbered by group. Dead filters
    are rows of zeros in the smallest group. ``form="dense"``: one convolution with zeros over all channels.
    """

    def __init__(self, layer: PermutedGroupedConv2d, form: str = "dense") -> None:
        super().__init__()
        self.activation = layer.activation
        self.outer_padding, self.padding_mode = layer._outer_padding, layer.padding_mode
        layout = layer.layout
        dense = layer.dense_weight().detach()
        dead = list(layout.dead_filters)
        if form == "dense" or not layout.pairs:
            parts = [(list(range(layout.in_channels)), list(range(layout.out_channels)))]
        else:
            parts = [(sorted(c), sorted(f)) for c, f in layout.groups if f]
            parts.sort(key=lambda part: part[1][0])
            if dead:
                parts[min(range(len(parts)), key=lambda i: len(parts[i][0]))][1].extend(dead)
        self.convs = nn.ModuleList()
        self.runs: list[tuple[int, int] | None] = []
        for number, (channels, filters) in enumerate(parts):
            conv = nn.Conv2d(
                len(channels),
                len(filters),
                layer.kernel_size,
                stride=layer.stride,
                padding=layer._inner_padding,
                dilation=layer.dilation,
                bias=layer.bias is not None,
                device=dense.device,
                dtype=dense.dtype,
            )
            with torch.no_grad():
                conv.weight.copy_(dense[filters][:, channels])
                if conv.bias is not None and layer.bias is not None:
                    conv.bias.copy_(layer.bias[filters])
            conv.requires_grad_(False)
            self.convs.append(conv)
            run = channels[-1] - channels[0] + 1 == len(channels)
            self.runs.append((channels[0], channels[-1] + 1) if run else None)
            self.register_buffer(f"channels{number}", torch.tensor(channels, device=dense.device))
        order = [f for _, filters in parts for f in filters]
        self.in_channels, self.ordered = layout.in_channels, order == sorted(order)
        self.register_buffer("order", torch.tensor(order, device=dense.device).argsort())
        self.train(layer.training)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """(N, in_channels, H, W), and what to add before the activation, to (N, out_channels, H', W')."""
        if self.outer_padding is not None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self.outer_padding, mode=mode)
        parts = []
        for number, (conv, run) in enumerate(zip(self.convs, self.runs, strict=True)):
            if run is None:
                part = x.index_select(1, self.get_buffer(f"channels{number}"))
            else:
                part = x if run == (0, self.in_channels) else x[:, run[0] : run[1]]
            parts.append(conv(part))
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if not self.ordered:
            out = out.index_select(1, self.get_buffer("order"))
        if residual is not None:
            out = out + residual
        return activations.find(self.activation).apply(out)


def _check(packed: Any, example_input: Any) -> tuple[PackedNetwork, tuple[Any, ...]]:
    inner = unwrap(packed) if isinstance(packed, nn.Module) else packed
    if not isinstance(inner, PackedNetwork):
        raise TypeError(f"packed: expected a PackedNetwork (dsprune.pack), got {type(inner).__name__}")
    inputs, _ = inner.bind(as_inputs(example_input))
    return inner, widen_batch(inputs)  # export takes a size of one for a constant


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"form: expected one of {list(FORMS)}, got {form!r}")


def _network(packed: PackedNetwork, inputs: tuple[Any, ...]) -> nn.Module:
    """The network that runs for these inputs, layer by layer, in evaluation mode; a copy."""
    with _no_futures():
        return copy.deepcopy(packed.network_for(inputs)).eval()


def standard_network(packed: PackedNetwork, example_input: Any, *, form: str = "dense") -> nn.Module:
    """A packed network with none but standard operators, for converters that know no others.

    Args:
        packed: from ``pack`` or ``load``; it is left alone.
        example_input: a tensor (N, C, H, W), or a tuple of positional arguments.
        form: ``"dense"``: one convolution a layer, with zeros, over the channels that packing left.
            ``"groups"``: per group a slice or gather, a convolution, and a concatenation: the multiply-adds
            of the packed network, in many small steps.

    Returns:
        A new module in evaluation mode that takes ``packed``'s positional arguments and gives its outputs up
        to rounding.

    Raises:
        TypeError, ValueError: bad arguments.
    """
    inner, inputs = _check(packed, example_input)
    _check_form(form)
    network = _network(inner, inputs)
    replaced: dict[int, nn.Module] = {}
    for name, layer in list(network.named_modules(remove_duplicate=False)):
        if id(layer) not in replaced:
            if isinstance(layer, PermutedGroupedConv2d):
                replaced[id(layer)] = StandardConv2d(layer, form)
            elif isinstance(layer, PackedConv2d):
                replaced[id(layer)] = _plain(layer)
        if id(layer) in replaced:
            if not name:
                return replaced[id(layer)]
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, replaced[id(layer)])
    if isinstance(network, fx.GraphModule):
        network.recompile()
    return network


def _plain(layer: PackedConv2d) -> nn.Conv2d:
    conv = nn.Conv2d.__new__(nn.Conv2d)
    nn.Module.__init__(conv)
    conv.__dict__.update({name: value for name, value in layer.__dict__.items() if name[0] != "_"})
    conv._reversed_padding_repeated_twice = layer._reversed_padding_repeated_twice
    conv._parameters = dict(layer._parameters)
    return conv


@contextlib.contextmanager
def _no_futures() -> Iterator[None]:
    # torch's own serialisation warns about itself.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _exported(network: nn.Module, inputs: tuple[Any, ...]) -> torch.export.ExportedProgram:
    """The program with sizes as free as the network allows: batch and image, the batch alone, neither."""
    attempts = [dynamic_shapes(inputs, True), dynamic_shapes(inputs, False), None]
    error: Exception | None = None
    for shapes in attempts:
        try:
            with quiet(), torch.no_grad():
                return torch.export.export(network, inputs, dynamic_shapes=shapes)
        except Exception as failure:  # any failure of the tracer means: try a plainer export
            error = failure
    lines = str(error).strip().splitlines()
    raise ValueError(f"packed: torch.export failed: {type(error).__name__}: {lines[0] if lines else ''}")


def export_torch(
    packed: PackedNetwork, example_input: Any, path: str | os.PathLike[str] | None = None
) -> torch.export.ExportedProgram:
    """A packed network as a ``torch.export`` program with the fused operators in its graph.

    Args:
        packed: from ``pack`` or ``load``; it is left alone.
        example_input: a tensor (N, C, H, W), or a tuple of positional arguments. Batch and image size stay
            free where the network allows it.
        path: where to write the program (``.pt2``), atomically, its folder made where it is missing; None:
            nowhere.

    Returns:
        The program. ``torch.export.load(path).module()`` is a network again, after ``import dsp_kernels``,
        which registers the operators. The backend that runs here is written into it. On the native backend
        it gives the packed network's own bits, where that is made of convolutions, sums, ReLUs, max pooling,
        global pooling and linear layers, as ResNets are; up to rounding elsewhere.

    Raises:
        TypeError: ``packed`` is no ``PackedNetwork``, ``example_input`` holds no tensor, or ``path`` is no
        path. ValueError: the network does not take the example, or cannot be exported. OSError: the file
        cannot be written.
    """
    inner, inputs = _check(packed, example_input)
    if path is not None:
        target_file(path)
    try:
        program = _exported(_as_programs(_network(inner, inputs), inner.backend), inputs)
    except ValueError:
        program = _exported(_network(inner, inputs), inputs)
    if path is not None:
        data = io.BytesIO()
        with _no_futures():
            torch.export.save(program, data)
        write_atomically(path, data.getvalue())
    return program


def export_aoti(packed: PackedNetwork, example_input: Any, path: str | os.PathLike[str]) -> Path:
    """A packed network compiled ahead of time by AOTInductor, the fused operators called from the package.

    Args:
        packed: from ``pack`` or ``load``; it is left alone.
        example_input: a tensor (N, C, H, W), or a tuple of positional arguments; batch and image size as in
            ``export_torch``.
        path: the package to write, its name ending in ``.pt2``, its folder made where it is missing. Needs a
            C++ compiler, and takes about a minute or less.

    Returns:
        The path. ``torch._inductor.aoti_load_package(path)`` is callable in a Python process that has
        imported ``dsp_kernels``: the operators are registered from Python, so a C++ program without Python
        cannot run the package.

    Raises:
        TypeError, ValueError: bad arguments, or the network cannot be exported. OSError: the file cannot be
        written. RuntimeError: the compiler fails.
    """
    target = target_file(path)
    if target.suffix != ".pt2":
        raise ValueError(f"path: expected a name ending in .pt2, got {str(path)!r}")
    program = export_torch(packed, example_input)
    with tempfile.TemporaryDirectory(prefix="dsprune-") as folder, _no_futures():
        made = torch._inductor.aoti_compile_and_package(
            program, package_path=os.path.join(folder, "packed.pt2")
        )
        write_atomically(target, Path(made).read_bytes())
    return target


def _names(value: Sequence[str] | None, name: str) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, str) or not all(isinstance(v, str) for v in value):
        raise TypeError(f"{name}: expected a sequence of names, got {value!r}")
    return list(value)


def export_onnx(
    packed: PackedNetwork,
    example_input: Any,
    path: str | os.PathLike[str],
    *,
    form: str = "dense",
    dynamic_size: bool = False,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int = OPSET,
    check: bool | None = None,
) -> Path:
    """A packed network as an ONNX file in standard operators: Conv, Add, Relu; Slice, Gather, Concat.

    Args:
        packed: from ``pack`` or ``load``; it is left alone.
        example_input: a tensor (N, C, H, W), or a tuple of positional arguments. The batch stays free.
        path: the file to write, atomically, its folder made where it is missing.
        form: as for ``standard_network``.
        dynamic_size: whether height and width stay free too.
        input_names, output_names: names in the file; None: the exporter's own.
        opset: version of the operator set, from 18 to the newest that the installed ``onnx`` knows.
        check: whether to run the file with ONNX Runtime on the example and on noise, and compare; None: where
            ONNX Runtime is installed.

    Returns:
        The path.

    Raises:
        TypeError, ValueError: bad arguments, or the network cannot be exported. ImportError: ``onnx`` and
        ``onnxscript`` (or ``onnxruntime`` with ``check=True``) are missing: ``pip install
        'dsp-kernels[onnx]'``. RuntimeError: ONNX Runtime cannot load the file, or its outputs differ by more
        than 1e-4 of the largest. OSError: the file cannot be written.
    """
    inner, inputs = _check(packed, example_input)
    _check_form(form)
    target_file(path)
    if isinstance(opset, bool) or not isinstance(opset, int):
        raise TypeError(f"opset: expected an integer of at least {OPSET}, got {opset!r}")
    if opset < OPSET:
        raise ValueError(f"opset: expected an integer of at least {OPSET}, got {opset}")
    if check is not None and not isinstance(check, bool):
        raise TypeError(f"check: expected True, False or None, got {check!r}")
    if not isinstance(dynamic_size, bool):
        raise TypeError(f"dynamic_size: expected True or False, got {dynamic_size!r}")
    names = _names(input_names, "input_names"), _names(output_names, "output_names")
    _require("onnx", "onnxscript")
    if check:
        _require("onnxruntime")
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise ValueError(
            f"opset: expected {OPSET} to {newest}, what onnx {onnx.__version__} knows, got {opset}"
        )
    network = standard_network(inner, inputs, form=form)
    axes = {0: "batch", 2: "height", 3: "width"} if dynamic_size else {0: "batch"}
    shapes = tree_map(
        lambda value: (
            {axis: name for axis, name in axes.items() if axis < value.dim()}
            if isinstance(value, torch.Tensor)
            else None
        ),
        inputs,
    )
    with quiet(), _no_futures(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        before = logging.root.level
        try:
            program = torch.onnx.export(
                network,
                inputs,
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=opset,
                input_names=names[0],
                output_names=names[1],
                verbose=False,
            )
        except Exception as failure:
            lines = str(failure).strip().splitlines()
            raise ValueError(
                f"packed: the ONNX exporter failed: {type(failure).__name__}: {lines[0] if lines else ''}"
            ) from failure
        finally:
            logging.root.setLevel(before)
    assert program is not None
    versions = {entry.domain: entry.version for entry in program.model_proto.opset_import}
    written = versions.get("", versions.get("ai.onnx"))
    if written != opset:
        raise ValueError(f"opset: the exporter cannot write {opset} for this network, only {written}")
    data = program.model_proto.SerializeToString()
    if check or (check is None and _found("onnxruntime")):
        _compare_onnx(data, inner, inputs)
    write_atomically(path, data)
    return Path(path)


def _found(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def _require(*names: str) -> None:
    missing = [name for name in names if not _found(name)]
    if missing:
        raise ImportError(
            f"ONNX export needs {' and '.join(missing)}, not installed here: pip install 'dsp-kernels[onnx]'"
        )


def _compare_onnx(data: bytes, packed: PackedNetwork, inputs: tuple[Any, ...]) -> None:
    """Raises RuntimeError where ONNX Runtime gives other outputs than the packed network."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of classes of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load the file; another opset may do, and "
            f"check=False writes it unchecked ({reason})"
        ) from error
    for args in (inputs, noise_like(inputs)):
        arrays = tensors_of(args)
        feed = {
            node.name: tensor.detach().cpu().numpy()
            for node, tensor in zip(session.get_inputs(), arrays, strict=True)
        }
        with torch.no_grad(), evaluating(packed):
            expected = tensors_of(packed(*own_tensors(args)))
        for given, wanted in zip(session.run(None, feed), expected, strict=True):
            found = differs(wanted.cpu(), torch.as_tensor(given), ONNX_TOLERANCE)
            if found is not None:
                raise RuntimeError(f"ONNX Runtime's {found}")
