"""The demonstration: one network on real digits, from its training to a packed file reloaded elsewhere."""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsprune import picture
from dsprune.checkpoint import CheckpointError, write_json
from dsprune.clock import check_seconds
from dsprune.recipes import stages, training
from dsprune.recipes.data import ImageData
from dsprune.recipes.runs import Config, Run
from dsprune.recipes.timing import best_dense, compare, random_images
from dsprune.recipes.training import Progress, Silent

TOLERANCE = 1e-4
"""The largest difference allowed between the logits of the packed and of the masked network."""


class DemoError(RuntimeError):
    """A promise of the demonstration that did not hold."""


@dataclass(frozen=True)
class Timing:
    """How latency is measured: batch sizes, seconds for each form, threads (0: torch's number as it is when
    the demonstration starts), and whether Inductor competes."""

    batches: Sequence[int] = (1, 128)
    seconds: float = 0.6
    threads: int = 0
    inductor: bool = False

    def __post_init__(self) -> None:
        check_seconds(self.seconds)


def run_demo(
    out: Path,
    config: Config,
    *,
    resume: bool = False,
    timing: Timing | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run all stages in the folder `out` and return the report, which is also written there as report.json.

    Test images are evaluated once all choices have been made. Raises DemoError where the packed network
    differs from the masked one, or its reloaded copy from it; TrainingError and CheckpointError as the
    stages do.
    """
    progress = progress or Silent()
    timing = timing or Timing()
    run = open_or_create(out, config, resume=resume)
    data = run.data()
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        return _stages(run, data, resume, timing, timing.threads or threads, progress, say)
    finally:
        torch.set_num_threads(threads)


def _stages(
    run: Run,
    data: ImageData,
    resume: bool,
    timing: Timing,
    latency_threads: int,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Any]:
    config = run.config
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - start
        say(f"{name}: {seconds[name]:.1f} s")
        return result

    timed("train the dense network", lambda: stages.make_dense(run, data, resume=resume, progress=progress))
    timed("learn the groups", lambda: stages.make_learned(run, data, resume=resume, progress=progress))
    timed("prune", lambda: stages.make_pruned(run, data, resume=resume))
    timed("finetune", lambda: stages.make_finetuned(run, data, resume=resume, progress=progress))
    timed("pack and save", lambda: stages.make_packed(run, data))

    dense, _, _ = run.read("dense", data)
    pruned, _, _ = run.read("pruned", data)
    masked, _, _ = run.read("finetuned", data)
    packed = run.packed(data)
    masked_test = training.evaluate(masked, data.test)
    packed_test = training.evaluate(packed, data.test)
    difference = (masked_test.logits - packed_test.logits).abs().max().item()
    if not difference <= TOLERANCE:
        raise DemoError(f"packed and masked logits differ by {difference:.2e}, more than {TOLERANCE:.0e}")
    images = torch.cat(list(data.test.batches(training.EVALUATED, data.device)))
    reloaded = timed("reload in a new process", lambda: stages.logits_in_new_process(run, data, images))
    if not torch.equal(reloaded, packed_test.logits):
        raise DemoError("the packed network, reloaded in a new process, does not give the same bits")

    torch.set_num_threads(latency_threads)
    times = timed("measure latency", lambda: measure(dense, packed, data, timing))
    torch.set_num_threads(config.threads)
    report: dict[str, Any] = {
        "network": config.title,
        "data": {
            "name": data.name, "size": data.size,
            "images": {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
        },
        "seed": config.seed,
        "settings": config.to_json(),
        "test_accuracy": {
            "dense": training.evaluate(dense, data.test).accuracy,
            "pruned": training.evaluate(pruned, data.test).accuracy,
            "finetuned": masked_test.accuracy,
            "packed": packed_test.accuracy,
        },
        "cost": stages.cost(packed, data),
        "latency_ms": times,
        "packed_minus_masked": difference,
        "reloaded_same_bits": True,
        "seconds": seconds,
        "machine": {
            "threads": config.threads, "latency_threads": latency_threads, "torch": torch.__version__,
            "python": platform.python_version(), "processor": platform.machine(),
        },
    }  # fmt: skip
    timed("draw", lambda: draw_run(run.path / "report.png", report, masked, dense, data))
    write_json(run.path / "report.json", report)
    return report


def open_or_create(out: Path, config: Config, *, resume: bool, moved: Sequence[str] = ()) -> Run:
    """The run in `out`: with `resume` the one there, which must have these settings; else a new one.

    `moved`: settings that may have changed meanwhile; the new ones are taken.

    Raises CheckpointError where the settings differ or there is no run of ours, ValueError where `out` is no
    folder.
    """
    if not (resume and (out / "run.json").exists()):
        return Run.create(out, config)
    run = Run.open(out)
    stored = dataclasses.replace(run.config, **{name: getattr(config, name) for name in moved})
    theirs, ours = stored.to_json(), config.to_json()
    changed = [key for key in ours if theirs[key] != ours[key]]
    if changed:
        raise CheckpointError(
            f"{out}: was begun with other settings ({', '.join(changed)}); start without --resume"
        )
    if stored != run.config:
        run.reconfigure(**{name: getattr(config, name) for name in moved})
    return run


def measure(
    dense: nn.Module, packed: nn.Module, data: ImageData, timing: Timing
) -> dict[str, dict[str, float]]:
    """For each batch size (as text, for JSON), milliseconds of every dense form and of "packed"."""
    return {
        str(batch): compare(
            dense,
            packed,
            random_images(batch, data.channels, data.size),
            seconds=timing.seconds,
            inductor=timing.inductor,
        )
        for batch in timing.batches
    }


def draw_run(
    path: Path, report: dict[str, Any], masked: nn.Module, dense: nn.Module, data: ImageData
) -> Path:
    """Draw the picture of a finished run: its structure, what is left of it, accuracy and latency."""
    layers = picture.layers_of(masked)
    dense_macs = stages.layer_macs(dense, data.example)
    cost, accuracy = report["cost"], report["test_accuracy"]
    images = len(data.train) + len(data.validation) + len(data.test)
    times = {
        int(batch): {"dense": best_dense(row)[1], "packed": row["packed"]}
        for batch, row in report["latency_ms"].items()
    }
    return picture.draw_report(
        masked,
        path,
        macs={layer.name: (layer.kept * dense_macs[layer.name], dense_macs[layer.name]) for layer in layers},
        accuracy={
            "dense": accuracy["dense"],
            "pruned": accuracy["pruned"],
            "packed, finetuned": accuracy["packed"],
        },
        latency=times,
        title=f"{report['network']} on {images:,} real {data.name}",
        subtitle=(
            f"{report['settings']['learn']['groups']} groups of filters learned in each layer;  "
            f"{cost['macs_cut_percent']:.2f}% of the network's FLOPs and "
            f"{cost['params_cut_percent']:.2f}% of its parameters removed"
        ),
    )


def mean_report(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What several seeds give together: mean accuracies, cuts and latencies, and every seed's accuracies."""

    def mean(*keys: str) -> float:
        values: list[Any] = list(reports)
        for key in keys:
            values = [value[key] for value in values]
        return statistics.fmean(values)

    first = reports[0]
    return {
        "network": first["network"],
        "data": first["data"],
        "seeds": [report["seed"] for report in reports],
        "test_accuracy": {name: mean("test_accuracy", name) for name in first["test_accuracy"]},
        "test_accuracy_by_seed": [report["test_accuracy"] for report in reports],
        "cost": {name: mean("cost", name) for name in first["cost"]},
        "latency_ms": {
            batch: {form: mean("latency_ms", batch, form) for form in forms}
            for batch, forms in first["latency_ms"].items()
        },
        "packed_minus_masked": max(report["packed_minus_masked"] for report in reports),
        "reloaded_same_bits": all(report["reloaded_same_bits"] for report in reports),
        "seconds": {name: mean("seconds", name) for name in first["seconds"]},
        "machine": first["machine"],
    }
