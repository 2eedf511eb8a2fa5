"""The GPU kernels that are shipped, as a compiler gets them: each Triton kernel with the constants of every
configuration in the table of launches. The gates in the tests compile them, and so does ``bench.sass``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from bench import machine_code
from dsp_kernels import GroupLayout, cost
from dsp_kernels.conv import chain, launches
from dsp_kernels.conv.launches import Launch

CAPABILITIES = (80, 86, 89, 90, 100)
CONV, CHAIN = "dsp_kernels.conv.triton_kernels", "dsp_kernels.conv.chain_kernels"
ASSIGNMENT = "dsp_kernels.assignment.triton_kernels"
GROUPS = 8  # the most column sums at a time

_POINTERS = {
    **dict.fromkeys(("items", "entries", "outputs", "filter_chunks", "index", "position"), "*i32"),
    **dict.fromkeys(("steps", "ranges"), "*i32"),
    **dict.fromkeys(("read", "valid"), "*i16"),
    **dict.fromkeys(("sums", "b1", "b2", "b3"), "*fp32"),
    **dict.fromkeys(("x", "weight", "bias", "residual", "out", "grad", "packed", "tiles"), "*{dtype}"),
    **dict.fromkeys(("stream", "following", "w1", "w2", "w3"), "*{dtype}"),
}
_TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.int32: "i32", torch.int64: "i64"}
_ELEMENTS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}


@dataclass(frozen=True)
class Job:
    """A kernel by name, Triton's types of its arguments, the compile-time ones, and how it is launched."""

    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    capability: int
    warps: int = 4
    stages: int = 3
    module: str = CONV

    def function(self) -> Any:
        return getattr(importlib.import_module(self.module), self.kernel)

    def values(self) -> dict[str, Any]:
        """The compile-time arguments, types of elements as Triton has them."""
        import triton.language as tl

        found = dict(self.constants)
        return found | {k: getattr(tl, _ELEMENTS[found[k]]) for k in {"ELEMENT", "ACC"} & found.keys()}

    def compiled(self) -> Any:
        return machine_code.compiled(
            self.function(),
            dict(self.types),
            self.values(),
            self.capability,
            warps=self.warps,
            stages=self.stages,
        )

    def read(self) -> tuple[machine_code.Sass, Any]:
        """The machine code, and what Triton built.

        Triton writes the same PTX for sm_89 as for sm_86 (a test holds it to that): it is compiled once, and
        Triton keeps it.
        """
        if self.capability == 89:
            built = replace(self, capability=86).compiled()
            return machine_code.inspect(machine_code.assembled(built.asm["ptx"], 89)), built
        built = self.compiled()
        return machine_code.inspect(built.asm["cubin"]), built


def make(kernel: str, dtype: str, constants: Mapping[str, Any], capability: int, **options: Any) -> Job:
    """The job of a convolution's or a chain's kernel: sizes are 32-bit integers, pointers by their names;
    ``dtype``: "fp16", "bf16" or "fp32", the data's.
    """
    job = Job(kernel, (), tuple(constants.items()), capability, **options)
    types = {
        name: _POINTERS.get(name, "i32").format(dtype=dtype)
        for name in job.function().arg_names
        if name not in constants
    }
    return replace(job, types=tuple(types.items()))


def is_size(name: str) -> bool:
    """Whether a run-time argument of a convolution's or a chain's kernel is a number, and no pointer."""
    return name not in _POINTERS


# ---- convolution ----


def conv_job(
    launch: Launch, precision: str, capability: int, dtype: str | None = None, **changes: Any
) -> Job:
    """The convolution in a configuration: several taps, chunks with holes, bias, residual and ReLU, unless
    ``changes`` say otherwise. ``precision``: "half", "tf32" or "ieee".
    """
    constants: dict[str, Any] = {
        "BLOCK_M": launch.BLOCK_M,
        "BLOCK_N": launch.BLOCK_N,
        "BLOCK_K": launch.BLOCK_K,
        "SPLIT": 1,
        "ALIGN": launch.copy // (2 if precision == "half" else 4),
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
    return make("conv_kernel", dtype, constants, capability, warps=launch.warps, stages=launch.stages)


def grad_weight_job(launch: Launch, precision: str, capability: int) -> Job:
    """The weight's gradient in a configuration."""
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
    return make("grad_weight_kernel", dtype, constants, capability, warps=launch.warps, stages=launch.stages)


def shipped() -> dict[str, Job]:
    """By name, every configuration of the launch table that a device of each capability may get, chains
    apart. One configuration's capabilities follow one another: what they share is compiled once.
    """
    jobs: dict[str, Job] = {}
    table = launches.read(launches.SHIPPED)
    wanted: dict[tuple[str, Launch], list[int]] = {}
    for capability in CAPABILITIES:
        rows = table["default"] | table.get(f"sm_{capability}", {})
        verified = {f"{key}+verified": row for key, row in table.get(f"sm_{capability}+verified", {}).items()}
        assert all(row.warps == 4 for row in rows.values()), "eight warps are for verified devices"
        for key, launch in (rows | verified).items():
            if isinstance(launch, Launch):
                wanted.setdefault((key, launch), []).append(capability)
    for (key, launch), capabilities in wanted.items():
        for capability in capabilities:
            op, precision = key.removesuffix("+verified").split("/")[:2]
            job = (grad_weight_job if op == "grad_weight" else conv_job)(launch, precision, capability)
            if job not in jobs.values():
                jobs[f"sm_{capability}-{key}"] = job
    return jobs


# ---- chains ----


def _parts(channels: int, first: int, second: int) -> GroupLayout:
    """Two groups of so many filters that share a third of the channels, with a boundary inside a chunk."""
    a, b, filters = 2 * channels // 3 + 1, channels // 3, first + second
    groups = [(range(a), range(first)), (range(b, channels), range(first, filters))]
    return GroupLayout(channels, filters, groups)


def _full(channels: int, filters: int) -> GroupLayout:
    return GroupLayout(channels, filters, [(range(channels), range(filters))])


# Triples of ResNet-50: pixels of a side, and the three layouts.
SHAPES: dict[str, tuple[int, tuple[GroupLayout, GroupLayout, GroupLayout]]] = {
    "stage 1, pruned": (56, (_parts(40, 20, 20), _full(40, 256), _full(256, 40))),
    "stage 1, dense": (56, (_full(64, 64), _full(64, 256), _full(256, 64))),
    "stage 1, three tiles": (56, (_parts(48, 36, 20), _full(56, 256), _full(256, 64))),
    "stage 1, four tiles": (56, (_parts(48, 40, 8), _full(48, 256), _full(256, 64))),
    "stage 2, pruned": (28, (_parts(80, 44, 44), _full(88, 512), _full(512, 80))),
    "stage 2, dense": (28, (_full(128, 128), _full(128, 512), _full(512, 128))),
}
# Triton's name of the type, and what is multiplied.
PRECISIONS = {
    "fp16": ("fp16", torch.float16),
    "bf16": ("bf16", torch.bfloat16),
    "tf32": ("fp32", torch.float32),
    "float32": ("fp32", torch.float32),
}


@dataclass(frozen=True)
class Triple:
    """``shape`` of SHAPES in a precision for an architecture."""

    shape: str
    precision: str
    capability: int

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.precision}-sm_{self.capability}"

    @property
    def layouts(self) -> tuple[GroupLayout, GroupLayout, GroupLayout]:
        return SHAPES[self.shape][1]

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision][1]

    @property
    def shared_memory(self) -> int:
        return cost.device(f"sm_{self.capability}").shared_memory

    def convs(self, batch: int = 32) -> list[cost.Conv]:
        size = SHAPES[self.shape][0]
        first, second, third = self.layouts
        return [
            cost.Conv(first, batch, (size, size), (3, 3), padding=(1, 1), activation="relu"),
            cost.Conv(second, batch, (size, size), residual=True, activation="relu"),
            cost.Conv(third, batch, (size, size), activation="relu"),
        ]

    @contextmanager
    def multiplying(self) -> Iterator[None]:
        """float32 as it is, or as TF32."""
        tf32 = "tf32" if self.precision == "tf32" else "ieee"
        with mock.patch.object(
            chain, "precision_of", lambda dtype: tf32 if dtype == torch.float32 else "half"
        ):
            yield

    def config(self) -> chain.ChainConfig:
        with self.multiplying():
            return chain.config_of(
                self.layouts, self.dtype, shared_memory=self.shared_memory, arch=f"sm_{self.capability}"
            )

    def job(self, config: chain.ChainConfig | None = None) -> Job:
        config = config or self.config()
        options = {"warps": config.warps, "stages": config.stages, "module": CHAIN}
        constants = chain.constants(config, self.dtype.itemsize, tf32=self.precision == "tf32")
        return make("chain_forward", PRECISIONS[self.precision][0], constants, self.capability, **options)


# ---- group assignment ----


def assignment_jobs(dtype: torch.dtype, capability: int = 90, offset: int = 0) -> list[Job]:
    """What the launcher of group assignment starts for weights of ``dtype`` that begin ``offset`` elements
    after an aligned address.
    """
    from dsp_kernels.assignment import triton as room
    from dsp_kernels.assignment.plan import SHIPPED

    jobs: dict[Job, None] = {}

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        warps = constants.pop("num_warps")
        types = [f"*{_TYPES[a.dtype]}" if isinstance(a, torch.Tensor) else "i32" for a in arguments]
        found = {k: getattr(v, "name", v) if k in ("ELEMENT", "ACC") else v for k, v in constants.items()}
        names = tuple(zip(kernel.arg_names, types, strict=False))
        job = Job(kernel.__name__, names, tuple(found.items()), capability, warps, module=ASSIGNMENT)
        jobs[job] = None

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


def assignment_name(job: Job) -> str:
    """Architecture, kernel, and what it was told."""
    told = {"ELEMENT", "MODE", "DIRECTED", "TOWARDS", "STORE", "MIXED", "KEEPING", "DIVIDE"}
    parts = [str(v) if isinstance(v, str) else k for k, v in job.constants if k in told and v]
    if "ELEMENT" not in dict(job.constants) and "ACC" in dict(job.constants):
        parts.append(dict(job.constants)["ACC"])
    return f"sm_{job.capability}-{job.kernel}-" + "-".join(parts)
