"""A network behind FastAPI and uvicorn, workers without torch: ``python serve.py net.dsp``.

POST /predict takes an array as numpy.save writes it, float32 (N, C, H, W), and gives one back. Needs fastapi,
uvicorn, numpy and dsp-kernels; torch is not imported. How many requests it takes: bench/serve_load.py.
"""

from __future__ import annotations

import argparse
import io
import os

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool

from dsp_kernels import runtime

NETWORK = "DSP_NETWORK"  # the file, for the workers
MOST_BYTES = 64 << 20  # of a request


def make_app() -> FastAPI:
    """What each worker process runs. One thread a call: requests share the cores, none has them all."""
    app, network = FastAPI(), runtime.load(os.environ[NETWORK], threads=1)

    @app.get("/health")
    def health() -> dict[str, object]:
        return {"pid": os.getpid(), "network": repr(network)}

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        if int(request.headers.get("content-length", MOST_BYTES + 1)) > MOST_BYTES:
            raise HTTPException(413, f"at most {MOST_BYTES} bytes, and with their number")
        body = await request.body()
        try:
            x = np.load(io.BytesIO(body), allow_pickle=False)
            y = await run_in_threadpool(network, x)  # outside of Python's lock
        except (ValueError, TypeError, EOFError) as error:
            raise HTTPException(400, str(error)) from error
        file = io.BytesIO()
        np.save(file, y, allow_pickle=False)
        return Response(file.getvalue(), media_type="application/octet-stream")

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="A network behind FastAPI and uvicorn.")
    parser.add_argument("network", help="a program file")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    runtime.load(given.network).close()  # what is wrong with it is said here, once
    os.environ[NETWORK] = os.path.abspath(given.network)
    uvicorn.run(
        "serve:make_app",
        factory=True,
        app_dir=os.path.dirname(os.path.abspath(__file__)),
        port=given.port,
        workers=given.workers,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
