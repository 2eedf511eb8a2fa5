"""Every shipped configuration of the Triton convolution, compiled for GPUs that are not here, and its machine
code read: no stack, no local memory, matrix instructions, 16-byte copies, no narrow loads in the K loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sass

from dsp_kernels import backends
from dsp_kernels.conv import launches
from dsp_kernels.conv import triton as room

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.skipif(backends.interpreted(), reason="Triton interprets: nothing is compiled"),
    pytest.mark.timeout(2400),
]

CAPABILITIES = (80, 86, 89, 90, 100)
# Shared memory that one block may have.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

_POINTERS = {
    **{"items": "*i32", "entries": "*i32", "read": "*i16", "outputs": "*i32", "filter_chunks": "*i32"},
    **{"index": "*i32", "position": "*i32", "sums": "*fp32"},
    **dict.fromkeys(("x", "weight", "bias", "residual", "out", "grad", "packed", "tiles"), "{dtype}"),
}


@dataclass(frozen=True)
class Job:
    """A kernel by name, the data's type, the compile-time arguments, and how it is launched."""

    kernel: str
    dtype: str
    constants: tuple[tuple[str, Any], ...]
    capability: int
    warps: int = 4
    stages: int = 3


def compiled(job: Job, capability: int, module: str = "dsp_kernels.conv.triton_kernels") -> Any:
    import importlib

    kernel = getattr(importlib.import_module(module), job.kernel)
    types = {name: _POINTERS.get(name, "i32").format(dtype=f"*{job.dtype}") for name in kernel.arg_names}
    return sass.compiled(kernel, types, dict(job.constants), capability, warps=job.warps, stages=job.stages)


def compile_and_read(job: Job, module: str = "dsp_kernels.conv.triton_kernels") -> tuple[sass.Sass, Any]:
    """The machine code, and what Triton built.

    Triton writes the same PTX for sm_89 as for sm_86 (a test holds it to that): it is compiled once, by the
    test before, whose result Triton keeps.
    """
    if job.capability == 89:
        built = compiled(job, 86, module)
        return sass.inspect(sass.assembled(built.asm["ptx"], 89)), built
    built = compiled(job, job.capability, module)
    return sass.inspect(built.asm["cubin"]), built


def conv_job(
    launch: room.Launch, precision: str, capability: int, dtype: str | None = None, **changes: Any
) -> Job:
    align = launch.copy // (2 if precision == "half" else 4)
    constants: dict[str, Any] = {
        "BLOCK_M": launch.BLOCK_M,
        "BLOCK_N": launch.BLOCK_N,
        "BLOCK_K": launch.BLOCK_K,
        "SPLIT": 1,
        "ALIGN": align,
        "TAIL": False,
        "POINTWISE": False,
        "PARTIAL": True,
        "ACTIVATION": 1,
        "HAS_BIAS": True,
        "HAS_RESIDUAL": True,
        "OUT_ALIGN": 8,
        "RESIDUAL_ALIGN": 8,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "WIDE": False,
        "UPCAST": False,
    } | changes
    if constants["SPLIT"] == 1:
        constants["sums"] = None
    for name, flag in (("bias", "HAS_BIAS"), ("residual", "HAS_RESIDUAL")):
        if not constants[flag]:
            constants[name] = None
    dtype = dtype or ("fp16" if precision == "half" else "fp32")
    return Job("conv_kernel", dtype, tuple(constants.items()), capability, launch.warps, launch.stages)


def grad_weight_job(launch: room.Launch, precision: str, capability: int) -> Job:
    align = 8 if precision == "half" else 4
    constants = {
        "BLOCK_M": launch.BLOCK_M,
        "BLOCK_N": launch.BLOCK_N,
        "BLOCK_K": launch.BLOCK_K,
        "ALIGN": align,
        "TAIL": False,
        "GRAD_ALIGN": align,
        "GRAD_TAIL": False,
        "POINTWISE": False,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "WIDE": False,
        "UPCAST": False,
    }
    dtype = "fp16" if precision == "half" else "fp32"
    return Job("grad_weight_kernel", dtype, tuple(constants.items()), capability, launch.warps, launch.stages)


def shipped() -> dict[str, Job]:
    """By name, every configuration of the launch table that a device of each capability may get. One
    configuration's capabilities follow one another: what they share is compiled once.
    """
    jobs: dict[str, Job] = {}
    table = launches.read(launches.SHIPPED)
    wanted: dict[tuple[str, launches.Launch], list[int]] = {}
    for capability in CAPABILITIES:
        rows = table["default"] | table.get(f"sm_{capability}", {})
        verified = {f"{key}+verified": row for key, row in table.get(f"sm_{capability}+verified", {}).items()}
        assert all(row.warps == 4 for row in rows.values()), "eight warps are for verified devices"
        for key, launch in (rows | verified).items():
            if isinstance(launch, launches.Launch):  # chains: test_chain_compile.py
                wanted.setdefault((key, launch), []).append(capability)
    for (key, launch), capabilities in wanted.items():
        for capability in capabilities:
            op, precision = key.removesuffix("+verified").split("/")[:2]
            make = grad_weight_job if op == "grad_weight" else conv_job
            job = make(launch, precision, capability)
            if job not in jobs.values():
                jobs[f"sm_{capability}-{key}"] = job
    return jobs


NARROW = room.Launch(64, 64, 64, 4, 4, 0)
VARIANTS: dict[str, dict[str, Any]] = {
    "pointwise": {"POINTWISE": True},
    "without holes": {"PARTIAL": False},
    "bfloat16": {"dtype": "bf16"},
    "split": {"SPLIT": 4, "HAS_BIAS": False, "HAS_RESIDUAL": False},
    "2^31 pixels": {"WIDE": True},
    "scattered filters": {"OUT_ALIGN": 1, "RESIDUAL_ALIGN": 1},
    "NCHW output": {"OUT_ALIGN": 0, "RESIDUAL_ALIGN": 0},
    "pixels aligned to 4 channels": {"ALIGN": 4},
    "pixels aligned to 2 channels": {"ALIGN": 2},
}
# How loads and stores are cut does not depend on what multiplies: not compiled for each architecture.
MEMORY = ("scattered filters", "NCHW output", "pixels aligned to 4 channels", "pixels aligned to 2 channels")
SHIPPED = shipped()
EXTRA = {
    f"sm_{capability}-{name}": conv_job(NARROW, "half", capability, **changes)
    for capability in (80, 90, 100)
    for name, changes in VARIANTS.items()
    if capability < 100 or name not in MEMORY
}
HELPERS = {
    f"sm_{capability}-{name}": Job(name, "fp16", tuple(constants.items()), capability)
    for capability in (80, 90, 100)
    for name, constants in {
        "conv_reduce_kernel": {
            "BLOCK_M": 64, "BLOCK_N": 64, "SPLIT": 4, "ACTIVATION": 2, "HAS_BIAS": True, "HAS_RESIDUAL": True,
            "OUT_ALIGN": 8, "RESIDUAL_ALIGN": 8, "WIDE": False, "UPCAST": False,
        },
        "prepare_weight_kernel": {"BLOCK": 1024},
        "grad_weight_reduce_kernel": {"BLOCK": 1024, "ROUND": False},
    }.items()
}  # fmt: skip


def by_name(jobs: dict[str, Job]) -> list[Any]:
    """With each change: large problems in half precision, and all of one architecture. The rest by night."""
    out = []
    for name, job in jobs.items():
        large = "-conv/half" in name and "/large" in name and job.capability in (80, 100)
        marks = [] if job.capability == 90 or large else [pytest.mark.nightly]
        out.append(pytest.param(job, id=name, marks=marks))
    return out


@pytest.mark.parametrize("job", by_name(SHIPPED))
def test_shipped_configuration(job: Job) -> None:
    code, built = compile_and_read(job)
    constants = dict(job.constants)
    exact = constants["PRECISION"] == "ieee" and job.dtype == "fp32"
    through = constants["ALIGN"] * (2 if job.dtype == "fp16" else 4) < 16  # the first-level cache
    assert sass.faults(code, matrix=not exact, wide=not through) == []
    # With holes, two loops: steps without holes, and steps with.
    loops = code.matrix_loops()
    assert len(loops) == (2 if job.kernel == "conv_kernel" else 1)
    assert not through or all(any(sass.COPY.match(i) and ".64" in i for i in loop) for loop in loops)
    assert built.metadata.shared <= SHARED[job.capability]
    # The pipeline is as deep as asked for: so many buffers a tile, and the copies of all steps but two under
    # way after a wait. Were loads in the loop indirect, there would be two buffers and waits for everything.
    assert min(sass.buffers(built.asm["ttgir"])) >= job.stages - 1
    for loop, groups in zip(loops, (2, 3), strict=False):
        assert min(sass.waits(loop)) == groups * (job.stages - 2), sass.waits(loop)


def test_sm_89_gets_the_ptx_of_sm_86() -> None:
    for name in ("conv/half/n32/small", "grad_weight/tf32"):
        job = SHIPPED[f"sm_89-{name}"]
        a, b = (
            compiled(job, capability).asm["ptx"].replace(f"sm_{capability}", "") for capability in (86, 89)
        )
        assert a == b


@pytest.mark.parametrize("job", by_name(EXTRA))
def test_variant(job: Job) -> None:
    code, _ = compile_and_read(job)
    assert sass.faults(code, matrix=True, wide=dict(job.constants)["ALIGN"] == 8) == []


@pytest.mark.parametrize("job", by_name(HELPERS))
def test_helper_kernel(job: Job) -> None:
    code, _ = compile_and_read(job)
    assert code.stack == 0 and code.count(sass.LOCAL) == 0


def test_the_gate_fails_for_an_index_list_in_the_k_loop(tmp_path: Path) -> None:
    """The kernel with its chunks' hints taken away: channels by a list, as nothing but a list."""
    import importlib.util
    import sys

    from dsp_kernels.conv import triton_kernels

    text = Path(triton_kernels.__file__).read_text(encoding="utf-8")
    chunks = "offset = tl.max_contiguous(tl.multiple_of(dy * x_h + dx * x_w + start + k % 8, ALIGN), ALIGN)"
    assert text.count(f"            {chunks}\n") == 1
    listed = text.replace(f"            {chunks}\n", "            offset = dy * x_h + dx * x_w + start\n")
    listed = listed.replace("entry = entries + (first * (BLOCK_K // 8) + k // 8) * 2",
                            "entry = entries + (first * BLOCK_K + k) * 2")  # fmt: skip
    assert listed.count("first * BLOCK_K + k) * 2") == 1
    listed = listed.replace("entry += BLOCK_K // 4", "entry += BLOCK_K * 2")
    path = tmp_path / "listed_kernels.py"
    path.write_text(listed, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("listed_kernels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["listed_kernels"] = module
    try:
        spec.loader.exec_module(module)
        job = conv_job(NARROW, "half", 80, PARTIAL=False)
        good, _ = compile_and_read(job)
        bad, _ = compile_and_read(job, "listed_kernels")
    finally:
        del sys.modules["listed_kernels"]
    assert sass.faults(good, matrix=True) == []
    found = sass.faults(bad, matrix=True)
    assert any("one or two bytes" in fault for fault in found), found


def test_a_new_image_size_compiles_nothing() -> None:
    """No size is a compile-time constant or specialised on."""
    from dsp_kernels.conv import triton_kernels

    for name in triton_kernels.__all__:
        kernel = getattr(triton_kernels, name)
        runtime = [p for p in kernel.params if not p.is_constexpr and p.name not in _POINTERS]
        assert all(p.do_not_specialize for p in runtime), [p.name for p in runtime if not p.do_not_specialize]
