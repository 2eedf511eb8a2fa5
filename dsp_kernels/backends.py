"""Which implementation runs, and why the others do not.

The choice is made by argument, then by the environment variable ``DSP_KERNELS_BACKEND``, then by rule: the
first of :data:`BACKENDS` that can run and offers itself. :func:`can_run` is the one check behind both the
choice and the error text. A backend is one object here and a module of its name in each family of operators
(:func:`implementation`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import os
from pathlib import Path
from types import ModuleType

import torch

from . import _compiled, activations

__all__ = [
    "BACKENDS",
    "ENVIRONMENT",
    "NAMES",
    "Backend",
    "available_backends",
    "can_run",
    "choose",
    "implementation",
    "native_module",
]

ENVIRONMENT = "DSP_KERNELS_BACKEND"

_GPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_CAPABILITY = (8, 0)
_log = logging.getLogger("dsp_kernels")
_logged: set[tuple[str, str]] = set()
_native: tuple[ModuleType | None, str | None] | None = None
_triton: tuple[str | None] | None = None
_chosen: dict[tuple[str | None, str | None, str, torch.dtype], str] = {}


def _forked() -> bool:
    """Whether this process is the fork of another and has not started a program of its own since."""
    try:
        stat = Path("/proc/self/stat").read_text()
        return bool(int(stat.rpartition(")")[2].split()[6]) & 0x40)  # PF_FORKNOEXEC
    except (OSError, ValueError, IndexError):
        return True


def _torch_team() -> int:
    """The address of GOMP_parallel in the OpenMP runtime that runs torch's loops; 0 where there is none, or
    where its threads may have been left behind in a parent process.
    """
    if _forked():
        return 0
    # The linker's own order: what was preloaded, then what libtorch_cpu itself is linked to.
    for library in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        try:
            runner = ctypes.CDLL(library).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(runner, ctypes.c_void_p).value or 0
    return 0


def _load_native() -> tuple[ModuleType | None, str | None]:
    global _native
    if _native is None:
        module, reason = _compiled.load()
        if module is not None:
            other = activations.differences(module.activations())
            if other is None:
                module.use_team(_torch_team())
            else:
                module, reason = None, f"built from other sources: {other}: build it again"
        _native = (module, reason)
    return _native


def native_module() -> ModuleType:
    """The compiled module. Raises RuntimeError with the reason where there is none."""
    module, reason = _load_native()
    if module is None:
        raise RuntimeError(f"the native backend is not available: {reason}")
    return module


def interpreted() -> bool:
    """Whether Triton interprets its kernels instead of compiling them (TRITON_INTERPRET=1), on any device."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _triton_reason() -> str | None:
    """Why Triton cannot be imported, or None. Looked for only where its kernels have a device to run on."""
    global _triton
    if _triton is None:
        try:
            import triton  # noqa: F401
        except ModuleNotFoundError as error:
            missing = error.name is not None and error.name.split(".")[0] == "triton"
            _triton = ("triton is not installed" if missing else f"triton cannot be loaded: {error}",)
        except ImportError as error:
            _triton = (f"triton cannot be loaded: {error}",)
        else:
            _triton = (None,)
    return _triton[0]


def _device_reason() -> str | None:
    """Why no kernel of ours runs on the current CUDA device, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    found = torch.cuda.get_device_capability()
    if found < _CAPABILITY:
        return f"needs compute capability 8.0, the device has {found[0]}.{found[1]}"
    return None


def _cuda_build_reason(module: ModuleType) -> str | None:
    if module.build_info().get("cuda_architectures") is None:
        return "built without CUDA kernels: no nvcc was found, or DSP_KERNELS_CUDA=0"
    status, _ = module.cuda_device_count()
    return None if status == 0 else str(module.last_error())


class Backend:
    """One way to run operators; the reference, which always can, unless a method says otherwise."""

    name = "reference"
    dtypes: tuple[torch.dtype, ...] | None = None  # None: all
    activations: tuple[str, ...] | None = None  # that a convolution may end with; None: all

    def available(self) -> str | None:
        """Why it cannot be used on this machine, or None."""
        return None

    def devices(self) -> tuple[str, ...] | None:
        """The types of device that it runs on; None: all."""
        return None

    def takes(self, device_type: str, dtype: torch.dtype) -> str | None:
        """Why it does not run a call on such tensors, or None."""
        devices = self.devices()
        if devices is not None and device_type not in devices:
            return f"runs on {devices[0]}, not on {device_type}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"takes {', '.join(map(str, self.dtypes))}, not {dtype}"
        return None

    def offers(self) -> str | None:
        """Why it waits to be asked for by name, or None where the rule may choose it."""
        return None


class _Native(Backend):
    name = "native"
    dtypes = (torch.float32,)

    def available(self) -> str | None:
        return _load_native()[1]

    def devices(self) -> tuple[str, ...]:
        return ("cpu",)


class _Triton(Backend):
    name = "triton"
    dtypes = _GPU_DTYPES
    activations = ("none", "relu", "relu6")

    def available(self) -> str | None:
        reason = None if interpreted() else _device_reason()
        return reason or _triton_reason()

    def devices(self) -> tuple[str, ...]:
        return ("cuda", "cpu") if interpreted() else ("cuda",)

    def offers(self) -> str | None:
        return "interpreted kernels run only where they are asked for" if interpreted() else None


class _Cuda(Backend):
    name = "cuda"
    dtypes = _GPU_DTYPES
    activations = ("none", "relu", "relu6")

    def available(self) -> str | None:
        module, reason = _load_native()
        if module is None:
            return reason
        return _device_reason() or _cuda_build_reason(module)

    def devices(self) -> tuple[str, ...]:
        return ("cuda",)

    def offers(self) -> str | None:
        return "runs only where it is asked for, until it has been measured against triton on a device"


# In the order in which the rule tries them.
BACKENDS: tuple[Backend, ...] = (_Native(), _Triton(), _Cuda(), Backend())
_BY_NAME = {backend.name: backend for backend in (BACKENDS[-1], *BACKENDS[:-1])}
NAMES = tuple(_BY_NAME)


@functools.cache
def implementation(family: str, name: str) -> ModuleType:
    """The module in which a backend runs a family of operators ("conv", "assignment"), imported when it is
    first used.

    Raises ValueError for an unknown name.
    """
    if name not in _BY_NAME:
        raise ValueError(_unknown("backend", name))
    return importlib.import_module(f"dsp_kernels.{family}.{name}")


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with None where it can be used here and else the reason why not."""
    return {name: backend.available() for name, backend in _BY_NAME.items()}


def can_run(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """None if backend ``name`` runs a convolution of ``dtype`` on ``device_type``, else why not."""
    backend = _BY_NAME[name]
    return backend.available() or backend.takes(device_type, dtype)


def fuses(name: str, activation: str) -> bool:
    """Whether a convolution of backend ``name`` may end with an activation, named without parameters."""
    known = _BY_NAME[name].activations
    return known is None or activation in known


def _log_once(name: str, reason: str, level: int) -> None:
    if (name, reason) not in _logged:
        _logged.add((name, reason))
        _log.log(level, "backend %s not used: %s", name, reason)


def _by_rule(device_type: str, dtype: torch.dtype, tried: str | None) -> str:
    for backend in BACKENDS:
        if backend.name == tried:
            continue
        reason = can_run(backend.name, device_type, dtype) or backend.offers()
        if reason is None:
            return backend.name
        _log_once(backend.name, reason, logging.INFO)
    return "reference"


def _unknown(where: str, name: object) -> str:
    return f"{where} must be one of {', '.join(NAMES)}, got {name!r}"


def _choose(backend: str | None, env: str | None, device_type: str, dtype: torch.dtype) -> str:
    if backend is not None:
        if not isinstance(backend, str):
            raise TypeError(_unknown("backend", backend))
        if backend not in NAMES:
            raise ValueError(_unknown("backend", backend))
        reason = can_run(backend, device_type, dtype)
        if reason is not None:
            usable = [name for name in NAMES if can_run(name, device_type, dtype) is None]
            raise ValueError(
                f"backend {backend!r} cannot run here: {reason}; "
                f"for {dtype} on {device_type} accepted: {usable}"
            )
        return backend
    if env:
        if env not in NAMES:
            raise ValueError(_unknown(f"the environment variable {ENVIRONMENT}", env))
        reason = can_run(env, device_type, dtype)
        if reason is None:
            return env
        # A wish for the whole process: a call that it does not fit still runs.
        _log_once(env, reason, logging.WARNING)
    return _by_rule(device_type, dtype, env or None)


def choose(backend: str | None, device_type: str, dtype: torch.dtype) -> str:
    """The name of the backend that runs a convolution of ``dtype`` on ``device_type`` ("cpu", "cuda", ...).

    ``backend``: the caller's wish or None. Raises ValueError (TypeError for something that is no string),
    with what is accepted, for an unknown name and for a wish that cannot be met. A backend named by the
    environment variable that does not fit this call is logged once and the rule decides. Under
    ``torch.compile`` the choice is made while tracing and is part of the graph.
    """
    env = os.environ.get(ENVIRONMENT)
    key = (backend, env, device_type, dtype)
    name = _chosen.get(key)
    if name is None:
        name = _chosen[key] = _choose(backend, env, device_type, dtype)
    return name


# Dynamo runs the function while tracing and keeps its result: it sees neither the environment nor the logger.
# The public decorator, torch.compiler.assume_constant_result, sets this and imports Dynamo: a second.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forget() -> None:
    """Forgets what was found, chosen and logged, so that all is looked up again. For tests."""
    global _native, _triton
    _native = _triton = None
    _chosen.clear()
    _logged.clear()
