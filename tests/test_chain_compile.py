"""The chain kernel compiled for GPUs that are not here, for the blocks of ResNet-50's stages 1 and 2, pruned
and dense, as the planner chooses it on each of them: no stack, no local memory, matrix instructions, 16-byte
copies, and the shared memory that the host side counts on. Where less is there, the planner leaves the three
layers.
"""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import kernels
from bench import machine_code as sass
from bench.kernels import Triple
from dsp_kernels import backends, cost
from dsp_kernels.conv import chain
from dsprune import gpu

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.skipif(backends.interpreted(), reason="Triton interprets: nothing is compiled"),
    pytest.mark.timeout(2400),
]

# Shared memory filled at once, in place of a pipeline's buffers.
WEIGHTS = re.compile(r"ttg\.local_alloc %")


def refused(job: Triple, shared_memory: int) -> str | None:
    with job.multiplying():
        return chain.refuses(job.convs(), job.dtype, shared_memory)


def planned(job: Triple, shared_memory: int | None = None) -> bool:
    """Whether the planner puts a chain in the place of three layers that take a second each, on a device
    with so much of it for a block.
    """
    steps = [SimpleNamespace(conv=conv, name="", node=SimpleNamespace(name="")) for conv in job.convs()]
    alone = [SimpleNamespace(seconds=1.0, padding=SimpleNamespace(runs=1))] * 3
    where = cost.device(f"sm_{job.capability}")
    where = dataclasses.replace(where, shared_memory=shared_memory or where.shared_memory)
    with job.multiplying():
        row = gpu._chain_row(tuple(steps), alone, where, job.dtype, None, False)  # type: ignore[arg-type]
    return row is not None


# Pruned blocks in all precisions; the others in one.
JOBS = [
    Triple(shape, precision, capability)
    for shape in kernels.SHAPES
    for precision in (kernels.PRECISIONS if shape.endswith("pruned") else ["fp16"])
    for capability in kernels.CAPABILITIES
]


def with_each_change(job: Triple) -> bool:
    """Half precision of all shapes on one architecture, of one on two more; the rest by night."""
    first = job.shape == "stage 1, pruned" and job.capability in (80, 100)
    return job.precision == "fp16" and (job.capability == 90 or first)


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(job, id=job.name, marks=[] if with_each_change(job) else [pytest.mark.nightly])
        for job in JOBS
    ],
)
def test_machine_code(job: Triple) -> None:
    assert planned(job)
    config = job.config()
    code, built = job.job(config).read()
    # Copies of a tile of 16 filters' weights are narrow, and those of the input go through the first-level
    # cache where weights stay.
    wide = config.copy == 16 or config.tile_n > 16
    assert sass.faults(code, matrix=job.precision != "float32", wide=wide) == []
    assert code.registers <= 255
    expected = config.shared_bytes(job.dtype.itemsize)
    shared = built.metadata.shared
    assert shared <= expected <= job.shared_memory
    assert shared >= 0.5 * expected, f"{shared} bytes of shared memory; the host counts on {expected}"
    ttgir = built.asm["ttgir"]
    assert config.resident == (
        job.capability >= 90 and job.precision in ("fp16", "bf16") and job.shape.startswith("stage 1")
        and (job.capability < 100 or job.shape != "stage 1, three tiles")
    )  # fmt: skip
    if config.resident:
        before, _, after = ttgir.partition("scf.for")
        parts = config.stream // config.block_s
        assert len(WEIGHTS.findall(before)) == parts * (1 + config.tiles) and not WEIGHTS.search(after)
    elif job.precision != "float32":
        # Entries come a step ahead: the copies of all steps but two are under way after a wait.
        assert min(sass.waits(code.matrix_loops()[0])) == 2 * (config.stages - 2)


def test_what_a_launch_compiles_is_what_the_gate_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsp_kernels.conv import chain_kernels

    job, found = Triple("stage 1, pruned", "fp16", 90), []
    kernel = chain_kernels.chain_forward

    class Recorder:
        def __getitem__(self, grid: object) -> Any:
            def launch(*arguments: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
                found.append((sass.launched(kernel, arguments, constants, 90), num_warps, num_stages))

            return launch

    monkeypatch.setattr(chain, "machine", lambda device: ("sm_90", 132))
    weights = [
        torch.zeros(layout.weight_numel(taps), dtype=torch.float16)
        for layout, taps in zip(job.layouts, (9, 1, 1), strict=True)
    ]
    made = chain.Chain(
        job.layouts,
        weights,
        [None] * 3,
        kernel=(3, 3),
        padding=(1, 1),
        shared_memory=job.shared_memory,
    )
    assert made.config == job.config() and made.config.resident
    gate = job.job()
    monkeypatch.setattr(chain_kernels, "chain_forward", Recorder())
    for batch, size in ((1, 1), (2, 8), (16, 16)):
        x = torch.zeros(batch, 40, size, size, dtype=torch.float16)
        made._launch(x, *(x.new_zeros(batch, c, size, size) for c in (256, 256, 40)))
    expected = sass.source(kernel, dict(gate.types), gate.values())
    for source, warps, stages in found:
        assert (source.signature, source.constants) == (expected.signature, expected.constants)
        assert {k: v for k, v in source.attrs.items() if v} == expected.attrs
        assert (warps, stages) == (gate.warps, gate.stages)
    assert len(found) == 3


@pytest.mark.parametrize("precision", kernels.PRECISIONS)
def test_where_shared_memory_does_not_hold_it_the_planner_leaves_three_layers(precision: str) -> None:
    job = Triple("stage 2, pruned", precision, 86)
    with job.multiplying():
        least = chain.config_of(job.layouts, job.dtype, shared_memory=1).shared_bytes(job.dtype.itemsize)
    assert refused(job, least) is None and planned(job, least)
    reason = refused(job, least - 1)
    assert reason == f"takes {least} bytes of shared memory, a block has {least - 1}"
    assert not planned(job, least - 1)


def test_the_gate_sees_a_tile_that_spills() -> None:
    """128 pixels with four warps need more registers than there are: the gate says so."""
    job = Triple("stage 1, dense", "fp16", 90)
    code, _ = job.job(dataclasses.replace(job.config(), block_m=128)).read()
    assert any("stack" in fault or "local" in fault for fault in sass.faults(code, matrix=True))
