"""The chain kernel against the float64 composition of its three convolutions, within the bound of each."""

from __future__ import annotations

import math
import random

import pytest
import torch
from conv_cases import BOUND, random_layout
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsp_kernels import GroupLayout, backends, cost
from dsp_kernels.conv import chain
from dsp_kernels.conv.chain import Chain
from dsp_kernels.conv.launches import ChainLaunch

LAST = torch.channels_last


def layouts(
    seed: int, channels: int, inner: int, stream: int, following: int, groups: tuple[int, int, int]
) -> list[GroupLayout]:
    rng = random.Random(seed)
    return [
        random_layout(rng, channels, inner, groups[0]),
        random_layout(rng, inner, stream, groups[1]),
        random_layout(rng, stream, following, groups[2]),
    ]


def parts(
    of: list[GroupLayout], dtype: torch.dtype, kernel: tuple[int, int], seed: int
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
    """Packed weights, biases and, in float64, the dense weights."""
    generator = torch.Generator().manual_seed(seed)
    packed, dense = [], []
    for layout, size in zip(of, (kernel, (1, 1), (1, 1)), strict=True):
        scale = 1 / math.sqrt(max(1, layout.in_channels) * size[0] * size[1])
        weight = torch.randn(layout.out_channels, layout.in_channels, *size, generator=generator) * scale
        packed.append(layout.pack(weight).to(dtype))
        dense.append(layout.unpack(packed[-1], size).double())
    biases: list[Tensor | None] = [
        torch.randn(layout.out_channels, generator=generator).to(dtype) for layout in of
    ]
    biases[seed % 3] = None
    return packed, biases, dense


def step(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, **geometry: object
) -> Tensor:
    out = torch.conv2d(x, weight, None if bias is None else bias.double(), **geometry)  # type: ignore[arg-type]
    return (out if residual is None else out + residual.double()).relu()


def check(made: Chain, dense: list[Tensor], x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Holds a chain's outputs against float64. An inner value may be off by its own bound and rounding, and
    the next convolution carries that on.
    """
    y, z = made(x, residual)
    dtype, info = x.dtype, torch.finfo(x.dtype)
    u = torch.finfo(torch.float32).eps / 2
    geometry = {"stride": made.stride, "padding": made.padding, "dilation": made.dilation}

    def one(value: Tensor, off: Tensor, i: int, r: Tensor | None, **g: object) -> tuple[Tensor, Tensor]:
        """(exact output, how far the kernel's may be off) of convolution i; ``off``: of its input."""
        exact = step(value, dense[i], made.biases[i], r, **g)
        size = step(value.abs(), dense[i].abs(), b.abs() if (b := made.biases[i]) is not None else None,
                    None if r is None else r.abs(), **g)  # fmt: skip
        carried = torch.conv2d(off, dense[i].abs(), None, **g)  # type: ignore[arg-type]
        terms = dense[i][0].numel() + 2
        bound = BOUND * math.sqrt(terms) * u * (size + carried) + carried
        return exact, bound + info.eps / 2 * (exact.abs() + bound) + info.smallest_normal * info.eps

    wide = x.double()
    h, h_off = one(wide, torch.zeros_like(wide), 0, None, **geometry)
    for name, got, (exact, off) in (
        ("y", y, one(h, h_off, 1, residual)),
        ("z", z, one(*one(h, h_off, 1, residual), 2, None)),
    ):
        assert got.dtype == dtype and got.shape == exact.shape and got.is_contiguous(memory_format=LAST)
        assert torch.isfinite(got).all(), f"{name}: an element was not written"
        error = (got.double() - exact).abs()
        assert bool((error <= off).all()), f"{name}: {(error / off).max():.3g} times the bound"
    return y, z


@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    groups=st.tuples(*3 * [st.integers(1, 8)]),
    channels=st.sampled_from([8, 16, 40]),
    # Few filters leave some of the groups without any, so that up to eight fit the four tiles that there are.
    inner=st.integers(1, 4) | st.integers(1, 40),
    stream=st.sampled_from([16, 48, 64]),
    following=st.integers(1, 24),
    geometry=st.sampled_from(
        [((3, 3), (1, 1), (1, 1), (1, 1)), ((3, 3), (2, 2), (1, 1), (1, 1)), ((1, 3), (1, 2), (0, 2), (1, 2)),
         ((2, 2), (1, 1), (0, 0), (2, 1)), ((1, 1), (1, 1), (0, 0), (1, 1))]
    ),
    size=st.sampled_from([(3, 3), (5, 4), (4, 7)]),
    resident=st.sampled_from([0, 1]),
    copy=st.sampled_from([8, 16]),
)  # fmt: skip
@settings(max_examples=24)
def test_chain(
    seed: int,
    dtype: torch.dtype,
    groups: tuple[int, int, int],
    channels: int,
    inner: int,
    stream: int,
    following: int,
    geometry: tuple[tuple[int, int], ...],
    size: tuple[int, int],
    resident: int,
    copy: int,
) -> None:
    of = layouts(seed, channels, inner, stream, following, groups)
    kernel, stride, padding, dilation = geometry
    packed, biases, dense = parts(of, dtype, kernel, seed)
    live = sum(bool(filters) for _, filters in of[0].groups) + bool(of[0].dead_filters)
    if live > chain.MOST_TILES:
        with pytest.raises(ValueError, match=r"filters in \d+ groups .* more than 4 tiles"):
            Chain(of, packed, biases, kernel=kernel, stride=stride, padding=padding, dilation=dilation)
        return
    launch = ChainLaunch(16, 16, 4, 3, resident, copy)
    made = Chain(
        of, packed, biases, kernel=kernel, stride=stride, padding=padding, dilation=dilation, launch=launch
    )
    assert made.config.resident == bool(resident) and made.config.copy == copy
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, channels, *size, generator=generator).to(dtype)
    shape = torch.conv2d(x.double(), dense[0], None, stride, padding, dilation).shape
    residual = torch.randn(2, stream, *shape[2:], generator=generator).to(dtype)
    y, z = check(made, dense, x, residual)
    again = made(x.contiguous(memory_format=LAST), residual)
    assert torch.equal(again[0], y) and torch.equal(again[1], z)


def simple(dtype: torch.dtype = torch.float32) -> tuple[Chain, list[Tensor]]:
    of = [
        GroupLayout(16, 8, [([0, 1, 9], [0, 1, 2, 3]), ([3, 4, 5, 12], [4, 5, 6, 7])]),
        GroupLayout(8, 16, [(range(8), range(16))]),
        GroupLayout(16, 8, [(range(16), range(8))]),
    ]
    packed, biases, dense = parts(of, dtype, (3, 3), 1)
    return Chain(of, packed, biases, kernel=(3, 3), padding=(1, 1), block_m=16), dense


def test_channels_that_a_group_does_not_read_do_not_reach_it() -> None:
    """NaN and infinity in the first convolution's unread channels: in holes of chunks and in chunks apart."""
    made, _ = simple()
    x, residual = torch.randn(1, 16, 4, 4), torch.randn(1, 16, 4, 4)
    expected = made(x, residual)
    for bad in (float("nan"), float("inf")):
        spoiled = x.clone()
        spoiled[:, [2, 6, 7, 8, 10, 11, 13, 14, 15]] = bad
        for got, want in zip(made(spoiled, residual), expected, strict=True):
            assert torch.equal(got, want)


def test_a_nan_that_is_read_comes_through() -> None:
    made, _ = simple()
    x, residual = torch.randn(1, 16, 4, 4), torch.randn(1, 16, 4, 4)
    x[0, 0, 0, 0] = float("nan")
    y, z = made(x, residual)
    assert y[..., :2, :2].isnan().all() and z[..., :2, :2].isnan().all()
    assert y[..., 2:, :].isfinite().all()


def test_no_memory_beside_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = simple()
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=LAST)
    residual = torch.randn(2, 16, 4, 4).contiguous(memory_format=LAST)
    sizes: list[int] = []
    real = torch.empty

    def counted(*args: object, **kwargs: object) -> Tensor:
        out = real(*args, **kwargs)  # type: ignore[call-overload]
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(torch, "empty", counted)
    y, z = made(x, residual)
    assert sizes == [y.numel(), z.numel()]


def test_an_empty_batch() -> None:
    made, _ = simple()
    y, z = made(torch.empty(0, 16, 4, 4), torch.empty(0, 16, 4, 4))
    assert y.shape == (0, 16, 4, 4) and z.shape == (0, 8, 4, 4)


def test_bad_input_is_refused_by_name() -> None:
    made, _ = simple()
    x, residual = torch.randn(1, 16, 4, 4), torch.randn(1, 16, 4, 4)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 16, H, W\)"):
        made(torch.randn(1, 8, 4, 4), residual)
    with pytest.raises(ValueError, match=r"residual must have shape \(1, 16, 4, 4\)"):
        made(x, residual[:, :, :3])
    with pytest.raises(TypeError, match=r"x must be torch\.float32"):
        made(x.half(), residual)
    with pytest.raises(ValueError, match="each must read what the one before it gives"):
        one = GroupLayout(8, 8, [(range(8), range(8))])
        two = GroupLayout(16, 16, [(range(16), range(16))])
        Chain([one, two, two], [torch.zeros(64)] * 3, [None] * 3, kernel=(1, 1))
    with pytest.raises(ValueError, match="a multiple of 8 is taken"):
        odd = GroupLayout(9, 16, [(range(9), range(16))])
        two = GroupLayout(16, 16, [(range(16), range(16))])
        Chain([odd, two, two], [torch.zeros(144), *[torch.zeros(256)] * 2], [None] * 3, kernel=(1, 1))


def convs(**changes: object) -> list[cost.Conv]:
    sizes = {"channels": 64, "inner": 64, "stream": 256, "following": 64, **changes}

    def full(a: object, b: object) -> GroupLayout:
        return GroupLayout(int(a), int(b), [(range(int(a)), range(int(b)))])  # type: ignore[call-overload]

    one = full(sizes["channels"], sizes["inner"])
    two, three = full(sizes["inner"], sizes["stream"]), full(sizes["stream"], sizes["following"])
    return [
        cost.Conv(one, 2, (8, 8), (3, 3), padding=(1, 1), activation="relu"),
        cost.Conv(two, 2, (8, 8), residual=True, activation="relu"),
        cost.Conv(three, 2, (8, 8), activation="relu"),
    ]


def test_what_a_chain_takes() -> None:
    half, large = torch.float16, 227 * 1024
    assert chain.refuses(convs(), half, large) is None
    assert "no multiple of 8" in str(chain.refuses(convs(channels=60), half, large))
    assert "no multiple of 16" in str(chain.refuses(convs(stream=250), half, large))
    assert "more than 128" in str(chain.refuses(convs(following=129), half, large))
    assert "more than 4 tiles" in str(chain.refuses(convs(inner=257), half, large))
    assert "not torch.float64" in str(chain.refuses(convs(), torch.float64, large))
    assert "shared memory" in str(chain.refuses(convs(), half, 16 * 1024))
    first, second, third = convs()
    assert "three convolutions" in str(chain.refuses([first, second], half, large))
    assert "residual" in str(chain.refuses([first, third, third], half, large))
    # The second stage of ResNet-50 fits sm_86 with fewer stages.
    wide = convs(channels=128, inner=128, stream=512, following=128)
    of = [conv.layout for conv in wide]
    assert chain.config_of(of, half).stages == 3
    assert chain.config_of(of, half, shared_memory=99 * 1024).stages == 2
    assert chain.refuses(wide, half, 99 * 1024) is None


def test_a_packed_block_through_the_interpreter() -> None:
    """The chain in a packed network's graph gives what its layers give."""
    import nets
    from torch import nn

    from dsprune import gpu, pack
    from dsprune.models.resnet import Bottleneck

    torch.manual_seed(0)
    blocks = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), *(Bottleneck(32, 8, 1) for _ in range(2)))
    model = nets.structured_zeros(nets.random_norms(blocks)).eval()
    x = torch.randn(1, 3, 5, 5)
    packed = pack(model, x)
    network, found = gpu.rewrite(
        packed.network, x.shape, torch.float32, cost.device("H200"), forms=("grouped",)
    )
    assert [row.form for row in found.rows].count("chain") == 1
    assert backends.interpreted()
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-5)
