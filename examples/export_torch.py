"""A packed network as a torch.export program and, with --aoti, as a compiled AOTInductor package.

python examples/export_torch.py --out outputs/exported --aoti
python examples/export_torch.py --out outputs/exported --load

--small takes two convolutions in place of ResNet-20: compiling ahead of time then takes seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import dsp_kernels  # noqa: F401  (registers the operators that the files call)


def images() -> list[torch.Tensor]:
    """At other batch and image sizes than those that the files are made with."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(shape, generator=generator) for shape in ((1, 3, 32, 32), (5, 3, 32, 32), (2, 3, 36, 28))
    ]


@torch.no_grad()
def compared(network: Callable[[torch.Tensor], torch.Tensor], expected: list[torch.Tensor]) -> str:
    same = all(torch.equal(network(x), y) for x, y in zip(images(), expected, strict=True))
    return "the same bits" if same else "other bits"


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--out", type=Path, required=True)
    options.add_argument(
        "--aoti", action="store_true", help="compile ahead of time too; needs a C++ compiler"
    )
    options.add_argument("--small", action="store_true", help="a small network in place of ResNet-20")
    options.add_argument("--load", action="store_true", help="load what an earlier run saved, and compare")
    args = options.parse_args()
    program, compiled, expected = (args.out / name for name in ("packed.pt2", "compiled.pt2", "logits.pt"))

    if args.load:  # the network's own code is not needed here
        logits = torch.load(expected)
        print(f"{program}: {compared(torch.export.load(program).module(), logits)}")
        if compiled.exists():
            print(f"{compiled}: {compared(torch._inductor.aoti_load_package(str(compiled)), logits)}")
        return

    import dsprune
    from dsprune.models import cifar_resnet

    # In earnest: groups from a GroupLearner, and finetuning after apply_structure.
    torch.manual_seed(0)
    model = (small_network() if args.small else cifar_resnet(20)).eval()
    x = torch.randn(1, 3, 32, 32)
    assignment = {conv.name: torch.arange(conv.out_channels) % 2 for conv in dsprune.prunable_convs(model, x)}
    dsprune.apply_structure(model, dsprune.find_structure(model, x, assignment, flops=0.5))
    packed = dsprune.pack(model, x)
    dsprune.export_torch(packed, x, program)
    if args.aoti:
        dsprune.export_aoti(packed, x, compiled)
    with torch.no_grad():
        torch.save([packed(image) for image in images()], expected)
    print(f"{program}: {program.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
