"""The stages of a run folder: dense, learned, pruned, finetuned, packed, and the check in a new process.

Each takes a `Run` and leaves its result in the folder. Training stages go on from their checkpoint with
`resume=True` and start over without it.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsprune.checkpoint import CheckpointError, read_checkpoint
from dsprune.recipes import training
from dsprune.recipes.data import ImageData
from dsprune.recipes.runs import Run, build_network
from dsprune.recipes.training import EVALUATED, Progress
from dsprune.structure import Structure


def make_dense(
    run: Run,
    data: ImageData,
    *,
    weights: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> None:
    """Train the dense network from scratch, or take its weights from a safetensors file.

    Raises CheckpointError where `weights` cannot be read or do not fit, TrainingError where the loss is not
    finite.
    """
    if resume and run.has("dense"):
        return
    model = run.network(data)
    if weights is not None:
        tensors = read_weights(weights)
        run.forget("dense")
        training.load_weights(model, tensors, weights)
        history: list[dict[str, Any]] = []
    else:
        run.forget("dense", checkpoints=not resume)
        history = training.pretrain(
            model, data, run.config.pretrain,
            seed=run.config.seed, checkpoint=run.checkpoint("pretrain"), resume=resume, progress=progress,
        )  # fmt: skip
    run.write("dense", model, history=history, weights=None if weights is None else str(weights))
    run.checkpoint("pretrain").unlink(missing_ok=True)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a safetensors file: a plain one, or that of one of our checkpoints.

    Raises CheckpointError, naming the file, where it is missing or damaged.
    """
    from safetensors.torch import load_file

    try:
        tensors, _ = read_checkpoint(path)
        return training.part_of(tensors, "model.")
    except CheckpointError as error:
        if "not a dsprune checkpoint" not in str(error):
            raise
    try:
        return load_file(path)
    except Exception as error:  # a damaged file fails in many ways
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None


def packed_layouts(path: Path) -> dict[str, Any] | None:
    """The layouts, as JSON by module name, in a file of `dsprune.save`; None for another safetensors file.

    The file is one that `read_weights` has read.

    Raises CheckpointError, naming the file, where its header is damaged.
    """
    from dsprune import io
    from dsprune.files import read_tensors

    try:
        return dict(read_tensors(path, io.FORMAT, ("version", io.VERSION))[1]["layouts"])
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, KeyError) and error.args == (io.FORMAT,):
            return None
        raise CheckpointError(f"{path}: damaged header ({error})") from None


def make_learned(
    run: Run, data: ImageData, *, resume: bool = False, progress: Progress | None = None
) -> None:
    """Learn the groups, from the dense network."""
    if resume and run.has("learned"):
        return
    run.forget("learned", checkpoints=not resume)
    model, _, _ = run.read("dense", data)
    assignment, history = training.learn(
        model, data, run.config.learn,
        seed=run.config.seed, checkpoint=run.checkpoint("learn"), resume=resume, progress=progress,
    )  # fmt: skip
    run.write("learned", model, assignment=assignment, history=history)
    run.checkpoint("learn").unlink(missing_ok=True)


def make_pruned(run: Run, data: ImageData, *, resume: bool = False) -> Structure | None:
    """Find the structure for the run's target and hold it by masks; the structure, where it was found now."""
    from dsprune.recipes.timing import random_images
    from dsprune.structure import apply_structure, find_structure

    if resume and run.has("pruned"):
        return None
    model, assignment, _ = run.read("learned", data)
    target = {k: v for k, v in dataclasses.asdict(run.config.prune).items() if v is not None}
    batch = target.pop("batch")
    example = data.example
    if "latency" in target:
        example = random_images(batch, *example.shape[1:3]).to(example.device)
    structure = find_structure(model, example, assignment, **target)
    apply_structure(model, structure)
    run.forget("pruned")
    run.write("pruned", model)
    return structure


def make_finetuned(
    run: Run, data: ImageData, *, resume: bool = False, progress: Progress | None = None
) -> None:
    """Train the pruned network on, with its masks held."""
    if resume and run.has("finetuned"):
        return
    run.forget("finetuned", checkpoints=not resume)
    model, _, _ = run.read("pruned", data)
    history = training.finetune(
        model, data, run.config.finetune,
        seed=run.config.seed, checkpoint=run.checkpoint("finetune"), resume=resume, progress=progress,
    )  # fmt: skip
    run.write("finetuned", model, history=history)
    run.checkpoint("finetune").unlink(missing_ok=True)


def make_packed(run: Run, data: ImageData) -> float:
    """Pack the finetuned (else the pruned) network and save it.

    Returns the largest difference of its logits from the masked network's, over the validation images.
    """
    import dsprune

    model, _, _ = run.read("finetuned" if run.has("finetuned") else "pruned", data)
    packed = dsprune.pack(model, data.example).eval()
    masked_logits = training.evaluate(model, data.validation).logits
    packed_logits = training.evaluate(packed, data.validation).logits
    run.path.mkdir(parents=True, exist_ok=True)
    dsprune.save(packed, run.file("packed"))
    return (masked_logits - packed_logits).abs().max().item()


def logits_in_new_process(
    run: Run, data: ImageData, images: torch.Tensor, *, timeout: float = 600.0
) -> torch.Tensor:
    """Load the packed file in a new Python process and run it there on `images` (N, C, H, W), float32.

    Returns its logits (N, classes), on the CPU. The process reads the settings and the packed file of the run
    and is given the images; it does not look at the data set. `timeout` is in seconds.

    Raises OSError, naming the file: with the process's last line where it fails, or where it takes longer
    than `timeout`.
    """
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        inputs, out = Path(folder) / "images.safetensors", Path(folder) / "logits.safetensors"
        save_file({"images": images.cpu().contiguous()}, inputs)
        command = [
            sys.executable,
            "-m",
            "dsprune.recipes.stages",
            str(run.path),
            str(inputs),
            str(out),
            str(data.classes),
            str(torch.get_num_threads()),
        ]
        path = os.pathsep.join(entry for entry in sys.path if entry)
        environment = {**os.environ, "PYTHONPATH": path}
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
        except subprocess.TimeoutExpired:
            raise OSError(
                f"loading {run.file('packed')} in a new process and running it on {len(images)} images took "
                f"longer than {timeout:g} s; the file is complete, and the run can be continued"
            ) from None
        if result.returncode != 0:
            lines = result.stderr.strip().splitlines() or ["no output"]
            raise OSError(f"loading {run.file('packed')} in a new process failed: {lines[-1]}")
        return load_file(out)["logits"]


def _main(folder: str, inputs: str, out: str, classes: str, threads: str) -> None:
    from safetensors.torch import load_file, save_file

    import dsprune

    torch.set_num_threads(int(threads))
    run = Run.open(Path(folder))
    device = torch.device(run.config.device)
    images = load_file(inputs)["images"]
    network = build_network(run.config.arch, run.config.depth, int(classes), images.shape[1]).to(device)
    packed = dsprune.load(run.file("packed"), network).eval()
    with torch.no_grad():
        parts = [packed(part.to(device)).cpu() for part in images.split(EVALUATED)]
    save_file({"logits": torch.cat(parts)}, out)


def layer_macs(model: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """The dense multiply-adds of each Conv2d for one image of `example` (1, C, H, W), by module name."""
    from dsprune.counting import one_image
    from dsprune.graph import owner_of

    modules = dict(model.named_modules())
    counts: dict[str, int] = {}
    for names, macs in one_image(model, (example,))[1].macs.items():
        name = owner_of(names[0].removesuffix("_orig"))
        if isinstance(modules.get(name), nn.Conv2d):
            counts[name] = counts.get(name, 0) + macs
    return counts


def cost(packed: nn.Module, data: ImageData) -> dict[str, float]:
    """Multiply-adds of one image and parameters, dense and left, and the cuts in percent, counted over the
    whole network and over its prunable convs alone."""
    import dsprune

    found = dsprune.summary(packed, data.example)
    prunable = [layer for layer in found.layers if layer.prunable]
    return {
        "macs_dense": found.dense_macs,
        "macs_left": found.macs,
        "macs_cut_percent": 100 * found.flops_cut("network"),
        "prunable_macs_dense": sum(layer.dense_macs for layer in prunable),
        "prunable_macs_left": sum(layer.macs for layer in prunable),
        "prunable_macs_cut_percent": 100 * found.flops_cut("prunable"),
        "params_dense": found.dense_params,
        "params_left": found.params,
        "params_cut_percent": 100 * found.params_cut("network"),
        "prunable_params_dense": sum(layer.dense_weights for layer in prunable),
        "prunable_params_left": sum(layer.weights for layer in prunable),
        "prunable_params_cut_percent": 100 * found.params_cut("prunable"),
    }


if __name__ == "__main__":
    _main(*sys.argv[1:])
