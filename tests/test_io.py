"""Packed networks on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import dsprune
from dsprune.files import tensors_to_bytes
from dsprune.io import FORMAT, write_atomically

X = torch.randn(2, 3, 16, 16)


@pytest.fixture(scope="module")
def packed() -> dsprune.PackedNetwork:
    torch.manual_seed(0)
    return dsprune.pack(nets.structured_zeros(nets.random_norms(nets.Residual())).eval(), X)


@pytest.fixture
def file(packed: dsprune.PackedNetwork, tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    dsprune.save(packed, path)
    return path


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_same_bits_in_this_process(packed: dsprune.PackedNetwork, file: Path) -> None:
    model = nets.Residual()
    again = dsprune.load(file, model)
    with torch.no_grad():
        assert torch.equal(again(X), packed(X))
        model.eval()
        torch.testing.assert_close(model(X), packed(X), rtol=1e-4, atol=1e-5)


def test_a_file_of_the_version_before_loads(packed: dsprune.PackedNetwork, tmp_path: Path) -> None:
    """Written as version 1 was: the header as JSON in the metadata, no SHA-256."""
    state, path = packed.packed_state(), tmp_path / "old.safetensors"
    header = {
        "format": FORMAT,
        "version": 1,
        "train": False,
        "inputs": [{"shape": [2, 3, 16, 16], "dtype": "float32"}],
        "layouts": {name: layout.to_json() for name, layout in state.layouts.items()},
    }
    tensors = {name: value.clone().contiguous() for name, value in state.tensors.items()}
    save_file(tensors, path, {FORMAT: json.dumps(header, sort_keys=True)})
    with torch.no_grad():
        assert torch.equal(dsprune.load(path, nets.Residual())(X), packed(X))
    # Of the present version, a file without its SHA-256 is damaged, and one with it is held to it.
    for changed in ({"version": 2}, {"sha256": "0" * 64}):
        save_file(tensors, path, {FORMAT: json.dumps(header | changed)})
        with pytest.raises(ValueError, match="damaged contents"):
            dsprune.load(path, nets.Residual())


def test_same_bits_in_a_new_process(packed: dsprune.PackedNetwork, file: Path, tmp_path: Path) -> None:
    torch.save(X, tmp_path / "x.pt")
    script = (
        "import sys, torch, dsprune, nets\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r}, weights_only=True)\n"
        f"y = dsprune.load({str(file)!r}, nets.Residual())(x)\n"
        f"torch.save(y.detach(), {str(tmp_path / 'y.pt')!r})\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": paths})
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), packed(X))


def test_the_file_is_small_and_plain(packed: dsprune.PackedNetwork, file: Path) -> None:
    with safe_open(file, framework="pt") as stored:
        header = json.loads(stored.metadata()[FORMAT])
        numel = sum(stored.get_tensor(k).numel() for k in stored.keys())  # noqa: SIM118
    assert header["inputs"] == [{"dtype": "float32", "shape": [2, 3, 16, 16]}]
    assert set(header["layouts"]) == {"a1.0", "a2.0", "b1.0", "b2.0", "project.0"}
    assert numel < sum(v.numel() for v in nets.Residual().state_dict().values())


def test_trained_in_packed_form(tmp_path: Path) -> None:
    model = nets.structured_zeros(nets.Residual())
    packed = dsprune.pack(model, X, train=True)
    packed(X).sum().backward()
    with torch.no_grad():
        for p in packed.parameters():
            p -= 0.01 * p.grad
    dsprune.save(packed, tmp_path / "t")
    again = dsprune.load(tmp_path / "t", nets.Residual())
    assert not again.fused and len(dict(again.layers())) == len(dict(packed.layers()))
    deployed = dsprune.load(tmp_path / "t", nets.Residual(), train=False)
    assert deployed.fused
    with torch.no_grad():
        torch.testing.assert_close(deployed(X), packed.eval()(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, 0.999])
def test_truncated_file_is_refused(file: Path, keep: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    model = nets.Residual()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="no whole safetensors file"):
        dsprune.load(file, model)
    assert unchanged(model, before)


def rewrite(file: Path, change: object) -> None:
    with safe_open(file, framework="pt") as stored:
        tensors = {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118
        header = json.loads(stored.metadata()[FORMAT])
        del header["sha256"]
    change(header, tensors)  # type: ignore[operator]
    file.write_bytes(tensors_to_bytes(tensors, FORMAT, header))


CHANGES = {
    "version": (lambda h, t: h.update(version=99), "has version 99; this package reads version 2"),
    "format": (lambda h, t: h.update(format="x"), "header of another format"),
    "layouts": (lambda h, t: h.pop("layouts"), "incomplete header"),
    "inputs": (lambda h, t: h.pop("inputs"), "incomplete header"),
    "inputs are no list": (lambda h, t: h.update(inputs=3), "incomplete header"),
    "no input": (lambda h, t: h.update(inputs=[]), "names inputs that the model does not take"),
    "no entry": (lambda h, t: h.update(inputs=["x"]), "no entry: 'x'"),
    "no shape": (lambda h, t: h["inputs"][0].pop("shape"), "incomplete header"),
    "shape": (
        lambda h, t: h["inputs"][0].update(shape=[2, 3, "x", 16]),
        r"an input of the shape \[2, 3, 'x'",
    ),
    "negative": (
        lambda h, t: h["inputs"][0].update(shape=[2, 3, -1, 16]),
        r"an input of the shape \[2, 3, -1",
    ),
    "dtype": (lambda h, t: h["inputs"][0].update(dtype="float33"), "unknown dtype 'float33'"),
    "no dtype": (lambda h, t: h["inputs"][0].update(dtype="nn"), "unknown dtype 'nn'"),
    "channels": (lambda h, t: h["inputs"][0].update(shape=[2, 4, 16, 16]), "does not take float32"),
    "index": (lambda h, t: h["layouts"]["a1.0"]["groups"][0][0].append(999), "999"),
    "lost tensor": (lambda h, t: t.pop("a1.0.weight"), "not the packed network's architecture"),
    "short weight": (lambda h, t: t.update({"a1.0.weight": t["a1.0.weight"][:-1].clone()}), "packed values"),
    "wrong name": (lambda h, t: h["layouts"].update(zz=h["layouts"]["a1.0"]), "has no Conv2d 'zz'"),
    "head": (
        lambda h, t: t.update({"head.weight": t["head.weight"][:, :-1].clone()}),
        "head.weight has shape",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_broken_contents_are_refused(file: Path, name: str) -> None:
    change, text = CHANGES[name]
    rewrite(file, change)
    model = nets.Residual()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=text) as error:
        dsprune.load(file, model)
    assert unchanged(model, before)
    assert str(error.value).startswith(("path: ", "model: ")), error.value
    if name not in ("lost tensor", "short weight", "wrong name", "head"):
        assert str(file) in str(error.value)


def test_other_architecture_is_refused_and_left_as_it_was(file: Path) -> None:
    for model in (nets.Plain(), nets.Zoo()):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError, match="model:"):
            dsprune.load(file, model)
        assert unchanged(model, before)


def test_other_precision_is_refused(file: Path) -> None:
    model = nets.Residual().double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"is torch\.float64, the packed network's is torch\.float32"):
        dsprune.load(file, model)
    assert unchanged(model, before)


def test_foreign_files(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"not written by dsprune\.save"):
        dsprune.load(tmp_path / "foreign", nets.Plain())
    save_file({"a": torch.zeros(2)}, tmp_path / "json", {FORMAT: "{"})
    with pytest.raises(ValueError, match="broken header"):
        dsprune.load(tmp_path / "json", nets.Plain())
    with pytest.raises(FileNotFoundError, match="path: no file"):
        dsprune.load(tmp_path / "nothing", nets.Plain())


def test_the_folder_is_made(packed: dsprune.PackedNetwork, tmp_path: Path) -> None:
    dsprune.save(packed, tmp_path / "not" / "there" / "net")
    assert dsprune.load(tmp_path / "not" / "there" / "net", nets.Residual()).fused
    with pytest.raises(NotADirectoryError, match="there/net' is no folder"):
        dsprune.save(packed, tmp_path / "not" / "there" / "net" / "net")
    with pytest.raises(IsADirectoryError, match="path: expected the name of a file"):
        dsprune.save(packed, tmp_path)


def test_save_refuses_other_things(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="packed: expected a PackedNetwork, got Plain"):
        dsprune.save(nets.Plain(), tmp_path / "x")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_atomically(path, b"old")

    def fail(*_args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["f"]


class Batches(nn.Module):
    """Takes one number of images alone where that is given."""

    def __init__(self, only: int | None = None) -> None:
        super().__init__()
        self.only = only
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        with torch.no_grad():
            self.b.weight[:, ::2] = 0

    def forward(self, x: torch.Tensor, shift: torch.Tensor, scale: int = 1) -> torch.Tensor:
        if self.only is not None and x.shape[0] != self.only:
            raise ValueError(f"{self.only} images")
        return self.b(self.a(x) + shift) * scale


@pytest.mark.parametrize("only", [None, 40])
def test_few_images_are_made_to_load_a_file(tmp_path: Path, monkeypatch, only: int | None) -> None:
    """A file of few bytes names any number of them."""
    monkeypatch.setattr(dsprune.io, "FEW_ELEMENTS", 3 * 8 * 8 * 5)
    inputs = torch.randn(40, 3, 8, 8), torch.randn(40, 1, 1, 1), 3
    packed = dsprune.pack(Batches(only).eval(), inputs)
    dsprune.save(packed, tmp_path / "a")
    model = Batches(only).eval()
    seen: set[int] = set()
    pack = dsprune.io.pack

    def watched(dense: nn.Module, example: Any, **options: Any) -> Any:
        seen.add(int(example[0].shape[0]))
        return pack(dense, example, **options)

    monkeypatch.setattr(dsprune.io, "pack", watched)
    loaded = dsprune.load(tmp_path / "a", model)
    assert seen == ({5} if only is None else {5, 40})
    assert loaded.example_shapes == packed.example_shapes
    dsprune.save(loaded, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with torch.no_grad():
        torch.testing.assert_close(loaded(*inputs), packed(*inputs), rtol=0, atol=0)


def test_an_input_that_is_too_large_is_not_saved(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(dsprune.io, "FEW_ELEMENTS", 100)
    monkeypatch.setattr(dsprune.io, "MOST_ELEMENTS", 2 * 3 * 8 * 8)
    for size, good in ((8, True), (9, False)):
        packed = dsprune.pack(nn.Conv2d(3, 4, 3), torch.randn(4, 3, size, size))
        if good:
            dsprune.save(packed, tmp_path / "a")
        else:
            with pytest.raises(ValueError, match="packed for an input of the shape"):
                dsprune.save(packed, tmp_path / "a")
