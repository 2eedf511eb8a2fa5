"""The command line's `export`, and `prune --latency`."""

from __future__ import annotations

from pathlib import Path

import nets
import pytest
import torch
from safetensors.torch import save_file

import dsprune
from dsp_kernels import runtime
from dsprune import cli
from dsprune.models import cifar_resnet
from dsprune.recipes import stages
from dsprune.recipes.training import Prune


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_file(nets.structured_zeros(cifar_resnet(20, in_channels=1), 0).state_dict(), path)
    return path


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")  # of torch, about itself
def test_export(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "not there" / "net.pt2"
    arguments = ["export", str(weights), "--size", "8", "--format", "torch", "--to", str(target)]
    assert cli.main(arguments) == 0
    assert str(target) in capsys.readouterr().out
    network = torch.export.load(target).module()
    model = cifar_resnet(20, in_channels=1)
    model.load_state_dict(stages.read_weights(weights))
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(network(x), dsprune.pack(model.eval(), x)(x))


def test_export_of_a_program(weights: Path, tmp_path: Path) -> None:
    target = tmp_path / "net.dsp"
    assert cli.main(["export", str(weights), "--size", "8", "--format", "program", "--to", str(target)]) == 0
    model = cifar_resnet(20, in_channels=1)
    model.load_state_dict(stages.read_weights(weights))
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        wanted = dsprune.pack(model.eval(), x)(x)
    assert torch.equal(torch.from_numpy(runtime.load(target)(x.numpy())), wanted)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--to", "{folder}"], "path: expected the name of a file, got the folder"),
        (["--to", "{weights}/net.onnx"], "net.safetensors' is no folder"),
        (["--to", "{file}.pt2", "--format", "torch", "--groups"], "groups: goes with --format onnx"),
        (["--to", "{file}.so", "--format", "aoti"], "path: expected a name ending in .pt2"),
    ],
)
def test_bad_export(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    names = {"folder": str(tmp_path), "weights": str(weights), "file": str(tmp_path / "file")}
    given = [argument.format(**names) for argument in arguments]
    assert cli.main(["export", str(weights), "--size", "8", *given]) == 1
    assert text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_target_of_prune() -> None:
    assert Prune(flops=None, latency=0.5, batch=8).latency == 0.5
    with pytest.raises(ValueError, match="exactly one target"):
        Prune(latency=0.5)
    with pytest.raises(ValueError, match="latency: expected the fraction left"):
        Prune(flops=None, latency=1.5)
    with pytest.raises(ValueError, match="batch: expected at least 1"):
        Prune(flops=None, latency=0.5, batch=0)
