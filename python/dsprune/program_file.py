"""A packed network as one file that runs without Python: for ``dsp_kernels.runtime`` and for C."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import fx

from dsp_kernels import runtime
from dsp_kernels.program import Program

from .io import target_file, write_atomically
from .pack import PackedNetwork
from .run.native import NativeRunner
from .run.segments import Plan, plan

__all__ = ["export_program"]

FURTHEST = 1024  # image sizes up to this one, and some beyond, are held against the graph's assumptions


def _image_shape(input_shape: Any) -> tuple[int, int, int]:
    expected = "(channels, height, width) or (batch, channels, height, width), each an int of at least 1"
    if not isinstance(input_shape, Sequence) or isinstance(input_shape, str):
        raise TypeError(f"input_shape: expected {expected}, got {type(input_shape).__name__} {input_shape!r}")
    sizes = list(input_shape)
    if any(isinstance(size, bool) or not isinstance(size, (int, np.integer)) for size in sizes):
        raise TypeError(f"input_shape: expected {expected}, got {tuple(sizes)}")
    if len(sizes) not in (3, 4) or min(sizes) < 1:
        raise ValueError(f"input_shape: expected {expected}, got {tuple(sizes)}")
    channels, height, width = map(int, sizes[-3:])
    return channels, height, width


def _program(packed: PackedNetwork, shape: tuple[int, int, int]) -> Program:
    """The native program for images of a shape. Raises ValueError with what is not native in the network."""
    x = torch.zeros(1, *shape)
    if not packed.fused:
        reason = packed.unfused_reason or "its layers were replaced one by one, as for training"
        raise ValueError(f"packed: is no native program: {reason}")
    runner = packed.runner_for((x,))
    if not isinstance(runner, NativeRunner):
        raise ValueError("packed: is on a GPU; programs run on the CPU: move it there with .to('cpu')")
    with torch.no_grad():
        found = runner.plan([x])
    if found is None:
        raise ValueError(f"packed: is no native program: {runner.reason}")
    program = _whole(found)
    if program is None:
        names = ", ".join(f"{name} ({count})" for name, count in found.torch.items())
        raise ValueError(
            f"packed: is no native program as a whole: in torch run {names or 'its outputs'}; {found.reason}"
        )
    return program


def _whole(found: Plan) -> Program | None:
    """The one program that a plan is, for any batch, or None."""
    whole = found.whole and len(found.segments) == 1 and not found.exact
    program = found.segments[0].program if whole else None
    return program if program is not None and len(program.input_shapes) == 1 else None


def _open_sizes(packed: PackedNetwork, program: Program) -> tuple[int, int] | None:
    """The least height and width from which on every size runs by these very steps, or None where only the
    program's own size does.
    """
    shape = program.input_shapes[0]
    channels, *own = shape
    limits = packed._limits
    if limits is None or packed.network_for((torch.zeros(1, *shape),)) is not packed.network:
        return None

    def admitted(height: int, width: int) -> bool:
        return limits.admit([(1, channels, height, width)])

    # Each size up to the furthest beside the own other one, and both together; beyond it, some.
    runs = []
    for at in (lambda s: (s, own[1]), lambda s: (own[0], s), lambda s: (s, s)):
        beyond = all(admitted(*at(s)) for s in (FURTHEST + 1, 3 * FURTHEST + 2, 100 * FURTHEST + 7))
        refused = [s for s in range(1, FURTHEST + 1) if not admitted(*at(s))]
        runs.append((refused[-1] if refused else 0) + 1 if beyond else FURTHEST + 1)
    least = max(runs[0], runs[2]), max(runs[1], runs[2])
    if least[0] > own[0] or least[1] > own[1]:
        return None
    others = [least, (own[0] + 1, own[1] + 2), (2 * own[0] + 1, own[1]), (own[0], 2 * own[1] + 3)]
    for height, width in others:
        with torch.no_grad():  # not through the runner, which would keep all of these
            found = plan(cast(fx.GraphModule, packed.network), [torch.empty(0, channels, height, width)])
        other = _whole(found)
        if other is None or not program.same_steps(other):
            return None
    return least


def export_program(packed: PackedNetwork, path: str | os.PathLike[str], input_shape: Sequence[int]) -> None:
    """Writes a packed network as a program file, which runs without torch and without Python.

    ``dsp_kernels.runtime.load(path)`` runs it on NumPy arrays, ``dsp_model_load`` of ``dsp_runtime.h`` in C;
    both give the bits of ``packed(x)`` on the native backend. The file holds the program's steps and float32
    weights, the names and shapes of input and output, a version and a checksum. Any batch size runs; other
    image sizes do where the graph and the steps are the same for them, from the smallest such size on.

    Args:
        packed: from ``pack`` or ``load``, on the CPU, that takes one image tensor and runs as one native
            program (``packed.program_reason`` is None); several outputs are ``output0``, ``output1``, ...
        path: the file to write. Replaced atomically; its folder is made where it is missing.
        input_shape: (C, H, W) or (N, C, H, W) of the images, in pixels.

    Raises:
        TypeError: ``packed`` is no ``PackedNetwork``, ``path`` no path, ``input_shape`` no sizes. ValueError:
        another number of sizes or one below 1, a shape that the network does not take, a network that is not
        native as a whole, with the operators that are not; RuntimeError: the compiled module is missing, or
        the file does not give the packed network's bits (hooks change what it computes, say). OSError: the
        file cannot be written. An older file is then untouched.
    """
    if not isinstance(packed, PackedNetwork):
        raise TypeError(f"packed: expected a PackedNetwork, got {type(packed).__name__}")
    target_file(path)
    shape = _image_shape(input_shape)
    program = _program(packed, shape)
    graph = cast(fx.GraphModule, packed.network_for((torch.zeros(1, *shape),))).graph
    name = next(node.name for node in graph.nodes if node.op == "placeholder")
    count = len(program.output_shapes)
    outputs = ["output"] if count == 1 else [f"output{i}" for i in range(count)]
    data = program.file([name], outputs, _open_sizes(packed, program))
    _compare(packed, data, shape)
    write_atomically(path, data)


def _compare(packed: PackedNetwork, data: bytes, shape: tuple[int, int, int]) -> None:
    """Runs the file beside the packed network. Raises RuntimeError where one bit differs."""
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = [leaf for leaf in torch.utils._pytree.tree_leaves(packed(x)) if leaf is not None]
    with runtime.load(data, threads=torch.get_num_threads()) as network:
        given = network(x.numpy())
    results = given if isinstance(given, tuple) else (given,)
    same = len(results) == len(expected) and all(
        np.array_equal(result.view(np.int32), leaf.numpy().view(np.int32))
        for result, leaf in zip(results, expected, strict=True)
    )
    if not same:
        raise RuntimeError(
            "packed: the program's outputs are not the packed network's, in order and bit by bit"
        )
