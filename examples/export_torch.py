"""A packed network as a torch.export program and, with --aoti, as a compiled AOTInductor package.

python examples/export_torch.py --out outputs/exported --aoti
python examples/export_torch.py --out outputs/exported --load
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import dsp_kernels  # noqa: F401  (registers the operators that the files call)


def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--out", type=Path, required=True)
    options.add_argument(
        "--aoti", action="store_true", help="compile ahead of time too; needs a C++ compiler"
    )
    options.add_argument("--load", action="store_true", help="load what an earlier run saved, and compare")
    args = options.parse_args()
    program, compiled, expected = (args.out / name for name in ("packed.pt2", "compiled.pt2", "logits.pt"))

    if args.load:  # the network's own code is not needed here
        network = torch.export.load(program).module()
        with torch.no_grad():
            same = torch.equal(network(images()), torch.load(expected))
            print(f"{program}: {'the same bits' if same else 'other bits'}")
            if compiled.exists():
                logits = torch._inductor.aoti_load_package(str(compiled))(images())
                same = torch.equal(logits, torch.load(expected))
                print(f"{compiled}: {'the same bits' if same else 'other bits'}")
        return

    import dsprune
    from dsprune.models import cifar_resnet

    # In earnest: groups from a GroupLearner, and finetuning after apply_structure.
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    model, x = cifar_resnet(20).eval(), images()
    assignment = {conv.name: torch.arange(conv.out_channels) % 2 for conv in dsprune.prunable_convs(model, x)}
    dsprune.apply_structure(model, dsprune.find_structure(model, x, assignment, flops=0.5))
    packed = dsprune.pack(model, x)
    dsprune.export_torch(packed, x, program)
    if args.aoti:
        dsprune.export_aoti(packed, x, compiled)
    with torch.no_grad():
        torch.save(packed(x), expected)
    print(f"{program}: {program.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
