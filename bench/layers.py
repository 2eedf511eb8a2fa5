"""Single layers on a CPU: the packed convolution against the dense forms of the same layer, taking turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dsprune
from bench.cases import Case, cases
from bench.environment import environment, peak_gflops
from dsp_kernels import GroupLayout
from dsp_kernels.program import Program
from dsprune.clock import medians
from dsprune.io import write_atomically
from dsprune.nn import PermutedGroupedConv2d

# Packed forms; the others are dense. "packed" and "merged" (as one group) are programs of one layer.
PACKED = ("packed", "merged", "operator")
IN_PLACE = "torch channels_last, converted"


@dataclass(frozen=True)
class LayerCase:
    """A packed layer of a network with the (C, H, W) that it reads there."""

    name: str
    layer: PermutedGroupedConv2d
    input_shape: tuple[int, int, int]

    def flops(self, batch: int) -> float:
        """Of the packed layer: 2 for a multiply and an add."""
        _, height, width = self.output_shape
        taps = self.layer.kernel_size[0] * self.layer.kernel_size[1]
        return 2.0 * batch * self.layer.layout.pairs * taps * height * width

    @property
    def output_shape(self) -> tuple[int, int, int]:
        with torch.device("meta"):
            out = F.conv2d(
                torch.empty(1, *self.input_shape),
                torch.empty(self.layer.out_channels, self.layer.in_channels, *self.layer.kernel_size),
                None,
                self.layer.stride,
                self.layer._inner_padding,
                self.layer.dilation,
            )
        return (int(out.shape[1]), int(out.shape[2]), int(out.shape[3]))


def layers_of(case: Case) -> Iterator[LayerCase]:
    """The packed layers of a network, one of each size and structure."""
    example = torch.randn(1, *case.input_shape)
    packed = dsprune.pack(case.make(), example)
    shapes: dict[str, tuple[int, int, int]] = {}
    hooks = [
        layer.register_forward_hook(
            lambda module, args, out, name=name: shapes.update({name: tuple(args[0].shape[1:])})
        )
        for name, layer in packed.layers()
    ]
    with torch.no_grad():
        packed(example)
    for hook in hooks:
        hook.remove()
    seen = set()
    for name, layer in packed.layers():
        assert isinstance(layer, PermutedGroupedConv2d)
        key = (layer.layout, layer.kernel_size, layer.stride, shapes[name])
        if key not in seen:
            seen.add(key)
            yield LayerCase(f"{case.name} {name}", layer, shapes[name])


def merged(layout: GroupLayout) -> GroupLayout:
    """One group: all live filters, reading every channel that somebody reads."""
    channels = sorted({c for group, _ in layout.groups for c in group})
    filters = sorted(f for _, group in layout.groups for f in group)
    return GroupLayout(layout.in_channels, layout.out_channels, [(channels, filters)] if filters else [])


def forms(case: LayerCase, batch: int) -> dict[str, Callable[[], Tensor]]:
    """What is compared: bias and activation inside everywhere, weights laid out ahead where a form can."""
    layer = case.layer
    x = torch.randn(batch, *case.input_shape)
    last = x.contiguous(memory_format=torch.channels_last)
    dense = layer.dense_weight().detach()
    dense_last = dense.contiguous(memory_format=torch.channels_last)
    bias = None if layer.bias is None else layer.bias.detach()
    geometry = (layer.stride, layer._inner_padding, layer.dilation)

    def act(out: Tensor) -> Tensor:
        if layer.activation == "relu":
            return out.relu_()
        return F.relu6(out, inplace=True) if layer.activation == "relu6" else out

    def program(layout: GroupLayout) -> Program:
        made = Program(case.input_shape)
        return made.build(
            made.conv(
                made.input,
                layout.pack(dense),
                layout,
                bias,
                kernel_size=layer.kernel_size,
                stride=layer.stride,
                padding=layer._inner_padding,
                dilation=layer.dilation,
                activation=layer.activation,
            )
        )

    packed, one_group = program(layer.layout), program(merged(layer.layout))
    return {
        "packed": lambda: packed(x),
        "merged": lambda: one_group(x),
        "operator": lambda: layer(x),
        "torch": lambda: act(F.conv2d(x, dense, bias, *geometry)),
        "torch channels_last": lambda: act(F.conv2d(last, dense_last, bias, *geometry)),
        # In a packed network's place: NCHW comes in and goes out.
        IN_PLACE: lambda: act(
            F.conv2d(x.contiguous(memory_format=torch.channels_last), dense_last, bias, *geometry)
        ).contiguous(),
    }


def judged(times: dict[str, float], flops: float, peak: float) -> dict[str, Any]:
    """What the times of a row say. Packed is a program's step or an operator, whichever is faster: alone, a
    program copies its input and output, which it does not between the layers of a network.
    """
    packed = min(times["packed"], times["operator"])
    dense = {name: time for name, time in times.items() if name not in PACKED}
    placed = min(dense["torch"], dense.pop(IN_PLACE))
    best = min(dense, key=lambda name: dense[name])
    rate = 1e-6 * flops / packed
    return {
        "packed_ms": packed,
        "best_dense": best,
        "speed_up": dense[best] / packed,
        "speed_up_in_place": placed / packed,
        "gflops": rate,
        "share_of_peak": rate / peak,
    }


def run_layer(case: LayerCase, batch: int, threads: int, seconds: float, peak: float) -> dict[str, Any]:
    """One row; ``peak`` is the GFLOP/s of one core."""
    torch.set_num_threads(threads)
    calls = forms(case, batch)
    with torch.no_grad():
        expected = calls["torch"]()
        worst = max(float((calls[name]() - expected).abs().max()) for name in calls)
    times = medians(calls, seconds=seconds)
    layout = case.layer.layout
    return {
        "layer": case.name,
        "input": list(case.input_shape),
        "output": list(case.output_shape),
        "kernel": list(case.layer.kernel_size),
        "stride": list(case.layer.stride),
        "groups": [[len(channels), len(filters)] for channels, filters in layout.groups],
        "kept": layout.pairs / (layout.in_channels * layout.out_channels),
        "batch": batch,
        "threads": threads,
        "times_ms": times,
        **judged(times, case.flops(batch), peak * threads),
        "difference": worst,
    }


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown, and below them what the worst are."""
    lines = [
        f"One core's measured peak: {results['peak_gflops']:.0f} GFLOP/s.",
        "",
        "| layer | in | out | kernel, stride | kept | batch | threads | best dense, ms | packed ms "
        "| as one group, ms | speed-up | in place | GFLOP/s | share of peak |",
        "|" + "---|" * 14,
    ]
    for row in results["layers"]:
        times = row["times_ms"]
        lines.append(
            f"| {row['layer']} | {'x'.join(map(str, row['input']))} | {'x'.join(map(str, row['output']))} "
            f"| {row['kernel'][0]}x{row['kernel'][1]}, {row['stride'][0]} | {100 * row['kept']:.0f}% "
            f"| {row['batch']} | {row['threads']} | {times[row['best_dense']]:.3f} ({row['best_dense']}) "
            f"| {row['packed_ms']:.3f} | {times['merged']:.3f} "
            f"| {row['speed_up']:.2f}x | {row['speed_up_in_place']:.2f}x | {row['gflops']:.0f} "
            f"| {100 * row['share_of_peak']:.0f}% |"
        )
    rows = results["layers"]
    if rows:
        slower = [row for row in rows if row["speed_up"] < 1]
        placed = [row for row in rows if row["speed_up_in_place"] < 1]
        lines += [
            "",
            f"{len(slower)} of {len(rows)} rows are slower than their best dense form where that is given "
            f"its input in channels_last; {len(placed)} where NCHW comes in and goes out, as in a packed "
            "network's place (torch, converted where that is faster).",
        ]
    return "\n".join(lines) + "\n"


def run(
    out: Path, *, suite: str, checkpoints: Path | None, seconds: float, threads: tuple[int, ...], only: str
) -> dict[str, Any]:
    """Measures the layers of a suite's networks whose name holds ``only``; writes layers.json and layers.md
    into ``out`` after each network.
    """
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "environment": environment(),
        "seconds_a_form": seconds,
        "peak_gflops": peak_gflops(),
        "layers": [],
    }
    for case in cases(checkpoints, suite):
        if only not in case.name:
            continue
        for layer in layers_of(case):
            for count in threads:
                for batch in case.batches:
                    results["layers"].append(run_layer(layer, batch, count, seconds, results["peak_gflops"]))
        write_atomically(out / "layers.json", (json.dumps(results, indent=1) + "\n").encode())
        write_atomically(out / "layers.md", table(results).encode())
    return results
