"""The CUDA kernels as they were compiled into the module, and their tables: neither needs a device."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.machine_code import kernel_of
from dsp_kernels import GroupLayout, available_backends
from dsp_kernels.backends import native_module

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "dsp_kernels" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
THREADS = 128
REGISTERS = 65536  # of a multiprocessor, on every device from sm_80 on
# Kernel -> blocks that are to fit on a multiprocessor at once (its DSP_KERNEL bounds).
BLOCKS = {
    "conv2d_kernel": 3,
    "conv2d_finish_kernel": 3,
    "conv2d_grad_weight_kernel": 3,
    "conv2d_prepare_kernel": 4,
    "conv2d_add_weight_kernel": 4,
    "lasso_columns_kernel": 4,
    "lasso_turn_kernel": 4,
    "lasso_apply_kernel": 4,
    "lasso_norms_kernel": 4,
    "lasso_total_kernel": 4,
    "lasso_rows_kernel": 4,
    "sample_forward_kernel": 4,
    "sample_backward_kernel": 4,
}
MAIN, STORED, SIZES = {"F16", "Bf16", "Tf32", "F32"}, {"F16", "Bf16", "F32"}, {"t", "j"}  # 16 and 32 bits
ELEMENTS, SUMS = {"Half", "Brain", "Single", "Double"}, {"f", "d"}
INSTANCES = {
    "conv2d_kernel": MAIN,
    "conv2d_grad_weight_kernel": MAIN,
    "conv2d_finish_kernel": STORED,
    "conv2d_add_weight_kernel": STORED,
    "conv2d_prepare_kernel": SIZES,
    "lasso_columns_kernel": ELEMENTS,
    "lasso_turn_kernel": ELEMENTS,
    "lasso_apply_kernel": ELEMENTS,
    "lasso_norms_kernel": SUMS,
    "lasso_total_kernel": SUMS,
    "lasso_rows_kernel": SUMS,
    "sample_forward_kernel": SUMS,
    "sample_backward_kernel": SUMS,
}

needs_native = pytest.mark.skipif(
    available_backends()["native"] is not None, reason=f"native: {available_backends()['native']}"
)


def named() -> list[str]:
    """What CMake was told to build for: "80-real", "native" and the like; skips where there is nothing."""
    if available_backends()["native"] is not None:
        pytest.skip(f"native: {available_backends()['native']}")
    built = native_module().build_info()["cuda_architectures"]
    if built is None:
        pytest.skip("the module was built without nvcc")
    return str(built).replace(";", " ").split()


def architectures() -> list[str]:
    """("80", "86", ...) for which the module holds machine code; skips where there is none."""
    named()
    return listed()


def tool(name: str, *arguments: str | Path, folder: Path | None = None) -> str:
    nvidia = pytest.importorskip("triton.backends.nvidia", reason=f"{name} comes with Triton")
    command = [Path(nvidia.__file__).parent / "bin" / name, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout


def cuobjdump(*arguments: str, folder: Path | None = None) -> str:
    return tool("cuobjdump", *arguments, MODULE, folder=folder)


@cache
def listed() -> list[str]:
    return sorted(set(re.findall(r"\.sm_(\w+)\.cubin", cuobjdump("-lelf"))))


@cache
def resources() -> dict[str, dict[tuple[str, str], dict[str, int]]]:
    """Architecture -> kernel and instance -> resources."""
    found: dict[str, dict[tuple[str, str], dict[str, int]]] = {}
    architecture, kernel = "", ("", "")
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (\w+):", line):
            kernel = kernel_of(match[1])
        elif "REG:" in line:
            numbers = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
            found.setdefault(architecture, {})[kernel] = numbers
    return found


@cache
def instructions(architecture: str) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        cuobjdump("-xelf", f"sm_{architecture}.", folder=Path(folder))
        cubins = sorted(Path(folder).glob("*.cubin"))
        # Without the analysis of branches: half the time (bench/machine_code.py).
        listing = "".join(tool("nvdisasm", "-c", "-ndf", cubin) for cubin in cubins)
    for line in listing.splitlines():
        if match := re.match(r"\s+\.section\s+\.text\.(\w+)", line):
            lines = found.setdefault(kernel_of(match[1]), [])
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            lines.append(match[1])
    assert found.keys() == resources()[architecture].keys() and all(found.values())
    return found


def test_every_architecture_is_there_and_ptx_for_newer_ones() -> None:
    built, asked = architectures(), named()
    assert built and set(resources()) == set(built)
    if asked == ["native"]:  # the devices at hand; after `make gpu`
        return
    assert {name.split("-")[0] for name in asked} == set(built)
    if len(built) > 1:
        assert set(built) >= {"80", "86", "89", "90", "100"}
        assert "sm_100.ptx" in cuobjdump("-lptx")


def test_a_module_for_the_device_at_hand_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """CMake knows its architecture by the name "native" alone."""
    expected = architectures()
    native = SimpleNamespace(build_info=lambda: {"cuda_architectures": "native"})
    monkeypatch.setattr(sys.modules[__name__], "native_module", lambda: native)
    assert named() == ["native"] and architectures() == expected
    test_every_architecture_is_there_and_ptx_for_newer_ones()


def test_every_kernel_is_there() -> None:
    architectures()
    expected = {(kernel, instance) for kernel, all_ in INSTANCES.items() for instance in all_}
    for architecture, kernels in resources().items():
        assert set(kernels) == expected, architecture


def test_registers_fit_the_planned_blocks_and_nothing_spills() -> None:
    architectures()
    for architecture, kernels in resources().items():
        for (kernel, instance), used in kernels.items():
            where = f"{kernel}<{instance}> on sm_{architecture}: {used}"
            assert used["STACK"] == 0, where
            assert used["LOCAL"] == 0, where
            # All of it is dynamic, but for what newer devices reserve.
            assert used["SHARED"] <= 1024, where
            # Registers are handed out to a warp in units of 256.
            warps = THREADS // 32
            assert -(-used["REG"] * 32 // 256) * 256 * warps * BLOCKS[kernel] <= REGISTERS, where


def test_machine_code_multiplies_matrices_and_copies_16_bytes() -> None:
    for architecture in architectures():
        for (kernel, instance), names in instructions(architecture).items():
            where = f"{kernel}<{instance}> on sm_{architecture}"
            assert not [n for n in names if n.startswith(("LDL", "STL"))], where
            if kernel in ("conv2d_kernel", "conv2d_finish_kernel"):
                assert any(re.match(r"STG?\.E\.128", n) for n in names), where
            if kernel not in ("conv2d_kernel", "conv2d_grad_weight_kernel"):
                continue
            assert any(n.startswith("HMMA") for n in names) == (instance != "F32"), where
            assert any(n.startswith("FFMA") for n in names) or instance != "F32", where
            copies = [n for n in names if n.startswith("LDGSTS")]
            assert copies and all(".128" in n for n in copies), where
            if instance in ("F16", "Bf16") or (kernel, instance) == ("conv2d_kernel", "Tf32"):
                assert any(n.startswith("LDSM") for n in names), where


def test_weights_move_16_bytes_at_a_time() -> None:
    """The passes over the weights of group assignment; what is not aligned has loads of its own beside."""
    for architecture in architectures():
        for (kernel, instance), names in instructions(architecture).items():
            if kernel not in ("lasso_columns_kernel", "lasso_turn_kernel", "lasso_apply_kernel"):
                continue
            where = f"{kernel}<{instance}> on sm_{architecture}"
            copies = [n for n in names if n.startswith("LDGSTS")]
            assert copies and all(".128" in n for n in copies), where
            if kernel == "lasso_apply_kernel":
                assert any(re.match(r"STG?\.E\.128", n) for n in names), where
            assert not [n for n in names if n.startswith(("ATOM", "RED"))], where


def test_without_a_device_the_module_says_so() -> None:
    architectures()
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    status, count = native_module().cuda_device_count()
    assert (status, count) == (4, 0)
    assert "no CUDA device can be used: " in native_module().last_error()
    assert available_backends()["cuda"] == "no CUDA device"


# ---- tables ----


def sizes(
    layout: GroupLayout,
    batch: int,
    size: int,
    kernel: int,
    *,
    stride: int = 1,
    operation: int = 0,
    precision: int = 0,
    fill: int = 0,
    blocks: int = 400,
) -> dict[str, int]:
    core = native_module()
    plan = layout.plan()
    geometry = (batch, size, size, kernel, kernel, stride, stride, kernel // 2, kernel // 2, 1, 1)
    arguments = (operation, precision, *geometry, plan.data_ptr(), plan.numel(), fill, blocks)
    status, needed = core.cuda_conv2d_table(*arguments, 0, 0)
    assert status == 0, core.last_error()
    words = torch.empty(needed, dtype=torch.int32)
    assert core.cuda_conv2d_table(*arguments, words.data_ptr(), needed) == (0, needed)
    status, *found = core.cuda_conv2d_sizes(words.data_ptr(), needed)
    assert status == 0
    names = ("prepared", "workspace", "blocks", "splits", "shared", "multiply_adds")
    return dict(zip(names, found, strict=True))


def halves(channels: int, filters: int, read: int) -> GroupLayout:
    """Two groups, each with every second filter, of the first and of the last ``read`` channels."""
    groups: list[tuple[Sequence[int], Sequence[int]]] = [
        (range(read), range(0, filters, 2)),
        (range(channels - read, channels), range(1, filters, 2)),
    ]
    return GroupLayout(channels, filters, groups)


@needs_native
@pytest.mark.parametrize("precision", range(4))
@pytest.mark.parametrize("operation", range(3))
@pytest.mark.parametrize(
    ("width", "size", "kernel", "stride"),
    [(64, 56, 1, 1), (64, 56, 3, 1), (128, 56, 3, 2), (256, 14, 3, 1), (512, 7, 3, 1), (64, 32, 7, 2)],
)
def test_shared_memory_fits_the_planned_blocks(
    width: int, size: int, kernel: int, stride: int, operation: int, precision: int
) -> None:
    found = sizes(
        halves(width, width, width // 2),
        32,
        size,
        kernel,
        stride=stride,
        operation=operation,
        precision=precision,
    )
    assert 0 < found["shared"] <= 48 * 1024  # needs no opting in
    reserved = 1024
    assert 3 * (found["shared"] + reserved) <= 164 * 1024  # sm_80; 90 and 100 have more
    assert 2 * (found["shared"] + reserved) <= 100 * 1024  # sm_86, sm_89


@needs_native
def test_filters_are_padded_to_eight() -> None:
    """A group of 20 filters is multiplied as 24, its 30 channels as 32, and pixels fill their boxes."""
    layout = GroupLayout(32, 20, [(range(30), range(20))])
    pixels = 8 * 16 * 16
    assert sizes(layout, 8, 16, 3)["multiply_adds"] == pixels * 24 * 32 * 9
    assert sizes(layout, 8, 16, 1)["multiply_adds"] == pixels * 24 * 32


@needs_native
def test_small_batches_split_the_sum() -> None:
    layout = halves(512, 512, 256)
    alone = sizes(layout, 1, 7, 3)
    assert alone["splits"] > 1
    assert alone["workspace"] > 0
    many = sizes(layout, 512, 7, 3)
    assert many["splits"] == 1
    assert many["workspace"] == 0


@needs_native
def test_more_elements_than_32_bits_count() -> None:
    """512 images of 256 channels and 224 x 224 pixels are 6.6e9 elements."""
    for operation in range(3):
        found = sizes(halves(256, 256, 64), 512, 224, 3, operation=operation)
        assert found["multiply_adds"] > 2 * 512 * 224 * 224 * 9 * 128 * 64 - 1
        assert found["blocks"] > 0


@needs_native
def test_bad_tables_are_refused() -> None:
    core = native_module()
    words = torch.zeros(64, dtype=torch.int32)
    assert core.cuda_conv2d_sizes(words.data_ptr(), 64)[0] == 1
    assert "table is not one of dsp_cuda_conv2d_table" in core.last_error()
    assert core.cuda_conv2d_sizes(words.data_ptr(), 3)[0] == 1
    assert core.cuda_conv2d_sizes(0, 0)[0] == 1
    plan = halves(4, 4, 2).plan()
    geometry = (1, 4, 4, 3, 3, 1, 1, 1, 1, 1, 1)
    for operation, precision, fill, blocks in ((3, 0, 0, 1), (0, 4, 0, 1), (0, 0, 3, 1), (0, 0, 0, 0)):
        arguments = (operation, precision, *geometry, plan.data_ptr(), plan.numel(), fill, blocks, 0, 0)
        assert core.cuda_conv2d_table(*arguments)[0] == 1


# Places in a table's words (csrc/conv/cuda_table.h): of its header, and in each class, item and chunk.
CLASSES_AT, ITEMS_AT = 7, 9
SPOILT: dict[str, tuple[str, int, int, str]] = {
    "classes beyond the end": ("header", 7, 1 << 30, "header: classes_at"),
    "more blocks": ("header", 10, 99, "header: blocks"),
    "less shared memory": ("header", 14, 64, "header: shared_bytes"),
    "a smaller workspace": ("header", 20, 1, "header: workspace"),
    "a larger input": ("header", 22, 1 << 20, "class 0: the size of the input"),
    "fewer weights": ("header", 26, 9, "item 0: a pair"),
    "unaligned channels": ("header", 30, 0, "header: vectors"),
    "a taller box": ("class", 5, 64, "class 0: "),
    "a wrong divisor": ("class", 39, 7, "class 0: halo_w_magic"),
    "a tap beyond the kernel": ("class", 43, 3, "class 0: the first tap"),
    "filters beyond the end": ("item", 0, 1 << 30, "item 0: filters_at"),
    "more filters": ("item", 1, 9, "item 0: octets"),
    "more chunks": ("item", 3, 2, "item 0: "),
    "pairs in the header": ("item", 4, 0, "item 0: pairs_at"),
    "weights of another item": ("item", 5, 8, "item 0: the first row of weights"),
    "a filter that is not there": ("filters", 0, 16, "item 0: a filter is 16"),
    "a filter twice": ("filters", 0, 2, "item 0: a filter, named twice, is 2"),
    "a channel that is not there": ("chunk", 8, 64, "item 0: a channel of a chunk"),
    "a unit between units": ("chunk", 2, 3, "item 0: a channel of a chunk"),
    "unread channels as if read": ("chunk", 6, 0, "item 0: used of a chunk"),
    "a weight that is not there": ("pairs", 0, 1 << 20, "item 0: a pair is 1048576"),
}


@needs_native
@pytest.mark.parametrize("name", SPOILT)
def test_a_table_is_checked_to_its_last_word(name: str) -> None:
    core = native_module()
    plan = halves(16, 16, 8).plan()
    arguments = (0, 0, 2, 6, 6, 3, 3, 1, 1, 1, 1, 1, 1, plan.data_ptr(), plan.numel(), 1, 1)
    _, needed = core.cuda_conv2d_table(*arguments, 0, 0)
    words = torch.empty(needed, dtype=torch.int32)
    assert core.cuda_conv2d_table(*arguments, words.data_ptr(), needed)[0] == 0
    assert core.cuda_conv2d_sizes(words.data_ptr(), needed)[0] == 0
    item = int(words[ITEMS_AT])
    starts = {
        "header": 0,
        "class": int(words[CLASSES_AT]),
        "item": item,
        "filters": int(words[item]),
        "chunk": int(words[item + 2]),
        "pairs": int(words[item + 4]),
    }
    part, at, value, text = SPOILT[name]
    assert words[starts[part] + at] != value
    words[starts[part] + at] = value
    assert core.cuda_conv2d_sizes(words.data_ptr(), needed)[0] == 1
    assert f"table: {text}" in core.last_error()
