"""Multiply-adds of whole networks are those that torch counts, dense and packed, for any layer."""

from __future__ import annotations

from collections.abc import Callable

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.flop_counter import FlopCounterMode

import dsprune

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning"),
]
IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def counted_by_torch(model: nn.Module, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*inputs)
    return counter.get_total_flops() // 2


class Body(nn.Module):
    """A convolution with channels to drop, and whatever comes after it."""

    def __init__(self, tail: nn.Module | Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        with torch.no_grad():
            self.b.weight[:4, [1, 2]] = 0
            self.b.weight[4:, [5]] = 0
        self.tail = tail

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(F.relu(self.a(x)))
        return x if self.tail is None else self.tail(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).transpose(1, 2)
        return self.inner(x, x, x)[0]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.line = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(F.relu(self.conv(x))).mean((2, 3))
        return self.line(self.line(x))


class Functional(nn.Module):
    """Weights that are parameters of no layer, computed ones, and products of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.scale = nn.Parameter(torch.randn(4, 8, 3, 3)), nn.Parameter(torch.randn(4, 1, 1, 1))
        self.matrix, self.offset = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(F.conv2d(x, self.kernel), (self.kernel * self.scale).transpose(0, 1))
        x = x[:, :4].flatten(2).transpose(1, 2)
        x = torch.addmm(self.offset, x.flatten(0, 1), self.matrix).unflatten(0, x.shape[:2])
        return torch.einsum("nij,nkj->nik", x, x) @ x


def old_norm() -> nn.Module:
    return weight_norm(nn.Conv2d(8, 8, 3))


def new_norm() -> nn.Module:
    return parametrizations.weight_norm(nn.Conv2d(8, 8, 3))


def flat(tail: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(2), tail)


TAILS: dict[str, Callable[[], nn.Module]] = {
    "conv1d": lambda: flat(nn.Conv1d(8, 16, 3, padding=1)),
    "conv1d, grouped": lambda: flat(nn.Conv1d(8, 16, 3, groups=4, dilation=2)),
    "transposed 1-D": lambda: flat(nn.ConvTranspose1d(8, 4, 3, stride=2)),
    "conv3d": lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Conv3d(2, 3, 3, padding=1)),
    "transposed 3-D": lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.ConvTranspose3d(2, 3, 2, stride=2)),
    "transposed": lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2, output_padding=1),
    "same, even kernel": lambda: nn.Conv2d(8, 5, 4, padding="same"),
    "same, odd kernel": lambda: nn.Conv2d(8, 5, 3, padding="same", dilation=2),
    "grouped": lambda: nn.Conv2d(8, 12, 3, groups=4, stride=2),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, groups=8),
    "padding mode": lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    "old weight norm": old_norm,
    "new weight norm": new_norm,
    "linear on a map": lambda: nn.Linear(8, 5),
    "bilinear upsampling": lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 1)),
    "attention": Attention,
    "used twice": Twice,
    "functional": Functional,
}


@pytest.mark.parametrize("tail", TAILS)
def test_dense_macs_are_torchs(tail: str) -> None:
    model = Body(TAILS[tail]()).eval()
    want = counted_by_torch(model, IMAGE)
    counted = dsprune.summary(model, IMAGE)
    assert counted.dense_macs == want
    assert counted.macs == want - 12 * 9 * 64
    # In evaluation torch runs attention as one operator, for which it has no formula.
    assert list(counted.uncounted) == (["aten._native_multi_head_attention"] if tail == "attention" else [])
    batch = IMAGE.expand(3, -1, -1, -1)
    assert dsprune.summary(model, batch).dense_macs == want  # of one image


@pytest.mark.filterwarnings("ignore:layers are replaced one by one:UserWarning")
@pytest.mark.parametrize(
    "tail", ["conv1d", "transposed", "same, even kernel", "old weight norm", "functional"]
)
def test_packed_macs_are_torchs(tail: str) -> None:
    model = Body(TAILS[tail]()).eval()
    want = counted_by_torch(model, IMAGE)
    training = dsprune.pack(model, IMAGE, train=True)
    for packed in (training, dsprune.pack(model, IMAGE), dsprune.pack(training.eval(), IMAGE)):
        counted = dsprune.summary(packed, IMAGE)
        assert counted.dense_macs == want
        assert counted.macs == counted_by_torch(packed, IMAGE) == want - 12 * 9 * 64


@pytest.mark.parametrize("batch", [1, 3])
def test_networks_without_images(batch: int) -> None:
    for model, x in (
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 5, 2)), torch.randn(batch, 3, 9)),
        (nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.Conv3d(4, 5, 2)), torch.randn(batch, 3, 6, 6, 6)),
        (nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 4)), torch.randn(batch, 7)),
    ):
        assert dsprune.summary(model, x).dense_macs == counted_by_torch(model, x[:1])


def test_an_image_without_a_batch() -> None:
    assert dsprune.summary(Body(), IMAGE[0]).dense_macs == counted_by_torch(Body(), IMAGE[0])


@pytest.mark.parametrize("kernel", [3, 4])
def test_flops_targets_are_of_all_that_torch_counts(kernel: int) -> None:
    torch.manual_seed(0)
    tail = nn.Sequential(nn.Conv2d(16, 16, kernel, padding="same"), nn.Flatten(2), nn.Conv1d(16, 8, 3))
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), tail)
    groups = {"2": torch.arange(16) % 2}
    structure = dsprune.find_structure(model, IMAGE, groups, flops=0.2)
    dsprune.apply_structure(model, structure)
    dense, counted = counted_by_torch(model, IMAGE), dsprune.summary(model, IMAGE)
    assert counted.dense_macs == dense
    left = counted_by_torch(dsprune.pack(model, IMAGE), IMAGE)
    assert counted.macs == left and structure.flops_cut == pytest.approx(1 - left / dense)
    assert structure.flops_cut >= 0.2


def test_what_cannot_be_counted_is_named() -> None:
    class Odd(Body):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x).flatten(2)
            return torch.mv(x[0], x[0, 0]) + torch.fft.fft(x).abs().sum()

    counted = dsprune.summary(Odd(), IMAGE)
    assert counted.dense_macs == counted_by_torch(Odd(), IMAGE)
    assert counted.uncounted["aten.mv"] == 1 and any("fft" in name for name in counted.uncounted)
    assert "not counted, torch has no formula: aten._fft" in str(counted)
    with pytest.warns(UserWarning, match="counted without.*aten.mv"):
        dsprune.find_structure(Odd(), IMAGE, {"b": torch.zeros(8, dtype=torch.long)}, flops=0.1)


def test_packing_a_training_form_is_packing_the_network() -> None:
    x = torch.randn(2, 3, 16, 16)
    for build in (nets.Residual, nets.Plain):
        model = nets.structured_zeros(nets.random_norms(build())).eval()
        once, training = dsprune.pack(model, x), dsprune.pack(model, x, train=True)
        wrapped = nn.Sequential(training)
        again = dsprune.pack(training, x)
        with torch.no_grad():
            assert torch.equal(once(x), again(x))
            torch.testing.assert_close(dsprune.pack(once, x)(x), once(x), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(dsprune.pack(wrapped, x)(x), once(x), rtol=1e-4, atol=1e-4)
            inside = dsprune.pack(training.network, x)
            torch.testing.assert_close(inside(x), once(x), rtol=1e-4, atol=1e-4)
        assert again.program_reason == once.program_reason is None
        assert (
            inside.program_reason is None and dsprune.summary(inside, x).macs == dsprune.summary(once, x).macs
        )
        assert dsprune.summary(again, x).layers == dsprune.summary(once, x).layers
        assert again.network.code == once.network.code
        retrained = dsprune.pack(training, x, train=True)
        assert [n for n, _ in retrained.layers()] == [n for n, _ in training.layers()]
        assert retrained.training == training.training
