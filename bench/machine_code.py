"""Compiles kernels for a GPU that is not there, and reads the machine code that came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
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
    """A kernel's machine code: its resources, its instructions in order, and its loops.

    A loop is what can be reached from itself, wherever it lies: waits are often moved to the kernel's end.
    Loops inside loops count with the outermost.
    """

    registers: int
    stack: int
    instructions: tuple[str, ...]
    loops: tuple[tuple[str, ...], ...]

    def matrix_loops(self) -> list[tuple[str, ...]]:
        """The loops that hold matrix instructions or, where there are none, many multiply-adds."""
        found = [loop for loop in self.loops if any(MATRIX.match(i) for i in loop)]
        return found or [loop for loop in self.loops if sum(i.startswith("FFMA") for i in loop) >= 16]

    def count(self, pattern: re.Pattern[str]) -> int:
        return sum(bool(pattern.match(i)) for i in self.instructions)


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


def waits(loop: Sequence[str]) -> list[int]:
    """How many groups of asynchronous copies may be under way after each wait of a loop."""
    found = [re.match(r"DEPBAR\.LE SB0, (0x[0-9a-f]+)", i) for i in loop]
    return [int(match[1], 16) for match in found if match]


def buffers(ttgir: str) -> list[int]:
    """How many buffers Triton gave each tile of two dimensions that it copies asynchronously."""
    return [int(n) for n in re.findall(r"ttg\.local_alloc[^\n]*memdesc<(\d+)x\d+x\d+x\w+,", ttgir)]


def source(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any]) -> Any:
    """``kernel`` as Triton compiles it, with all pointers aligned to 16 bytes and no size specialised on.

    ``types``: Triton's names of the arguments' types ("*fp16", "i32"); ``constants``: the other arguments.
    """
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    return ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"},
    )


def launched(kernel: Any, arguments: Sequence[Any], keywords: Mapping[str, Any], capability: int) -> Any:
    """The same of what a launch would compile: ``kernel[grid](*arguments, **keywords)`` on a device."""
    from triton.compiler import ASTSource
    from triton.runtime.jit import create_function_from_signature

    backend = _backend(capability)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*arguments, **keywords)
    _, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, options)
    return ASTSource(kernel, signature, constants, attributes)


def _backend(capability: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    return make_backend(GPUTarget("cuda", capability, 32))


def compiled(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    *,
    warps: int,
    stages: int,
) -> Any:
    """``kernel``, as :func:`source` has it, compiled for compute capability ``capability`` (80: 8.0)."""
    import triton
    from triton.backends.compiler import GPUTarget

    return triton.compile(
        source(kernel, types, constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )


def assembled(ptx: str, capability: int) -> bytes:
    """PTX of an earlier capability assembled for ``capability``, as Triton itself does it."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(re.sub(r"\.target sm_\d+", f".target sm_{capability}", ptx))
        _run("ptxas", f"--gpu-name=sm_{capability}", "-lineinfo", str(source), "-o", str(target))
        return target.read_bytes()


def _run(tool: str, *arguments: str) -> str:
    import triton.backends.nvidia

    path = Path(triton.backends.nvidia.__file__).parent / "bin" / tool
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _loops(blocks: list[list[int]], successors: list[set[int]]) -> list[list[int]]:
    """The strongly connected parts of a flow graph that hold a cycle, each as instructions in order."""
    reach = [set(s) for s in successors]
    changed = True
    while changed:
        changed = False
        for r in reach:
            more = set().union(*(reach[b] for b in r)) - r
            changed |= bool(more)
            r |= more
    parts = {frozenset(b for b in reach[a] if a in reach[b]) for a in range(len(blocks)) if a in reach[a]}
    return sorted([i for b in sorted(part) for i in blocks[b]] for part in parts)


def inspect(binary: bytes) -> Sass:
    """Disassembles a binary of one kernel with the tools that Triton brings along."""
    (found,) = inspect_all(binary).values()
    return found


def inspect_all(binary: bytes) -> dict[str, Sass]:
    """Disassembles each kernel of a binary, by its symbol."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        # The analysis left out is of branches by a stack of targets, which no architecture here has.
        listing = _run("nvdisasm", "-c", "-ndf", file.name)
    return parse(usage, listing)


def parse(usage: str, listing: str) -> dict[str, Sass]:
    """What ``cuobjdump --dump-resource-usage`` and ``nvdisasm -c`` write of a binary, kernel by kernel."""
    resources = dict(re.findall(r"Function (\S+):\s+(.*)", usage))
    out = {}
    for part in re.split(r"(?m)^\s*\.section\s+(?=\.text\.)", listing)[1:]:
        name = re.match(r"\.text\.([^\s,]+)", part)
        assert name is not None and name[1] in resources, part[:200]
        found = re.search(r"REG:(\d+) STACK:(\d+)", resources[name[1]])
        assert found is not None, resources[name[1]]
        out[name[1]] = Sass(int(found[1]), int(found[2]), *_flow(part))
    return out


def kernel_of(symbol: str) -> tuple[str, str]:
    """Kernel and instance of the mangled name of one of our CUDA kernels."""
    found = re.match(r"_ZN3dsp4cuda(?:5lasso)?\d+([a-z]\w*?_kernel)I(?:NS1?_\d+(\w+?)E|(\w))EEv", symbol)
    assert found is not None, symbol
    return found[1], found[2] or found[3]


def _flow(listing: str) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The instructions and loops of one kernel's listing."""
    instructions: list[str] = []
    blocks: list[list[int]] = [[]]
    labels: dict[str, int] = {}
    jumps: dict[int, str] = {}  # block -> label
    falls: set[int] = set()  # blocks that go on to the next one
    for line in listing.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            if blocks[-1]:
                falls.add(len(blocks) - 1)
                blocks.append([])
            labels[label[1]] = len(blocks) - 1
        elif found := re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*[^;]*)", line):
            text = found[2].strip()
            blocks[-1].append(len(instructions))
            instructions.append(text)
            target = re.search(r"`\((\.L_x_\d+)\)", text)
            if target and text.startswith("BRA"):
                jumps[len(blocks) - 1] = target[1]
            if target or text.startswith("EXIT"):
                if found[1] or not (text.startswith("BRA `") or text.startswith("EXIT")):
                    falls.add(len(blocks) - 1)
                blocks.append([])
    successors: list[set[int]] = [set() for _ in blocks]
    for i in range(len(blocks)):
        if i in falls and i + 1 < len(blocks):
            successors[i].add(i + 1)
        if i in jumps and jumps[i] in labels:
            successors[i].add(labels[jumps[i]])
    loops = tuple(tuple(instructions[i] for i in loop) for loop in _loops(blocks, successors))
    return tuple(instructions), loops
