"""A packed network as an ONNX file in standard operators, and run with ONNX Runtime.

python examples/export_onnx.py --out outputs/onnx
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnxruntime
import torch

import dsprune
from dsprune.models import cifar_resnet


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--form", choices=("groups", "dense"), default="groups")
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    # In earnest: groups from a GroupLearner, and finetuning after apply_structure.
    torch.manual_seed(0)
    model, x = cifar_resnet(20).eval(), torch.randn(8, 3, 32, 32)
    assignment = {conv.name: torch.arange(conv.out_channels) % 2 for conv in dsprune.prunable_convs(model, x)}
    dsprune.apply_structure(model, dsprune.find_structure(model, x, assignment, flops=0.5))
    packed = dsprune.pack(model, x)

    # The batch stays free; what ONNX Runtime gives is compared before the file is written.
    path = dsprune.export_onnx(
        packed,
        x[:1],
        args.out / "packed.onnx",
        form=args.form,
        input_names=["images"],
        output_names=["logits"],
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": x.numpy()})
    with torch.no_grad():
        difference = float((torch.from_numpy(logits) - packed(x)).abs().max())
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB, largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
