"""The command line: learn, prune, finetune, pack, show and bench on a run folder, and the demonstration.

Anything wrong with what was asked ends with one line on stderr and exit status 1 (2 for wrong options, 130
after Ctrl-C). Results go to stdout, progress to stderr.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from torch import nn

    from dsprune.recipes.data import ImageData
    from dsprune.recipes.runs import Config, Run

app = typer.Typer(
    name="dsprune",
    help="Learn filter groups in a CNN, prune channels per group, pack what is left into a fast network.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

INTERRUPTED = 130


class Arch(StrEnum):
    """Built-in architectures."""

    cifar_resnet = "cifar_resnet"
    resnet18 = "resnet18"
    resnet50 = "resnet50"


class Count(StrEnum):
    """What a target counts."""

    network = "network"
    prunable = "prunable"


RunOption = Annotated[
    Path, typer.Option("--run", "--out", help="The run folder.", show_default=False, metavar="FOLDER")
]
ArchOption = Annotated[Arch | None, typer.Option(help="The architecture. [cifar_resnet]", show_default=False)]
DepthOption = Annotated[int | None, typer.Option(help="Depth of cifar_resnet: 20, 32, 44, 56, 110. [20]")]
DataOption = Annotated[str | None, typer.Option(help="The data set: digits. [digits]")]
SizeOption = Annotated[int | None, typer.Option(help="Side of the images in pixels. [16]")]
SeedOption = Annotated[int | None, typer.Option(help="Seed of everything random. [0]")]
ThreadsOption = Annotated[
    int | None, typer.Option(help="Threads to compute with. [as the run began, at first torch's choice]")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite a run that is in the folder already.")]
EpochsOption = Annotated[int | None, typer.Option(help="Epochs (of one cycle, for finetune).")]
BatchOption = Annotated[int | None, typer.Option(help="Images in a training batch.")]
LrOption = Annotated[float | None, typer.Option(help="Largest learning rate.")]
SecondsOption = Annotated[float, typer.Option(help="Seconds to time each form for.")]
InductorOption = Annotated[
    bool, typer.Option("--inductor", help="Time torch.compile with freezing too (slow start).")
]


def _out() -> Console:
    return Console(highlight=False, soft_wrap=False)


def _err() -> Console:
    return Console(stderr=True, highlight=False)


class _Bars:
    """Progress bars, one a stage, on stderr."""

    def __init__(self, bars: Progress, prefix: str = "") -> None:
        self.bars = bars
        self.prefix = prefix
        self.tasks: dict[str, Any] = {}

    def step(self, stage: str, done: int, total: int, note: str) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(self.prefix + stage, total=total, note="")
        self.bars.update(self.tasks[stage], completed=done, note=note)


@contextmanager
def _bars() -> Iterator[Progress]:
    with Progress(
        TextColumn("{task.description:<9}"),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
        console=_err(),
        refresh_per_second=5,
    ) as bars:
        yield bars


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _threads(count: int | None) -> None:
    if count is not None:
        import torch

        if not 1 <= count <= 1024:
            raise ValueError(f"threads: expected 1 to 1024, got {count}")
        torch.set_num_threads(count)


def _new_config(base: Config, network: dict[str, Any], **stages: dict[str, Any]) -> Config:
    """`base` with what the user gave; for each stage its own settings."""
    changed = {
        name: dataclasses.replace(getattr(base, name), **given) for name, given in stages.items() if given
    }
    return dataclasses.replace(base, **network, **changed)


def _changed(stored: Config, wanted: Config) -> list[str]:
    """The names of the settings in which two configurations differ."""
    names = []
    for name, value in dataclasses.asdict(stored).items():
        other = dataclasses.asdict(wanted)[name]
        if isinstance(value, dict):
            names += [f"{name}.{key}" for key in value if value[key] != other[key]]
        elif value != other:
            names.append(name)
    return names


def _update_stage(run: Run, stage: str, result: str, given: dict[str, Any], *, resume: bool) -> None:
    """Give a stage of a run the user's settings; with resume they must be those it was begun with.

    Where there is nothing to go on from, resume begins with the settings given, and wants some: those of an
    attempt that was cut off before it stored them are not known.
    """
    settings = dataclasses.replace(getattr(run.config, stage), **given)
    if resume and (run.has(result) or run.checkpoint(stage).exists()):
        if settings != getattr(run.config, stage):
            raise ValueError(
                f"{stage}: --resume goes on with the settings it began with; leave out other options"
            )
        return
    if resume and not given:
        raise ValueError(f"{run.path}: has no {stage} to resume; start without --resume")
    run.forget(result)  # before the settings change, by which it was not made
    if settings != getattr(run.config, stage):
        run.reconfigure(**{stage: settings})


@app.command()
def learn(
    run: RunOption,
    arch: ArchOption = None,
    depth: DepthOption = None,
    data: DataOption = None,
    size: SizeOption = None,
    seed: SeedOption = None,
    weights: Annotated[
        Path | None, typer.Option(help="Trained dense weights (safetensors); else they are trained first.")
    ] = None,
    pretrain_epochs: Annotated[int | None, typer.Option(help="Epochs of dense training.")] = None,
    groups: Annotated[int | None, typer.Option(help="Groups of filters in each layer.")] = None,
    strength: Annotated[float | None, typer.Option(help="Strength of the group lasso.")] = None,
    first_order: Annotated[
        bool | None, typer.Option("--first-order", help="Drop the mixed second-order term: cheaper steps.")
    ] = None,
    epochs: EpochsOption = None,
    batch: BatchOption = None,
    lr: LrOption = None,
    resume: ResumeOption = False,
    force: ForceOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Train a dense network (or take its weights), and learn the groups of its filters."""
    import torch

    from dsprune.recipes import stages
    from dsprune.recipes.runs import Config, Run

    network = _given(arch=arch and arch.value, depth=depth, data=data, size=size, seed=seed, threads=threads)
    given = {
        "pretrain": _given(epochs=pretrain_epochs, batch=batch),
        "learn": _given(
            groups=groups, strength=strength, first_order=first_order, epochs=epochs, batch=batch, lr=lr
        ),
    }
    exists = (run / "run.json").exists()
    if resume and exists:
        here = Run.open(run)
        wanted = _new_config(here.config, network, **given)
        if changed := _changed(here.config, wanted):
            raise ValueError(f"{run}: was begun with another {', '.join(changed)}; start over with --force")
    elif resume:
        raise ValueError(f"{run}: nothing to resume, it is not a run folder")
    elif exists and not force:
        raise ValueError(
            f"{run}: already holds a run; give --resume to go on with it or --force to start over"
        )
    else:
        config = _new_config(Config(threads=torch.get_num_threads()), network, **given)
        if weights is not None:
            stages.read_weights(weights)
        here = Run.create(run, config)
    images = here.data()
    _threads(here.config.threads)
    with _bars() as bars:
        shown = _Bars(bars)
        stages.make_dense(here, images, weights=weights, resume=resume, progress=shown)
        stages.make_learned(here, images, resume=resume, progress=shown)
    _say_accuracy(here, images, "learned")


def _say_accuracy(run: Run, data: ImageData, stage: str, model: nn.Module | None = None) -> None:
    from dsprune.recipes.training import evaluate

    model = model or run.read(stage, data)[0]
    accuracy = evaluate(model, data.validation).accuracy
    typer.echo(f"{run.file(stage)}: validation accuracy {accuracy:.2f}%")


@app.command()
def prune(
    run: RunOption,
    flops: Annotated[
        float | None, typer.Option(help="Fraction of the FLOPs to remove, 0 to 1. [0.62]")
    ] = None,
    params: Annotated[
        float | None, typer.Option(help="Fraction of the parameters to remove, 0 to 1.")
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(help="Fraction of the dense network's time to take, measured here, 0 to 1."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Images in a batch, for --latency.")] = 1,
    count: Annotated[
        Count, typer.Option(help="Count the whole network or its prunable convs.")
    ] = Count.network,
    threads: ThreadsOption = None,
) -> None:
    """Remove input channels per group until a target is met."""
    from dsprune.recipes import stages
    from dsprune.recipes.runs import Run
    from dsprune.recipes.training import Prune

    here = Run.open(run)
    _threads(here.config.threads if threads is None else threads)
    here.need("learned", "learn")
    settings = (
        Prune(count=count.value)
        if flops is None and params is None and latency is None
        else Prune(flops=flops, params=params, count=count.value, latency=latency, batch=batch)
    )
    images = here.data()
    here.config = dataclasses.replace(here.config, prune=settings)
    structure = stages.make_pruned(here, images)
    here.reconfigure(prune=settings)
    pruned = here.read("pruned", images)[0]
    _print_summary(pruned, images)
    if structure is not None and structure.latency is not None:
        typer.echo(str(structure.latency))
    _say_accuracy(here, images, "pruned", pruned)


@app.command()
def finetune(
    run: RunOption,
    cycles: Annotated[int | None, typer.Option(help="Learning rate cycles.")] = None,
    epochs: EpochsOption = None,
    batch: BatchOption = None,
    lr: LrOption = None,
    resume: ResumeOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Train the pruned network on, with its masks held."""
    from dsprune.recipes import stages
    from dsprune.recipes.runs import Run

    here = Run.open(run)
    _threads(here.config.threads if threads is None else threads)
    here.need("pruned", "prune")
    given = _given(cycles=cycles, epochs=epochs, batch=batch, lr=lr)
    images = here.data()
    _update_stage(here, "finetune", "finetuned", given, resume=resume)
    with _bars() as bars:
        stages.make_finetuned(here, images, resume=resume, progress=_Bars(bars))
    _say_accuracy(here, images, "finetuned")


class Importance(StrEnum):
    """How `oneshot` weighs what it may remove."""

    magnitude = "magnitude"
    activation = "activation"


@app.command()
def oneshot(
    model: Annotated[
        Path, typer.Argument(help="Trained weights (safetensors), or a run folder.", show_default=False)
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, SET:DIR (cifar10, fashion-mnist or imagenet), or a FILE.npy of inputs "
            "(N, C, H, W). [that of the run folder]",
            show_default=False,
        ),
    ] = None,
    flops: Annotated[float | None, typer.Option(help="Fraction of the FLOPs to remove, 0 to 1.")] = None,
    params: Annotated[
        float | None, typer.Option(help="Fraction of the parameters to remove, 0 to 1.")
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(help="Fraction of the dense network's time to take, measured here, 0 to 1."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Images in a batch, for --latency.")] = 1,
    groups: Annotated[int, typer.Option(help="Groups of filters in each layer; 1: channel pruning.")] = 2,
    images: Annotated[int, typer.Option(help="Training images to calibrate on.")] = 512,
    importance: Annotated[Importance, typer.Option(help="What counts as important.")] = Importance.activation,
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct/--no-reconstruct", help="Least squares after the cut.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="The packed network. [oneshot.safetensors beside MODEL]")
    ] = None,
    arch: ArchOption = None,
    depth: Annotated[int, typer.Option(help="Depth of cifar_resnet, for weights.")] = 20,
    threads: ThreadsOption = None,
) -> None:
    """Prune a trained network without training: group, cut, least squares on a few images, pack."""
    import dsprune
    from dsprune.recipes.data import ImageData
    from dsprune.recipes.oneshot import BATCH, agreement, chosen, one_shot, read_data
    from dsprune.recipes.runs import Run
    from dsprune.recipes.timing import random_images
    from dsprune.recipes.training import evaluate

    _threads(threads)
    start = time.perf_counter()
    target = _given(flops=flops, params=params, latency=latency)
    if len(target) != 1:
        raise ValueError(f"expected exactly one of --flops, --params and --latency, got {len(target)}")
    for name, value in (("images", images), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    folder = model if model.is_dir() else model.parent
    if model.is_dir():
        here = Run.open(model)
        here.need("dense", "learn")
        source = here.data() if data is None else read_data(data, here.config.size)
        network = here.read("dense", here.data())[0]
    elif data is None:
        raise ValueError("data: expected --data for a file of weights")
    else:
        source = read_data(data)
        size = source.size if isinstance(source, ImageData) else min(source.images.shape[2:])
        network = _file_source(model, arch.value if arch else "cifar_resnet", depth, size).model
        if _is_packed(network):
            raise ValueError(f"{model}: is packed already; expected the weights of a dense network")
    if isinstance(source, ImageData):
        batches = chosen(source.train, images, seed)
    else:
        batches = list(source.images[:images].split(BATCH))
    example = batches[0][:1]
    if latency is not None:
        example = random_images(batch, *example.shape[1:3])
    made = one_shot(
        network, example, batches, groups=groups, importance=importance.value, reconstruct=reconstruct,
        seed=seed, **target,
    )  # fmt: skip
    packed = dsprune.pack(made.masked, batches[0][:1]).eval()
    path = out or folder / "oneshot.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    dsprune.save(packed, path)
    print(dsprune.summary(packed, batches[0][:1]))
    if made.structure.latency is not None:
        typer.echo(str(made.structure.latency))
    rows = {"dense": network, "cut": made.cut, "reconstructed": made.masked, "packed": packed}
    if not reconstruct:
        rows.pop("reconstructed")
    for name, stage in rows.items():
        if isinstance(source, ImageData):
            typer.echo(f"{name}: validation accuracy {evaluate(stage, source.validation).accuracy:.2f}%")
        else:
            same, error = agreement(stage, network, batches)
            typer.echo(f"{name}: same answer as dense {same:.2f}%, relative error {error:.3f}")
    count = sum(len(part) for part in batches)
    typer.echo(f"{path}: {count} images, took {time.perf_counter() - start:.0f} s")


@app.command()
def pack(run: RunOption, threads: ThreadsOption = None) -> None:
    """Pack the pruned network into a fast one, and save it."""
    from dsprune.recipes import stages
    from dsprune.recipes.runs import Run

    here = Run.open(run)
    _threads(here.config.threads if threads is None else threads)
    here.need("pruned", "prune")
    images = here.data()
    difference = stages.make_packed(here, images)
    packed = here.packed(images)
    _print_summary(packed, images)
    _say_accuracy(here, images, "packed", packed)
    typer.echo(f"largest difference from the masked network's logits: {difference:.1e}")


def _print_summary(model: nn.Module, data: ImageData) -> None:
    import dsprune

    print(dsprune.summary(model, data.example))


@dataclasses.dataclass
class _Source:
    """A network to show or time: as it is, the dense one it stands for, and one zero image."""

    model: nn.Module
    dense: nn.Module
    example: Any
    title: str
    folder: Path


def _source(
    run: Path | None, file: Path | None, stage: str | None, arch: Arch | None, depth: int, size: int
) -> _Source:
    """Find what the user means: a stage of a run folder, or a file of weights or of a packed network."""
    from dsprune.checkpoint import CheckpointError
    from dsprune.recipes.runs import STAGES, Run

    if (run is None) == (file is None):
        raise ValueError("expected either --run FOLDER or a FILE")
    if run is not None:
        here = Run.open(run)
        if stage is not None and stage not in STAGES:
            raise ValueError(f"stage: expected one of {list(STAGES)}, got {stage!r}")
        stage = stage or here.latest()
        if not here.has(stage):
            raise CheckpointError(f"{run}: has no {stage} network")
        data = here.data()
        model = here.packed(data) if stage == "packed" else here.read(stage, data)[0]
        dense = here.read("dense", data)[0] if here.has("dense") else here.network(data).eval()
        return _Source(model, dense, data.example, f"{here.config.title}, {stage}, {run}", run)
    assert file is not None
    if stage is not None:
        raise ValueError("stage: goes with --run; a FILE is one network already")
    return _file_source(file, arch.value if arch else "cifar_resnet", depth, size)


def _file_source(file: Path, arch: str, depth: int, size: int) -> _Source:
    """The network in a file: a plain state dict, a stage of a run folder, or a packed network."""
    import torch

    import dsprune
    from dsprune.recipes import runs, stages

    if not 1 <= size <= 4096:
        raise ValueError(f"size: expected 1 to 4096 pixels, got {size}")
    tensors = stages.read_weights(file)
    layouts = stages.packed_layouts(file)
    stem, head = ("stem.conv", "classifier") if arch == "cifar_resnet" else ("conv1", "fc")
    first, last = tensors.get(f"{stem}.weight"), tensors.get(f"{head}.weight")
    if first is None or last is None or last.ndim != 2:
        raise ValueError(f"{file}: not the weights of a {arch} (it lacks {stem}.weight or {head}.weight)")
    stem_layout = (layouts or {}).get(stem)
    channels = stem_layout["in_channels"] if stem_layout else first.shape[1] if first.ndim == 4 else 0
    if type(channels) is not int or not 1 <= channels <= 4096:
        raise ValueError(f"{file}: expected 1 to 4096 channels of the images, got {channels!r}")
    dense = runs.build_network(arch, depth, len(last), channels).eval()
    model = runs.build_network(arch, depth, len(last), channels).eval()
    if layouts is not None:
        model = dsprune.load(file, model).eval()
    else:
        runs.hold_masks(model, tensors, file)
    return _Source(model, dense, torch.zeros(1, channels, size, size), file.name, file.parent)


@app.command()
def show(
    file: Annotated[Path | None, typer.Argument(help="Weights or a packed network; or give --run.")] = None,
    run: Annotated[
        Path | None, typer.Option("--run", "--out", help="The run folder.", metavar="FOLDER")
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="dense, learned, pruned, finetuned or packed. [the last there is]")
    ] = None,
    arch: ArchOption = None,
    depth: Annotated[int, typer.Option(help="Depth of cifar_resnet, for a FILE.")] = 20,
    size: Annotated[int, typer.Option(help="Side of the images in pixels, for a FILE.")] = 32,
    picture: Annotated[
        Path | None, typer.Option(help="Where the picture goes. [structure.png beside the network]")
    ] = None,
) -> None:
    """Print what is left of a network, layer by layer, and draw its structure."""
    import dsprune
    from dsprune.picture import draw_structure

    source = _source(run, file, stage, arch, depth, size)
    print(dsprune.summary(source.model, source.example))
    path = picture or source.folder / "structure.png"
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"picture: expected a name ending in .png, .svg or .pdf, got {str(path)!r}")
    try:
        draw_structure(source.model, path, title=source.title)
    except ValueError as error:
        if "nothing to draw" not in str(error):
            raise
        typer.echo("no picture: nothing is pruned in this network")
    else:
        typer.echo(f"picture: {path}")


@app.command()
def bench(
    file: Annotated[Path | None, typer.Argument(help="Weights or a packed network; or give --run.")] = None,
    run: Annotated[
        Path | None, typer.Option("--run", "--out", help="The run folder.", metavar="FOLDER")
    ] = None,
    arch: ArchOption = None,
    depth: Annotated[int, typer.Option(help="Depth of cifar_resnet, for a FILE.")] = 20,
    size: Annotated[int, typer.Option(help="Side of the images in pixels, for a FILE.")] = 32,
    batch: Annotated[
        list[int] | None, typer.Option(help="Batch size; may be given again. [1 and 128]")
    ] = None,
    seconds: SecondsOption = 1.0,
    inductor: InductorOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Time the dense network against the packed one: interleaved in one run, medians."""
    import dsprune
    from dsprune.clock import check_seconds
    from dsprune.recipes import timing

    check_seconds(seconds)
    _threads(threads)
    source = _source(run, file, None, arch, depth, size)
    model = source.model
    packed = model if _is_packed(model) else dsprune.pack(model, source.example).eval()
    channels, side = source.example.shape[1], source.example.shape[2]
    rows = {}
    for count in batch or [1, 128]:
        images = timing.random_images(count, channels, side)
        rows[str(count)] = timing.compare(source.dense, packed, images, seconds=seconds, inductor=inductor)
    _out().print(_latency_table(rows, source.title))


class ExportFormat(StrEnum):
    """What `export` writes."""

    onnx = "onnx"
    torch = "torch"
    aoti = "aoti"
    program = "program"


@app.command()
def export(
    out: Annotated[Path, typer.Option("--to", help="The file to write.", show_default=False)],
    file: Annotated[Path | None, typer.Argument(help="Weights or a packed network; or give --run.")] = None,
    run: Annotated[
        Path | None, typer.Option("--run", "--out", help="The run folder.", metavar="FOLDER")
    ] = None,
    form: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            help="onnx: standard operators; torch: torch.export; aoti: compiled; program: without torch.",
        ),
    ] = ExportFormat.onnx,
    groups: Annotated[
        bool, typer.Option("--groups", help="ONNX: a convolution per group of filters.")
    ] = False,
    arch: ArchOption = None,
    depth: Annotated[int, typer.Option(help="Depth of cifar_resnet, for a FILE.")] = 20,
    size: Annotated[int, typer.Option(help="Side of the images in pixels, for a FILE.")] = 32,
) -> None:
    """Write the packed network for another runtime: ONNX, torch.export, AOTInductor, our own."""
    import dsprune
    from dsprune.io import target_file

    if groups and form is not ExportFormat.onnx:
        raise ValueError("groups: goes with --format onnx")
    target_file(out)
    source = _source(run, file, None, arch, depth, size)
    packed = source.model
    if not isinstance(packed, dsprune.PackedNetwork):
        packed = dsprune.pack(packed, source.example).eval()
    if form is ExportFormat.onnx:
        dsprune.export_onnx(packed, source.example, out, form="groups" if groups else "dense")
    elif form is ExportFormat.torch:
        dsprune.export_torch(packed, source.example, out)
    elif form is ExportFormat.program:
        dsprune.export_program(packed, out, source.example.shape)
    else:
        dsprune.export_aoti(packed, source.example, out)
    typer.echo(f"{out}: {out.stat().st_size / 1e3:.0f} kB")


def _is_packed(model: nn.Module) -> bool:
    from dsprune import PackedNetwork

    return isinstance(model, PackedNetwork)


def _latency_table(rows: dict[str, dict[str, float]], title: str, threads: int = 0) -> Table:
    import torch

    from dsprune.recipes.timing import PACKED_FORMS, best_dense

    threads = threads or torch.get_num_threads()
    table = Table(
        title=f"{title}: median ms of dense forms and packed, {threads} thread{'s' if threads > 1 else ''}",
        title_justify="left",
    )
    table.add_column("")
    for batch in rows:
        table.add_column(f"batch {batch}", justify="right")
    best = {batch: best_dense(times) for batch, times in rows.items()}
    first = next(iter(rows.values()))
    for name in sorted(first, key=lambda name: (name == "packed", name in PACKED_FORMS)):
        cells = [
            f"[bold]{times[name]:.2f}[/bold]" if name == best[batch][0] else f"{times[name]:.2f}"
            for batch, times in rows.items()
        ]
        table.add_row(name, *cells)
    speed_up = [f"{best[batch][1] / times['packed']:.2f}x" for batch, times in rows.items()]
    table.add_row("speed-up", *speed_up)
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1):
        table.caption = f"the machine was busy (load {os.getloadavg()[0]:.1f}): these times say little"
        table.caption_justify = "left"
    return table


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "--run", help="The run folder.", metavar="FOLDER")] = Path(
        "outputs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of everything random (the first one, with --seeds).")] = 0,
    seeds: Annotated[int, typer.Option(help="How many seeds to run; their mean is reported.")] = 1,
    size: SizeOption = None,
    groups: Annotated[int | None, typer.Option(help="Groups of filters in each layer.")] = None,
    flops: Annotated[float | None, typer.Option(help="Fraction of the network's FLOPs to remove.")] = None,
    pretrain_epochs: Annotated[int | None, typer.Option(help="Epochs of dense training.")] = None,
    learn_epochs: Annotated[int | None, typer.Option(help="Epochs of group learning.")] = None,
    finetune_epochs: Annotated[int | None, typer.Option(help="Epochs of a finetuning cycle.")] = None,
    cycles: Annotated[int | None, typer.Option(help="Finetuning cycles.")] = None,
    batch: BatchOption = None,
    seconds: SecondsOption = 0.6,
    inductor: InductorOption = False,
    resume: ResumeOption = False,
    threads: Annotated[
        int | None, typer.Option(help="Threads to train with. [1: the network is small]")
    ] = None,
) -> None:
    """ResNet-20 on real handwritten digits: train, learn groups, prune, finetune, pack, reload, time."""
    from dsprune.checkpoint import write_json
    from dsprune.recipes.demo import Timing, mean_report, run_demo
    from dsprune.recipes.runs import Config

    start = time.perf_counter()
    if not 1 <= seeds <= 1000:
        raise ValueError(f"seeds: expected 1 to 1000, got {seeds}")
    timing = Timing(seconds=seconds, inductor=inductor)
    base = _new_config(
        Config(),
        _given(size=size, threads=threads),
        pretrain=_given(epochs=pretrain_epochs, batch=batch),
        learn=_given(groups=groups, epochs=learn_epochs, batch=batch),
        prune=_given(flops=flops),
        finetune=_given(epochs=finetune_epochs, cycles=cycles, batch=batch),
    )
    reports = []
    with _bars() as bars:
        for offset in range(seeds):
            config = dataclasses.replace(base, seed=seed + offset)
            folder = out if seeds == 1 else out / f"seed{config.seed}"
            shown = _Bars(bars, f"seed {config.seed}: " if seeds > 1 else "")

            def say(text: str, prefix: str = shown.prefix) -> None:
                bars.console.print(f"  {prefix}{text}", markup=False)

            reports.append(run_demo(folder, config, resume=resume, timing=timing, progress=shown, say=say))
    report = reports[0]
    if seeds > 1:
        report = mean_report(reports)
        write_json(out / "report.json", report)
    console = _out()
    for table in _demo_tables(report, seeds):
        console.print(table)
    typer.echo(
        f"packed and masked logits differ by at most {report['packed_minus_masked']:.1e}; "
        "reloaded in a new process: the same bits"
    )
    last = out if seeds == 1 else out / f"seed{seed}"
    typer.echo(f"picture: {last / 'report.png'}")
    typer.echo(f"packed network: {last / 'packed.safetensors'}")
    typer.echo(f"figures: {out / 'report.json'}")
    typer.echo(f"took {time.perf_counter() - start:.0f} s")


def _demo_tables(report: dict[str, Any], seeds: int) -> list[Table]:
    accuracy, cost = report["test_accuracy"], report["cost"]
    data = f"{report['data']['name']}, {report['data']['images']['test']} test images"
    mean = f", mean of {seeds} seeds" if seeds > 1 else ""
    names = ("dense", "pruned", "finetuned", "packed")
    table = Table(title=f"{report['network']} on {data}{mean}", title_justify="left")
    for column in ("", *names):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("test accuracy", *(f"{accuracy[name]:.2f}%" for name in names))
    for label, key in (("multiply-adds", "macs"), ("parameters", "params")):
        left = _short(cost[f"{key}_left"])
        table.add_row(label, _short(cost[f"{key}_dense"]), left, left, left)
    removed = Table(title="Removed", title_justify="left")
    for column in ("counted over", "multiply-adds", "parameters"):
        removed.add_column(column, justify="left" if column == "counted over" else "right")
    for label, prefix in (("the whole network", ""), ("its prunable convs", "prunable_")):
        cuts = (f"{cost[f'{prefix}{key}_cut_percent']:.2f}%" for key in ("macs", "params"))
        removed.add_row(label, *cuts)
    return [
        table,
        removed,
        _latency_table(report["latency_ms"], "Latency", report["machine"]["latency_threads"]),
    ]


def _short(count: float) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count / 1e3:.1f} k"


recipes = typer.Typer(
    help="The published experiments, from training to a report, on a folder with the data set.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(recipes, name="recipe")

DataFolder = Annotated[
    Path, typer.Option("--data", help="The folder with the data set.", show_default=False, metavar="DIR")
]
OutFolder = Annotated[
    Path | None,
    typer.Option(
        "--out", "--run", help="The run folder. [outputs/RECIPE-NETWORK-gGROUPS]", show_default=False,
        metavar="RUN",
    ),
]  # fmt: skip
TargetOption = Annotated[
    float | None,
    typer.Option("--flops", help="Fraction of the prunable FLOPs to remove. [the paper's]"),
]
WeightsOption = Annotated[
    Path | None, typer.Option(help="Trained dense weights (safetensors); else they are trained first.")
]
ScaleOption = Annotated[float, typer.Option(help="Multiplies the epochs of all stages, for trials.")]
LimitOption = Annotated[int, typer.Option(help="Images to take of each part, for trials; 0: all.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu or cuda. [cuda where there is one]", show_default=False)
]
RunSeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]


@recipes.command("cifar10")
def recipe_cifar10(
    data: DataFolder,
    out: OutFolder = None,
    depth: Annotated[int, typer.Option(help="Depth of the ResNet: 20 or 56.")] = 20,
    groups: Annotated[int, typer.Option(help="Groups of filters in each layer: 2, 3 or 4.")] = 4,
    flops: TargetOption = None,
    weights: WeightsOption = None,
    seed: RunSeedOption = 0,
    epochs_scale: ScaleOption = 1.0,
    limit: LimitOption = 0,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    seconds: SecondsOption = 1.0,
    inductor: InductorOption = False,
    resume: ResumeOption = False,
    force: ForceOption = False,
) -> None:
    """ResNet-20 or ResNet-56 on CIFAR-10: train, learn groups, prune, finetune, pack, test, report."""
    from dsprune.recipes.recipe import cifar10_config

    out = out or Path(f"outputs/cifar10-resnet{depth}-g{groups}")
    config = cifar10_config(
        data, depth=depth, groups=groups, flops=flops, epochs_scale=epochs_scale,
        **_machine(out, resume, seed, limit, device, threads),
    )  # fmt: skip
    _run_recipe(out, config, weights, 0, seconds, inductor, resume, force)


@recipes.command("fashion-mnist")
def recipe_fashion_mnist(
    data: DataFolder,
    out: OutFolder = None,
    depth: Annotated[int, typer.Option(help="Depth of the ResNet: 20, 32, 44, 56, 110.")] = 20,
    groups: Annotated[int, typer.Option(help="Groups of filters in each layer.")] = 4,
    flops: Annotated[
        float | None, typer.Option("--flops", help="Fraction of the network's FLOPs to remove. [0.6]")
    ] = None,
    weights: WeightsOption = None,
    seed: RunSeedOption = 0,
    epochs_scale: ScaleOption = 1.0,
    limit: LimitOption = 0,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    seconds: SecondsOption = 1.0,
    inductor: InductorOption = False,
    resume: ResumeOption = False,
    force: ForceOption = False,
) -> None:
    """A CIFAR ResNet on Fashion-MNIST (its four gzipped IDX files), at settings of ours."""
    from dsprune.recipes.recipe import fashion_config

    out = out or Path(f"outputs/fashion-mnist-resnet{depth}-g{groups}")
    config = fashion_config(
        data, depth=depth, groups=groups, flops=flops, epochs_scale=epochs_scale,
        **_machine(out, resume, seed, limit, device, threads),
    )  # fmt: skip
    _run_recipe(out, config, weights, 0, seconds, inductor, resume, force)


@recipes.command("imagenet")
def recipe_imagenet(
    data: DataFolder,
    out: OutFolder = None,
    arch: Annotated[str, typer.Option(help="resnet18 or resnet50.")] = "resnet50",
    groups: Annotated[int, typer.Option(help="Groups of filters in each layer.")] = 2,
    flops: TargetOption = None,
    weights: WeightsOption = None,
    batch: Annotated[int, typer.Option(help="Images in a training batch; rates follow it.")] = 256,
    size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 224,
    workers: Annotated[int, typer.Option(help="Processes that decode images.")] = 4,
    seed: RunSeedOption = 0,
    epochs_scale: ScaleOption = 1.0,
    limit: LimitOption = 0,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    seconds: SecondsOption = 1.0,
    inductor: InductorOption = False,
    resume: ResumeOption = False,
    force: ForceOption = False,
) -> None:
    """ResNet-18 or ResNet-50 on ImageNet, or on any tree train/CLASS/* and val/CLASS/* of images."""
    from dsprune.recipes.recipe import imagenet_config

    if not 0 <= workers <= 256:
        raise ValueError(f"workers: expected 0 to 256, got {workers}")
    out = out or Path(f"outputs/imagenet-{arch}-g{groups}")
    config = imagenet_config(
        data, arch=arch, groups=groups, flops=flops, size=size, batch=batch, epochs_scale=epochs_scale,
        **_machine(out, resume, seed, limit, device, threads),
    )  # fmt: skip
    _run_recipe(out, config, weights, workers, seconds, inductor, resume, force)


def _machine(
    out: Path, resume: bool, seed: int, limit: int, device: str | None, threads: int | None
) -> dict[str, Any]:
    """Fields of the configuration; a run that is resumed goes on with its own threads and device."""
    import torch

    from dsprune.recipes.runs import Run

    if resume and (out / "run.json").exists():
        stored = Run.open(out).config
        device, threads = device or stored.device, threads or stored.threads
    return {
        "seed": seed,
        "limit": limit,
        "device": device or ("cuda" if torch.cuda.is_available() else "cpu"),
        "threads": torch.get_num_threads() if threads is None else threads,
    }


def _run_recipe(
    out: Path,
    config: Config,
    weights: Path | None,
    workers: int,
    seconds: float,
    inductor: bool,
    resume: bool,
    force: bool,
) -> None:
    from dsprune.recipes.demo import Timing
    from dsprune.recipes.recipe import open_recipe, result_rows, run_recipe

    timing = Timing(seconds=seconds, inductor=inductor)
    if (out / "run.json").exists() and not (resume or force):
        raise ValueError(
            f"{out}: already holds a run; give --resume to go on with it or --force to start over"
        )
    run, images = open_recipe(out, config, resume=resume, weights=weights, workers=workers)
    with _bars() as bars:

        def say(text: str) -> None:
            bars.console.print(f"  {text}", markup=False)

        report = run_recipe(
            run, images, weights=weights, timing=timing,
            progress=_Bars(bars), say=say,
        )  # fmt: skip
    table = Table(
        title=f"{report['network']} on {report['data']['name']}, {len(images.test)} test images",
        title_justify="left",
    )
    for column in ("", "this run", "published"):
        table.add_column(column, justify="right" if column else "left")
    for row in result_rows(report):
        table.add_row(*row)
    console = _out()
    console.print(table)
    if not report["published_settings"]:
        typer.echo("a trial: not the settings of the full recipe")
    console.print(_latency_table(report["latency_ms"], "Latency", report["latency_threads"]))
    for name, what in (("report.md", "report"), ("report.json", "figures"), ("packed.safetensors", "packed")):
        typer.echo(f"{what}: {out / name}")


def _known_errors() -> tuple[type[BaseException], ...]:
    from dsprune.pack import PackError
    from dsprune.recipes.demo import DemoError
    from dsprune.recipes.training import TrainingError

    return (ValueError, TypeError, OSError, ImportError, DemoError, TrainingError, PackError)


def _fail(text: str, status: int) -> int:
    line = " ".join(str(text).split())
    print(f"dsprune: {line}", file=sys.stderr)
    return status


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        previous = None
    try:
        result = app(args=arguments, prog_name="dsprune", standalone_mode=False)
    except KeyboardInterrupt:
        result = INTERRUPTED
    except typer.Exit as exit_:
        return exit_.exit_code
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            return _usage(error)
        if isinstance(error, _known_errors()):
            return _fail(str(error) or type(error).__name__, 1)
        raise
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
    if result == INTERRUPTED:  # typer, too, turns Ctrl-C into this status
        return _fail("interrupted; the last checkpoint is kept, --resume goes on from it", INTERRUPTED)
    return result if isinstance(result, int) else 0


def _usage(error: Exception) -> int:
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    status = getattr(error, "exit_code", 1)
    if type(error).__name__ == "NoArgsIsHelpError":  # of click or of the copy in typer; its text is the help
        print(text, file=sys.stderr)
        return int(status)
    return _fail(text, status)


if __name__ == "__main__":
    sys.exit(main())
