"""Every kernel that group assignment launches, compiled for GPUs that are not here, and its machine code
read: no stack, no local memory, and loads of 16 bytes of the weights.

What is compiled is recorded from the launcher itself: float32 for all architectures (for two of them the
small kernels that do not touch the weights), the other dtypes for one.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bench import kernels
from bench import machine_code as sass
from bench.kernels import Job
from dsp_kernels import backends

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.skipif(backends.interpreted(), reason="Triton interprets: nothing is compiled"),
    pytest.mark.timeout(2400),
]

WIDE_LOAD = re.compile(r"^LDG\.E(\.\w+)*\.128")
WIDE_STORE = re.compile(r"^STG\.E(\.\w+)*\.128")


def all_jobs() -> list[Job]:
    if backends.interpreted():
        return []
    jobs = [
        job
        for capability in kernels.CAPABILITIES
        for job in kernels.assignment_jobs(torch.float32, capability)
        if capability in (80, 90) or "ELEMENT" in dict(job.constants)
    ]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        jobs += [job for job in kernels.assignment_jobs(dtype) if job not in jobs]
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


@pytest.mark.parametrize("job", JOBS, ids=kernels.assignment_name)
def test_machine_code(job: Job) -> None:
    assert faults(job, job.read()[0]) == []


def test_all_kernels_are_there() -> None:
    from dsp_kernels.assignment import triton_kernels

    text = Path(triton_kernels.__file__).read_text(encoding="utf-8")
    entries = set(re.findall(r"^def ([a-z]\w*)\(", text, re.MULTILINE))
    assert entries == {job.kernel for job in JOBS}


def test_the_gate_fails_for_weights_that_are_not_aligned() -> None:
    job = next(
        job for job in kernels.assignment_jobs(torch.bfloat16, offset=1) if job.kernel == "squares_forward"
    )
    assert dict(job.constants)["VEC"] == 1
    found = faults(job, job.read()[0])
    assert "no loads of 16 bytes" in found and any("one or two bytes" in fault for fault in found)
