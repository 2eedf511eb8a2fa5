"""Accuracy over measured latency on Fashion-MNIST: dense, narrow, channel pruning, groups of several kinds.

    python -m bench.fashion_experiment --data DIR --out FOLDER [--size 14] [--seeds 3] [--only METHOD ...]
    python -m bench.fashion_experiment --out FOLDER --report

ResNet-20 on ``TRAIN_IMAGES`` of Fashion-MNIST's training images, in full size (28) or averaged to half of
it (14). A *cell* is one network: size, seed, method, cut. Each leaves one JSON in FOLDER when it is finished,
and the cells in ``bench/results/fashion-experiment.json`` count as finished: a run that was killed, here or
elsewhere, goes on from there, and several processes may share a FOLDER. Cells are in an order that keeps the
table balanced. Nothing was chosen by test images, on which each network is evaluated once: finetuned ones
when they are packed, the others with their masks.

``--report`` times all networks in one interleaved run, then writes the JSON, the table and
``docs/images/fashion-experiment.png``.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import math
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import dsprune
from dsprune import models
from dsprune.checkpoint import read_checkpoint, read_json, write_checkpoint, write_json
from dsprune.recipes import training
from dsprune.recipes.data import ImageData, stratified_split
from dsprune.recipes.folders import ByteSplit, fashion_mnist

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "fashion-experiment.json"
PICTURE = ROOT / "docs" / "images" / "fashion-experiment.png"

TRAIN_IMAGES, VALIDATION_IMAGES, CALIBRATION_IMAGES = 10_000, 2_000, 512
BATCH = 64
CUTS = (0.6, 0.8, 0.9)
ONE_SHOT = 0.5  # cut of the cells that are not finetuned
DENSE = {"epochs": 7, "lr": 0.1, "weight_decay": 5e-4}
LEARN = {"epochs": 2, "lr": 0.05, "weight_decay": 5e-4}
FINETUNE = {"epochs": 2, "lr": 0.05, "weight_decay": 5e-4}


@dataclass(frozen=True)
class Method:
    """How a network comes about. ``source``: how the groups do."""

    name: str
    title: str
    source: str  # "dense", "narrow", "one", "random", "clustered", "learned"
    groups: int = 4
    reconstruct: bool = False
    importance: str = "magnitude"
    order: str = "first"
    update: str = "subgradient"
    strength: float = 0.05
    temperature: float = 0.5
    alpha_lr: float = 1e-3
    warm: float = 0.0  # logits of the clustered groups that learning starts from
    only_cut: float = 0.0  # where a method is tried at one cut


METHODS = {
    method.name: method
    for method in (
        Method("dense", "dense", "dense"),
        Method("narrow", "narrow networks from scratch", "narrow"),
        Method("one", "channel pruning (one group)", "one", groups=1),
        Method("random", "random groups", "random"),
        Method("clustered", "clustered groups", "clustered"),
        Method("first", "learned, first order", "learned"),
        Method("exact", "learned, exact", "learned", order="exact"),
        Method("one-r", "one group, reconstructed", "one", 1, True, "activation"),
        Method("random-r", "random groups, reconstructed", "random", 4, True, "activation"),
        Method("clustered-r", "clustered groups, reconstructed", "clustered", 4, True, "activation"),
        Method("clustered2-r", "2 clustered groups, reconstructed", "clustered", 2, True, "activation"),
        Method("first-prox", "learned, first order, proximal", "learned", update="proximal"),
        Method("exact-prox", "learned, exact, proximal", "learned", order="exact", update="proximal"),
        # What might help learned groups, one change each, at the middle cut.
        Method("weak", "first order, strength 0.002", "learned", strength=0.002, only_cut=0.8),
        Method("middle", "first order, strength 0.01", "learned", strength=0.01, only_cut=0.8),
        Method("warm", "first order, from clustered groups", "learned", warm=1.0, only_cut=0.8),
        Method("fast", "first order, rate of the logits 0.01", "learned", alpha_lr=1e-2, only_cut=0.8),
        Method("hot", "first order, temperature 2", "learned", temperature=2.0, only_cut=0.8),
        Method(
            "learned-r", "strength 0.01, from clustered groups, reconstructed", "learned", 4, True,
            "activation", strength=0.01, warm=1.0, only_cut=0.8,
        ),
    )
}  # fmt: skip


# ---- data and training


def subset(split: ByteSplit, count: int) -> ByteSplit:
    """``count`` images, the classes in their proportions, always the same ones."""
    index = stratified_split(split.labels, (count / len(split),), 0)[0]
    return dataclasses.replace(split, images=split.images[index], labels=split.labels[index])


def halved(split: ByteSplit) -> ByteSplit:
    """Each 2 x 2 pixels replaced by their mean."""
    images = F.avg_pool2d(split.images.float(), 2).round().to(torch.uint8)
    return dataclasses.replace(split, images=images)


def load(folder: Path, size: int) -> ImageData:
    """The images of the experiment, with all 10,000 test images."""
    data = fashion_mnist(folder)
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    counts = {"train": TRAIN_IMAGES, "validation": VALIDATION_IMAGES, "test": len(data.test)}
    chosen = {}
    for name, part in parts.items():
        assert isinstance(part, ByteSplit)
        part = part if counts[name] == len(part) else subset(part, counts[name])
        chosen[name] = part if size == 28 else halved(part)
    return dataclasses.replace(data, size=size, shift=size // 14, **chosen)


def calibration(data: ImageData, seed: int, count: int = CALIBRATION_IMAGES) -> list[Tensor]:
    """Training images as they are, in batches of 64: what a user with few images has."""
    assert isinstance(data.train, ByteSplit)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:count]
    split = dataclasses.replace(data.train, images=data.train.images[order], labels=data.train.labels[order])
    return list(split.batches(64, data.device))


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy; the convolutions in bfloat16, which takes 0.4 of the time here."""
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(model(images).float(), labels)


def train(
    model: nn.Module,
    data: ImageData,
    settings: Mapping[str, float],
    seed: int,
    stage: int,
    warmup: float = 0.0,
    step: Callable[[Callable[[], Tensor], torch.optim.Optimizer], Tensor] | None = None,
) -> list[float]:
    """SGD with momentum 0.9, a cosine to 0; mean losses by epoch. ``step``: in place of an ordinary one."""
    generator = training.seed_everything(seed, stage)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=settings["lr"], momentum=0.9, weight_decay=settings["weight_decay"]
    )
    epochs = int(settings["epochs"])
    total = epochs * math.ceil(len(data.train) / BATCH)
    done, means = 0, []
    model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    for _ in range(epochs):
        losses = []
        for images, labels in data.train.epoch(BATCH, data.shift, generator, 0, data.device):
            for group in optimizer.param_groups:
                group["lr"] = settings["lr"] * training.cosine(done, total, warmup)
            done += 1

            def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
                return loss_of(model, images, labels)

            if step is not None:
                loss = step(closure, optimizer)
            else:
                optimizer.zero_grad(set_to_none=True)
                loss = closure()
                loss.backward()
                optimizer.step()
            losses.append(loss.item())
        means.append(statistics.fmean(losses))
        if not math.isfinite(means[-1]):
            raise training.TrainingError(f"the loss is {means[-1]} after an epoch")
    model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    return means


def score(model: nn.Module, data: ImageData, part: str) -> float:
    """Accuracy in percent, float32."""
    return training.evaluate(model, getattr(data, part)).accuracy


# ---- cells


def narrow_width(cut: float) -> int:
    """The width of the first stage whose network has about ``1 - cut`` of the multiply-adds."""
    return round(16 * math.sqrt(1 - cut))


def network(width: int = 16) -> nn.Module:
    return models.cifar_resnet(20, in_channels=1, widths=(width, 2 * width, 4 * width))


@dataclass
class Lab:
    """One run: where its files are, the data, what to do while it goes."""

    folder: Path
    data: ImageData
    say: Callable[[str], None]
    filters: dict[str, int] = dataclasses.field(default_factory=dict)  # of each convolution to prune

    def dense(self, seed: int) -> nn.Module:
        """The trained dense network of a seed."""
        path = self.folder / f"dense-{self.data.size}-{seed}.safetensors"
        model = network()
        if not path.exists():
            torch.manual_seed(seed)
            model = network()
            start = time.thread_time()
            losses = train(model, self.data, DENSE, seed, 1, warmup=0.1)
            write_checkpoint(
                path, model.state_dict(), {"losses": losses, "seconds": time.thread_time() - start}
            )
            self.say(f"dense {seed}: losses {[round(x, 3) for x in losses]}")
        model.load_state_dict(read_checkpoint(path)[0])
        return model.eval()

    def learned(self, method: Method, seed: int) -> tuple[nn.Module, dict[str, Tensor], float]:
        """The network after group learning, its groups and the seconds that it took."""
        tried = (method.groups, method.order, method.update, method.strength, method.temperature)
        name = "-".join(map(str, ("learned", self.data.size, *tried, method.alpha_lr, method.warm, seed)))
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            model = self.dense(seed)
            total = int(LEARN["epochs"]) * math.ceil(TRAIN_IMAGES / BATCH)
            learner = dsprune.GroupLearner(
                model, self.data.example, groups=method.groups, strength=method.strength, total_steps=total,
                seed=seed, order=method.order, update=method.update, temperature=method.temperature,
                alpha_lr=method.alpha_lr,
            )  # fmt: skip
            if method.warm:
                start_groups = self.groups(dataclasses.replace(method, source="clustered"), model, seed)
                with torch.no_grad():
                    for layer, groups in start_groups.items():
                        hot = F.one_hot(groups, method.groups).t()
                        learner.logits[layer].copy_(method.warm * hot)
            start = time.thread_time()
            losses = train(model, self.data, LEARN, seed, 2, step=learner.step)
            tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
            tensors |= {f"groups.{k}": v for k, v in learner.assignment().items()}
            write_checkpoint(path, tensors, {"losses": losses, "seconds": time.thread_time() - start})
            self.say(f"{name}: losses {[round(x, 3) for x in losses]}")
        tensors, meta = read_checkpoint(path)
        model = network()
        model.load_state_dict(training.part_of(tensors, "model."))
        return model.eval(), training.part_of(tensors, "groups."), meta["seconds"]

    def groups(self, method: Method, model: nn.Module, seed: int) -> dict[str, Tensor]:
        """Groups of a trained network, without learning."""
        if not self.filters:
            infos = dsprune.prunable_convs(model, self.data.example)
            self.filters = {info.name: info.out_channels for info in infos}
        if method.source == "one":
            return {name: torch.zeros(count, dtype=torch.int64) for name, count in self.filters.items()}
        if method.source == "random":
            generator = torch.Generator().manual_seed(seed)
            return {
                name: torch.randperm(count, generator=generator) % method.groups
                for name, count in self.filters.items()
            }
        return dsprune.group_filters(
            model, self.data.example, method.groups, calibration(self.data, seed), seed=seed
        )

    def cell(self, method: Method, seed: int, cut: float) -> dict[str, Any]:
        """Make one network and score it."""
        data, seconds = self.data, {}
        content: dict[str, Any] = {"size": data.size, "method": method.name, "seed": seed, "cut": cut}
        validation: dict[str, float] = {}
        test: dict[str, float] = {}

        def timed(name: str, work: Callable[[], Any]) -> Any:
            start = time.thread_time()
            result = work()
            seconds[name] = round(time.thread_time() - start, 2)
            return result

        if method.source == "dense":
            model = self.dense(seed)
        elif method.source == "narrow":
            torch.manual_seed(seed)
            model = network(narrow_width(cut))
            # As many epochs as a pruned network has in all.
            settings = {**DENSE, "epochs": DENSE["epochs"] + FINETUNE["epochs"]}
            timed("train", lambda: train(model, data, settings, seed, 1, warmup=0.1))
            content["width"] = narrow_width(cut)
        else:
            images = calibration(data, seed)
            if method.source == "learned":
                model, assignment, seconds["learn"] = self.learned(method, seed)
            else:
                model = self.dense(seed)
                assignment = timed("groups", lambda: self.groups(method, model, seed))
            content["sizes"] = {
                name: sorted(torch.bincount(groups).tolist(), reverse=True)
                for name, groups in assignment.items()
            }
            validation["before the cut"] = score(model, data, "validation")
            more = (
                {}
                if method.importance == "magnitude"
                else {"importance": method.importance, "batches": images}
            )
            structure = timed(
                "structure",
                lambda: dsprune.find_structure(model, data.example, assignment, flops=cut, **more),
            )
            dsprune.apply_structure(model, structure)
            validation["cut"] = score(model, data, "validation")
            if method.reconstruct:
                timed("reconstruct", lambda: dsprune.reconstruct(model, structure, images))
                validation["reconstructed"] = score(model, data, "validation")
            else:
                timed("statistics", lambda: update_bn(images, model))
                model.eval()
                validation["statistics"] = score(model, data, "validation")
            test["not finetuned"] = score(model, data, "test")
            if cut != ONE_SHOT:
                content["losses"] = timed("finetune", lambda: train(model, data, FINETUNE, seed, 3))
        if cut != ONE_SHOT:
            packed = dsprune.pack(model, data.example).eval()
            validation["end"] = score(packed, data, "validation")
            test["end"] = score(packed, data, "test")
        found = dsprune.summary(model, data.example)
        content |= {
            "settings": dataclasses.asdict(method),
            "validation": validation,
            "test": test,
            "macs": found.macs,
            "params": found.params,
            "flops_cut": found.flops_cut("network"),
            "params_cut": found.params_cut("network"),
            "kept": kept_of(model),
            "seconds": seconds,
            "load": os.getloadavg()[0],
        }
        return content


def kept_of(model: nn.Module) -> dict[str, str]:
    """The (filter, channel) products of each convolution that are not zero, as compressed bits: what its time
    is measured by, here and elsewhere."""
    kept = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            bits = np.packbits(module.weight.detach().flatten(2).ne(0).any(-1).numpy())
            kept[name] = base64.b85encode(zlib.compress(bits.tobytes(), 9)).decode()
    return kept


def cells(seeds: int) -> list[tuple[Method, int, float]]:
    """All cells in the order of the work."""
    direct = ("one", "random", "clustered")
    fitted = ("one-r", "random-r", "clustered-r", "clustered2-r")
    tried = tuple(name for name, method in METHODS.items() if method.only_cut)
    todo: list[tuple[str, int, float]] = []
    for seed in range(seeds):
        todo.append(("dense", seed, 0.0))
        todo += [(name, seed, ONE_SHOT) for name in (*direct, *fitted)]
        todo += [(name, seed, cut) for cut in CUTS for name in (*direct, "narrow")]
    for name in ("first", "exact"):
        todo += [(name, seed, cut) for seed in range(seeds) for cut in CUTS]
    todo += [(name, 0, METHODS[name].only_cut) for name in tried]
    for seed in range(seeds):
        todo += [(name, seed, cut) for cut in CUTS for name in fitted]
    for name in ("first-prox", "exact-prox"):
        todo += [(name, seed, cut) for seed in range(seeds) for cut in CUTS]
    return [(METHODS[name], seed, cut) for name, seed, cut in todo]


def name_of(size: int, method: Method, seed: int, cut: float) -> str:
    return f"{size}-{method.name}-{seed}-{round(100 * cut)}"


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """The finished cells by name, of FOLDER and of the committed results."""
    found: dict[str, dict[str, Any]] = {}
    if RESULTS.exists():
        found |= read_json(RESULTS)["cells"]
    return found | {path.stem: read_json(path) for path in sorted((folder / "cells").glob("*.json"))}


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process may do a piece of work that others leave alone meanwhile."""
    for _ in range(2):
        try:
            with path.open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            text = path.read_text()
            if text.isdigit() and Path("/proc", text).exists():
                break
            path.unlink(missing_ok=True)  # of a process that is no more
            continue
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
        return
    yield False


def work(lab: Lab, seeds: int, only: Sequence[str] | None) -> None:
    """All cells that are not finished and that nobody else is at; a network that several begin with is made
    by one process."""
    while True:
        left = 0
        for method, seed, cut in cells(seeds):
            name = name_of(lab.data.size, method, seed, cut)
            if name in finished(lab.folder) or (only and method.name not in only):
                continue
            begins = method.source in ("dense", "learned") or cut == ONE_SHOT
            key = f"{method.name if method.source == 'learned' else 'dense'}-{seed}" if begins else name
            with claimed(lab.folder / f"{lab.data.size}-{key}.claim") as mine:
                ready = (
                    not mine or begins or (lab.folder / f"dense-{lab.data.size}-{seed}.safetensors").exists()
                )
                if not mine or not ready:
                    left += 1
                    continue
                if (lab.folder / "cells" / f"{name}.json").exists():  # meanwhile
                    break
                content = lab.cell(method, seed, cut)
                write_json(lab.folder / "cells" / f"{name}.json", content)
            lab.say(
                f"{name}: test {content['test']}, validation {content['validation']}, {content['seconds']}"
            )
            break
        else:
            if not left:
                return
            time.sleep(20)


# ---- the report


def rebuilt(cell: Mapping[str, Any]) -> nn.Module:
    """A network with the cell's zeros, the rest random: what its time depends on."""
    torch.manual_seed(0)
    model = network(cell.get("width", 16)).eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            bits = np.frombuffer(zlib.decompress(base64.b85decode(cell["kept"][name])), np.uint8)
            shape = module.weight.shape[:2]
            mask = torch.from_numpy(np.unpackbits(bits, count=shape.numel()).reshape(shape).copy())
            with torch.no_grad():
                module.weight.mul_(mask[:, :, None, None])
    return model


@torch.no_grad()
def latencies(found: Mapping[str, Mapping[str, Any]], batches: Sequence[int], rounds: int) -> dict[str, Any]:
    """By cell and batch: median and least milliseconds of CPU time of a call, packed, one thread. The
    networks take turns, whose first call is not counted."""
    calls: dict[tuple[str, int], Callable[[], Any]] = {}
    for name, cell in found.items():
        packed = dsprune.pack(rebuilt(cell), torch.zeros(1, 1, cell["size"], cell["size"])).eval()
        for batch in batches:
            x = torch.randn(batch, 1, cell["size"], cell["size"])
            calls[name, batch] = lambda packed=packed, x=x: packed(x)
    times: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            call()
            for _ in range(2 if key[1] > 1 else 10):
                start = time.thread_time()
                call()
                times[key].append(time.thread_time() - start)
    return {
        name: {
            str(batch): [round(1e3 * of(times[name, batch]), 4) for of in (statistics.median, min)]
            for batch in batches
        }
        for name in found
    }


def mean_sd(values: Sequence[float]) -> list[float]:
    """Mean and standard deviation of a sample."""
    return [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0]


def rows_of(found: Mapping[str, Mapping[str, Any]], size: int) -> list[dict[str, Any]]:
    """One row a method and cut, over its seeds."""
    rows = []
    for method in METHODS.values():
        own = [cell for cell in found.values() if cell["method"] == method.name and cell["size"] == size]
        for cut in sorted({cell["cut"] for cell in own}):
            cells_ = sorted((cell for cell in own if cell["cut"] == cut), key=lambda cell: cell["seed"])
            row: dict[str, Any] = {"method": method.name, "title": method.title, "cut": cut}
            row["seeds"] = [cell["seed"] for cell in cells_]
            for key in ("flops_cut", "params_cut", "macs", "params"):
                row[key] = statistics.fmean(cell[key] for cell in cells_)
            for key in ("not finetuned", "end"):
                if all(key in cell["test"] for cell in cells_):
                    row[key] = mean_sd([cell["test"][key] for cell in cells_])
            row["validation"] = {
                key: mean_sd([cell["validation"][key] for cell in cells_]) for key in cells_[0]["validation"]
            }
            for batch in cells_[0].get("latency", {}):
                row[f"ms_{batch}"] = mean_sd([cell["latency"][batch][0] for cell in cells_])
            rows.append(row)
    return rows


def at_latency(rows: Sequence[Mapping[str, Any]], ms: float, batch: int) -> float | None:
    """Accuracy of a method at a time, between its measured points on a logarithmic scale, or None."""
    points = sorted((math.log(row[f"ms_{batch}"][0]), row["end"][0]) for row in rows if "end" in row)
    for (left, low), (right, high) in pairwise(points):
        if left <= math.log(ms) <= right:
            return low + (high - low) * (math.log(ms) - left) / max(1e-12, right - left)
    return None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| | FLOPs cut | parameters cut | ms, batch 64 | ms, batch 1 | not finetuned | finetuned | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def shown(value: Sequence[float] | None, digits: int) -> str:
        return "" if value is None else f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"

    for row in sorted(rows, key=lambda row: row["cut"]):
        lines.append(
            f"| {row['title']} | {100 * row['flops_cut']:.1f}% | {100 * row['params_cut']:.1f}% | "
            f"{shown(row.get('ms_64'), 2)} | {shown(row.get('ms_1'), 3)} | "
            f"{shown(row.get('not finetuned'), 2)} | {shown(row.get('end'), 2)} | {len(row['seeds'])} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, Any]], path: Path, size: int) -> None:
    """Accuracy over latency, one curve a method, with the spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for method in METHODS.values():
        own = [row for row in rows if row["method"] == method.name and "end" in row and "ms_64" in row]
        if method.only_cut or not own:
            continue
        own.sort(key=lambda row: row["ms_64"][0])
        x, y = [row["ms_64"][0] for row in own], [row["end"][0] for row in own]
        error = [row["end"][1] for row in own]
        axis.errorbar(x, y, error, marker="o", capsize=3, linewidth=1.2, markersize=4, label=method.title)
    axis.set_xscale("log")
    axis.set_xlabel(f"ms for 64 images of {size} x {size}, packed, one core")
    axis.set_ylabel("test accuracy, % (mean and standard deviation over seeds)")
    axis.grid(color="#E5E5E5", linewidth=0.6)
    axis.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def report(folder: Path, size: int, rounds: int) -> None:
    """Times all finished networks in one run, and writes what is published."""
    found = finished(folder)
    mine = {name: cell for name, cell in found.items() if cell["size"] == size}
    for name, times in latencies(mine, (64, 1), rounds).items():
        found[name]["latency"] = times
    rows = rows_of(found, size)
    equal = {}
    by_method = {
        name: [row for row in rows if row["method"] == name and "end" in row and row["cut"]]
        for name in METHODS
    }
    for cut in CUTS:
        reference = [row for row in by_method["one"] if row["cut"] == cut]
        if reference:
            ms = reference[0]["ms_64"][0]
            values = {name: at_latency(own, ms, 64) for name, own in by_method.items()}
            equal[f"{cut:g}"] = {"ms_64": ms, **{k: v for k, v in values.items() if v is not None}}
    settings = {"dense": DENSE, "learn": LEARN, "finetune": FINETUNE, "batch": BATCH}
    content = {
        "network": "ResNet-20",
        "data": f"Fashion-MNIST, {TRAIN_IMAGES} training, {VALIDATION_IMAGES} validation images",
        "settings": settings,
        "calibration_images": CALIBRATION_IMAGES,
        "environment": {"torch": torch.__version__, "threads": 1, "load_while_timing": os.getloadavg()[0]},
        "at_the_latency_of_one_group": equal,
        "rows": {str(n): rows_of(found, n) for n in sorted({cell["size"] for cell in found.values()})},
        "cells": found,
    }
    write_json(RESULTS, content)
    draw(rows, PICTURE, size)
    print(table(rows))
    for cut, values in equal.items():
        print(cut, {key: round(value, 2) for key, value in values.items()})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the cells")
    parser.add_argument("--size", type=int, choices=(14, 28), default=14)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="methods to run")
    parser.add_argument("--report", action="store_true", help="time all networks, write what is published")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each network, for --report")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:7.1f} s] {text}", file=sys.stderr, flush=True)

    (options.out / "cells").mkdir(parents=True, exist_ok=True)
    if options.report:
        report(options.out, options.size, options.rounds)
        return 0
    if options.data is None:
        parser.error("--data is needed")
    work(Lab(options.out, load(options.data, options.size), say), options.seeds, options.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
