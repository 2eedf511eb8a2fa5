"""What the shipped GPU kernels' machine code is like, without a device: a table by kernel and architecture.

    python -m bench.sass [--out FOLDER] [--only TEXT] [--architectures 80,90,100] [--cubins FOLDER]

Writes ``kernels.json`` and ``kernels.md`` (bench/results holds the committed ones, so that a change to a
kernel shows what it did); rows that are there and were not asked for stay. The Triton kernels are compiled by
Triton, the CUDA ones by nvcc, where there is one.

Of each kernel: registers, shared memory, and how many blocks a multiprocessor holds by these. Of each loop
that multiplies matrices (of the others the one that loads most): instructions a warp by class, as they stand
there, those of inner loops once; copies from global memory by width; the bytes that are on their way after a
wait, of all blocks, beside those that Little's law asks for: bandwidth x latency, of one multiprocessor, with
LATENCY assumed. Then the cycles that one pass of one block takes a multiprocessor at least:

    matrix   multiply-adds over the published rate
    cache    bytes copied over the second-level cache's rate (devices.json: assumed), whether or not the
             first-level cache has them; of kernels without matrix instructions over memory's bandwidth
    issue    instructions of all warps, four a cycle
    latency  bytes copied over what is on its way in LATENCY

and the largest of them is what bounds it. Not so for the CUDA kernels, whose loops hold inner loops and
several ways of copying, one of which is taken, and for chains whose weights stay, whose loop over tiles holds
all others: of them there are the counts alone, and of the CUDA kernels the most shared memory that a block
asks for. Nothing here is measured. The rules of occupancy: CUDA C++ Programming Guide, technical
specifications per compute capability.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import kernels, machine_code
from bench.machine_code import Sass
from dsp_kernels import cost

ROOT = Path(__file__).resolve().parent.parent
LATENCY = 0.8e-6  # seconds from asking memory to having it, under load: assumed
REGISTERS = 65536
RESERVED = 1024  # bytes of shared memory that each block takes besides
SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228}  # KiB of a multiprocessor
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64}
TENSOR_COLUMNS = 512  # of tensor memory, sm_100
# Multiply-adds of half precision a cycle and multiprocessor: the clock behind a published rate follows.
HALF_RATE = {80: 1024, 86: 512, 89: 512, 90: 2048, 100: 4096}
CUDA = ("csrc/conv/conv2d.cu", "csrc/assignment/lasso.cu")
CUDA_THREADS = 128

CLASSES = {
    "matrix": "HMMA HGMMA UTCHMMA UTCQMMA UTCIMMA IMMA DMMA",
    "copy": "LDGSTS UTMALDG UBLKCP",
    "load": "LDG LD",
    "store": "STG ST RED ATOM ATOMG",
    "shared": "LDS STS LDSM STSM MOVM LDTM STTM UTCCP ATOMS",
    "local": "LDL STL",
    "wait": "DEPBAR LDGDEPBAR BAR SYNCS WARPSYNC WARPGROUP FENCE MEMBAR ARRIVES NANOSLEEP UTCBAR CCTL ERRBAR",
    "float": "FFMA FADD FMUL FSEL FSET FSETP FMNMX MUFU HADD2 HMUL2 HFMA2 HSET2 HSETP2 HMNMX2 F2F F2I I2F "
    "F2FP DADD DMUL DFMA DSETP FCHK I2FP F2IP FFMA2 FADD2 FMUL2",
    "branch": "BRA BSSY BSYNC EXIT CALL RET BREAK BRX JMP YIELD BMOV",
}
_CLASS = {name: kind for kind, names in CLASSES.items() for name in names.split()}


def class_of(instruction: str) -> str:
    """The class of an instruction; "integer" for addresses, masks, moves and what else there is."""
    return _CLASS.get(re.split(r"[.\s]", instruction, maxsplit=1)[0], "integer")


def width_of(instruction: str) -> int:
    """Bytes that one thread moves by a load, store or copy."""
    for mark, size in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
        if re.search(rf"{re.escape(mark)}(\.|\s|$)", instruction):
            return size
    return 4


def multiply_adds(instruction: str, warps: int) -> int:
    """Of a matrix instruction, all warps of a block; 0 where its text does not tell (sm_100: a descriptor
    does).
    """
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction):  # of four warps together
        return int(found[1]) * int(found[2]) * int(found[3]) * warps // 4
    if found := re.match(r"HMMA\.16(8)(16|8|4)\b", instruction):
        return 16 * 8 * int(found[2]) * warps
    return 0


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel. ``step``: multiply-adds of a pass through its loop, where the code does not tell.
    ``alternatives``: a pass through the loop is not all that stands there.
    """

    name: str
    capability: int
    code: Sass
    warps: int
    shared: int
    tensor_columns: int = 0
    step: int = 0
    alternatives: bool = False

    def blocks(self) -> int:
        """How many fit on a multiprocessor."""
        registers = -(-self.code.registers * 32 // 256) * 256 * self.warps
        fits = [
            REGISTERS // registers,
            1024 * SHARED[self.capability] // (self.shared + RESERVED),
            WARPS[self.capability] // self.warps,
        ]
        if self.tensor_columns:
            fits.append(TENSOR_COLUMNS // self.tensor_columns)
        return min(fits)

    def loops(self) -> list[tuple[str, ...]]:
        """The loops that matter: those with matrix instructions, or else that which loads most."""
        found = self.code.matrix_loops()

        def loaded(loop: Sequence[str]) -> int:
            return sum(width_of(i) for i in loop if class_of(i) in ("copy", "load"))

        return found or [max(self.code.loops, key=loaded)] if self.code.loops else []


def loop_row(kernel: Kernel, loop: Sequence[str]) -> dict[str, Any]:
    """The figures of one loop."""
    where = cost.device(f"sm_{kernel.capability}")
    clock = where.matrix["float16"] / (2 * where.sms * HALF_RATE[kernel.capability])
    threads, blocks = 32 * kernel.warps, kernel.blocks()
    classes = Counter(map(class_of, loop))
    matrix = [i for i in loop if class_of(i) == "matrix"]
    macs: int | None = sum(multiply_adds(i, kernel.warps) for i in matrix)
    macs = (macs or kernel.step or None) if matrix else macs
    rate = where.matrix["tf32" if any("TF32" in i for i in matrix) else "float16"]
    if not matrix:
        macs = threads * sum(i.startswith("FFMA") for i in loop)
        rate = where.matrix["float32"]
    copies = Counter(width_of(i) for i in loop if class_of(i) == "copy")
    loads = Counter(width_of(i) for i in loop if class_of(i) == "load")
    moved = threads * sum(width * n for counted in (copies, loads) for width, n in counted.items())
    groups = sum(i.startswith("LDGDEPBAR") for i in loop)
    waits = machine_code.waits(loop)
    if copies and groups and waits:
        under_way = threads * sum(width * n for width, n in copies.items()) * min(waits) / groups
    else:
        under_way = threads * sum(width * n for width, n in (copies or loads).items())
    under_way *= blocks
    through = where.l2_bandwidth if matrix else where.bytes_per_second()
    multiplied = None if macs is None else macs / (rate / (2 * where.sms * clock))
    cycles: dict[str, float | None] = {
        "matrix" if matrix else "multiply": multiplied,
        "cache" if matrix else "memory": moved / (through / where.sms / clock),
        "issue": len(loop) * kernel.warps / 4,
        "latency": moved * LATENCY * clock / under_way if under_way else 0.0,
    }
    counts = {
        "instructions": len(loop),
        "classes": {name: classes[name] for name in (*CLASSES, "integer") if classes[name]},
        "matrix": dict(Counter(i.split()[0] for i in matrix)),
        "copies": {str(width): n for width, n in sorted(copies.items(), reverse=True)},
        "loads": {str(width): n for width, n in sorted(loads.items(), reverse=True)},
    }
    if kernel.alternatives:
        return counts
    return counts | {
        "multiply_adds": macs,
        "under_way": round(under_way),
        "needed": round(where.bytes_per_second() * LATENCY / where.sms),
        "cycles": {name: None if v is None else round(v, 1) for name, v in cycles.items()},
        "bound": max(cycles, key=lambda name: cycles[name] or 0.0),
    }


def row(kernel: Kernel) -> dict[str, Any]:
    """The figures of one kernel."""
    return {
        "kernel": kernel.name,
        "architecture": f"sm_{kernel.capability}",
        "registers": kernel.code.registers,
        "stack": kernel.code.stack,
        "shared": kernel.shared,
        "warps": kernel.warps,
        "blocks": kernel.blocks(),
        "instructions": len(kernel.code.instructions),
        "loops": [loop_row(kernel, loop) for loop in kernel.loops()],
    }


# ---- what is shipped ----


def of_job(name: str, job: kernels.Job) -> Kernel:
    code, built = job.read()
    constants = dict(job.constants)
    sizes = [constants.get(key, 0) for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
    return Kernel(
        name,
        job.capability,
        code,
        job.warps,
        int(built.metadata.shared),
        int(getattr(built.metadata, "tmem_size", 0) or 0),
        sizes[0] * sizes[1] * sizes[2],
        bool(constants.get("RESIDENT")),
    )


def triton_jobs(capability: int) -> Iterator[tuple[str, kernels.Job]]:
    """Name and job of every Triton kernel that such a device may get."""
    table = kernels.shipped()
    for name, job in table.items():
        if name.startswith(f"sm_{capability}-"):
            yield name.split("-", 1)[1], job
    for shape in kernels.SHAPES:
        triple = kernels.Triple(shape, "bf16", capability)
        yield f"chain/{shape}", triple.job()
    for dtype in (torch.float32, torch.bfloat16):
        for job in kernels.assignment_jobs(dtype, capability):
            weights = "ELEMENT" in dict(job.constants)
            if weights or dtype == torch.float32:
                yield f"assignment/{kernels.assignment_name(job).split('-', 1)[1].rstrip('-')}", job


def cuda_kernels(capability: int, cubins: Path | None) -> Iterator[Kernel]:
    """The compiled CUDA kernels, by nvcc or from ``cubins`` (files like conv2d-90.cubin). Shared memory is
    dynamic: the most that a block of three (conv) or four has.
    """
    for source in CUDA:
        stem = Path(source).stem
        with tempfile.TemporaryDirectory() as folder:
            path = Path(cubins or folder, f"{stem}-{capability}.cubin")
            if not path.exists():
                command = ["nvcc", "-std=c++17", "-O3", "-Icsrc", f"-arch=sm_{capability}", "-cubin"]
                subprocess.run([*command, source, "-o", path], cwd=ROOT, check=True)
            found = machine_code.inspect_all(path.read_bytes())
        for symbol, code in sorted(found.items()):
            kernel, instance = machine_code.kernel_of(symbol)
            blocks = 3 if stem == "conv2d" else 4
            shared = min(48, SHARED[capability] // blocks - 1) * 1024
            yield Kernel(f"cuda/{kernel}<{instance}>", capability, code, CUDA_THREADS // 32, shared)


# ---- report ----


def markdown(rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """The rows as tables, one an architecture."""
    tools = ", ".join(f"{name} {version}" for name, version in about.items() if version)
    out = [
        "# The shipped GPU kernels' machine code",
        "",
        f"`python -m bench.sass`; {tools}. Read off compiled code, nothing run. Latency is assumed to be "
        f"{1e6 * LATENCY:.1f} us; bandwidths and rates are those of dsp_kernels/devices.json.",
        "What the columns mean: bench/sass.py.",
    ]
    for architecture in dict.fromkeys(r["architecture"] for r in rows):
        out += [
            "",
            f"## {architecture} ({cost.device(architecture).name})",
            "",
            "| kernel | registers | shared, KiB | blocks | loop | matrix | copies of 16 / 8 / 4 bytes | "
            "loads | shared | integer | float | under way / needed, KiB | "
            "matrix / cache / issue / latency, cycles | bound |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for r in (r for r in rows if r["architecture"] == architecture):
            stack = f" (stack {r['stack']})" if r["stack"] else ""
            head = f"{r['registers']}{stack} | {r['shared'] / 1024:.1f} | {r['blocks']}"
            for i, loop in enumerate(r["loops"]):
                of, copies = loop["classes"], loop["copies"]
                end = " |  | "
                if "bound" in loop:
                    cycles = " / ".join("?" if v is None else f"{v:.0f}" for v in loop["cycles"].values())
                    end = f"{loop['under_way'] / 1024:.0f} / {loop['needed'] / 1024:.0f} | "
                    end += f"{cycles} | {loop['bound']}"
                out.append(
                    f"| {r['kernel'] if i == 0 else ''} | {head if i == 0 else ' | | '} | "
                    f"{loop['instructions']} | {of.get('matrix', 0)} | "
                    f"{' / '.join(str(copies.get(w, 0)) for w in ('16', '8', '4'))} | {of.get('load', 0)} | "
                    f"{of.get('shared', 0)} | {of.get('integer', 0)} | {of.get('float', 0)} | {end} |"
                )
            if not r["loops"]:
                out.append(f"| {r['kernel']} | {head} | none" + " |" * 10)
    return "\n".join(out) + "\n"


def merged(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The new rows where there are any of a kernel and architecture, else the old ones; by architecture."""
    found = {(r["architecture"], r["kernel"]): r for r in (*old, *new)}
    return sorted(found.values(), key=lambda r: int(r["architecture"].removeprefix("sm_")))


def to_json(rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """The file of the rows, one a line."""
    head = json.dumps({"versions": about, "latency_us": 1e6 * LATENCY})
    return head[:-1] + ', "kernels": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n"


def versions() -> dict[str, Any]:
    """Of the compilers."""
    import triton

    nvcc = None
    if shutil.which("nvcc"):
        text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
        found = re.search(r"release ([\d.]+)", text)
        nvcc = found[1] if found else None
    return {"triton": triton.__version__, "nvcc": nvcc}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sass", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for kernels.json and kernels.md")
    parser.add_argument("--only", default="", help="kernels whose name holds this text")
    parser.add_argument("--architectures", default="80,90,100")
    parser.add_argument("--cubins", type=Path, help="folder of CUDA binaries that nvcc made before")
    options = parser.parse_args(arguments)
    rows = []
    for capability in map(int, options.architectures.split(",")):
        for name, job in triton_jobs(capability):
            if options.only in name:
                rows.append(row(of_job(name, job)))
                print(f"sm_{capability} {name}", file=sys.stderr)
        if options.only in "cuda/" or options.only.startswith("cuda"):
            if options.cubins is None and shutil.which("nvcc") is None:
                print("no nvcc: without the CUDA kernels", file=sys.stderr)
                continue
            rows += [row(k) for k in cuda_kernels(capability, options.cubins) if options.only in k.name]
    about = versions()
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        path = Path(options.out, "kernels.json")
        if path.exists():
            rows = merged(json.loads(path.read_text(encoding="utf-8"))["kernels"], rows)
        path.write_text(to_json(rows, about), encoding="utf-8")
        Path(options.out, "kernels.md").write_text(markdown(rows, about), encoding="utf-8")
    print(markdown(rows, about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
