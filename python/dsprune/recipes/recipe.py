"""The published experiments as recipes, CIFAR-10 and ImageNet, from training to a report beside the paper's;
and Fashion-MNIST, which the paper does not have.

All three stages run on a folder with the data set, CIFAR-10's at the authors' settings. Validation images,
held out of the training set, choose; the test set is evaluated on once, when everything else is done.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dsprune import picture
from dsprune.checkpoint import read_json, write_bytes, write_json
from dsprune.recipes import stages, training
from dsprune.recipes.data import ImageData
from dsprune.recipes.demo import TOLERANCE, DemoError, Timing, open_or_create
from dsprune.recipes.runs import Config, Run
from dsprune.recipes.timing import best_dense, compare, random_images
from dsprune.recipes.training import Progress, Silent

PUBLISHED = {
    ("cifar10", "ResNet-20"): {
        4: [(92.22, 63.57, 50.45)],
        3: [(92.14, 62.43, 49.15)],
        2: [(92.07, 61.23, 48.35)],
    },
    ("cifar10", "ResNet-56"): {
        4: [(94.25, 65.11, 56.30)],
        3: [(94.07, 64.14, 55.01)],
        2: [(93.99, 63.26, 56.24)],
    },
    ("imagenet", "ResNet-18"): {2: [(69.55, 60.08, 45.70), (67.95, 70.05, 57.25), (65.81, 80.00, 69.92)]},
    ("imagenet", "ResNet-50"): {2: [(76.54, 70.00, 52.54), (75.45, 80.03, 66.00), (73.29, 90.02, 81.64)]},
}
"""By data set and network, then groups: accuracy, and what is removed of the prunable convolutions' FLOPs and
parameters, in percent (Park et al., AAAI 2023)."""

CHECKED = 256
"""How many validation images the packed network is compared on when it is loaded in a new process."""


def published(
    data: str, network: str, groups: int, cut: float | None = None
) -> tuple[float, float, float] | None:
    """The paper's row for these, or None; of several that with the FLOPs cut nearest to `cut`, a fraction."""
    rows = PUBLISHED.get((data, network), {}).get(groups)
    if rows is None:
        return None
    return rows[0] if cut is None else min(rows, key=lambda row: abs(row[1] - 100 * cut))


def _scaled(epochs: int, scale: float) -> int:
    return max(1, round(epochs * scale))


def _check_scale(scale: float) -> None:
    if not 0 < scale <= 10:
        raise ValueError(f"epochs-scale: expected more than 0 and at most 10, got {scale!r}")


def _target(data: str, network: str, groups: int, flops: float | None) -> training.Prune:
    row = published(data, network, groups, flops)
    if flops is None:
        if row is None:
            have = sorted(PUBLISHED[data, network])
            raise ValueError(
                f"groups: expected one of {have}, or a target of your own by flops, got {groups}"
            )
        flops = row[1] / 100
    return training.Prune(flops=flops, count="prunable")


def cifar10_config(
    folder: Path,
    *,
    depth: int = 20,
    groups: int = 4,
    flops: float | None = None,
    epochs_scale: float = 1.0,
    **more: Any,
) -> Config:
    """The authors' settings for CIFAR-10; `more` are fields of `Config`.

    `flops`: the fraction of the prunable convolutions' FLOPs to remove (None: the published one).
    `epochs_scale` multiplies the epochs of all stages. ValueError for a network the paper does not have.
    """
    strengths = {20: 2e-3, 56: 5e-4}
    if depth not in strengths:
        raise ValueError(f"depth: expected one of {sorted(strengths)}, got {depth!r}")
    _check_scale(epochs_scale)
    milestones = [_scaled(epoch, epochs_scale) for epoch in (82, 123)]
    epochs = _scaled(164, epochs_scale)
    return Config(
        depth=depth,
        data="cifar10",
        size=32,
        folder=str(folder),
        pretrain=training.Pretrain(
            epochs=epochs, batch=128, lr=0.1, momentum=0.9, weight_decay=1e-4, warmup=0,
            milestones=tuple(milestones),
        ),
        learn=training.Learn(
            groups=groups, strength=strengths[depth], temperature=0.5, epochs=_scaled(120, epochs_scale),
            batch=128, lr=0.05, momentum=0.9, weight_decay=1e-3,
        ),
        prune=_target("cifar10", f"ResNet-{depth}", groups, flops),
        finetune=training.Finetune(
            cycles=5, epochs=_scaled(80, epochs_scale), batch=128, lr=0.015, momentum=0.9, weight_decay=1e-3
        ),
        **more,
    )  # fmt: skip


def fashion_config(
    folder: Path,
    *,
    depth: int = 20,
    groups: int = 4,
    flops: float | None = None,
    epochs_scale: float = 1.0,
    **more: Any,
) -> Config:
    """Settings of ours for Fashion-MNIST; arguments as for `cifar10_config`.

    `flops`: the fraction of the network's FLOPs to remove (None: 0.6).
    """
    _check_scale(epochs_scale)
    return Config(
        depth=depth,
        data="fashion-mnist",
        size=28,
        folder=str(folder),
        pretrain=training.Pretrain(epochs=_scaled(30, epochs_scale), batch=128, lr=0.1, weight_decay=5e-4),
        learn=training.Learn(
            groups=groups, strength=2e-3, epochs=_scaled(15, epochs_scale), batch=128, lr=0.05,
            weight_decay=5e-4,
        ),
        prune=training.Prune(flops=0.6 if flops is None else flops),
        finetune=training.Finetune(
            cycles=2, epochs=_scaled(10, epochs_scale), batch=128, lr=0.05, weight_decay=5e-4
        ),
        **more,
    )  # fmt: skip


def imagenet_config(
    folder: Path,
    *,
    arch: str = "resnet50",
    groups: int = 2,
    flops: float | None = None,
    size: int = 224,
    batch: int = 256,
    epochs_scale: float = 1.0,
    **more: Any,
) -> Config:
    """Settings for ImageNet; arguments as for `cifar10_config`.

    The authors' code has no ImageNet part: the dense network is trained as in He et al. (CVPR 2016), and the
    other two stages have the form of CIFAR-10's with 60 epochs of learning and 3 cycles of 80 epochs.

    Raises ValueError for another `arch`, a scale out of range, and, without `flops`, a number of groups that
    the paper does not have.
    """
    names = {"resnet18": "ResNet-18", "resnet50": "ResNet-50"}
    if arch not in names:
        raise ValueError(f"arch: expected one of {sorted(names)}, got {arch!r}")
    _check_scale(epochs_scale)
    milestones = [_scaled(epoch, epochs_scale) for epoch in (30, 60)]
    return Config(
        arch=arch,
        data="imagenet",
        size=size,
        folder=str(folder),
        pretrain=training.Pretrain(
            epochs=_scaled(90, epochs_scale), batch=batch, lr=0.1 * batch / 256, momentum=0.9,
            weight_decay=1e-4, warmup=0, milestones=tuple(milestones),
        ),
        learn=training.Learn(
            groups=groups, strength=2e-4, temperature=0.5, epochs=_scaled(60, epochs_scale), batch=batch,
            lr=0.05 * batch / 256, momentum=0.9, weight_decay=3e-5,
        ),
        prune=_target("imagenet", names[arch], groups, flops),
        finetune=training.Finetune(
            cycles=3, epochs=_scaled(80, epochs_scale), batch=batch, lr=0.05 * batch / 256, momentum=0.9,
            weight_decay=3e-5,
        ),
        **more,
    )  # fmt: skip


def open_recipe(
    out: Path, config: Config, *, resume: bool = False, weights: Path | None = None, workers: int = 0
) -> tuple[Run, ImageData]:
    """The run in `out`, new or with `resume` the one there, and its data.

    What is wrong with the data, or with `weights`, is said before anything is written: DataError,
    CheckpointError. With `resume` the settings must be those that the run was begun with.
    """
    config = dataclasses.replace(config, folder=str(Path(config.folder).resolve()))
    data = Run(out, config, workers).data()
    if weights is not None:
        stages.read_weights(weights)
    run = open_or_create(out, config, resume=resume, moved=("folder",))
    run.workers = workers
    return run, data


def run_recipe(
    run: Run,
    data: ImageData,
    *,
    weights: Path | None = None,
    timing: Timing | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run all stages that are not finished yet and return the report, which is also written in the folder.

    `weights`: trained dense weights (safetensors) instead of the first stage. A finished run is only
    reported again. Raises DemoError where the packed network differs from the masked one, or its reloaded
    copy from it; DataError, TrainingError and CheckpointError as the stages do.
    """
    if (run.path / "report.json").exists():
        return read_json(run.path / "report.json")
    threads = torch.get_num_threads()
    torch.set_num_threads(run.config.threads)
    try:
        return _stages(run, data, weights, timing or Timing(), progress or Silent(), say)
    finally:
        torch.set_num_threads(threads)


def _stages(
    run: Run,
    data: ImageData,
    weights: Path | None,
    timing: Timing,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Any]:
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - start
        say(f"{name}: {seconds[name]:.1f} s")
        return result

    # A new run has nothing to go on from; what a killed one has finished is kept.
    timed(
        "train the dense network",
        lambda: stages.make_dense(run, data, weights=weights, resume=True, progress=progress),
    )
    timed("learn the groups", lambda: stages.make_learned(run, data, resume=True, progress=progress))
    timed("prune", lambda: stages.make_pruned(run, data, resume=True))
    timed("finetune", lambda: stages.make_finetuned(run, data, resume=True, progress=progress))
    timed("pack and save", lambda: stages.make_packed(run, data))

    networks: dict[str, nn.Module] = {
        stage: run.read(stage, data)[0] for stage in ("dense", "pruned", "finetuned")
    }
    packed = networks["packed"] = run.packed(data)
    images = next(iter(data.validation.batches(CHECKED, data.device)))
    checked = [_logits(network, images) for network in (networks["finetuned"], packed)]
    difference = (checked[0] - checked[1]).abs().max().item()
    tolerance = TOLERANCE * max(1.0, checked[0].abs().max().item())
    if not difference <= tolerance:
        raise DemoError(f"packed and masked logits differ by {difference:.2e}, more than {tolerance:.0e}")
    reloaded = timed("reload in a new process", lambda: stages.logits_in_new_process(run, data, images))
    if not torch.equal(reloaded, checked[1]):
        raise DemoError("the packed network, reloaded in a new process, does not give the same bits")

    cost = stages.cost(packed, data)
    channel_pruned = timed("prune channels", lambda: _channel_pruned(run, data, cost))
    torch.set_num_threads(timing.threads or run.config.threads)
    times = timed(
        "measure latency", lambda: _measured(networks["dense"], packed, channel_pruned, data, timing)
    )
    torch.set_num_threads(run.config.threads)

    # Only now the test images.
    scores = timed(
        "test", lambda: {name: training.evaluate(model, data.test) for name, model in networks.items()}
    )
    report = {
        **_facts(run, data, cost),
        "validation_accuracy": {
            stage: training.evaluate(networks[stage], data.validation).accuracy
            for stage in ("dense", "pruned", "finetuned")
        },
        "test_accuracy": {name: score.accuracy for name, score in scores.items()},
        "latency_ms": times,
        "latency_threads": timing.threads or run.config.threads,
        "channel_pruning": stages.cost(channel_pruned, data),
        "packed_minus_masked": difference,
        "reloaded_same_bits": True,
        "history": {
            stage: run.read(stage, data)[2].get("history", []) for stage in ("dense", "learned", "finetuned")
        },
        "seconds": seconds,
    }
    picture.draw_structure(
        networks["finetuned"], run.path / "structure.png", title=f"{run.config.title} on {data.name}"
    )
    draw_curves(run.path / "curves.png", report)
    write_bytes(run.path / "report.md", markdown(report).encode())
    write_json(run.path / "report.json", report)
    return report


def _logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(images).cpu()
    return logits


def _channel_pruned(run: Run, data: ImageData, cost: Mapping[str, float]) -> nn.Module:
    """The learned network with one group a layer, cut to the multiply-adds that the packed one has: what
    channel pruning would leave. It is only timed, not trained.
    """
    import dsprune

    model, assignment, _ = run.read("learned", data)
    one = {name: torch.zeros_like(groups) for name, groups in assignment.items()}
    cut = cost["macs_cut_percent"] / 100
    structure = dsprune.find_structure(model, data.example, one, flops=cut)
    return dsprune.pack(dsprune.apply_structure(copy.deepcopy(model), structure), data.example)


def _measured(
    dense: nn.Module, packed: nn.Module, channel_pruned: nn.Module, data: ImageData, timing: Timing
) -> dict[str, dict[str, float]]:
    return {
        str(batch): compare(
            dense,
            packed,
            random_images(batch, data.channels, data.size).to(data.device),
            seconds=timing.seconds,
            inductor=timing.inductor,
            channel_pruned=channel_pruned,
        )
        for batch in timing.batches
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


def _facts(run: Run, data: ImageData, cost: Mapping[str, float]) -> dict[str, Any]:
    config = run.config
    on_gpu = data.device.type == "cuda"
    row = published(config.data, config.title, config.learn.groups, config.prune.flops)
    names = ("accuracy", "flops_cut", "params_cut")
    return {
        "network": config.title,
        "data": {
            "name": data.name, "size": data.size, "classes": data.classes,
            "images": {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
        },
        "settings": config.to_json(),
        "published_settings": _as_published(config),
        "dense_weights": run.read("dense", data)[2].get("weights"),
        "published": None if row is None else dict(zip(names, row, strict=True)),
        "cost": dict(cost),
        "versions": {
            "dsp-kernels": _version("dsp-kernels"), "torch": torch.__version__, "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "machine": {
            "processor": platform.machine(), "system": platform.system(), "threads": config.threads,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        },
    }  # fmt: skip


def _as_published(config: Config) -> bool:
    """Whether epochs, rates and images are those of the full recipe."""
    folder, groups, flops = Path(config.folder), config.learn.groups, config.prune.flops
    if config.data == "cifar10":
        full = cifar10_config(folder, depth=config.depth, groups=groups, flops=flops)
    elif config.data == "fashion-mnist":
        full = fashion_config(folder, depth=config.depth, groups=groups, flops=flops)
    else:
        full = imagenet_config(folder, arch=config.arch, groups=groups, flops=flops)
    stages_equal = all(
        getattr(config, stage) == getattr(full, stage) for stage in ("pretrain", "learn", "finetune")
    )
    return stages_equal and config.limit == 0 and config.size == full.size


# ---- the report ----


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


def result_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What the run reached, beside the published figures: a label, this run's, the paper's."""
    cut = {name: f"{value:.2f}%" for name, value in report["cost"].items() if name.endswith("_percent")}
    accuracy = report["test_accuracy"]
    paper = report["published"] or {}

    def given(name: str) -> str:
        return f"{paper[name]:.2f}%" if name in paper else ""

    return [
        ("test accuracy, dense", f"{accuracy['dense']:.2f}%", ""),
        ("test accuracy, pruned, finetuned, packed", f"{accuracy['packed']:.2f}%", given("accuracy")),
        ("FLOPs removed, prunable convs", cut["prunable_macs_cut_percent"], given("flops_cut")),
        ("FLOPs removed, whole network", cut["macs_cut_percent"], ""),
        ("parameters removed, prunable convs", cut["prunable_params_cut_percent"], given("params_cut")),
        ("parameters removed, whole network", cut["params_cut_percent"], ""),
    ]  # fmt: skip


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a document."""
    data, settings = report["data"], report["settings"]
    images = data["images"]
    lines = [
        f"# {report['network']} on {data['name']}, {settings['learn']['groups']} groups",
        "",
        f"{images['train']:,} images for training, {images['validation']:,} for validation, "
        f"{images['test']:,} for the test, which was taken once. Seed {settings['seed']}.",
        "",
    ]
    if not report["published_settings"]:
        lines += ["**A trial: epochs, images or image size are not those of the full recipe.**", ""]
    lines += ["## Result", ""]
    lines += _table(["", "this run", "published"], [list(row) for row in result_rows(report)])
    lines += [
        "",
        "Published: Park et al., AAAI 2023, the median of five runs; counted over prunable convolutions. The "
        "paper trains on the images that validate here, too.",
        "",
        "## Latency, ms",
        "",
    ]
    times = report["latency_ms"]
    forms = list(next(iter(times.values())))
    rows = []
    for batch, row in times.items():
        value = best_dense(row)[1]
        rows.append(
            [
                batch,
                *(f"{row[form]:.2f}" for form in forms),
                f"{value / row['packed']:.2f}x",
                f"{value / row['channel pruning']:.2f}x",
            ]
        )
    lines += _table(["batch", *forms, "speed-up, packed", "speed-up, channel pruning"], rows)
    other, threads = report["channel_pruning"], report["latency_threads"]
    lines += [
        "",
        f"Medians on {report['machine']['device']}, {threads} thread{'s' if threads > 1 else ''}, taking "
        "turns in one process; speed-up against the fastest dense form. Channel pruning: one group a layer, "
        f"{other['macs_cut_percent']:.2f}% of the network's FLOPs removed (packed: "
        f"{report['cost']['macs_cut_percent']:.2f}%), timed only.",
        "",
        "## Curves and structure",
        "",
        "![Loss and validation accuracy](curves.png)",
        "",
        "![Structure](structure.png)",
        "",
        "## Settings",
        "",
        "```json",
        json.dumps(settings, indent=2),
        "```",
        "",
    ]
    versions = [f"{name} {version}" for name, version in report["versions"].items()]
    lines += [", ".join([*versions, report["machine"]["system"], report["machine"]["processor"]]) + ".", ""]
    return "\n".join(lines)


def draw_curves(path: Path, report: Mapping[str, Any]) -> Path:
    """Draw the training loss and the validation accuracy of each stage to an image file; returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    titles = {"dense": "Dense training", "learned": "Group learning", "finetuned": "Finetuning"}
    shown = {stage: entries for stage, entries in report["history"].items() if entries}
    figure = Figure(figsize=(4.2 * max(1, len(shown)), 4.6), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, max(1, len(shown)), sharex="col", squeeze=False)
    for column, (stage, entries) in enumerate(shown.items()):
        epochs = range(1, len(entries) + 1)
        for row, key, label in ((0, "loss", "training loss"), (1, "validation_accuracy", "validation, %")):
            axes = panels[row, column]
            axes.plot(epochs, [entry[key] for entry in entries], color=picture.PALETTE[0], linewidth=1.4,
                      marker="o" if len(entries) < 3 else None)  # fmt: skip
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
            if column == 0:
                axes.set_ylabel(label)
        panels[0, column].set_title(titles[stage], loc="left", fontweight="bold", fontsize=10.5)
        for entry_number, entry in enumerate(entries, 1):
            if entry.get("best"):
                panels[1, column].plot(
                    [entry_number], [entry["validation_accuracy"]], "o", color=picture.PALETTE[5]
                )
        panels[1, column].set_xlabel("epoch")
        panels[1, column].xaxis.set_major_locator(MaxNLocator(integer=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
