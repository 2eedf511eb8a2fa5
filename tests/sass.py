"""Compiles Triton kernels for a GPU that is not there, and reads what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Instructions that multiply matrices, from sm_80 to sm_100.
MATRIX = re.compile(r"^(HMMA|HGMMA|UTC[A-Z]*MMA|IMMA|DMMA|BMMA)\b")
LOCAL = re.compile(r"^(LDL|STL)\b")
GLOBAL_LOAD = re.compile(r"^LDG\b")
COPY = re.compile(r"^LDGSTS\b")
TENSOR_COPY = re.compile(r"^UTMALDG\b")


@dataclass(frozen=True)
class Sass:
    """A kernel's machine code: its resources, its instructions in order, and its loops."""

    registers: int
    stack: int
    instructions: tuple[str, ...]
    loops: tuple[tuple[str, ...], ...]

    def matrix_loops(self) -> list[tuple[str, ...]]:
        """The loops that hold matrix instructions (or, failing those, multiply-adds), without loops inside."""
        found = [loop for loop in self.loops if any(MATRIX.match(i) for i in loop)]
        found = found or [loop for loop in self.loops if sum(i.startswith("FFMA") for i in loop) >= 16]
        return [a for a in found if not any(set_of(b) < set_of(a) for b in found)]

    def count(self, pattern: re.Pattern[str]) -> int:
        return sum(bool(pattern.match(i)) for i in self.instructions)


def set_of(loop: tuple[str, ...]) -> frozenset[str]:
    return frozenset(loop)


def is_narrow_load(instruction: str) -> bool:
    """A load of one or two bytes from global memory."""
    return bool(GLOBAL_LOAD.match(instruction) or COPY.match(instruction)) and bool(
        re.search(r"\.[US](8|16)\b", instruction)
    )


def is_wide_copy(instruction: str) -> bool:
    """An asynchronous copy of 16 bytes a thread, or of a whole tile."""
    return bool(COPY.match(instruction) and ".128" in instruction) or bool(TENSOR_COPY.match(instruction))


def faults(sass: Sass, *, matrix: bool, wide: bool = True) -> list[str]:
    """What a kernel of matrix products must not be; empty if all is well.

    ``matrix``: it must use matrix instructions; ``wide``: its loops must copy 16 bytes a thread.
    """
    out = []
    if sass.stack:
        out.append(f"a stack of {sass.stack} bytes")
    if local := sass.count(LOCAL):
        out.append(f"{local} accesses to local memory")
    if matrix and not sass.count(MATRIX):
        out.append("no matrix instructions")
    loops = sass.matrix_loops()
    if not loops:
        out.append("no loop of products")
    for loop in loops:
        if narrow := sum(map(is_narrow_load, loop)):
            out.append(f"{narrow} loads of one or two bytes in a loop of products")
        if wide and not any(map(is_wide_copy, loop)):
            out.append("no copy of 16 bytes in a loop of products")
    return out


def cubin(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    *,
    warps: int,
    stages: int,
) -> bytes:
    """``kernel`` compiled for compute capability ``capability`` (80 for 8.0), with all pointers aligned to 16.

    ``types``: Triton's names of the arguments' types ("*fp16", "i32"); ``constants``: the other arguments.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    return compiled.asm["cubin"]


def _tool(name: str) -> str:
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / name)


def inspect(binary: bytes) -> Sass:
    """Disassembles a kernel with the tools that Triton brings along."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        run: Callable[..., str] = lambda *command: subprocess.run(  # noqa: E731
            command, check=True, capture_output=True, text=True
        ).stdout
        usage = run(_tool("cuobjdump"), "--dump-resource-usage", file.name)
        listing = run(_tool("nvdisasm"), "-c", file.name)
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert resources is not None, usage
    instructions: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*[^;]*)", line):
            text = found[1].strip()
            if target := re.search(r"`\((\.L_x_\d+)\)", text):
                branches.append((len(instructions), target[1]))
            instructions.append(text)
    loops = tuple(
        tuple(instructions[labels[target] : at + 1])
        for at, target in branches
        if labels.get(target, at + 1) <= at
    )
    return Sass(int(resources[1]), int(resources[2]), tuple(instructions), loops)
