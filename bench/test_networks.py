"""pytest-benchmark suite of whole networks: ``python -m pytest bench/test_networks.py``.

ResNet-20 with random structures; ``python -m bench`` compares more networks, forms and batches, in turns.
"""

from __future__ import annotations

import pytest
import torch

import dsprune
from bench.cases import random_structure
from dsprune.models import cifar_resnet

CUTS = (0.5, 0.7, 0.9)
FORMS = ("packed", "dense", "dense channels_last", "dense TorchScript")


@pytest.fixture(scope="module", params=CUTS, ids=lambda cut: f"{round(100 * cut)}% cut")
def networks(request):
    dense = random_structure(lambda: cifar_resnet(20), (3, 32, 32), request.param, 2)
    return request.param, dense, dsprune.pack(dense, torch.randn(1, 3, 32, 32))


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [1, 32, 128])
def test_inference(benchmark, networks, batch, threads, form):
    cut, dense, packed = networks
    x = torch.randn(batch, 3, 32, 32)
    call = packed if form == "packed" else dense
    if form == "dense channels_last":
        call = dsprune.graph.clean_copy(dense).to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    benchmark.group = f"resnet20, {round(100 * cut)}% cut, batch {batch}, {threads} threads"
    with torch.inference_mode():
        if form == "dense TorchScript":
            call = torch.jit.freeze(torch.jit.trace(dense, x))
        torch.testing.assert_close(call(x), dense(x), rtol=1e-3, atol=1e-4)
        benchmark(call, x)


@pytest.mark.parametrize("form", ["packed", "dense"])
def test_training_step(benchmark, networks, threads, form):
    """One step of SGD at batch 128."""
    cut, dense, _ = networks
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    model = dsprune.graph.clean_copy(dense).train()
    if form == "packed":
        model = dsprune.pack(model, images[:2], train=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    benchmark.group = f"training step, {round(100 * cut)}% cut, {threads} threads"
    benchmark(step)
