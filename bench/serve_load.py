"""Load on examples/serve.py: ``serve_load.py net.dsp``, with an interpreter that has fastapi.

Mixed batches from several clients, some requests wrong on purpose, and now and then a worker killed. Every
answer is held against the network in this process, bit by bit; printed are times and what the largest worker
holds after the first share of the requests and at the end. Ends with 1 where an answer differs, memory grew
or a killed worker stays away.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from dsp_kernels import runtime

ROOT = Path(__file__).resolve().parent.parent
BATCHES = (1, 1, 1, 2, 3, 8, 16)


def packed(x: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, x, allow_pickle=False)
    return file.getvalue()


class Load:
    def __init__(self, network: str, port: int) -> None:
        self.port, self.lock = port, threading.Lock()
        self.times: list[float] = []
        self.retried = self.refused = self.kills = 0
        self.wrong: list[str] = []
        net = runtime.load(network, threads=1)
        shape = net.inputs[0].shape[1:]
        generator = np.random.default_rng(0)
        self.cases = []
        for batch in BATCHES:
            x = generator.standard_normal((batch, *shape), np.float32)
            y = net(x)
            assert isinstance(y, np.ndarray)
            self.cases.append((packed(x), y))
        self.bad = packed(np.zeros((1, shape[0] + 1, *shape[1:]), np.float32))

    def call(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def pids(self) -> set[int]:
        found = set()
        for _ in range(40):
            try:
                found.add(int(json.loads(self.call("GET", "/health")[1])["pid"]))
            except (OSError, http.client.HTTPException, ValueError):
                time.sleep(0.2)
        return found

    def all_pids(self, workers: int) -> set[int]:
        """The workers', when all are there; those that are after 30 seconds."""
        end = time.monotonic() + 30
        while len(found := self.pids()) < workers and time.monotonic() < end:
            time.sleep(0.5)
        return found

    def kill(self, seed: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # the one before
            os.kill(random.Random(seed).choice(sorted(self.pids())), signal.SIGKILL)
            self.kills += 1

    def memory(self) -> int:
        """Of the worker that holds the most."""
        held = [0]
        for pid in self.pids():
            try:
                text = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            lines = [line.split() for line in text.splitlines()]
            held += [int(line[1]) * 1024 for line in lines if line[0] == "VmRSS:"]  # none of a dead one
        return max(held)

    def one(self, random_: random.Random) -> None:
        if random_.random() < 0.02:
            status, _ = self.again(self.bad)
            if status != 400:
                self.wrong.append(f"a wrong request got {status}")
            self.refused += 1
            return
        body, wanted = random_.choice(self.cases)
        begin = time.perf_counter()
        status, data = self.again(body)
        taken = time.perf_counter() - begin
        got = np.load(io.BytesIO(data), allow_pickle=False) if status == 200 else None
        with self.lock:
            self.times.append(taken)
            if got is None or got.shape != wanted.shape or got.tobytes() != wanted.tobytes():
                self.wrong.append(f"status {status}, batch {len(wanted)}")

    def again(self, body: bytes) -> tuple[int, bytes]:
        """A request that a dying worker took with it is made again, as a client would."""
        for attempt in range(100):
            try:
                return self.call("POST", "/predict", body)
            except (OSError, http.client.HTTPException):
                with self.lock:
                    self.retried += 1
                time.sleep(0.02 * (1 + attempt))
        raise RuntimeError("the server is gone")

    def run(self, requests: int, clients: int, seed: int) -> None:
        left = [requests]

        def client(number: int) -> None:
            random_ = random.Random(seed * 1000 + number)
            while True:
                with self.lock:
                    if left[0] == 0:
                        return
                    left[0] -= 1
                self.one(random_)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def main() -> int:
    parser = argparse.ArgumentParser(description="Load on examples/serve.py.")
    parser.add_argument("network")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=4, help="workers killed on the way")
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "examples" / "serve.py", given.network, "--port", port]
    command += ["--workers", given.workers]
    load, rounds = Load(given.network, port), given.kills + 1
    result: dict[str, Any] = {"requests": given.requests, "workers": given.workers}
    with subprocess.Popen(list(map(str, command))) as server:
        try:
            while not load.pids():
                if server.poll() is not None:
                    return 1
            begin = time.perf_counter()
            for number in range(rounds):
                kill = threading.Timer(0.3, load.kill, (number,))
                if number > 0:  # while requests are under way
                    kill.start()
                load.run(given.requests // rounds, given.clients, number)
                if number == 0:
                    result["held_first"] = load.memory()
            result["seconds"] = time.perf_counter() - begin
            result["workers_at_the_end"] = len(load.all_pids(given.workers))
            result["held_last"] = load.memory()
        finally:
            server.terminate()
            server.wait(30)
    times = sorted(load.times)
    result |= {
        "answers": len(times),
        "refused": load.refused,
        "kills": load.kills,
        "retried": load.retried,
        "wrong": len(load.wrong),
        "median_ms": 1e3 * statistics.median(times),
        "p99_ms": 1e3 * times[int(0.99 * len(times))],
    }
    print(json.dumps(result))
    grew = result["held_last"] > 1.1 * result["held_first"] + (4 << 20)
    fewer = result["workers_at_the_end"] < given.workers
    return int(bool(load.wrong) or grew or fewer or "torch" in sys.modules)


if __name__ == "__main__":
    raise SystemExit(main())
