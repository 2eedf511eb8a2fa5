"""Every shipped configuration of the Triton convolution, compiled for GPUs that are not here, and its machine
code read: no stack, no local memory, matrix instructions, 16-byte copies, no narrow loads in the K loop.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import kernels
from bench import machine_code as sass
from bench.kernels import Job, conv_job
from dsp_kernels import GroupLayout, backends
from dsp_kernels.conv import launches
from dsp_kernels.conv.launches import Launch

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.skipif(backends.interpreted(), reason="Triton interprets: nothing is compiled"),
    pytest.mark.timeout(2400),
]

# Shared memory that one block may have.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

NARROW = Launch(64, 64, 64, 4, 4, 0)
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
SHIPPED = kernels.shipped()
EXTRA = {
    f"sm_{capability}-{name}": conv_job(NARROW, "half", capability, **changes)
    for capability in (80, 90, 100)
    for name, changes in VARIANTS.items()
    if capability < 100 or name not in MEMORY
}
HELPERS = {
    f"sm_{capability}-{name}": kernels.make(name, "fp16", constants, capability)
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
FLOAT16 = ("x", "*fp16")


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
    code, built = job.read()
    constants = dict(job.constants)
    half = FLOAT16 in job.types
    exact = constants["PRECISION"] == "ieee" and not half
    through = constants["ALIGN"] * (2 if half else 4) < 16  # the first-level cache
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
            dataclasses.replace(job, capability=c).compiled().asm["ptx"].replace(f"sm_{c}", "")
            for c in (86, 89)
        )
        assert a == b


@pytest.mark.parametrize("job", by_name(EXTRA))
def test_variant(job: Job) -> None:
    code, _ = job.read()
    assert sass.faults(code, matrix=True, wide=dict(job.constants)["ALIGN"] == 8) == []


@pytest.mark.parametrize("job", by_name(HELPERS))
def test_helper_kernel(job: Job) -> None:
    code, _ = job.read()
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
        good, _ = job.read()
        bad, _ = dataclasses.replace(job, module="listed_kernels").read()
    finally:
        del sys.modules["listed_kernels"]
    assert sass.faults(good, matrix=True) == []
    found = sass.faults(bad, matrix=True)
    assert any("one or two bytes" in fault for fault in found), found


def test_a_new_image_size_compiles_nothing() -> None:
    """No size is a compile-time constant or specialised on."""
    from dsp_kernels.conv import chain_kernels, triton_kernels

    named = [getattr(triton_kernels, name) for name in triton_kernels.__all__ if name.endswith("_kernel")]
    for kernel in [*named, chain_kernels.chain_forward]:
        runtime = [p for p in kernel.params if not p.is_constexpr and kernels.is_size(p.name)]
        assert all(p.do_not_specialize for p in runtime), [p.name for p in runtime if not p.do_not_specialize]


@dataclasses.dataclass(frozen=True)
class Launched:
    """A kernel of a module, launched on the CPU: what would be compiled is kept, nothing runs."""

    kernel: Any
    found: list[Any]

    def __getitem__(self, grid: object) -> Any:
        def launch(*arguments: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
            source = sass.launched(self.kernel, arguments, constants, 90)
            self.found.append((self.kernel.__name__, told(source), num_warps, num_stages))

        return launch


def told(source: Any) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """All that the compiler is told of a kernel's arguments: types, constants, alignment."""
    return source.signature, source.constants, {k: v for k, v in source.attrs.items() if v}


class Recorder:
    """The Triton kernels, recorded."""

    def __init__(self, module: Any) -> None:
        self.module, self.found = module, []  # type: Any, list[Any]

    def __getattr__(self, name: str) -> Launched:
        return Launched(getattr(self.module, name), self.found)


@pytest.mark.parametrize("batch", [1, 2, 16], ids=["a size of one", "two", "sixteen"])
@pytest.mark.parametrize("key", ["conv/half/n32/large", "conv/half/n64/large/taps", "conv/ieee/n16/large"])
def test_what_a_launch_compiles_is_what_the_gates_read(
    key: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Types, constants and what is known of pointers, whatever the sizes: multiples of 16 and ones too."""
    from dsp_kernels.conv import triton as room
    from dsp_kernels.conv import triton_kernels

    recorder = Recorder(triton_kernels)
    monkeypatch.setattr(room, "_kernels", lambda: recorder)
    gate = SHIPPED[f"sm_90-{key}"]
    row = launches.rows_of("sm_90").get(key) or launches.rows_of("default")[key]
    assert isinstance(row, Launch)
    half = "half" in key
    layout = GroupLayout(16, 16, [(range(10), range(8)), (range(3, 16), range(8, 16))])
    x = torch.zeros(batch, 16, 8, 8, dtype=torch.float16 if half else torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = x.new_zeros(layout.pairs * 9)
    out = torch.empty_like(x)
    with room.launching(row):
        room.forward(
            *(x, weight, layout.plan(), x.new_zeros(16), out, 16, (3, 3), (1, 1), (1, 1), (1, 1), "relu")
        )
        room.grad_weight(out, x, layout.plan(), weight.numel(), (3, 3), (1, 1), (1, 1), (1, 1))
    by_kernel = {name: (digest, warps, stages) for name, digest, warps, stages in recorder.found}
    assert set(by_kernel) == {
        *("conv_kernel", "grad_weight_kernel", "grad_weight_reduce_kernel", "prepare_weight_kernel")
    }
    for job in (gate, kernels.grad_weight_job(row, "half" if half else "ieee", 90)):
        source = sass.source(job.function(), dict(job.types), job.values())
        assert by_kernel[job.kernel] == (told(source), row.warps, row.stages), job.kernel
