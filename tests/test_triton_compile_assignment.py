"""Every kernel that group assignment launches, compiled for GPUs that are not here, and its machine code
read: no stack, no local memory, and loads of 16 bytes of the weights.

What is compiled is recorded from the launcher itself: float32 for all architectures (for two of them the
small kernels that do not touch the weights), the other dtypes for one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import sass
import torch

from dsp_kernels import backends

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.skipif(backends.interpreted(), reason="Triton interprets: nothing is compiled"),
    pytest.mark.timeout(2400),
]

CAPABILITIES = (80, 86, 89, 90, 100)
GROUPS = 8  # the most column sums at a time
POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64"}
TYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
WIDE_LOAD = re.compile(r"^LDG\.E(\.\w+)*\.128")
WIDE_STORE = re.compile(r"^STG\.E(\.\w+)*\.128")


@dataclass(frozen=True)
class Job:
    """A kernel by name, the types of its arguments, its compile-time arguments, and how it is launched."""

    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int
    capability: int = 90

    @property
    def name(self) -> str:
        told = {"ELEMENT", "MODE", "DIRECTED", "TOWARDS", "STORE", "MIXED", "KEEPING", "DIVIDE"}
        parts = [str(v) if isinstance(v, str) else k for k, v in self.constants if k in told and v]
        if "ELEMENT" not in dict(self.constants) and "ACC" in dict(self.constants):
            parts.append(dict(self.constants)["ACC"])
        return f"sm_{self.capability}-{self.kernel}-" + "-".join(parts)


def record(dtype: torch.dtype, offset: int = 0) -> list[Job]:
    """What the launcher starts for weights of ``dtype`` that begin ``offset`` elements after an aligned
    address."""
    from dsp_kernels.assignment import triton as room
    from dsp_kernels.assignment.plan import SHIPPED

    jobs: dict[Job, None] = {}

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        warps = constants.pop("num_warps")
        types = [POINTERS[a.dtype] if isinstance(a, torch.Tensor) else "i32" for a in arguments]
        found = {k: getattr(v, "name", v) if k in ("ELEMENT", "ACC") else v for k, v in constants.items()}
        names = tuple(zip(kernel.arg_names, types, strict=False))
        jobs[Job(kernel.__name__, names, tuple(found.items()), warps)] = None

    def weight(*shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return torch.zeros(count + 64, dtype=dtype)[offset : offset + count].view(shape)

    acc = torch.float64 if dtype == torch.float64 else torch.float32
    weights, moves, kept = ([weight(64, 64, 3, 3), weight(128, 64, 1, 1)] for _ in range(3))
    logs = [torch.zeros(GROUPS, w.shape[0], dtype=acc) for w in weights]
    grad, ones, matrix = torch.ones(2, dtype=acc), [1.0, 1.0], torch.cat(logs, 1)
    with (
        mock.patch.object(room, "launch", launch),
        mock.patch.object(room, "tiling", lambda size, interpreted: SHIPPED[size]),
    ):
        room.group_lasso(weights, logs, ones)
        room.group_lasso_backward(grad, weights, logs, ones)
        room.group_lasso_hessian(grad, moves, logs, weights, logs, ones)
        network = room.Network(weights, GROUPS, ones)
        network.shrink(weights, matrix, ones)
        network.shrink(weights, matrix, ones, proximal=True)
        network.shrink(weights, matrix, ones, keeps=kept)
        network.copy(weights, kept)
        network.log_gradient(weights, matrix, ones, None)
        network.log_gradient(weights, matrix, ones, moves)
        if dtype == acc:
            for divide in (False, True):
                room.sample_groups(matrix, matrix, 0.5, divide)
            room.sample_groups_backward(matrix, matrix, 0.5)
            room.update_logits(matrix, matrix, [1.0] * 7, matrix, matrix, matrix, matrix)
    return list(jobs)


def compile_and_read(job: Job) -> sass.Sass:
    from dsp_kernels.assignment import triton_kernels

    kernel = getattr(triton_kernels, job.kernel)
    constants = dict(job.constants)
    for name in {"ELEMENT", "ACC"} & constants.keys():
        constants[name] = getattr(triton_kernels.tl, TYPES[constants[name]])
    built = sass.compiled(kernel, dict(job.types), constants, job.capability, warps=job.warps, stages=3)
    return sass.inspect(built.asm["cubin"])


def on(job: Job, capability: int) -> Job:
    return Job(job.kernel, job.types, job.constants, job.warps, capability)


def all_jobs() -> list[Job]:
    if backends.interpreted():
        return []
    jobs = [
        on(job, capability)
        for job in record(torch.float32)
        for capability in (CAPABILITIES if "ELEMENT" in dict(job.constants) else (80, 90))
    ]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        jobs += [job for job in record(dtype) if job not in jobs]
    return jobs


JOBS = all_jobs()


def faults(job: Job, code: sass.Sass) -> list[str]:
    """What a kernel of ours must not be; empty if all is well."""
    out = []
    if code.stack:
        out.append(f"a stack of {code.stack} bytes")
    if local := code.count(sass.LOCAL):
        out.append(f"{local} accesses to local memory")
    if narrow := sum(map(sass.is_narrow_load, code.instructions)):
        out.append(f"{narrow} loads of one or two bytes")
    if "ELEMENT" in dict(job.constants):
        if not code.count(WIDE_LOAD):
            out.append("no loads of 16 bytes")
        if job.kernel in ("apply_forward", "copy_forward") and not code.count(WIDE_STORE):
            out.append("no stores of 16 bytes")
    return out


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_machine_code(job: Job) -> None:
    assert faults(job, compile_and_read(job)) == []


def test_all_kernels_are_there() -> None:
    from dsp_kernels.assignment import triton_kernels

    text = Path(triton_kernels.__file__).read_text(encoding="utf-8")
    entries = set(re.findall(r"^def ([a-z]\w*)\(", text, re.MULTILINE))
    assert entries == {job.kernel for job in JOBS}


def test_the_gate_fails_for_weights_that_are_not_aligned() -> None:
    job = next(job for job in record(torch.bfloat16, offset=1) if job.kernel == "squares_forward")
    assert dict(job.constants)["VEC"] == 1
    found = faults(job, compile_and_read(job))
    assert "no loads of 16 bytes" in found and any("one or two bytes" in fault for fault in found)
