"""The summary of dense, masked and packed networks."""

from __future__ import annotations

import nets
import pytest
import torch

import dsprune
from dsprune.models import cifar_resnet, resnet50

X = torch.randn(1, 3, 16, 16)


def test_dense_network() -> None:
    counted = dsprune.summary(cifar_resnet(20), torch.randn(1, 3, 32, 32))
    assert counted.macs == counted.dense_macs == 40_813_184
    assert counted.params == counted.dense_params == sum(p.numel() for p in cifar_resnet(20).parameters())
    assert counted.flops_cut() == counted.params_cut("prunable") == 0


def test_resnet50_has_its_known_macs() -> None:
    counted = dsprune.summary(resnet50(), torch.randn(1, 3, 224, 224))
    assert round(counted.macs / 1e9, 2) == 4.09
    assert counted.params == 25_557_032


def test_masked_and_packed_agree() -> None:
    model = nets.structured_zeros(nets.random_norms(nets.Residual()), dead=0.2).eval()
    masked, packed = dsprune.summary(model, X), dsprune.summary(dsprune.pack(model, X), X)
    assert (masked.macs, masked.dense_macs, masked.params) == (packed.macs, packed.dense_macs, packed.params)
    assert packed.packed and not masked.packed
    trained = dsprune.summary(dsprune.pack(model, X, train=True), X)
    assert (
        masked.macs <= trained.macs < masked.dense_macs
    )  # filters that nobody reads are still computed there


def test_macs_scale_with_the_image() -> None:
    packed = dsprune.pack(nets.structured_zeros(nets.Residual()).eval(), X)
    small, large = dsprune.summary(packed, X), dsprune.summary(packed, torch.randn(1, 3, 32, 32))
    assert large.flops_cut("prunable") == pytest.approx(small.flops_cut("prunable"))
    assert large.macs > 3.9 * small.macs


def test_transposed_convolutions_count() -> None:
    rows = {layer.name: layer for layer in dsprune.summary(nets.Zoo(), X).layers}
    assert rows["up"].macs == rows["up"].dense_macs == 12 * 10 * 4 * 8 * 8
    assert not rows["up"].prunable


def test_table_shows_both_cuts_with_two_decimals() -> None:
    model = nets.structured_zeros(nets.Residual())
    counted = dsprune.summary(model, X)
    lines = str(counted).splitlines()
    assert f"{100 * counted.flops_cut('prunable'):.2f}" in lines[-2] and lines[-2].startswith(
        "prunable convolutions"
    )
    assert f"{100 * counted.flops_cut():.2f}" in lines[-1] and f"{counted.macs:,}" in lines[-1]
    assert len({len(line) for line in lines}) == 1


def test_bad_count() -> None:
    with pytest.raises(ValueError, match="count: expected 'network' or 'prunable', got 'all'"):
        dsprune.summary(nets.Plain(), X).flops_cut("all")


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="model: expected"):
        dsprune.summary("net", X)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="example_input"):
        dsprune.summary(nets.Plain(), None)
