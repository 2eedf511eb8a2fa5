"""The report on machine code: parser and sums on a listing written by hand, and the committed table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import kernels, machine_code, sass
from dsp_kernels import backends, cost

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results" / "kernels.json"

USAGE = """
Resource usage:
 Function first:
  REG:168 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:704 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function second:
  REG:255 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:704 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def lines(*texts: str) -> str:
    """Instructions as nvdisasm writes them; labels end in a colon."""
    out = [
        text if text.startswith(".") else f"        /*{16 * i:04x}*/                   {text} ;"
        for i, text in enumerate(texts)
    ]
    return "\n".join(out) + "\n"


# A loop of two 64x32x16 products with copies of 16, 8 and 4 bytes, one group of which may be on its way; its
# wait stands behind the end, as the compiler likes to put it.
LISTING = (
    '\t.section\t.text.first,"ax",@progbits\n'
    + lines(
        "S2R R0, SR_TID.X",
        ".L_x_0:",
        "LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]",
        "LDGSTS.E.64 [R5], desc[UR4][R2.64]",
        "LDGSTS.E [R6], desc[UR4][R2.64]",
        "LDGDEPBAR",
        "LDG.E.U16 R7, desc[UR4][R2.64]",
        "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24",
        "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24",
        "FADD R1, R1, R2",
        "IADD3 R3, R3, 0x1, RZ",
        "LDS R8, [R9]",
        "BRA `(.L_x_1)",
        ".L_x_2:",
        "EXIT",
        ".L_x_1:",
        "DEPBAR.LE SB0, 0x1",
        "@P0 BRA `(.L_x_0)",
        "BRA `(.L_x_2)",
    )
    + '\t.section\t.text.second,"ax",@progbits\n'
    + lines("STL [R1], R2", "HMMA.16816.F32 R4, R8, R12, R4", "EXIT")
)


def test_a_listing_of_two_kernels() -> None:
    found = machine_code.parse(USAGE, LISTING)
    assert list(found) == ["first", "second"]
    first, second = found["first"], found["second"]
    assert (first.registers, first.stack, second.registers, second.stack) == (168, 0, 255, 8)
    assert len(first.instructions) == 16 and second.instructions[1].startswith("HMMA")
    (loop,) = first.loops
    assert len(loop) == 13 and loop[-1].startswith("BRA") and not any(i == "EXIT" for i in loop)
    assert second.loops == ()
    assert machine_code.waits(loop) == [1]
    assert "a stack of 8 bytes" in machine_code.faults(second, matrix=True)


def test_the_figures_of_a_loop_by_hand() -> None:
    code = machine_code.parse(USAGE, LISTING)["first"]
    kernel = sass.Kernel("first", 90, code, warps=4, shared=96 * 1024)
    # 168 registers are 5376 a warp, 21504 a block: three fit; shared memory holds two.
    assert kernel.blocks() == 2
    assert sass.Kernel("first", 90, code, 4, 1024).blocks() == 3
    assert sass.Kernel("first", 100, code, 4, 1024, tensor_columns=512).blocks() == 1
    row = sass.loop_row(kernel, code.loops[0])
    assert row["classes"] == {
        **{"matrix": 2, "copy": 3, "load": 1, "shared": 1, "wait": 2, "float": 1, "branch": 2, "integer": 1}
    }
    assert row["copies"] == {"16": 1, "8": 1, "4": 1} and row["loads"] == {"2": 1}
    assert row["multiply_adds"] == 2 * 64 * 32 * 16
    # 28 bytes a thread in the group that may be on its way, of two blocks of 128 threads.
    assert row["under_way"] == 28 * 128 * 2
    where = cost.device("sm_90")
    assert row["needed"] == round(where.bytes_per_second() * sass.LATENCY / 132)
    clock = 989e12 / (2 * 2048 * 132)
    assert row["cycles"] == {
        "matrix": 32.0,
        "cache": round(30 * 128 / (where.l2_bandwidth / 132 / clock), 1),
        "issue": 13.0,
        "latency": round(30 * 128 * sass.LATENCY * clock / (28 * 128 * 2), 1),
    }
    assert row["bound"] == "latency"


@pytest.mark.parametrize(
    ("instruction", "warps", "expected"),
    [
        ("HMMA.16816.F32.BF16 R4", 4, 4 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32 R4", 8, 8 * 16 * 8 * 8),
        ("HGMMA.64x128x16.F32 R24", 8, 2 * 64 * 128 * 16),
        ("UTCHMMA gdesc[UR4]", 4, 0),
        ("FFMA R1, R2, R3, R4", 4, 0),
    ],
)
def test_multiply_adds_of_matrix_instructions(instruction: str, warps: int, expected: int) -> None:
    assert sass.multiply_adds(instruction, warps) == expected


def test_new_rows_take_the_place_of_old_ones() -> None:
    old = [
        {"architecture": "sm_100", "kernel": "a", "v": 1},
        {"architecture": "sm_90", "kernel": "a", "v": 2},
    ]
    new = [{"architecture": "sm_90", "kernel": "a", "v": 3}, {"architecture": "sm_80", "kernel": "b", "v": 4}]
    assert [r["v"] for r in sass.merged(old, new)] == [4, 3, 1]


def committed() -> dict[tuple[str, str], dict[str, object]]:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["kernels"]
    return {(r["architecture"], r["kernel"]): r for r in rows}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_committed_table_has_every_kernel_that_is_shipped(capability: int) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    if backends.interpreted():
        pytest.skip("Triton interprets: nothing is compiled")
    of = {kernel for architecture, kernel in committed() if architecture == f"sm_{capability}"}
    assert {name for name, _ in sass.triton_jobs(capability)} <= of
    assert {"cuda/conv2d_kernel<F16>", "cuda/lasso_columns_kernel<Single>"} <= of


def test_a_kernel_is_what_the_committed_table_says() -> None:
    """A kernel that was changed needs `python -m bench.sass --only NAME --out bench/results`."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if backends.interpreted():
        pytest.skip("Triton interprets: nothing is compiled")
    if json.loads(RESULTS.read_text(encoding="utf-8"))["versions"]["triton"] != triton.__version__:
        pytest.skip("the table was made with another Triton")
    name = "conv/half/n32/large"
    job = kernels.shipped()[f"sm_90-{name}"]
    assert sass.row(sass.of_job(name, job)) == committed()["sm_90", name]
