"""The chain kernel compiled for GPUs that are not here, for the blocks of ResNet-50's stages 1 and 2, pruned
and dense, as the planner chooses it on each of them: no stack, no local memory, matrix instructions, 16-byte
copies, and the shared memory that the host side counts on. Where less is there, the planner leaves the three
layers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import sass
import torch

from dsp_kernels import GroupLayout, backends, cost
from dsp_kernels.conv import chain
from dsprune import gpu

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.skipif(backends.interpreted(), reason="Triton interprets: nothing is compiled"),
    pytest.mark.timeout(2400),
]

CAPABILITIES = (80, 86, 89, 90, 100)
# Triton's name of the type, and what is multiplied.
PRECISIONS = {
    "fp16": ("fp16", torch.float16),
    "bf16": ("bf16", torch.bfloat16),
    "tf32": ("fp32", torch.float32),
    "float32": ("fp32", torch.float32),
}


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
    "stage 1, pruned": (56, halves(40, 40), full(40, 256), full(256, 40)),
    "stage 1, dense": (56, full(64, 64), full(64, 256), full(256, 64)),
    "stage 2, pruned": (28, halves(80, 88), full(88, 512), full(512, 80)),
    "stage 2, dense": (28, full(128, 128), full(128, 512), full(512, 128)),
}


@dataclass(frozen=True)
class Job:
    """``shape`` of SHAPES in a precision for an architecture."""

    shape: str
    precision: str
    capability: int

    @property
    def layouts(self) -> tuple[GroupLayout, GroupLayout, GroupLayout]:
        return SHAPES[self.shape][1:]

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision][1]

    @property
    def shared_memory(self) -> int:
        return cost.device(f"sm_{self.capability}").shared_memory

    def convs(self) -> list[cost.Conv]:
        size = SHAPES[self.shape][0]
        first, second, third = self.layouts
        return [
            cost.Conv(first, 32, (size, size), (3, 3), padding=(1, 1), activation="relu"),
            cost.Conv(second, 32, (size, size), residual=True, activation="relu"),
            cost.Conv(third, 32, (size, size), activation="relu"),
        ]

    def refused(self, shared_memory: int) -> str | None:
        with self.multiplying():
            return chain.refuses(self.convs(), self.dtype, shared_memory)

    def planned(self, shared_memory: int | None = None) -> bool:
        """Whether the planner puts a chain in the place of three layers that take a second each, on a device
        with so much of it for a block.
        """
        steps = [SimpleNamespace(conv=conv, name="", node=SimpleNamespace(name="")) for conv in self.convs()]
        alone = [SimpleNamespace(seconds=1.0, padding=SimpleNamespace(runs=1))] * 3
        where = cost.device(f"sm_{self.capability}")
        where = dataclasses.replace(where, shared_memory=shared_memory or where.shared_memory)
        with self.multiplying():
            row = gpu._chain_row(tuple(steps), alone, where, self.dtype, None, False)  # type: ignore[arg-type]
        return row is not None

    def multiplying(self) -> Any:
        """float32 as it is, or as TF32."""
        tf32 = "tf32" if self.precision == "tf32" else "ieee"
        return mock.patch.object(
            chain, "precision_of", lambda dtype: tf32 if dtype == torch.float32 else "half"
        )

    def config(self) -> chain.ChainConfig:
        with self.multiplying():
            return chain.config_of(
                self.layouts, self.dtype, shared_memory=self.shared_memory, arch=f"sm_{self.capability}"
            )


# Pruned blocks in all precisions; dense ones, which are wider, in one.
JOBS = [
    Job(shape, precision, capability)
    for shape in SHAPES
    for precision in (PRECISIONS if shape.endswith("pruned") else ["fp16"])
    for capability in CAPABILITIES
]


def name_of(job: Job) -> str:
    return f"{job.shape}-{job.precision}-sm_{job.capability}"


def compiled(job: Job, config: chain.ChainConfig, capability: int) -> Any:
    from dsp_kernels.conv import chain_kernels

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
        "PRECISION": "tf32" if job.precision == "tf32" else "ieee",
        "UPCAST": False,
    }
    element = f"*{PRECISIONS[job.precision][0]}"
    types = dict.fromkeys(("x", "residual", "stream", "following", "w1", "w2", "w3"), element)
    types |= {"b1": "*fp32", "b2": "*fp32", "b3": "*fp32", "steps": "*i32", "valid": "*i8", "ranges": "*i32"}
    types = {name: types.get(name, "i32") for name in chain_kernels.chain_forward.arg_names}
    return sass.compiled(
        chain_kernels.chain_forward, types, constants, capability, warps=config.warps, stages=config.stages
    )


def compile_and_read(job: Job, config: chain.ChainConfig) -> tuple[sass.Sass, int]:
    """The machine code, and its shared memory. For sm_89 the PTX of sm_86, as for the other kernels
    (test_triton_compile.py), which Triton keeps from the test before.
    """
    if job.capability == 89:
        built = compiled(job, config, 86)
        return sass.inspect(sass.assembled(built.asm["ptx"], 89)), built.metadata.shared
    built = compiled(job, config, job.capability)
    return sass.inspect(built.asm["cubin"]), built.metadata.shared


@pytest.mark.parametrize("job", JOBS, ids=name_of)
def test_machine_code(job: Job) -> None:
    assert job.planned()
    config = job.config()
    code, shared = compile_and_read(job, config)
    assert sass.faults(code, matrix=job.precision != "float32") == []
    assert code.registers <= 255
    expected = config.shared_bytes(job.dtype.itemsize)
    assert shared <= expected <= job.shared_memory
    assert shared >= 0.5 * expected, f"{shared} bytes of shared memory; the host counts on {expected}"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_where_shared_memory_does_not_hold_it_the_planner_leaves_three_layers(precision: str) -> None:
    job = Job("stage 2, pruned", precision, 86)
    with job.multiplying():
        least = chain.config_of(job.layouts, job.dtype, shared_memory=1).shared_bytes(job.dtype.itemsize)
    assert job.refused(least) is None and job.planned(least)
    reason = job.refused(least - 1)
    assert reason == f"takes {least} bytes of shared memory, a block has {least - 1}"
    assert not job.planned(least - 1)


def test_the_gate_sees_a_tile_that_spills() -> None:
    """128 pixels with four warps need more registers than there are: the gate says so."""
    job = Job("stage 1, dense", "fp16", 90)
    code, _ = compile_and_read(job, dataclasses.replace(job.config(), block_m=128))
    assert any("stack" in fault or "local" in fault for fault in sass.faults(code, matrix=True))
