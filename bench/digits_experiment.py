"""Learned groups on real digits: exact against released formulas, first order, random groups, one group.

    python -m bench.digits_experiment --out FOLDER [--seeds 5] [--report]

For each seed one ResNet-20 is trained on scikit-learn's digits. From it every variant learns for
``LEARNING_STEPS`` steps on the same batches, with the same strength and schedule; each result is cut to the
same shares of the FLOPs and finetuned for the same number of epochs. Nothing is chosen by any score: the
settings are constants of this file, so validation images are only watched, and test images are evaluated on
once, when everything else is done.

FOLDER holds a run folder for each network and one JSON for each finished piece of work; a run that was
interrupted goes on from there. ``--report`` then looks at the test images, prints the table, and writes
``bench/results/digits-experiment.json`` and ``docs/images/digits-experiment.png``.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_kernels.assignment import LassoTable
from dsp_kernels.assignment.reference import harden
from dsprune import GroupLearner, find_structure, summary
from dsprune.checkpoint import read_json, write_json
from dsprune.recipes import stages, training
from dsprune.recipes.data import ImageData, batches
from dsprune.recipes.datasets import load_data
from dsprune.recipes.runs import Config, Run

ROOT = Path(__file__).resolve().parent.parent
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


def endless(data: ImageData, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
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


# ---- the report


def on_test_images(folder: Path, seeds: int, data: ImageData) -> dict[str, Any]:
    """Accuracy and loss on the test images of every finished network and of the dense ones. Evaluated once:
    what is in ``test.json`` is not evaluated again."""
    path = folder / "test.json"
    if path.exists():
        return read_json(path)
    scores: dict[str, Any] = {}
    for seed in range(seeds):
        runs = {f"seed{seed}-dense": "dense"}
        runs |= {f"seed{seed}-{v.name}-{round(100 * cut)}": "finetuned" for v in VARIANTS for cut in CUTS}
        for name, stage in runs.items():
            score = training.evaluate(Run.open(folder / name).read(stage, data)[0], data.test)
            scores[name] = {"accuracy": score.accuracy, "loss": score.loss}
    write_json(path, scores)
    return scores


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def groups_of(content: dict[str, Any]) -> dict[str, float]:
    """Of one network: groups in use and the share of the largest, on average over the layers."""
    used, largest = [], []
    for assignment in content["assignment"].values():
        counts = torch.bincount(torch.tensor(assignment))
        used.append(int((counts > 0).sum()))
        largest.append(counts.max().item() / len(assignment))
    return {"used": statistics.fmean(used), "largest": statistics.fmean(largest)}


def agreement_of(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The adjusted Rand index of two networks' groupings, on average over the layers."""
    pairs = [(ours["assignment"][name], theirs["assignment"][name]) for name in ours["assignment"]]
    return statistics.fmean(agreement(torch.tensor(a), torch.tensor(b)) for a, b in pairs)


def summarise(folder: Path, seeds: int, data: ImageData) -> dict[str, Any]:
    """All figures of the report."""
    test = on_test_images(folder, seeds, data)
    runs = {
        (v.name, cut, seed): read_json(folder / f"seed{seed}-{v.name}-{round(100 * cut)}.json")
        for v in VARIANTS
        for cut in CUTS
        for seed in range(seeds)
    }
    rows = []
    for variant in VARIANTS:
        for cut in CUTS:
            own = [runs[variant.name, cut, seed] for seed in range(seeds)]
            scores = [test[f"seed{seed}-{variant.name}-{round(100 * cut)}"] for seed in range(seeds)]
            exact = [test[f"seed{seed}-exact-{round(100 * cut)}"] for seed in range(seeds)]
            differences = [a["accuracy"] - b["accuracy"] for a, b in zip(scores, exact, strict=True)]
            rows.append(
                {
                    "variant": variant.name,
                    "title": variant.title,
                    "cut": cut,
                    "flops_cut": statistics.fmean(run["flops_cut"] for run in own),
                    "params_cut": statistics.fmean(run["params_cut"] for run in own),
                    "test_accuracy_by_seed": [score["accuracy"] for score in scores],
                    "test_accuracy": mean_sd([score["accuracy"] for score in scores]),
                    "test_loss": mean_sd([score["loss"] for score in scores]),
                    "minus_exact": mean_sd(differences),
                    "pruned_validation_accuracy": mean_sd(
                        [r["validation"]["pruned"]["accuracy"] for r in own]
                    ),
                    "learned_validation_accuracy": mean_sd(
                        [r["validation"]["learned"]["accuracy"] for r in own]
                    ),
                    "last_losses": mean_sd([statistics.fmean(r["curve"]["loss"][-20:]) for r in own]),
                    "last_penalty": mean_sd([r["curve"]["penalty"][-1] for r in own]),
                    "filters_moved_last_50_steps": mean_sd([sum(r["curve"]["moved"][-50:]) for r in own]),
                    "groups_used": statistics.fmean(groups_of(r)["used"] for r in own),
                    "largest_group": statistics.fmean(groups_of(r)["largest"] for r in own),
                }
            )
    agreements = {
        f"exact and {other}, same seed": mean_sd(
            [agreement_of(runs["exact", CUTS[0], s], runs[other, CUTS[0], s]) for s in range(seeds)]
        )
        for other in ("released", "released-scale", "first", "random")
    }
    return {
        "network": "ResNet-20",
        "data": f"digits, {data.size} x {data.size}",
        "seeds": seeds,
        "groups": GROUPS,
        "learning_steps": LEARNING_STEPS,
        "settings": {"learn": dataclasses.asdict(LEARN), "finetune": dataclasses.asdict(FINETUNE)},
        "test_images": len(data.test),
        "dense_test_accuracy": mean_sd([test[f"seed{seed}-dense"]["accuracy"] for seed in range(seeds)]),
        "rows": rows,
        "agreement": agreements,
        "curves": {
            v.name: {
                key: [
                    [round(x, 5) for x in runs[v.name, CUTS[0], seed]["curve"][key]] for seed in range(seeds)
                ]
                for key in ("loss", "penalty")
            }
            for v in VARIANTS
            if v.name in ("exact", "released")
        },
        "structures": {
            v.name: {name: layer["groups"] for name, layer in runs[v.name, CUTS[0], 0]["structure"].items()}
            for v in VARIANTS
        },
        "environment": {"torch": torch.__version__, "threads": torch.get_num_threads()},
    }


def table(found: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| groups | FLOPs cut | parameters cut | test accuracy, % | less exact | test loss | not finetuned |",
        "|---|---|---|---|---|---|---|",
    ]
    for cut in CUTS:
        for row in (row for row in found["rows"] if row["cut"] == cut):
            accuracy, loss, less = row["test_accuracy"], row["test_loss"], row["minus_exact"]
            lines.append(
                f"| {row['title']} | {100 * row['flops_cut']:.2f}% | {100 * row['params_cut']:.2f}% | "
                f"{accuracy[0]:.2f} ± {accuracy[1]:.2f} | {less[0]:+.2f} ± {less[1]:.2f} | "
                f"{loss[0]:.4f} ± {loss[1]:.4f} | {row['pruned_validation_accuracy'][0]:.1f}% |"
            )
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """The curves, the structures of the first seed, and the accuracies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    colours = {"exact": "tab:blue", "released": "tab:orange"}
    for place, key in enumerate(("loss", "penalty")):
        axis = axes[0, place]
        for name, colour in colours.items():
            values = torch.tensor(found["curves"][name][key])
            if key == "loss":  # averages of five steps
                values = values.unfold(1, 5, 1).mean(2)
            steps = range(found["learning_steps"] - values.shape[1] + 1, found["learning_steps"] + 1)
            for curve in values:
                axis.plot(steps, curve, color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(steps, values.mean(0), color=colour, label=f"{name} formulas")
        axis.set_yscale("log")
        axis.set_xlabel("learning step")
        axis.set_title("training loss, 5 steps averaged" if key == "loss" else "penalty, hard assignment")
        axis.legend(frameon=False)
    axis = axes[1, 0]
    names = list(found["structures"]["exact"])
    shades = {"exact": ("tab:blue", "lightsteelblue"), "released": ("tab:orange", "bisque")}
    for side, name in enumerate(("exact", "released")):
        for index, layer in enumerate(names):
            bottom = 0.0
            sizes = found["structures"][name][layer]
            total = sum(filters for filters, _ in sizes) or 1
            for group, (filters, _) in enumerate(sorted(sizes, reverse=True)):
                axis.bar(
                    index + 0.42 * side - 0.21, filters / total, 0.38, bottom=bottom,
                    color=shades[name][group % 2], edgecolor="white", linewidth=0.6,
                )  # fmt: skip
                bottom += filters / total
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_title(f"groups' shares of the filters, {100 * CUTS[0]:.0f}% cut, seed 0: exact and released")
    axis = axes[1, 1]
    titles = [variant.title for variant in VARIANTS]
    for cut, marker in zip(CUTS, "os", strict=True):
        rows = [row for row in found["rows"] if row["cut"] == cut]
        shift = -0.12 if cut == CUTS[0] else 0.12
        for index, row in enumerate(rows):
            y = row["test_accuracy_by_seed"]
            axis.plot([index + shift] * len(y), y, marker, color="0.6", markersize=4)
            axis.plot(index + shift, row["test_accuracy"][0], marker, color="tab:red", markersize=7)
        axis.plot([], [], marker, color="tab:red", label=f"{100 * cut:.0f}% of the FLOPs cut")
    axis.set_xticks(range(len(titles)), titles, rotation=20, ha="right", fontsize=8)
    axis.set_title("test accuracy after finetuning, % (red: mean)")
    axis.legend(frameon=False, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--report", action="store_true", help="also look at the test images and write what is published"
    )
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
    if options.report:
        found = summarise(options.out, options.seeds, data)
        write_json(ROOT / "bench" / "results" / "digits-experiment.json", found)
        draw(found, ROOT / "docs" / "images" / "digits-experiment.png")
        print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
