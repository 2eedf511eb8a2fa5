"""The authors' pruned ResNet-20 networks: load, count, pack, the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dsprune
from dsprune.models import cifar_resnet

PUBLISHED = {4: ("63.57", "50.45"), 3: ("62.43", "49.15"), 2: ("61.23", "48.35")}


def network(folder: Path, groups: int) -> torch.nn.Module:
    model = cifar_resnet(20)
    model.load_state_dict(load_file(folder / f"resnet20_g{groups}.safetensors"))
    return model.eval()


@pytest.mark.parametrize("groups", PUBLISHED)
def test_published_cuts(authors_data: Path, groups: int) -> None:
    counted = dsprune.summary(network(authors_data, groups), torch.randn(1, 3, 32, 32))
    flops, params = PUBLISHED[groups]
    line = str(counted).splitlines()[-2]
    assert line.startswith("prunable convolutions") and f" {flops} " in line and line.endswith(f" {params}")
    stored = json.loads((authors_data / f"resnet20_g{groups}.json").read_text())
    assert sum(layer.macs for layer in counted.layers if layer.prunable) == stored["prunable_macs_left"]


@pytest.mark.parametrize("groups", PUBLISHED)
def test_packed_gives_the_authors_logits(authors_data: Path, groups: int) -> None:
    reference = load_file(authors_data / f"resnet20_g{groups}.reference.safetensors")
    model = network(authors_data, groups)
    packed = dsprune.pack(model, reference["images"][:1])
    with torch.no_grad():
        assert float((packed(reference["images"]) - reference["logits"]).abs().max()) < 1e-4
    counted = dsprune.summary(packed, reference["images"][:1])
    assert counted.macs <= 0.42 * counted.dense_macs


@pytest.mark.parametrize("groups", PUBLISHED)
def test_the_authors_groups_come_back(authors_data: Path, groups: int) -> None:
    stored = json.loads((authors_data / f"resnet20_g{groups}.json").read_text())["groups"]
    packed = dsprune.pack(network(authors_data, groups), torch.randn(1, 3, 32, 32), train=True)
    layers = dict(packed.layers())
    for name, expected in stored.items():
        found = {(frozenset(c), frozenset(f)) for c, f in layers[name].layout.groups}
        assert found == {(frozenset(c), frozenset(f)) for c, f in expected if f}, name
