"""Networks from program files, NumPy arrays in and out. Imports the compiled module and NumPy, never torch.

``net = load("net.dsp"); y = net(x)``: the files are written by ``dsprune.export_program``, and the results
have the bits of the packed network that was exported. The same in C: ``dsp_runtime.h`` (docs/deploy.md).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _compiled

__all__ = ["Network", "TensorInfo", "load"]

_DTYPES = {0: "float32"}
_ERRORS: dict[int, type[Exception]] = {1: ValueError, 2: MemoryError, 6: OSError}  # dsp_status


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a network.

    ``shape`` is of one image, as exported; its first size is the batch, which may be any. ``least`` and
    ``most`` bound each size of an input (``most`` None: no bound).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    least: tuple[int, ...]
    most: tuple[int | None, ...]


def _info(given: Any) -> TensorInfo:
    name, dtype, shape, least, most = given
    return TensorInfo(name, _DTYPES[dtype], shape, least, tuple(m if m < 1 << 31 else None for m in most))


def _cores() -> int:
    """How many this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _threads(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"threads: expected an int, got {type(value).__name__} {value!r}")
    if not 1 <= value <= 1 << 16:
        raise ValueError(f"threads: expected 1 to {1 << 16}, got {value}")
    return int(value)


def _at(array: np.ndarray) -> tuple[int, tuple[int, ...]]:
    return array.__array_interface__["data"][0], array.shape  # array.ctypes imports ctypes


def _plain(given: object) -> bool:
    """Whether it is an array without a mask."""
    masked = sys.modules.get("numpy.ma")  # imported by whoever has made one
    return isinstance(given, np.ndarray) and not (masked and isinstance(given, masked.MaskedArray))


class Network:
    """A network from a program file; made by :func:`load`.

    Any number of threads may call one network at the same time: calls run outside of Python's lock. It
    pickles (a file by its path, which is loaded again) and survives a fork.

    Attributes:
        inputs, outputs: what it takes and gives, as tuples of :class:`TensorInfo`.
        threads: how many threads a call uses at most; the result does not depend on it.
    """

    def __init__(self, source: str | bytes, threads: int | None = None) -> None:
        self.threads = _cores() if threads is None else _threads(threads)
        self._source = source
        self._handle = 0
        self._native, reason = _compiled.load()
        if self._native is None:
            raise RuntimeError(f"the compiled module is not available: {reason}")
        if isinstance(source, bytes):
            self._kept = np.frombuffer(source, np.uint8)  # the core reads it again for other image sizes
            status, handle = self._native.model_load_memory(_at(self._kept)[0], len(source))
        else:
            status, handle = self._native.model_load(os.fsencode(source))
        self._check(status)
        self._handle = handle
        inputs, outputs = self._native.model_tensors(handle)
        self.inputs = tuple(map(_info, inputs))
        self.outputs = tuple(map(_info, outputs))

    def _check(self, status: int) -> None:
        if status != 0:
            text = self._native.last_error()  # type: ignore[union-attr]
            raise _ERRORS.get(status, RuntimeError)(text)

    def _arrays(self, given: tuple[Any, ...]) -> list[np.ndarray]:
        if len(given) != len(self.inputs):
            names = ", ".join(info.name for info in self.inputs)
            raise TypeError(f"expected {len(self.inputs)} inputs ({names}), got {len(given)}")
        arrays = []
        for x, info in zip(given, self.inputs, strict=True):
            if not _plain(x):
                raise TypeError(f"{info.name}: expected a NumPy array, got {type(x).__name__}")
            if x.dtype != np.float32:
                raise ValueError(f"{info.name}: expected {info.dtype}, got {x.dtype}")
            if x.ndim != len(info.shape):
                raise ValueError(f"{info.name}: expected {len(info.shape)} dimensions, got shape {x.shape}")
            arrays.append(np.require(x, requirements=("C_CONTIGUOUS", "ALIGNED")))
        return arrays

    def _results(self, out: Any, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        if out is None:
            return [np.empty(shape, np.float32) for shape in shapes]
        given = list(out) if isinstance(out, (tuple, list)) else [out]
        if len(given) != len(shapes):
            raise TypeError(f"out: expected {len(shapes)} arrays, got {len(given)}")
        for y, shape in zip(given, shapes, strict=True):
            if not _plain(y):
                raise TypeError(f"out: expected a NumPy array, got {type(y).__name__}")
            if y.dtype != np.float32 or y.shape != shape:
                raise ValueError(f"out: expected float32 {shape}, got {y.dtype} {y.shape}")
            if not (y.flags.c_contiguous and y.flags.aligned and y.flags.writeable):
                raise ValueError("out: expected a contiguous, aligned array that can be written")
        return given

    def __call__(
        self, *inputs: np.ndarray, out: Any = None, threads: int | None = None
    ) -> np.ndarray | tuple[np.ndarray, ...]:
        """Runs the network.

        Args:
            inputs: one array for each of ``inputs``, float32 (N, C, H, W), of one batch N, which may be 0.
            out: an array, or a tuple of them where there are several outputs, to write the results to:
                float32, contiguous, of just their shape, apart from the inputs. None: new ones.
            threads: at most so many for this call; None: ``self.threads``.

        Returns:
            The output, or a tuple of them where there are several: float32, (N, C, H, W), or (N, features).

        Raises:
            TypeError: an argument of another type, or another number of inputs. ValueError: another dtype, a
            shape that the file does not allow or that the steps do not fit, or an ``out`` as above it is not.
            MemoryError: there is not enough. OSError: the file has changed since, and another image size is
            asked for. RuntimeError: after ``close``.
        """
        arrays = self._arrays(inputs)
        count = self.threads if threads is None else _threads(threads)
        native, handle, given = self._native, self._open(), [_at(x) for x in arrays]
        status, shapes = native.model_plan(handle, given)  # type: ignore[union-attr]
        self._check(status)
        results = self._results(out, shapes)
        self._check(native.model_run(handle, given, [_at(y) for y in results], count))  # type: ignore[union-attr]
        return results[0] if len(results) == 1 else tuple(results)

    def plan(self, *shapes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The outputs' shapes for inputs of these shapes. The work that the first call with another image
        size does is then done: 8 sizes besides the file's are kept.

        Raises: as a call does.
        """
        status, made = self._native.model_plan(  # type: ignore[union-attr]
            self._open(), [(0, tuple(map(int, shape))) for shape in shapes]
        )
        self._check(status)
        return tuple(made)

    def memory(self) -> dict[str, int]:
        """Of the file's own image size: ``weight_bytes``, ``arena_bytes`` (image or pair), ``scratch_bytes``
        (thread), ``arenas`` (number).
        """
        memory: dict[str, int] = self._native.model_memory(self._open())  # type: ignore[union-attr]
        return memory

    def close(self) -> None:
        """Frees the network's memory; no call may be under way. It is freed without this when it is gone."""
        handle, self._handle = self._handle, 0
        destroy = getattr(self._native, "model_destroy", None)  # gone while Python ends
        if handle and destroy is not None:
            destroy(handle)

    def _open(self) -> int:
        if not self._handle:
            raise RuntimeError("the network is closed")
        return self._handle

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", 0):
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return Network, (self._source, self.threads)

    def __repr__(self) -> str:
        takes = ", ".join(f"{info.name} {info.shape}" for info in self.inputs)
        gives = ", ".join(f"{info.name} {info.shape}" for info in self.outputs)
        return f"Network({takes} -> {gives})"


def load(source: str | os.PathLike[str] | bytes, *, threads: int | None = None) -> Network:
    """Loads a program file.

    Args:
        source: the path of a file, or its bytes.
        threads: how many threads a call uses at most; None: one for each core that the process may use.

    Raises:
        TypeError: another type. FileNotFoundError, OSError: no such file, or it cannot be read. ValueError:
        a file that is damaged, truncated, of another version, or for a library that knows other operations.
        MemoryError: there is not enough. RuntimeError: the compiled module is missing.
    """
    if isinstance(source, (bytearray, memoryview)):
        source = bytes(source)
    if not isinstance(source, (str, bytes, os.PathLike)):
        raise TypeError(f"source: expected a path or bytes, got {type(source).__name__}")
    if isinstance(source, bytes):
        return Network(source, threads)
    path = os.path.abspath(os.fsdecode(source))  # what it is pickled as
    if "\0" in path:
        raise ValueError(f"source: {path!r} is no path")
    if not os.path.exists(path):
        raise FileNotFoundError(f"source: no file at {path!r}")
    return Network(path, threads)
