"""Packed networks for other runtimes: a saved program gives the same bits, ONNX Runtime the same outputs."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import dsprune
from dsp_kernels import GroupLayout, available_backends
from dsprune import export
from dsprune.models import cifar_resnet
from dsprune.nn import PackedConv2d, PermutedGroupedConv2d

TORCH_FUTURE = "ignore:.*treespec:FutureWarning"  # torch.export.load about itself


@functools.cache
def packed_net(make: type[nn.Module], **kwargs: Any) -> dsprune.PackedNetwork:
    """One packing for all tests: none of them changes it."""
    torch.manual_seed(0)
    model = nets.structured_zeros(nets.random_norms(make()), 0).eval()
    return dsprune.pack(model, torch.randn(1, 3, 16, 16), **kwargs)


# ---- standard operators ----

LAYOUTS = {
    "runs": GroupLayout(6, 5, [([0, 1, 2], [0, 1, 2]), ([3, 4], [3, 4])]),
    "gathers, disordered filters": GroupLayout(6, 5, [([5, 0, 2], [3, 0]), ([1, 4, 0], [4, 2, 1])]),
    "dead filters": GroupLayout(6, 5, [([0, 1, 3, 5], [4]), ([2], [1])]),
    "all dead": GroupLayout(6, 5, []),
    "dense": GroupLayout(6, 5, [(range(6), range(5))]),
    "empty group": GroupLayout(6, 5, [([1], []), ([0, 5], [2, 0, 4])]),
}


@pytest.mark.parametrize("form", export.FORMS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1, "activation": "relu"},
        {"padding": "same", "dilation": 2, "padding_mode": "reflect", "activation": "relu6", "bias": False},
        {"stride": (2, 1), "padding": (0, 1)},
    ],
)
def test_a_layer_in_standard_operators(name: str, options: dict[str, Any], form: str) -> None:
    layer = PermutedGroupedConv2d(LAYOUTS[name], 3, dtype=torch.float64, **options)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    plain = export.StandardConv2d(layer, form)
    with torch.no_grad():
        residual = torch.randn_like(layer(x))
        for args in ((x,), (x, residual)):
            assert float((plain(*args) - layer(*args)).abs().max()) < 1e-12
    if form == "groups":
        filters = sum(conv.out_channels for conv in plain.convs)
        assert filters == 5 and len(plain.convs) == max(1, sum(bool(f) for _, f in LAYOUTS[name].groups))


@pytest.mark.parametrize("form", export.FORMS)
@pytest.mark.parametrize("make", [nets.Plain, nets.Residual, nets.Zoo, nets.DeadButBiased])
def test_a_network_in_standard_operators(make: type[nn.Module], form: str) -> None:
    packed = packed_net(make)
    standard = dsprune.standard_network(packed, torch.randn(1, 3, 16, 16), form=form)
    assert not any(isinstance(m, PermutedGroupedConv2d) for m in standard.modules())
    for shape in ((1, 3, 16, 16), (3, 3, 22, 18)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert float((standard(x) - packed(x)).abs().max()) < 1e-5
    assert any(True for _ in packed.layers()), "the packed network is left alone"


@pytest.mark.filterwarnings("ignore:layers are replaced")
def test_networks_that_are_not_fused() -> None:
    x = torch.randn(2, 3, 16, 16)
    packed = packed_net(nets.Residual, train=True)
    assert any(isinstance(m, PackedConv2d) for m in packed.modules())
    standard = dsprune.standard_network(packed, x)
    assert not any(isinstance(m, (PermutedGroupedConv2d, PackedConv2d)) for m in standard.modules())
    with torch.no_grad():
        assert float((standard(x) - packed.eval()(x)).abs().max()) < 1e-5
    torch.manual_seed(0)
    odd = dsprune.pack(nets.structured_zeros(nets.Untraceable(), 0).eval(), torch.randn(1, 4, 8, 8))
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        assert float((dsprune.standard_network(odd, x)(x) - odd(x)).abs().max()) < 1e-5


# ---- torch.export ----

RELOAD = """
import sys, torch
import dsp_kernels
program, inputs, out = sys.argv[1:]
network = torch.export.load(program).module()
with torch.no_grad():
    torch.save([network(x) for x in torch.load(inputs)], out)
"""


def test_a_saved_program_gives_the_same_bits(tmp_path: Path) -> None:
    """In another process, at other batch and image sizes, with nothing but the operators imported."""
    packed = packed_net(nets.Residual)
    path = tmp_path / "not" / "there" / "packed.pt2"
    program = dsprune.export_torch(packed, torch.randn(1, 3, 16, 16), path)
    fused = [n for n in program.graph.nodes if "permuted_grouped_conv2d" in str(n.target)]
    assert len(fused) == 6 and not any("aten.conv2d" in str(n.target) for n in program.graph.nodes)
    inputs = [torch.randn(shape) for shape in ((1, 3, 16, 16), (5, 3, 16, 16), (2, 3, 20, 24))]
    torch.save(inputs, tmp_path / "inputs.pt")
    subprocess.run(
        [sys.executable, "-c", RELOAD, path, tmp_path / "inputs.pt", tmp_path / "out.pt"],
        check=True, capture_output=True, timeout=1200,
    )  # fmt: skip
    for x, given in zip(inputs, torch.load(tmp_path / "out.pt"), strict=True):
        with torch.no_grad():
            assert packed.program_reason is None or available_backends()["native"] is not None
            assert torch.equal(given, packed(x))


@pytest.mark.filterwarnings(TORCH_FUTURE)
def test_a_program_of_the_authors_network(authors_data: Path, tmp_path: Path) -> None:
    model = cifar_resnet(20)
    model.load_state_dict(load_file(authors_data / "resnet20_g4.safetensors"))
    reference = load_file(authors_data / "resnet20_g4.reference.safetensors")
    packed = dsprune.pack(model.eval(), reference["images"][:1])
    dsprune.export_torch(packed, reference["images"], tmp_path / "packed.pt2")
    network = torch.export.load(tmp_path / "packed.pt2").module()
    with torch.no_grad():
        logits = network(reference["images"])
        assert torch.equal(logits, packed(reference["images"]))
    assert float((logits - reference["logits"]).abs().max()) < 1e-4


# An AOTInductor package: tests/test_example_pairs.py.


# ---- ONNX ----


def session(path: Path) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])


def run(path: Path, x: torch.Tensor) -> torch.Tensor:
    runtime = session(path)
    return torch.from_numpy(runtime.run(None, {runtime.get_inputs()[0].name: x.numpy()})[0])


def operators(path: Path) -> set[str]:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert {d.domain for d in model.opset_import} <= {"", "pkg.onnxscript.torch_lib.common"}
    assert all(node.domain == "" for node in model.graph.node)
    return {node.op_type for node in model.graph.node}


@pytest.fixture
def onnx() -> Any:
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnx")


@pytest.mark.parametrize("groups", (4, 3, 2))
def test_onnx_of_the_authors_networks(onnx: Any, authors_data: Path, tmp_path: Path, groups: int) -> None:
    model = cifar_resnet(20)
    model.load_state_dict(load_file(authors_data / f"resnet20_g{groups}.safetensors"))
    reference = load_file(authors_data / f"resnet20_g{groups}.reference.safetensors")
    packed = dsprune.pack(model.eval(), reference["images"][:1])
    form = "groups" if groups == 4 else "dense"
    path = dsprune.export_onnx(packed, reference["images"][:1], tmp_path / "net.onnx", form=form)
    with torch.no_grad():
        expected = packed(reference["images"])
    logits = run(path, reference["images"])
    assert float((logits - expected).abs().max()) < 1e-4
    assert float((logits - reference["logits"]).abs().max()) < 1e-4
    kinds = operators(path)
    assert kinds <= {"Conv", "Relu", "Gather", "Slice", "Concat", "Add", "ReduceMean", "Reshape", "Gemm",
                     "GlobalAveragePool", "Flatten"}  # fmt: skip
    assert ("Concat" in kinds) == (form == "groups")


def in_openvino(path: Path, x: torch.Tensor) -> torch.Tensor:
    openvino = pytest.importorskip("openvino")
    # Its default on a processor with bfloat16 is bfloat16.
    network = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(network(x.numpy())[0])


@pytest.mark.parametrize("runtime", [run, in_openvino], ids=["onnxruntime", "openvino"])
@pytest.mark.parametrize("form", export.FORMS)
def test_onnx_of_a_network_cut_by_nine_tenths(onnx: Any, tmp_path: Path, form: str, runtime: Any) -> None:
    pytest.importorskip({run: "onnxruntime", in_openvino: "openvino"}[runtime])
    model, x = nets.random_norms(cifar_resnet(20)).eval(), torch.randn(4, 3, 16, 16)
    assignment = {info.name: torch.arange(info.out_channels) % 2 for info in dsprune.prunable_convs(model, x)}
    dsprune.apply_structure(model, dsprune.find_structure(model, x, assignment, flops=0.9))
    packed = dsprune.pack(model, x)
    path = dsprune.export_onnx(packed, x, tmp_path / "net.onnx", form=form, check=False)
    with torch.no_grad():
        expected = model(x)
    assert float((runtime(path, x) - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_onnx_of_random_zeros(onnx: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    packed = packed_net(nets.Residual)
    path = dsprune.export_onnx(
        packed, torch.randn(1, 3, 16, 16), tmp_path / "net.onnx",
        form="groups", dynamic_size=True, input_names=["image"], output_names=["logits"], check=True,
    )  # fmt: skip
    runtime = session(path)
    assert runtime.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert [v.name for v in (*runtime.get_inputs(), *runtime.get_outputs())] == ["image", "logits"]
    for shape in ((1, 3, 16, 16), (5, 3, 16, 16), (2, 3, 22, 18)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = packed(x)
        assert float((run(path, x) - expected).abs().max()) < 1e-4 * max(1, float(expected.abs().max()))


def test_onnx_of_a_network_with_everything(onnx: Any, tmp_path: Path) -> None:
    packed = packed_net(nets.Zoo)
    path = dsprune.export_onnx(packed, torch.randn(1, 3, 16, 16), tmp_path / "net.onnx", dynamic_size=True)
    operators(path)
    x = torch.randn(3, 3, 20, 24)
    with torch.no_grad():
        assert float((run(path, x) - packed(x)).abs().max()) < 1e-4


def test_onnx_of_a_transformers_network(onnx: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
    )
    torch.manual_seed(0)
    model = nets.structured_zeros(nets.random_norms(transformers.ResNetForImageClassification(config))).eval()
    x = torch.randn(2, 3, 32, 32)
    packed = dsprune.pack(model, x)
    path = dsprune.export_onnx(packed, x, tmp_path / "net.onnx")
    with torch.no_grad():
        assert float((run(path, x) - packed(x).logits).abs().max()) < 1e-4


def test_a_wrong_file_is_noticed(onnx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    packed = packed_net(nets.Plain)

    forward = export.StandardConv2d.forward
    monkeypatch.setattr(export.StandardConv2d, "forward", lambda self, x, r=None: forward(self, x, r) + 0.01)
    target = tmp_path / "net.onnx"
    target.write_bytes(b"older")
    with pytest.raises(RuntimeError, match=r"ONNX Runtime \S+ cannot load the file; another opset"):
        export._compare_onnx(b"nothing", packed, (torch.randn(1, 3, 16, 16),))
    with pytest.raises(RuntimeError, match="outputs differ by"):
        dsprune.export_onnx(packed, torch.randn(1, 3, 16, 16), target, check=True)
    assert target.read_bytes() == b"older"


@pytest.mark.filterwarnings("ignore:layers are replaced")
def test_onnx_of_a_network_in_training_mode(onnx: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nets.structured_zeros(nets.random_norms(nets.Plain()), 0)
    x = torch.randn(1, 3, 16, 16)
    packed = dsprune.pack(model, x, train=True).train()
    next(m for m in packed.modules() if isinstance(m, nn.BatchNorm2d)).eval()  # frozen, as users do
    modes = [m.training for m in packed.modules()]
    state = {name: value.clone() for name, value in packed.state_dict().items()}
    path = dsprune.export_onnx(packed, x, tmp_path / "net.onnx", check=True)
    assert [m.training for m in packed.modules()] == modes and True in modes
    assert all(torch.equal(value, state[name]) for name, value in packed.state_dict().items())
    with torch.no_grad():
        assert float((run(path, x) - packed.eval()(x)).abs().max()) < 1e-4


# ---- what is refused ----


@pytest.mark.usefixtures("onnx")
def test_bad_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = packed_net(nets.Plain), torch.randn(1, 3, 16, 16)
    path = tmp_path / "net.onnx"
    with pytest.raises(TypeError, match="packed: expected a PackedNetwork"):
        dsprune.export_onnx(nets.Plain(), x, path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="example_input"):
        dsprune.export_torch(packed, "x")
    with pytest.raises(ValueError, match="form: expected one of"):
        dsprune.export_onnx(packed, x, path, form="sparse")
    for opset, error in ((11, ValueError), (99, ValueError), (18.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="opset: expected"):
            dsprune.export_onnx(packed, x, path, opset=opset)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="check: expected True, False or None, got 'yes'"):
        dsprune.export_onnx(packed, x, path, check="yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dynamic_size: expected True or False"):
        dsprune.export_onnx(packed, x, path, dynamic_size=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not take"):
        dsprune.export_torch(packed, torch.randn(1, 4, 16, 16), path)
    for export_to in (dsprune.export_torch, dsprune.export_aoti, dsprune.export_onnx):
        with pytest.raises(TypeError, match="path: expected the name of a file, got int"):
            export_to(packed, x, 3)  # type: ignore[operator]
        with pytest.raises(IsADirectoryError, match="path: expected the name of a file, got the folder"):
            export_to(packed, x, tmp_path)  # type: ignore[operator]
    with pytest.raises(TypeError, match="input_names"):
        dsprune.export_onnx(packed, x, path, input_names="image")
    with pytest.raises(ValueError, match=r"path: expected a name ending in \.pt2"):
        dsprune.export_aoti(packed, x, path)
    monkeypatch.setattr(export, "_found", lambda name: False)
    with pytest.raises(ImportError, match=r"onnx and onnxscript.*dsp-kernels\[onnx\]"):
        dsprune.export_onnx(packed, x, path)
    assert not list(tmp_path.iterdir())
