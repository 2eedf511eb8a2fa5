"""Learned groups on real digits: exact against released formulas, first order, random groups, one group.

    python -m bench.digits_experiment --out FOLDER [--seeds 5] [--report]

For each seed one ResNet-20 is trained on scikit-learn's digits. From it every variant learns for
``LEARNING_STEPS`` steps on the same batches, with the same strength and schedule; each result is cut to the
same shares of the FLOPs and finetuned for the same number of epochs. Nothing is chosen by any score: the
settings are constants of this file, so validation images are only watched, and test images are evaluated on
once, when everything else is done.

FOLDER holds a run folder for each network and one JSON for each finished piece of work; a run that was
interrupted goes on from there. ``--report`` only writes the files that are published: the figures
(``bench/results/digits-experiment.json``), the picture and the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_kernels.assignment import LassoTable
from dsp_kernels.assignment.reference import harden
from dsprune import GroupLearner, find_structure, summary
from dsprune.recipes import stages, training
from dsprune.recipes.checkpoint import write_json
from dsprune.recipes.data import ImageData, batches, load_data
from dsprune.recipes.runs import Config, Run

LEARNING_STEPS = 200
GROUPS = 4
CUTS = (0.62, 0.85)
LEARN = training.Learn(groups=GROUPS)
FINETUNE = training.Finetune(cycles=1, epochs=8)


@dataclass(frozen=True)
class Variant:
    """How the groups come about. ``order`` None: they are given, and only the penalty step is taken."""

    name: str
    title: str
    order: str | None
    groups: int = GROUPS
    scale: str = "paper"


VARIANTS = (
    Variant("exact", "exact formulas", "exact"),
    Variant("released", "released formulas", "released"),
    Variant("released-scale", "released formulas and scale", "released", scale="released"),
    Variant("first", "first order", "first"),
    Variant("random", "random groups", None),
    Variant("one", "one group", None, groups=1),
)


# ---- learning


def endless(data: ImageData, batch: int, generator: torch.Generator) -> Any:
    """Training batches, epoch after epoch."""
    while True:
        yield from batches(data.train, batch, data.shift, generator)


class GivenGroups:
    """The penalty steps of a learner whose assignment is fixed: random and balanced, or one group."""

    def __init__(self, model: nn.Module, data: ImageData, variant: Variant, seed: int) -> None:
        probe = GroupLearner(
            model, data.example, groups=variant.groups, strength=0.0, total_steps=1, scale=variant.scale
        )
        self._names = probe.names
        weights = [model.get_submodule(name).get_parameter("weight") for name in self._names]
        self._table = LassoTable(weights, variant.groups, list(probe.scales.values()))
        generator = torch.Generator().manual_seed(seed)
        columns = []
        for weight in weights:
            order = torch.randperm(weight.shape[0], generator=generator)
            columns.append(F.one_hot(order % variant.groups, variant.groups).t().float())
        self._scores = torch.cat(columns, 1)
        self._logs = harden(self._scores)
        self._steps = 0

    def step(self, closure: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
        """An ordinary training step, then the penalty step of the fixed assignment."""
        optimizer.zero_grad(set_to_none=True)
        loss = closure()
        loss.backward()
        optimizer.step()
        ramp = LEARN.strength * min(1.0, (self._steps + 1) / LEARNING_STEPS)
        rate = ramp * float(optimizer.param_groups[0]["lr"])
        self._table.shrink(self._logs, [rate] * len(self._names))
        self._steps += 1
        return loss.detach()

    def penalty(self) -> Tensor:
        """The scaled penalty of the whole network."""
        return self._table.penalties(self._logs).sum()

    def assignment(self) -> dict[str, Tensor]:
        """The group of each filter, for each convolution."""
        parts = self._table.split(self._scores)
        return {name: part.argmax(0) for name, part in zip(self._names, parts, strict=True)}


def learn(run: Run, data: ImageData, variant: Variant, say: Callable[[str], None]) -> None:
    """Learn (or be given) groups from the dense network, and leave the result in the run folder."""
    model, _, _ = run.read("dense", data)
    seed = run.config.seed
    generator = training.seed_everything(seed, 2)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARN.lr, momentum=LEARN.momentum, weight_decay=LEARN.weight_decay
    )
    learner: GroupLearner | GivenGroups
    if variant.order is None:
        learner = GivenGroups(model, data, variant, seed)
    else:
        learner = GroupLearner(
            model, data.example, groups=variant.groups, strength=LEARN.strength,
            total_steps=LEARNING_STEPS, temperature=LEARN.temperature, scale=variant.scale, seed=seed,
            order=variant.order,
        )  # fmt: skip
    curve: dict[str, list[float]] = {"loss": [], "penalty": [], "moved": []}
    validation: list[list[float]] = []
    before = learner.assignment()
    model.train()
    start = time.perf_counter()
    for step, (images, labels) in enumerate(endless(data, LEARN.batch, generator)):
        if step == LEARNING_STEPS:
            break
        for group in optimizer.param_groups:
            group["lr"] = LEARN.lr * training.cosine(step, LEARNING_STEPS)

        def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
            return F.cross_entropy(model(images), labels)

        loss = learner.step(closure, optimizer).item()
        if not math.isfinite(loss):
            raise training.TrainingError(f"{run.path}: the loss is {loss} at learning step {step + 1}")
        after = learner.assignment()
        curve["loss"].append(loss)
        curve["penalty"].append(learner.penalty().item())
        curve["moved"].append(sum(int((after[name] != before[name]).sum()) for name in after))
        before = after
        if (step + 1) % 20 == 0:
            score = training.evaluate(model, data.validation)
            validation.append([step + 1, score.accuracy, score.loss])
            say(f"{run.path.name}: step {step + 1}, loss {loss:.3f}, validation {score.accuracy:.1f}%")
    seconds = time.perf_counter() - start
    run.write(
        "learned",
        model.eval(),
        assignment=learner.assignment(),
        curve=curve,
        validation=validation,
        seconds=seconds,
    )


# ---- one network, one variant, one cut


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """The adjusted Rand index of two groupings: 1 for equal ones, 0 on average for random ones."""
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(ours.numpy(), theirs.numpy()))


def structure_of(model: nn.Module, data: ImageData, assignment: dict[str, Tensor], cut: float) -> Any:
    """By layer: filters and read channels of each group that is left, and the share of weights kept."""
    found = find_structure(model, data.example, assignment, flops=cut)
    layers = {}
    for name in assignment:
        layout = found[name]
        kept = sum(len(channels) * len(filters) for channels, filters in layout.groups)
        layers[name] = {
            "filters": layout.out_channels,
            "channels": layout.in_channels,
            "groups": [[len(filters), len(channels)] for channels, filters in layout.groups],
            "kept": kept / (layout.out_channels * layout.in_channels),
        }
    return layers


def config_of(seed: int, cut: float, threads: int) -> Config:
    """The settings of one network."""
    return Config(seed=seed, threads=threads, learn=LEARN, prune=training.Prune(flops=cut), finetune=FINETUNE)


def a_run(path: Path, config: Config) -> Run:
    """The run folder at ``path``, begun anew where it has other settings."""
    if (path / "run.json").exists():
        run = Run.open(path)
        if run.config == config:
            return run
    return Run.create(path, config)


def one(
    folder: Path, seed: int, variant: Variant, threads: int, data: ImageData, say: Callable[[str], None]
) -> None:
    """All work for one seed and variant but the test images; what is finished is left alone."""
    dense = a_run(folder / f"seed{seed}-dense", config_of(seed, CUTS[0], threads))
    stages.make_dense(dense, data, resume=True)
    for cut in CUTS:
        name = f"seed{seed}-{variant.name}-{round(100 * cut)}"
        result = folder / f"{name}.json"
        if result.exists():
            continue
        run = a_run(folder / name, config_of(seed, cut, threads))
        learned = a_run(folder / f"seed{seed}-{variant.name}", config_of(seed, CUTS[0], threads))
        if not learned.has("learned"):
            shutil.copyfile(dense.file("dense"), learned.file("dense"))
            learn(learned, data, variant, say)
        shutil.copyfile(dense.file("dense"), run.file("dense"))
        shutil.copyfile(learned.file("learned"), run.file("learned"))
        stages.make_pruned(run, data, resume=True)
        model, assignment, meta = run.read("learned", data)
        structure = structure_of(model, data, assignment, cut)
        scores = {"learned": training.evaluate(model, data.validation)}
        start = time.perf_counter()
        stages.make_finetuned(run, data, resume=True)
        seconds = time.perf_counter() - start
        for stage in ("pruned", "finetuned"):
            scores[stage] = training.evaluate(run.read(stage, data)[0], data.validation)
        counted = summary(run.read("finetuned", data)[0], data.example)
        content = {
            "seed": seed,
            "variant": variant.name,
            "cut": cut,
            "settings": {**dataclasses.asdict(variant), "learning_steps": LEARNING_STEPS},
            "curve": meta["curve"],
            "validation_while_learning": meta["validation"],
            "seconds": {"learn": meta["seconds"], "finetune": seconds},
            "validation": {k: {"accuracy": v.accuracy, "loss": v.loss} for k, v in scores.items()},
            "flops_cut": counted.flops_cut("network"),
            "params_cut": counted.params_cut("network"),
            "assignment": {k: v.tolist() for k, v in assignment.items()},
            "structure": structure,
        }
        write_json(result, content)
        say(
            f"{name}: cut {100 * counted.flops_cut('network'):.2f}% of the FLOPs, validation "
            f"{scores['learned'].accuracy:.1f} -> {scores['pruned'].accuracy:.1f} -> "
            f"{scores['finetuned'].accuracy:.1f}%"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    data = load_data("digits", config_of(0, CUTS[0], options.threads).size)
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:7.1f} s] {text}", file=sys.stderr, flush=True)

    for seed in range(options.seeds):
        for variant in VARIANTS:
            one(options.out, seed, variant, options.threads, data, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
