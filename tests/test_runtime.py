"""Program files: the packed network's bits from them, without torch, and nothing but whole files read."""

from __future__ import annotations

import functools
import os
import pickle
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch
from torch import nn

import dsprune
from dsp_kernels import available_backends, runtime
from dsp_kernels.program import Program

pytestmark = pytest.mark.skipif(
    available_backends()["native"] is not None, reason=f"native: {available_backends()['native']}"
)


class Heads(nn.Module):
    """Two outputs of one network."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nets.conv_bn(3, 8), nets.conv_bn(8, 4), nets.conv_bn(8, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.relu(self.body(x))
        return self.b(y), torch.relu(self.a(y))


class Branch(nn.Module):
    """Another network for images of odd height: its graph is good for even ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nets.conv_bn(3, 8), nets.conv_bn(8, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.a(x)
        return {"features": self.b(torch.relu(y) if x.shape[2] % 2 == 0 else y)}


@functools.cache
def packed_net(make: type[nn.Module], size: int = 16) -> dsprune.PackedNetwork:
    torch.manual_seed(0)
    model = nets.structured_zeros(nets.random_norms(make()), 0).eval()
    return dsprune.pack(model, torch.randn(1, 3, size, size))


@functools.cache
def exported(folder: Path, make: type[nn.Module] = nets.Residual, size: int = 16) -> Path:
    path = folder / "folder" / f"{make.__name__}.dsp"
    dsprune.export_program(packed_net(make, size), path, (3, size, size))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


def bits(array: np.ndarray) -> list[Any]:
    return [array.shape, array.view(np.int32).tolist()]


def expected(packed: dsprune.PackedNetwork, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        (leaf,) = torch.utils._pytree.tree_leaves(packed(torch.from_numpy(x)))
    return leaf.numpy()


def images(*shape: int) -> np.ndarray:
    return torch.randn(shape).numpy()


# ---- the same bits ----


@pytest.mark.parametrize("make", [nets.Residual, nets.DeadButBiased])
def test_the_bits_of_the_packed_network(folder: Path, make: type[nn.Module]) -> None:
    """At other batch and image sizes, on several threads, from a path and from bytes."""
    packed, path = packed_net(make), exported(folder, make)
    first, second = runtime.load(path), runtime.load(path.read_bytes(), threads=2)
    for shape in ((1, 3, 16, 16), (5, 3, 16, 16), (2, 3, 20, 24), (3, 3, 9, 31), (0, 3, 16, 16)):
        x = images(*shape)
        wanted = bits(expected(packed, x))
        assert bits(first(x, threads=1)) == wanted
        assert bits(first(x, threads=3)) == wanted
        assert bits(second(x)) == wanted
        assert first.plan(shape) == (tuple(wanted[0]),)
    x = images(2, 3, 16, 32)[:, :, :, ::2]  # not contiguous
    assert bits(first(x)) == bits(expected(packed, np.ascontiguousarray(x)))
    x = images(2, 3, 16, 16)
    dense = packed.dense_model().double().eval()
    with torch.no_grad():
        (leaf,) = torch.utils._pytree.tree_leaves(dense(torch.from_numpy(x).double()))
    assert float(np.abs(first(x) - leaf.numpy()).max()) < 1e-4


def test_what_a_file_says_of_itself(folder: Path) -> None:
    network = runtime.load(exported(folder))
    (x,), (y,) = network.inputs, network.outputs
    assert (x.name, x.dtype, x.shape, x.most) == ("x", "float32", (1, 3, 16, 16), (None, 3, None, None))
    assert x.least[:2] == (0, 3) and 1 <= max(x.least[2:]) <= 16
    assert (y.name, y.shape) == ("output", network(images(1, 3, 16, 16)).shape)
    assert network.memory()["weight_bytes"] > 0
    assert repr(network).startswith("Network(x (1, 3, 16, 16) -> output (")


def test_a_network_with_two_outputs(folder: Path) -> None:
    packed, network = packed_net(Heads), runtime.load(exported(folder, Heads))
    assert [info.name for info in network.outputs] == ["output0", "output1"]
    x = images(3, 3, 12, 20)
    with torch.no_grad():
        wanted = [leaf.numpy() for leaf in packed(torch.from_numpy(x))]
    assert [bits(y) for y in network(x)] == [bits(y) for y in wanted]


def test_a_network_that_differs_by_image_size(folder: Path) -> None:
    """The file is good for the size that it was written for, and no other size runs by its steps."""
    packed = packed_net(Branch)
    for path, size in ((exported(folder, Branch), 16), (folder / "odd.dsp", 15)):
        dsprune.export_program(packed, path, (3, size, size))
        network = runtime.load(path)
        assert network.inputs[0].least == (0, 3, size, size) and network.inputs[0].most == (
            None,
            3,
            size,
            size,
        )
        x = images(3, 3, size, size)
        assert bits(network(x)) == bits(expected(packed, x))
        text = rf"input 0 \(x\) has the shape \(1, 3, 17, 16\), expected size 2 to be {size}$"
        with pytest.raises(ValueError, match=text):
            network(images(1, 3, 17, 16))


def test_several_inputs_and_outputs() -> None:
    """A vector and two images in, an image and a vector out; against torch's own functions."""
    program = Program((6,), (3, 8, 8), (4, 8, 8))
    vector, image, other = program.inputs
    weight, matrix = torch.randn(4, 3, 3, 3), torch.randn(5, 6)
    sum_ = program.add(program.conv2d(image, weight, padding=1), other, activation="relu")
    program.build(sum_, program.linear(vector, matrix))
    network = runtime.load(
        program.file(["v", "x", "other"], ["sum", "features"], least=(3, 4), most=(9, None))
    )
    assert [info.name for info in (*network.inputs, *network.outputs)] == [
        "v",
        "x",
        "other",
        "sum",
        "features",
    ]
    assert network.inputs[0].shape == (1, 6) and network.outputs[1].shape == (1, 5)
    for height, width in ((8, 8), (3, 20)):
        v, x, o = torch.randn(3, 6), torch.randn(3, 3, height, width), torch.randn(3, 4, height, width)
        y, features = network(v.numpy(), x.numpy(), o.numpy())
        wanted = torch.relu(torch.nn.functional.conv2d(x.double(), weight.double(), padding=1) + o.double())
        assert float(np.abs(y - wanted.numpy()).max()) < 1e-4
        assert float(np.abs(features - (v.double() @ matrix.double().T).numpy()).max()) < 1e-4
        if (height, width) == (8, 8):
            assert [bits(y), bits(features)] == [bits(t.numpy()) for t in program(v, x, o)]
            out = (np.empty_like(y), np.empty_like(features))
            assert network(v.numpy(), x.numpy(), o.numpy(), out=out) == out and bits(out[0]) == bits(y)
    v, x, o = images(3, 6), images(3, 3, 8, 8), images(3, 4, 8, 8)
    with pytest.raises(ValueError, match=r"other.* has another batch than input 0"):
        network(v, x, o[:2])
    with pytest.raises(ValueError, match=r"size 2 to be 3 to 9"):
        network(v, images(3, 3, 10, 8), o)
    with pytest.raises(ValueError, match="program: "):
        network(v, images(3, 3, 9, 8), o)  # an addition of two sizes
    with pytest.raises(ValueError, match="printable"):
        program.file(["v", "an x", "other"], ["sum", "features"])
    with pytest.raises(ValueError, match="two inputs or outputs are named v"):
        program.file(["v", "x", "other"], ["v", "features"])


def test_many_threads_and_many_sizes_at_once(folder: Path) -> None:
    """More sizes than are kept, from several threads: each call has the bits of a call alone."""
    network, packed = runtime.load(exported(folder), threads=1), packed_net(nets.Residual)
    xs = [images(1 + i % 3, 3, 16 + i, 16 + 2 * i) for i in range(11)]
    wanted = [bits(expected(packed, x)) for x in xs]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            assert [bits(y) for y in pool.map(network, xs)] == wanted


def test_results_into_given_memory(folder: Path) -> None:
    network = runtime.load(exported(folder))
    x = images(4, 3, 16, 16)
    wanted = network(x)
    out = np.full_like(wanted, np.nan)
    assert network(x, out=out) is out and bits(out) == bits(wanted)
    assert network(x, out=(out,)) is out
    for bad, error in (
        (out[:2], ValueError),
        (out.astype(np.float64), ValueError),
        (np.zeros((*wanted.shape, 2), np.float32)[..., 0], ValueError),
        (np.broadcast_to(np.zeros(1, np.float32), wanted.shape), ValueError),
        (wanted.tolist(), TypeError),
        ((out, out), TypeError),
    ):
        with pytest.raises(error, match="out: expected"):
            network(x, out=bad)
    both = np.zeros(x.size + out.size, np.float32)
    both[: x.size] = x.ravel()
    with pytest.raises(ValueError, match=r"output 0 \(output\) overlaps"):
        network(both[: x.size].reshape(x.shape), out=both[x.size - 1 : -1].reshape(out.shape))


def test_bad_calls(folder: Path) -> None:
    network = runtime.load(exported(folder))
    x = images(1, 3, 16, 16)
    for bad in (x.tolist(), torch.from_numpy(x), np.ma.masked_array(x), None):
        with pytest.raises(TypeError, match="x: expected a NumPy array"):
            network(bad)
    for bad in (x.astype(np.float64), x.astype(">f4")):
        with pytest.raises(ValueError, match="x: expected float32, got"):
            network(bad)
    with pytest.raises(ValueError, match=r"x: expected 4 dimensions, got shape \(3, 16, 16\)"):
        network(x[0])
    with pytest.raises(ValueError, match=r"expected size 1 to be 3"):
        network(images(1, 4, 16, 16))
    with pytest.raises(ValueError, match=r"expected size 2 to be \d+ or more"):
        network(images(1, 3, 0, 16))
    with pytest.raises(TypeError, match=r"expected 1 inputs \(x\), got 2"):
        network(x, x)
    for threads, error in ((0, ValueError), (True, TypeError), (1.0, TypeError)):
        with pytest.raises(error, match="threads: expected"):
            network(x, threads=threads)
        with pytest.raises(error, match="threads: expected"):
            runtime.load(exported(folder), threads=threads)
    again = pickle.loads(pickle.dumps(network))
    assert bits(again(x)) == bits(network(x)) and again.threads == network.threads
    with network:
        pass
    for call in (lambda: network(x), network.memory, lambda: network.plan(x.shape)):
        with pytest.raises(RuntimeError, match="closed"):
            call()


# ---- without torch ----

WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "dsprune", "safetensors"):
            raise ImportError(f"{name} is refused")
sys.meta_path.insert(0, Refuse())
import os
import numpy
import dsp_kernels
from dsp_kernels import runtime
assert "GroupLayout" in dir(dsp_kernels)
try:
    dsp_kernels.GroupLayout
except ImportError as error:
    assert "torch is refused" in str(error)
else:
    raise SystemExit("torch was not needed?")
network = runtime.load(sys.argv[1], threads=2)
given = numpy.load(sys.argv[2])
x, wanted = given["x"], given["y"].view("i4")
assert (network(x).view("i4") == wanted).all()
child = os.fork()  # the core's threads stay behind; the child starts its own
if child == 0:
    os._exit(0 if (network(x).view("i4") == wanted).all() else 1)
assert os.waitpid(child, 0)[1] == 0
assert not any(name.partition(".")[0] == "torch" for name in sys.modules)
"""


def test_in_a_process_that_refuses_torch(folder: Path, tmp_path: Path) -> None:
    x = images(5, 3, 20, 16)
    np.savez(tmp_path / "given.npz", x=x, y=expected(packed_net(nets.Residual), x))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, exported(folder), tmp_path / "given.npz"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


OPERATORS = """
import sys
import dsp_kernels
from dsp_kernels import runtime
assert "torch" not in sys.modules
import torch
assert torch.ops.dsp_kernels.program_linear.default and dsp_kernels.GroupLayout.from_mask
import dsp_kernels.layout
assert dsp_kernels.layout.GroupLayout is dsp_kernels.GroupLayout
assert not any(type(finder).__module__ == "dsp_kernels" for finder in sys.meta_path)
"""
FIRST_A_PART = """
import dsp_kernels.layout, dsp_kernels.conv.op
import torch
assert dsp_kernels.layout.GroupLayout is dsp_kernels.GroupLayout
assert torch.ops.dsp_kernels.program_linear.default
"""


@pytest.mark.parametrize("script", [OPERATORS, pytest.param(FIRST_A_PART, marks=pytest.mark.nightly)])
def test_operators_are_there_with_torch(script: str) -> None:
    """Whichever of the two is imported first."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


# ---- files ----


def with_checksum(data: bytes) -> bytes:
    """As if it had been written so: what the checksum does not catch is to be found by reading."""
    return data[:12] + struct.pack("<I", zlib.crc32(data[16:])) + data[16:]


def test_the_checksum_is_that_of_zlib(folder: Path) -> None:
    data = exported(folder).read_bytes()
    assert data[:8] == b"\x89DSP\r\n\x1a\n" and len(data) == struct.unpack("<Q", data[16:24])[0]
    assert with_checksum(data) == data


def test_damaged_files_are_refused(folder: Path) -> None:
    data = exported(folder).read_bytes()
    steps = {*range(0, 700), *range(700, len(data), 997), len(data) - 1}
    for length in sorted(steps):
        with pytest.raises(ValueError, match="program file"):
            runtime.load(data[:length])
    for at in sorted(steps):
        with pytest.raises(ValueError, match="program file"):
            runtime.load(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
    with pytest.raises(ValueError, match="bytes, not the"):
        runtime.load(data + b"\0")


def test_files_that_say_something_else_are_refused(folder: Path) -> None:
    """With a checksum that fits: versions, dtypes, sections, sizes, names, operations."""
    data = bytearray(exported(folder).read_bytes())
    sections = [struct.unpack_from("<IIQQQ", data, 32 + 32 * i) for i in range(4)]
    tensors, operations, steps, _weights = (offset for _, _, offset, _, _ in sections)
    for at, form, value, text in (
        (8, "<I", 2, "it has version 2, this library reads 1"),
        (24, "<I", 5, "other sections"),
        (28, "<I", 1, "other sections"),
        (32, "<I", 9, "other sections"),
        (36 + 96, "<I", 1, "weights have the dtype 1"),
        (40 + 32, "<Q", operations + 64, "elsewhere"),
        (48 + 96, "<Q", 1 << 62, "beyond the file"),
        (48 + 96, "<Q", sections[3][3] - 4, "behind its sections"),
        (tensors, "<I", 0, "lies behind the list"),
        (tensors + 4, "<I", 2, "ends too soon"),
        (tensors, "<I", 1 << 30, "too many"),
        (tensors + 8, "<i", 2, "x has the dtype 2"),
        (tensors + 12, "<i", 3, "x has 3 dimensions"),
        (tensors + 16, "<q", 2, "x is not of one image|out of order"),
        (tensors + 24, "<q", 0, "out of order"),
        (tensors + 32, "<q", 20, "for other inputs"),
        (tensors + 112, "<I", 300, "name .* too long"),
        (tensors + 116, "<B", 7, "printable"),
        (tensors + 117, "<B", 7, "between names"),
        (operations + 4, "<I", 4000, "step 4000 is unknown to this library"),
        (operations + 8, "<Q", 1, "is not the one that the file was written for"),
        (operations + 16, "<I", 7, "unknown kind"),
        (steps + 8, "<q", 77, "version is 77"),
        (steps + 8 * 10, "<q", 4000, "operation 4000 is unknown"),
    ):
        changed = bytearray(data)
        struct.pack_into(form, changed, at, value)
        with pytest.raises(ValueError, match=text):
            runtime.load(with_checksum(bytes(changed)))


def test_sources_that_are_no_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file at"):
        runtime.load(tmp_path / "none.dsp")
    with pytest.raises(OSError, match=r"no regular file|directory"):
        runtime.load(tmp_path)
    with pytest.raises(OSError, match="no regular file"):
        runtime.load(os.devnull)
    with pytest.raises(TypeError, match="source: expected a path or bytes, got int"):
        runtime.load(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no path"):
        runtime.load("a\0b")
    (tmp_path / "empty.dsp").write_bytes(b"")
    with pytest.raises(ValueError, match="too short"):
        runtime.load(tmp_path / "empty.dsp")


def test_a_file_that_changes_under_the_network(folder: Path, tmp_path: Path) -> None:
    """What was planned goes on; a new size is refused instead of being made of other weights."""
    path = tmp_path / "net.dsp"
    path.write_bytes(exported(folder).read_bytes())
    network = runtime.load(path)
    x = images(1, 3, 16, 16)
    before = bits(network(x))
    path.write_bytes(exported(folder, nets.DeadButBiased).read_bytes())
    with pytest.raises(OSError, match="has changed since it was loaded"):
        network(images(1, 3, 24, 24))
    path.write_bytes(b"short")
    with pytest.raises((OSError, ValueError), match="program file"):
        network(images(1, 3, 24, 24))
    assert bits(network(x)) == before


# ---- what is not exported ----


def test_networks_that_are_no_program(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nets.conv_bn(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.fft2(self.conv(x)).real.erfinv()

    path = tmp_path / "net.dsp"
    odd = dsprune.pack(Odd().eval(), torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"packed: .*fft.*erfinv"):
        dsprune.export_program(odd, path, (3, 8, 8))
    reference = dsprune.pack(nets.Plain().eval(), torch.randn(1, 3, 16, 16), backend="reference")
    with pytest.raises(ValueError, match=r"packed: .*'reference' runs layer by layer"):
        dsprune.export_program(reference, path, (3, 16, 16))
    training = dsprune.pack(nets.Plain(), torch.randn(1, 3, 16, 16), train=True)
    with pytest.raises(ValueError, match="packed: "):
        dsprune.export_program(training, path, (3, 16, 16))
    assert not path.exists()


def test_a_hook_that_changes_the_result_is_seen(tmp_path: Path) -> None:
    packed = packed_net(nets.Residual)
    hook = packed.register_forward_hook(lambda module, given, result: result * 2)
    try:
        with pytest.raises(RuntimeError, match="not the packed network's"):
            dsprune.export_program(packed, tmp_path / "net.dsp", (3, 16, 16))
    finally:
        hook.remove()


def test_bad_arguments_of_the_export(tmp_path: Path) -> None:
    packed, path = packed_net(nets.Residual), tmp_path / "net.dsp"
    with pytest.raises(TypeError, match="packed: expected a PackedNetwork, got Plain"):
        dsprune.export_program(nets.Plain(), path, (3, 16, 16))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="path: "):
        dsprune.export_program(packed, 3, (3, 16, 16))  # type: ignore[arg-type]
    with pytest.raises(IsADirectoryError):
        dsprune.export_program(packed, tmp_path, (3, 16, 16))
    for shape in (16, "316", (3, 16.0, 16), (3, True, 16), None):
        with pytest.raises(TypeError, match="input_shape: expected"):
            dsprune.export_program(packed, path, shape)  # type: ignore[arg-type]
    for sizes in ((16, 16), (3, 0, 16), (1, 1, 3, 16, 16)):
        with pytest.raises(ValueError, match="input_shape: expected"):
            dsprune.export_program(packed, path, sizes)
    with pytest.raises(ValueError):
        dsprune.export_program(packed, path, (4, 16, 16))
    assert not path.exists()
    old = b"an older file"
    path.write_bytes(old)
    with pytest.raises(ValueError):
        dsprune.export_program(packed, path, (4, 16, 16))
    assert path.read_bytes() == old
    dsprune.export_program(packed, path, (2, 3, 16, 16))
    assert runtime.load(path).inputs[0].shape == (1, 3, 16, 16)
