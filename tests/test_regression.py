"""Reconstruction against least squares on the whole matrix, layer by layer, in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsprune
from dsp_kernels import GroupLayout
from dsprune import regression


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """Every way of padding; a bias, a BatchNorm, and a convolution with neither that is used twice."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 5, (3, 2), padding="same", dilation=2, bias=bias)
        self.norm = nn.BatchNorm2d(5)
        self.c = nn.Conv2d(5, 4, (1, 3), stride=(1, 2), padding=(0, 1), padding_mode="reflect", bias=True)
        self.twice = nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.b(torch.relu(self.stem(x)))))
        x = torch.relu(self.c(x))
        y: Tensor = self.twice(torch.relu(self.twice(x)))
        return y


STRUCTURE = {
    "b": GroupLayout(6, 5, [((0, 2, 3, 5), (0, 3)), ((1, 2, 4), (4, 1))]),  # filter 2 is dead
    "c": GroupLayout(5, 4, [((0, 1, 3), (2, 0)), ((4, 3), (1, 3))]),
    "twice": GroupLayout(4, 4, [((0, 1), (0, 2)), ((2, 1, 3), (1, 3))]),
}


def network(bias: bool = False) -> Net:
    torch.manual_seed(0)
    model = Net(bias).double()
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(4, 3, 9, 10, dtype=torch.float64) * 2 + 1)
        model.norm.weight.uniform_(0.5, 2)
        model.norm.bias.uniform_(0, 1)  # no channel that ReLU leaves nothing of
    return model.eval()


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n + 2, 3, 9, 10, dtype=torch.float64, generator=generator) for n in range(count)]


def unfolded(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """(rows, channels, taps) by slices, without F.unfold."""
    pads = conv._reversed_padding_repeated_twice
    x = F.pad(x, pads, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    taps = [
        x[:, :, i * dh : i * dh + (height - 1) * sh + 1 : sh, j * dw : j * dw + (width - 1) * sw + 1 : sw]
        for i in range(kh)
        for j in range(kw)
    ]
    return torch.stack(taps, 2).permute(0, 3, 4, 1, 2).reshape(-1, x.shape[1], kh * kw)


def io_of(model: nn.Module, name: str, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    given, made = [], []

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        given.append(args[0].detach())
        made.append(out.detach())

    handle = model.get_submodule(name).register_forward_hook(hook)
    for x in inputs:
        model(x)
    handle.remove()
    return given, made


def expected(model: Net, structure: dict[str, GroupLayout], inputs: list[Tensor], ridge: float) -> Net:
    """The definition: rows added for the ridge, ``torch.linalg.lstsq`` on the whole matrix."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for name, layout in structure.items():
            conv = found.get_submodule(name)
            conv.weight.mul_(layout.mask()[:, :, None, None])  # type: ignore
    for name, layout in structure.items():
        conv = found.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        intercept = conv.bias is not None or name == "b"
        x = torch.cat([unfolded(conv, part) for part in io_of(found, name, inputs)[0]])
        y = torch.cat(
            [part.permute(0, 2, 3, 1).reshape(-1, part.shape[1]) for part in io_of(model, name, inputs)[1]]
        )
        constants = y.mean(0).clone()
        for channels, filters in layout.groups:
            columns = x[:, list(channels)].flatten(1)
            start = conv.weight.detach()[list(filters)][:, list(channels)].flatten(1).t()
            size = (ridge * columns.square().sum(0).mean()).sqrt()
            left = torch.cat([columns, size * torch.eye(columns.shape[1], dtype=torch.float64)])
            right = torch.cat([y[:, list(filters)], size * start])
            if intercept:
                ones = torch.cat([torch.ones(len(columns), 1), torch.zeros(columns.shape[1], 1)]).double()
                left = torch.cat([left, ones], 1)
            solved = torch.linalg.lstsq(left, right).solution
            with torch.no_grad():
                shape = (len(filters), len(channels), *conv.weight.shape[2:])
                rows = torch.tensor(filters)[:, None]
                conv.weight[rows, torch.tensor(channels)] = solved[: columns.shape[1]].t().reshape(shape)
            if intercept:
                constants[list(filters)] = solved[-1]
        with torch.no_grad():
            if conv.bias is not None:
                conv.bias.copy_(constants)
            elif name == "b":
                assert found.norm.running_mean is not None
                found.norm.running_mean -= constants
    return found


@pytest.mark.parametrize("bias, ridge", [(False, 0.0), (True, 1e-3), (False, 10.0)])
def test_least_squares(bias: bool, ridge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks of a few rows of one image; every position counts once.
    monkeypatch.setattr(regression, "BLOCK_BYTES", 8 * 10 * 36 * 2)
    model, inputs = network(bias), batches()
    wanted = expected(model, STRUCTURE, inputs, ridge)
    dense = copy.deepcopy(model)
    assert dsprune.reconstruct(model, STRUCTURE, iter(inputs), ridge=ridge) is model
    for name, layout in STRUCTURE.items():
        conv, like = model.get_submodule(name), wanted.get_submodule(name)
        assert torch.equal(conv.weight_mask[:, :, 0, 0].bool(), layout.mask())  # type: ignore
        torch.testing.assert_close(conv.weight, like.weight, rtol=1e-7, atol=1e-9)
        if conv.bias is not None:
            torch.testing.assert_close(conv.bias, like.bias, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(model.norm.running_mean, wanted.norm.running_mean, rtol=1e-7, atol=1e-9)
    # What is no part of it is as it was.
    assert torch.equal(model.stem.weight, dense.stem.weight)
    assert model.norm.running_var is not None and dense.norm.running_var is not None
    assert torch.equal(model.norm.running_var, dense.norm.running_var)
    x = inputs[0]
    packed = dsprune.pack(model, x).eval()
    torch.testing.assert_close(packed(x), wanted(x), rtol=1e-6, atol=1e-8)


def test_it_comes_closer_and_dead_filters_are_their_means() -> None:
    model, inputs = network(), batches()
    dense, masked = copy.deepcopy(model), copy.deepcopy(model)
    once = {name: STRUCTURE[name] for name in ("b", "c")}
    dsprune.apply_structure(masked, once)
    dsprune.reconstruct(model, once, inputs)

    def error(network: nn.Module) -> float:
        return sum(float((network(x) - dense(x)).square().sum().detach()) for x in inputs)

    assert error(model) < 0.7 * error(masked)
    of_dense = torch.cat([dense.norm(y) for y in io_of(dense, "b", inputs)[1]])
    ours = torch.cat([model.norm(y) for y in io_of(model, "b", inputs)[1]])
    torch.testing.assert_close(ours[:, 2], of_dense[:, 2].mean().expand_as(ours[:, 2]))
    torch.testing.assert_close(ours.mean((0, 2, 3)), of_dense.mean((0, 2, 3)))  # the intercept: equal means


def test_everything_kept_changes_nothing() -> None:
    model, inputs = network(True), batches()
    full = {name: GroupLayout.from_mask(torch.ones_like(v.mask())) for name, v in STRUCTURE.items()}
    before = model(inputs[0])
    dsprune.reconstruct(model, full, inputs)
    torch.testing.assert_close(model(inputs[0]), before, rtol=1e-7, atol=1e-9)


def test_a_masked_network_and_a_given_dense_one() -> None:
    plain, inputs = network(), batches()
    dense, masked, spoilt = (copy.deepcopy(plain) for _ in range(3))
    dsprune.reconstruct(plain, STRUCTURE, inputs)
    dsprune.apply_structure(masked, STRUCTURE)
    count = len(masked.b._forward_pre_hooks)
    dsprune.reconstruct(masked, STRUCTURE, inputs)
    assert len(masked.b._forward_pre_hooks) == count
    for name, value in plain.state_dict().items():
        assert torch.equal(value, masked.state_dict()[name]), name
    # Weights that were spoilt are found again from the dense network (but of a layer that feeds itself).
    once = {name: STRUCTURE[name] for name in ("b", "c")}
    dsprune.apply_structure(spoilt, once)
    with torch.no_grad():
        for name in once:
            spoilt.get_submodule(name).weight_orig.normal_()  # type: ignore
    dsprune.reconstruct(spoilt, once, inputs, dense=dense, ridge=0)
    again = network()
    dsprune.reconstruct(again, once, inputs, ridge=0)
    torch.testing.assert_close(spoilt(inputs[0]), again(inputs[0]), rtol=1e-6, atol=1e-8)


def test_fewer_positions_than_weights() -> None:
    """Singular equations: the weights move as little as they can."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 12, 1), nn.ReLU(), nn.Conv2d(12, 3, 3)).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)  # 8 rows, 9 x 6 weights a filter and an intercept
    layout = GroupLayout(12, 3, [(tuple(range(6)), (0, 1, 2))])
    wanted = model(x)
    start = model[2].weight.detach().clone()
    dsprune.reconstruct(model, {"2": layout}, [x], ridge=0)
    torch.testing.assert_close(model(x), wanted, rtol=1e-6, atol=1e-8)
    moved = (model[2].weight - start)[:, :6].flatten(1)
    rows = unfolded(model[2], torch.relu(model[0](x)))[:, :6].flatten(1).detach()
    # Of least norm: in the span of the rows.
    inside = moved @ torch.linalg.pinv(rows) @ rows
    torch.testing.assert_close(inside, moved, rtol=1e-5, atol=1e-7)


def test_without_a_graph_there_is_no_intercept_for_batchnorm() -> None:
    class Branching(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if bool(x.sum() < 1e9) else x

    torch.manual_seed(0)
    model = Branching(False).double().eval()
    assert model.norm.running_mean is not None
    before = model.norm.running_mean.clone()
    dsprune.reconstruct(model, STRUCTURE, batches())
    assert torch.equal(model.norm.running_mean, before)


def test_a_batchnorm_that_others_read_keeps_its_mean() -> None:
    class Shared(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.norm(x[:, :1].expand(-1, 5, -1, -1))[:, :4, :, ::2]

    torch.manual_seed(0)
    model = Shared(False).double().eval()
    assert model.norm.running_mean is not None
    before = model.norm.running_mean.clone()
    dsprune.reconstruct(model, STRUCTURE, batches())
    assert torch.equal(model.norm.running_mean, before)


def test_the_result_has_the_same_bits_again() -> None:
    first, second = network(), network()
    for model in (first, second):
        dsprune.reconstruct(model, STRUCTURE, batches())
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def tied() -> nn.Module:
    model = network()
    other = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    other.weight = model.twice.weight
    model.other = other
    return model


def grouped() -> nn.Module:
    model = network()
    model.b = nn.Conv2d(10, 5, 1, groups=5)
    return model


class Half(Net):
    """``twice`` is never called."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.norm(self.b(self.stem(x))))
        return y


X = batches(1)
BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "ridge": (network, {"ridge": -1}, ValueError, "ridge: expected a finite number"),
    "ridge type": (network, {"ridge": "1"}, TypeError, "ridge: expected a number"),
    "no batches": (network, {"batches": []}, ValueError, "batches: expected one batch"),
    "a tensor": (network, {"batches": X[0]}, TypeError, "batches: expected an iterable"),
    "not finite": (network, {"batches": [X[0] / 0]}, ValueError, "batches\\[0\\]: expected finite"),
    "structure": (network, {"structure": [1]}, TypeError, "structure: expected a mapping"),
    "unknown": (network, {"structure": {"d": STRUCTURE["b"]}}, ValueError, "structure: 'd' is no Conv2d"),
    "shape": (network, {"structure": {"c": STRUCTURE["b"]}}, ValueError, "structure\\['c'\\]: expected"),
    "dense": (network, {"dense": 1}, TypeError, "dense: expected a torch.nn.Module"),
    "other dense": (network, {"dense": nn.ReLU()}, ValueError, "dense: 'b' is no Conv2d of the shape"),
    "tied": (tied, {}, ValueError, "model: the weight of 'twice' is shared by"),
    "groups": (
        grouped, {"structure": {"b": GroupLayout(2, 5, [((0,), (0, 1)), ((1,), (2,))])}}, ValueError,
        "structure: 'b' has 5 groups; expected a plain convolution",
    ),
    "unused": (lambda: Half(False).double(), {}, ValueError, "structure: 'twice' does not run"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_leaves_the_model_as_it_was(case: str) -> None:
    make, given, error, text = BAD[case]
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = {"structure": STRUCTURE, "batches": X, **given}
    with pytest.raises(error, match=text):
        dsprune.reconstruct(model, **arguments)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
