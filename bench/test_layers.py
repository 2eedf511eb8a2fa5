"""pytest-benchmark suite of single layers: ``python -m pytest bench/test_layers.py``.

The layer shapes of ResNet-20 and ResNet-50 (He et al., CVPR 2016) with two groups of filters, each form of a
layer in one group of rows. ``--benchmark-json FILE`` writes the figures.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsp_kernels import GroupLayout, available_backends
from dsp_kernels.program import Program
from dsprune.nn import PermutedGroupedConv2d

# name: channels, filters, size, kernel, stride
SHAPES = {
    "resnet20 stage 1": (16, 16, 32, 3, 1),
    "resnet20 stage 2, strided": (16, 32, 32, 3, 2),
    "resnet20 stage 2": (32, 32, 16, 3, 1),
    "resnet20 stage 3": (64, 64, 8, 3, 1),
    "resnet50 stage 1, 3x3": (64, 64, 56, 3, 1),
    "resnet50 stage 1, 1x1": (64, 256, 56, 1, 1),
    "resnet50 stage 4, 3x3": (512, 512, 7, 3, 1),
}
GROUPS, KEPT = 2, 0.4  # of each group's channels
FORMS = ("packed, as a program", "packed, as an operator", "torch", "torch channels_last")


def random_layout(channels: int, filters: int) -> GroupLayout:
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(filters, generator=generator).tolist()
    groups = []
    for g in range(GROUPS):
        read = torch.randperm(channels, generator=generator)[: max(1, round(KEPT * channels))]
        groups.append((sorted(read.tolist()), sorted(order[g::GROUPS])))
    return GroupLayout(channels, filters, groups)


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer(benchmark, shape, batch, threads, form):
    """Forward, bias and ReLU inside; outputs are compared with torch's before the clock runs."""
    if form.startswith("packed") and available_backends()["native"] is not None:
        pytest.skip(f"native: {available_backends()['native']}")
    channels, filters, size, kernel, stride = SHAPES[shape]
    layout = random_layout(channels, filters)
    torch.manual_seed(0)
    layer = PermutedGroupedConv2d(
        layout, kernel, stride=stride, padding=kernel // 2, activation="relu"
    ).eval()
    x = torch.randn(batch, channels, size, size)
    dense, bias = layer.dense_weight().detach(), layer.bias
    assert bias is not None
    if form == "torch channels_last":
        x, dense = (t.contiguous(memory_format=torch.channels_last) for t in (x, dense))
    program = Program((channels, size, size))
    run = program.build(
        program.conv(
            program.input,
            layer.weight.detach(),
            layout,
            bias.detach(),
            kernel_size=kernel,
            stride=stride,
            padding=kernel // 2,
            activation="relu",
        )
    )
    calls = {
        "packed, as a program": lambda: run(x),
        "packed, as an operator": lambda: layer(x),
        "torch": lambda: F.conv2d(x, dense, bias, stride, kernel // 2).relu_(),
    }
    call = calls.get(form, calls["torch"])
    benchmark.group = f"{shape}, batch {batch}, {threads} threads"
    taps = kernel * kernel
    with torch.inference_mode():
        out = call()
        torch.testing.assert_close(out, calls["torch"](), rtol=1e-4, atol=1e-4)
        pixels = out.shape[2] * out.shape[3]
        macs = layout.pairs if form.startswith("packed") else channels * filters
        benchmark.extra_info["MFLOP"] = 2e-6 * macs * taps * pixels * batch
        benchmark(call)
