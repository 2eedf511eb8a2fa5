"""One network in one runtime, in a process without torch: ``runtime_child.py FORM FILE INPUT SECONDS``.

Prints JSON: milliseconds to import the runtime, to load the file, of the first call, of a call (median,
least), and what the process holds over an interpreter with NumPy. One thread.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def resident() -> int:
    fields = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in fields if line.startswith("VmRSS:"))


def prepare(form: str) -> Callable[[str], Callable[[np.ndarray], np.ndarray]]:
    """Imports a runtime; what is returned loads a file."""
    if form == "packed":
        from dsp_kernels import runtime

        return lambda path: runtime.load(path, threads=1)  # type: ignore[return-value]
    if form == "onnxruntime":
        import onnxruntime

        def load_onnx(path: str) -> Callable[[np.ndarray], np.ndarray]:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            name = session.get_inputs()[0].name
            return lambda x: session.run(None, {name: x})[0]

        return load_onnx
    import openvino

    def load_openvino(path: str) -> Callable[[np.ndarray], np.ndarray]:
        hints = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = openvino.Core().compile_model(path, "CPU", hints).create_infer_request()
        return lambda x: request.infer([x], share_outputs=True)[0]

    return load_openvino


def main() -> None:
    form, path, given, seconds = sys.argv[1:]
    x = np.load(given)
    before, begin = resident(), time.perf_counter()
    load = prepare(form)
    imported = time.perf_counter()
    network = load(path)
    loaded = time.perf_counter()
    y = np.array(network(x))
    first = time.perf_counter()
    times = []
    while time.perf_counter() - first < float(seconds) or len(times) < 10:
        start = time.thread_time()
        network(x)
        times.append(time.thread_time() - start)
    print(
        json.dumps(
            {
                "import_ms": 1e3 * (imported - begin),
                "load_ms": 1e3 * (loaded - imported),
                "first_ms": 1e3 * (first - loaded),
                "call_ms": 1e3 * statistics.median(times),
                "least_ms": 1e3 * min(times),
                "held_bytes": resident() - before,
                "output": y.ravel().tolist(),
            }
        )
    )
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main()
