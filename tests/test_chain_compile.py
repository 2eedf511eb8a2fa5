"""The chain kernel compiled for GPUs that are not here, for the blocks of ResNet-50's stages 1 and 2, pruned
and dense: no stack, no local memory, matrix instructions, 16-byte copies, and the shared memory that the host
side counts on.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import sass

from dsp_kernels import GroupLayout, backends
from dsp_kernels.conv import chain

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.skipif(backends.interpreted(), reason="Triton interprets: nothing is compiled"),
    pytest.mark.timeout(600),
]

SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
DTYPE = {"fp16": 2, "bf16": 2}


def halves(channels: int, filters: int) -> GroupLayout:
    """Two groups that share a third of the channels, with a boundary inside a chunk."""
    a, b = 2 * channels // 3 + 1, channels // 3
    return GroupLayout(
        channels,
        filters,
        [(range(a), range(filters // 2)), (range(b, channels), range(filters // 2, filters))],
    )


def full(channels: int, filters: int) -> GroupLayout:
    return GroupLayout(channels, filters, [(range(channels), range(filters))])


SHAPES = {
    "stage 1, pruned": [halves(40, 40), full(40, 256), full(256, 40)],
    "stage 1, dense": [full(64, 64), full(64, 256), full(256, 64)],
    "stage 2, pruned": [halves(80, 88), full(88, 512), full(512, 80)],
    "stage 2, dense": [full(128, 128), full(128, 512), full(512, 128)],
}
# Every shape on the reference architecture, the others on the heaviest that they take.
JOBS = [(shape, 90, "fp16") for shape in SHAPES] + [
    ("stage 1, pruned", 80, "bf16"),
    ("stage 2, pruned", 80, "fp16"),
    ("stage 2, pruned", 86, "fp16"),
    ("stage 2, pruned", 100, "bf16"),
]


def compile_and_read(
    shape: str, capability: int, dtype: str, kernel: str = "chain_forward"
) -> tuple[sass.Sass, int, int]:
    """In a process of its own: the machine code, its shared memory and what the host counts on, in bytes."""
    import torch

    from dsp_kernels.conv import chain_kernels

    config = chain.config_of(
        SHAPES[shape], torch.float16, shared_memory=SHARED[capability], arch=f"sm_{capability}"
    )
    constants: dict[str, Any] = {
        "CS": config.stream,
        "C3": config.following,
        "T": config.tiles,
        "HOLES": config.holes,
        "TILE_N": config.tile_n,
        "N3": config.n3,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "BLOCK_S": config.block_s,
        "PRECISION": "ieee",
        "UPCAST": False,
    }
    types = dict.fromkeys(("x", "residual", "stream", "following", "w1", "w2", "w3"), f"*{dtype}")
    types |= {"b1": "*fp32", "b2": "*fp32", "b3": "*fp32", "steps": "*i32", "valid": "*i8", "ranges": "*i32"}
    function = getattr(chain_kernels, kernel)
    types = {name: types.get(name, "i32") for name in function.arg_names}
    built = sass.compiled(function, types, constants, capability, warps=config.warps, stages=config.stages)
    return sass.inspect(built.asm["cubin"]), built.metadata.shared, config.shared_bytes(DTYPE[dtype])


def test_machine_code() -> None:
    with ProcessPoolExecutor(2) as pool:
        found = list(pool.map(compile_and_read, *zip(*JOBS, strict=True)))
    for (shape, capability, dtype), (code, shared, expected) in zip(JOBS, found, strict=True):
        where = f"{shape}, sm_{capability}, {dtype}: "
        assert sass.faults(code, matrix=True) == [], where
        assert code.registers <= 255, where
        assert shared <= SHARED[capability], f"{where}{shared} bytes of shared memory"
        assert 0.5 * expected <= shared <= expected, f"{where}{shared} bytes of shared memory, not {expected}"


def test_the_gate_sees_a_tile_that_spills() -> None:
    """128 pixels with four warps need more registers than there are: the gate says so."""
    import dataclasses

    real = chain.config_of
    try:
        chain.config_of = lambda *a, **k: dataclasses.replace(real(*a, **k), block_m=128)  # type: ignore
        code, _, _ = compile_and_read("stage 1, dense", 90, "fp16")
    finally:
        chain.config_of = real
    assert any("stack" in fault or "local" in fault for fault in sass.faults(code, matrix=True))
