"""Whole networks on a CPU: packed against the best of the dense forms, in one process, taking turns."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.nn.utils import prune

import dsprune
from bench.baselines import narrow, without_zeros
from bench.cases import Case, cases
from bench.environment import environment, pinned
from bench.memory import in_process
from dsprune.clock import in_turns, medians
from dsprune.io import write_atomically
from dsprune.recipes.runtimes import onnx_file, runtime_forms
from dsprune.recipes.timing import dense_forms

TOLERANCE = 1e-4


def authors_program(folder: Path, groups: int) -> nn.Module:
    """The authors' released program for ResNet-20, from a clone of their repository."""
    found = sorted(
        p for p in folder.rglob("*.pt*") if "resnet20" in p.name.lower() and f"g{groups}" in p.name.lower()
    )
    if not found:
        raise FileNotFoundError(f"--authors: no TorchScript of ResNet-20 with {groups} groups under {folder}")
    return torch.jit.load(
        str(found[0]), map_location="cpu"
    ).eval()  # a TorchScript archive: code, no pickled objects


def run_case(
    case: Case,
    threads: tuple[int, ...],
    seconds: float,
    inductor: bool,
    authors: Path | None,
    progress: Callable[[str], None],
    rounds: int = 1,
) -> list[dict[str, Any]]:
    """The cells of one network, all of them ``rounds`` times; a form's time is the median over the rounds, so
    that what disturbs the machine for some seconds does not decide about a cell.

    On one thread a time is processor time, on more wall-clock time; ``rounds_ms`` has both. Beside the packed
    network stand the dense one before pruning, in all forms, and in the runtimes a narrower network with as
    many multiply-adds as the packed one, where its architecture can be made narrower.
    """
    model = case.make()
    example = torch.randn(1, *case.input_shape)
    packed = dsprune.pack(model, example)
    counted = dsprune.summary(packed, example)
    whole = without_zeros(model)
    thin: tuple[nn.Module, int] | None = None
    with contextlib.suppress(ValueError):
        thin = narrow(model, example, counted.macs, 8 if case.input_shape[1] > 64 else 4)
    files = [onnx_file(network, example) for network in (whole, *([thin[0]] if thin else []))]
    cells = [(count, batch) for count in threads for batch in case.batches]
    measured: dict[tuple[int, int], list[dict[str, Any]]] = {cell: [] for cell in cells}
    worst = dict.fromkeys(cells, 0.0)
    dense: list[str] = []
    load = os.getloadavg()
    for turn in range(rounds):
        for count, batch in cells:
            torch.set_num_threads(count)
            which = f", round {turn + 1} of {rounds}" if rounds > 1 else ""
            progress(f"{case.name}, batch {batch}, {count} thread{'s' if count > 1 else ''}{which}")
            images = torch.randn(batch, *case.input_shape)
            torch._dynamo.reset()
            with pinned(count):
                calls: dict[str, Callable[[], Any]] = dict(
                    dense_forms(whole, images, inductor=inductor, file=files[0])
                )
                dense = list(calls)
                if thin is not None:
                    narrow_calls = runtime_forms(thin[0], images, file=files[1])[0]
                    calls.update({f"narrow {name}": call for name, call in narrow_calls.items()})
                if authors is not None and case.name.startswith("authors"):
                    theirs = authors_program(authors, int(case.name[-1]))
                    calls["authors"] = lambda theirs=theirs, images=images: theirs(images)  # type: ignore[misc]
                calls["packed"] = lambda images=images: packed(images)  # type: ignore[misc]
                with torch.no_grad():
                    expected = model(images)
                    off = float(
                        (packed(images) - expected).abs().max() / max(1.0, float(expected.abs().max()))
                    )
                if not off <= worst[count, batch]:  # NaN too
                    worst[count, batch] = off
                times_now = in_turns(calls, seconds=seconds)
            measured[count, batch].append({name: value.to_json() for name, value in times_now.items()})
    rows = []
    for (count, batch), turns in measured.items():
        clock = "cpu_median" if count == 1 else "wall_median"
        times = {name: statistics.median(turn[name][clock] for turn in turns) for name in turns[0]}
        best = min(dense, key=lambda name: times[name])
        thin_forms = [name for name in times if name.startswith("narrow ")]
        best_narrow = min(thin_forms, key=lambda name: times[name]) if thin_forms else None
        rows.append(
            {
                "case": case.name,
                "batch": batch,
                "threads": count,
                "clock": clock,
                "times_ms": times,
                "rounds_ms": turns,
                "best_dense": best,
                "speed_up": times[best] / times["packed"],
                "best_narrow": best_narrow,
                "over_narrow": times[best_narrow] / times["packed"] if best_narrow else None,
                "narrow_macs": thin[1] if thin else None,
                "over_authors": times["authors"] / times["packed"] if "authors" in times else None,
                "difference": worst[count, batch],
                "outputs_agree": worst[count, batch] <= TOLERANCE,
                "macs": counted.macs,
                "dense_macs": counted.dense_macs,
                "gflops": 2e-6 * counted.macs * batch / times["packed"],
                "program": packed.program_reason,
                "load": load,
            }
        )
    return rows


def train_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-3)

    def step() -> torch.Tensor:
        with torch.enable_grad():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        return loss.detach()

    return step


def run_training(case: Case, threads: tuple[int, ...], seconds: float) -> list[dict[str, Any]]:
    """One finetuning step in packed form against one of the masked dense network (best memory format)."""
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        model = case.make().train()
        images = torch.randn(case.images_trained, *case.input_shape)
        labels = torch.randint(10, (case.images_trained,))
        packed = dsprune.pack(model, images[:2], train=True)
        masked = copy.deepcopy(model)
        for module in masked.modules():
            if isinstance(module, nn.Conv2d) and bool((module.weight == 0).any()):
                prune.custom_from_mask(module, "weight", (module.weight != 0).float())
        last = dsprune.graph.clean_copy(model).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for module in last.modules():
            if isinstance(module, nn.Conv2d) and bool((module.weight == 0).any()):
                prune.custom_from_mask(module, "weight", (module.weight != 0).float())
        calls = {
            "masked": train_step(masked, images, labels),
            "masked channels_last": train_step(
                last, images.contiguous(memory_format=torch.channels_last), labels
            ),
            "packed": train_step(packed, images, labels),
        }
        times = medians(calls, seconds=seconds)
        best = min(("masked", "masked channels_last"), key=lambda name: times[name])
        rows.append(
            {
                "case": case.name,
                "batch": case.images_trained,
                "threads": count,
                "times_ms": times,
                "best_dense": best,
                "speed_up": times[best] / times["packed"],
            }
        )
    return rows


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values)) if values else float("nan")


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| network | MACs left | batch | threads | best dense | ms | best narrow | its MACs / packed | ms "
        "| packed ms | over dense | over narrow | over the authors' program | GFLOP/s "
        "| memory, packed / frozen dense, MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["inference"]:
        memory = row.get("memory")
        shown = f"{memory['packed'] / 1e6:.1f} / {memory['frozen'] / 1e6:.1f}" if memory else ""
        over = row.get("over_authors")
        theirs = f"{over:.1f}x" if over else ""
        thin, over_thin = "| |", ""
        if row["best_narrow"]:
            name = row["best_narrow"].removeprefix("narrow ")
            ratio = row["narrow_macs"] / row["macs"]
            thin = f"{name} | {ratio:.2f} | {row['times_ms'][row['best_narrow']]:.3f}"
            over_thin = f"{row['over_narrow']:.2f}x"
        lines.append(
            f"| {row['case']} | {100 * row['macs'] / row['dense_macs']:.0f}% "
            f"| {row['batch']} | {row['threads']} | "
            f"{row['best_dense']} | {row['times_ms'][row['best_dense']]:.3f} | {thin} "
            f"| {row['times_ms']['packed']:.3f} | "
            f"{row['speed_up']:.2f}x | {over_thin} | {theirs} | {row['gflops']:.0f} | {shown} |"
        )
    if results["training"]:
        lines += [
            "",
            "| training step | batch | threads | masked ms | masked channels_last ms | packed ms "
            "| over the better | over masked |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in results["training"]:
            times = row["times_ms"]
            lines.append(
                f"| {row['case']} | {row['batch']} | {row['threads']} | {times['masked']:.1f} "
                f"| {times['masked channels_last']:.1f} | {times['packed']:.1f} | {row['speed_up']:.2f}x "
                f"| {times['masked'] / times['packed']:.2f}x |"
            )
    lines += ["", "| group of rows | geometric mean | least |", "|---|---|---|"]
    for name, values in summary_groups(results).items():
        lines.append(f"| {name} | {geometric_mean(values):.2f}x | {min(values):.2f}x |")
    return "\n".join(lines) + "\n"


def summary_groups(results: dict[str, Any]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    for row in results["inference"]:
        kind = "-".join(row["case"].split("-")[:2])
        groups.setdefault(kind, []).append(row["speed_up"])
        if row["batch"] == 1:
            groups.setdefault(f"{kind}, batch 1", []).append(row["speed_up"])
        if "%" in row["case"]:
            network, cut = row["case"].split("-")[1], row["case"].rsplit("-", 1)[1]
            groups.setdefault(f"{network}, {cut} cut, over dense", []).append(row["speed_up"])
            if row["over_narrow"]:
                groups.setdefault(f"{network}, {cut} cut, over narrow", []).append(row["over_narrow"])
    for row in results["training"]:
        groups.setdefault("training step", []).append(row["speed_up"])
    return groups


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = results["inference"]
    labels = [f"{r['case']}  b{r['batch']} t{r['threads']}" for r in rows]
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.19 * len(rows)), layout="constrained")
    colours = {1: "#4477aa", 2: "#ee6677"}
    axis.barh(
        range(len(rows)),
        [r["speed_up"] for r in rows],
        color=[colours.get(r["threads"], "#228833") for r in rows],
    )
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), labels, fontsize=6)
    axis.invert_yaxis()
    axis.set_xlabel("times faster than the best dense form")
    axis.set_title("Packed networks on a CPU (blue: 1 thread, red: 2 threads)", fontsize=9)
    axis.margins(y=0.005)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run(
    out: Path,
    *,
    suite: str,
    checkpoints: Path | None,
    authors: Path | None,
    seconds: float,
    rounds: int,
    threads: tuple[int, ...],
    inductor: bool,
    memory: bool,
    only: str = "",
) -> dict[str, Any]:
    """Runs the suites' networks whose name holds ``only``; writes networks.json, networks.md and networks.png
    into ``out`` after each network.
    """
    console = Console(stderr=True)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "environment": environment(),
        "seconds_a_cell": seconds,
        "rounds": rounds,
        "inference": [],
        "training": [],
    }
    warnings.simplefilter("ignore")
    for case in cases(checkpoints, suite):
        if only not in case.name:
            continue
        rows = run_case(case, threads, seconds, inductor, authors, lambda text: console.print(text), rounds)
        if memory:
            for row in rows:
                if row["threads"] == threads[0]:
                    held = {
                        f: in_process(case.name, f, row["batch"], row["threads"], checkpoints)
                        for f in ("packed", "frozen")
                    }
                    row["memory"] = held if None not in held.values() else None
        results["inference"] += rows
        if case.images_trained:
            results["training"] += run_training(case, threads, 4 * seconds)  # few steps fit into a second
        write_atomically(out / "networks.json", (json.dumps(results, indent=1) + "\n").encode())
        write_atomically(out / "networks.md", table(results).encode())
    plot(results, out / "networks.png")
    return results
