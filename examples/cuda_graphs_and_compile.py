"""A packed network in as few launches as there can be: a CUDA graph of its own, and torch.compile.

    python examples/cuda_graphs_and_compile.py [--half] [--batch 8]

Where there is a CUDA device, a packed network captures itself at the first call with a shape, and
`torch.compile(mode="reduce-overhead")` makes CUDA graphs of its own around our operators. Without a device
this says so and runs the same lines on the CPU: there the whole network is one native program, and the mode
is `torch.compile`'s default. The outputs of all forms are compared.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import dsprune
from dsprune.latency import interleaved


def network() -> nn.Module:
    """A small network whose second convolution has two groups, each without some of its input channels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    with torch.no_grad():
        model[2].weight[:16, ::2] = 0
        model[2].weight[16:, 1::3] = 0
    return model.eval()


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--half", action="store_true", help="bfloat16, on a device")
    args = options.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if not cuda:
        print("no CUDA device: the CPU's forms run")
    dtype = torch.bfloat16 if args.half and cuda else torch.float32
    model = network().to(device=device, dtype=dtype)
    images = torch.randn(args.batch, 3, 32, 32).to(device=device, dtype=dtype)

    packed = dsprune.pack(model, images)
    compiled = torch.compile(packed, fullgraph=True, mode="reduce-overhead" if cuda else None)
    layers = packed.network  # the layers one by one, as hooks, autocast and training see them
    expected = model(images)
    calls = {
        "dense": lambda: model(images),
        "packed, layer by layer": lambda: layers(images),
        "packed": lambda: packed(images),
        "packed, torch.compile": lambda: compiled(images),
    }
    for name, call in calls.items():
        for _ in range(3):  # the first calls compile and capture
            difference = float((call() - expected).abs().max() / expected.abs().max())
        print(f"{name}: largest difference {difference:.1e} of the largest logit")
        assert difference < (5e-2 if dtype == torch.bfloat16 else 1e-4)
    one = "one CUDA graph" if cuda else "one native program"
    print(f"packed: {one if packed.program_reason is None else packed.program_reason}")
    for name, milliseconds in zip(calls, interleaved(list(calls.values()), device), strict=True):
        print(f"{name}: {milliseconds:.3f} ms")


if __name__ == "__main__":
    main()
