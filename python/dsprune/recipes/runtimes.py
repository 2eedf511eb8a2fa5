"""A dense network in the runtimes that one would take on a CPU: OpenVINO and ONNX Runtime, in float32."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

TOLERANCE = 1e-4


def onnx_file(model: nn.Module, example: torch.Tensor) -> bytes:
    """A network in standard operators, BatchNorm folded; the batch is free.

    Raises what ``export_onnx`` raises, ImportError where the packages for it are missing.
    """
    from dsprune.export import export_onnx
    from dsprune.pack import pack

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "network.onnx"
        export_onnx(pack(model, example), example, path, form="dense", check=False)
        return path.read_bytes()


def _openvino(file: bytes, images: torch.Tensor, threads: int) -> Callable[[], torch.Tensor]:
    import openvino

    network = (core := openvino.Core()).read_model(file, b"")
    network.reshape(list(images.shape))
    settings = {
        # Its default on a processor with bfloat16 is bfloat16.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    data = images.numpy()
    return lambda: torch.from_numpy(
        next(iter(request.infer([data], share_inputs=True, share_outputs=True).values()))
    )


def onnxruntime_session(file: bytes, threads: int) -> Any:
    """An ONNX Runtime session on the CPU with so many threads, which sleep between calls."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Each session has threads of its own, which would go on spinning while the next form is timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _onnxruntime(file: bytes, images: torch.Tensor, threads: int) -> Callable[[], torch.Tensor]:
    session = onnxruntime_session(file, threads)
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


_RUNTIMES = {"OpenVINO": _openvino, "ONNX Runtime": _onnxruntime}


def runtime_forms(
    model: nn.Module, images: torch.Tensor, *, threads: int | None = None, file: bytes | None = None
) -> tuple[dict[str, Callable[[], torch.Tensor]], dict[str, str]]:
    """A dense network in each runtime that is installed, ready to call, and by name why one is missing.

    Args:
        model: in eval mode, one image tensor in, one tensor out, float32 on the CPU.
        images: (N, C, H, W), float32.
        threads: of each runtime; None: torch's number.
        file: what ``onnx_file`` made of the model; None: made here, which takes seconds.

    Raises RuntimeError where a runtime's output is off by more than 1e-4 of the largest value.
    """
    threads = torch.get_num_threads() if threads is None else threads
    images = images.detach().contiguous()
    try:
        file = onnx_file(model, images[:1]) if file is None else file
    except Exception as error:  # the exporter, or a package that it needs
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {}, dict.fromkeys(_RUNTIMES, f"no ONNX file: {text}")
    with torch.no_grad():
        expected = model(images)
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    missing: dict[str, str] = {}
    for name, prepare in _RUNTIMES.items():
        try:
            call = prepare(file, images, threads)
            given = call()
        except ImportError:
            missing[name] = "not installed"
            continue
        except Exception as error:  # an operator that the runtime lacks
            missing[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
            continue
        off = float((given - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        if not off <= TOLERANCE:
            raise RuntimeError(f"{name} differs from the eager network by {off:.1e}, accepted is {TOLERANCE}")
        calls[name] = call
    return calls, missing
