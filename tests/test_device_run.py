"""The device run's driver, with stand-ins for its phases and its machine: what one of them does to itself
leaves the others' results in place.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import device_run, device_steps
from bench.device_run import Phase

ROOT = Path(device_run.__file__).resolve().parent.parent
FOUND = {"device": "a stand-in", "capability": [9, 0], "torch": "2.11", "driver": "1", "commit": "abc"}


def shell(name: str, script: str, ends: float = 60.0, *after: str, least: float = 0.0) -> Phase:
    return Phase(name, ["sh", "-c", script], ends, after, least)


def result(value: int) -> str:
    """A script that leaves a result."""
    return f"""echo '{{"kind": "network", "row": {value}}}' >> $DSP_DEVICE_RESULTS"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_what_one_phase_does_leaves_the_others_in_place(tmp_path: Path) -> None:
    child = tmp_path / "child"
    phases = [
        shell("build", "echo 'no compiler' >&2; exit 3"),
        shell("hangs", f"{result(1)}; trap '' TERM; sleep 300 & echo $! > {child}; wait; sleep 300", 3.0),
        shell("dies", f"{result(2)}; kill -SEGV $$"),
        Phase("is not there", ["/nowhere/compute-sanitizer"], 60.0),
        shell("works", result(3), 60.0, "build", "hangs", "dies", "is not there"),
        shell("comes too late", result(4), 3.5, "works", least=2.0),
        shell("is last", result(5), 60.0, "comes too late"),
    ]
    start = time.monotonic()
    assert device_run.drive(tmp_path / "out", phases, FOUND) == 1
    assert 3 - device_run.GRACE <= time.monotonic() - start < 30
    lines = device_run.lines(tmp_path / "out" / "results.jsonl")
    assert lines[0]["kind"] == "environment" and lines[0]["commit"] == "abc"
    ended = {line["phase"]: (line["status"], line["why"]) for line in lines if line["kind"] == "phase"}
    assert ended["build"] == ("failed", "status 3: no compiler")
    assert ended["hangs"][0] == "out of time"
    assert ended["dies"] == ("died", "of SIGSEGV; last words: it printed nothing")
    assert ended["is not there"][0] == "not started" and "compute-sanitizer" in ended["is not there"][1]
    assert ended["comes too late"][0] == "left out"
    assert ended["works"] == ended["is last"] == ("ended", None)
    assert [line["row"] for line in lines if line["kind"] == "network"] in ([1, 2, 3, 5], [2, 1, 3, 5])
    assert not alive(int(child.read_text())), "what a phase started is ended with it"
    page = (tmp_path / "out" / "summary.md").read_text()
    assert "| build | failed |" in page and "a stand-in" in page and "status 3: no compiler" in page
    assert "no compiler" in (tmp_path / "out" / "log.txt").read_text()
    assert len(list((tmp_path / "out").iterdir())) <= 8


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()


def test_the_whole_has_a_limit_too(tmp_path: Path) -> None:
    phases = [shell("a", "sleep 60", 60.0), shell("b", result(1), 60.0, "a", least=0.5)]
    start = time.monotonic()
    assert device_run.drive(tmp_path / "out", phases, FOUND, seconds=2.5) == 1
    assert time.monotonic() - start < 20
    lines = device_run.lines(tmp_path / "out" / "results.jsonl")
    status = {line["phase"]: line["status"] for line in lines if line["kind"] == "phase"}
    assert status["a"] == "out of time"


def test_all_well_is_status_0(tmp_path: Path) -> None:
    assert device_run.drive(tmp_path / "out", [shell("a", result(1))], FOUND) == 0


def test_half_a_line_is_passed_over(tmp_path: Path) -> None:
    cut = """printf '{"kind": "network", "ro' >> $DSP_DEVICE_RESULTS; kill -KILL $$"""
    assert device_run.drive(tmp_path / "out", [shell("a", result(1)), shell("b", cut, 60.0, "a")], FOUND) == 1
    lines = device_run.lines(tmp_path / "out" / "results.jsonl")
    assert [line["row"] for line in lines if line["kind"] == "network"] == [1]
    assert {line["kind"] for line in lines} == {"environment", "network", "phase"}


def test_the_driver_ends_its_phases_when_it_is_told_to(tmp_path: Path) -> None:
    program = f"""
import signal, sys
from pathlib import Path
from bench import device_run
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
phase = device_run.Phase("a", ["sh", "-c", "echo $$ > {tmp_path}/pid; sleep 300"], 400.0)
device_run.drive(Path("{tmp_path}/out"), [phase], {{}})
"""
    driver = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    end = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert time.monotonic() < end
        time.sleep(0.02)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(60) == 143
    assert not alive(int((tmp_path / "pid").read_text()))
    assert (tmp_path / "out" / "summary.md").exists()


@pytest.mark.parametrize("which", ["plan", "tuning_plan", "others_plan"])
def test_plans_fit_the_time_and_name_what_there_is(which: str, tmp_path: Path) -> None:
    phases = getattr(device_run, which)(tmp_path, FOUND)
    names = [phase.name for phase in phases]
    assert len(set(names)) == len(names)
    for phase in phases:
        assert phase.ends <= device_run.SECONDS and set(phase.after) <= set(names)
        assert all(phases[names.index(name)].ends <= phase.ends for name in phase.after)
        if "bench.device_steps" in phase.command:
            step = phase.command[list(phase.command).index("bench.device_steps") + 1]
            assert step in device_steps.STEPS
    builder = phases[names.index("build")]
    assert "-DCMAKE_CUDA_ARCHITECTURES=90" in builder.environment["DSP_KERNELS_CMAKE_ARGS"]
    if which == "plan":  # what is timed has the device alone
        timed = ["tests", "networks", "autotune", "autotune as before", "layers", "again", "races"]
        for before, phase in itertools.pairwise(timed):
            assert before in phases[names.index(phase)].after
        assert "tests/test_gpu.py" in phases[names.index("tests")].command


def test_the_commit_needs_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSP_COMMIT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(device_run, "ROOT", tmp_path)
    assert device_run.commit(None) is None
    (tmp_path / "COMMIT").write_text("of the file\n")
    assert device_run.commit(None) == "of the file"
    monkeypatch.setenv("DSP_COMMIT", "of the environment")
    assert device_run.commit(None) == "of the environment"
    assert device_run.commit("named") == "named"


def test_without_a_device_or_torch_it_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = json.dumps({"torch": "2.11", "device": None, "capability": None})
    monkeypatch.setattr(device_run, "ask", lambda *_: (told, ""))
    monkeypatch.setattr(device_run, "drive", lambda *_: pytest.fail("nothing is to be run"))
    assert device_run.main(["--out", str(tmp_path / "out")]) == 2
    assert "no CUDA device: torch.cuda.is_available() is False" in capsys.readouterr().err
    monkeypatch.setattr(device_run, "ask", lambda *_: (None, "no torch: No module named 'torch'"))
    with pytest.raises(SystemExit) as ended:
        device_run.main(["--out", str(tmp_path / "out")])
    assert ended.value.code == 2 and "no torch" in capsys.readouterr().err


def test_make_gpu_is_this_command_and_nothing_else(tmp_path: Path) -> None:
    """With a stand-in for Python, which fails."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("no make on PATH")
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(f"""#!/bin/sh
echo "$*" >> "{log}"
exit 2
""")
    python.chmod(0o755)
    out = tmp_path / "out"
    command = [make, "gpu", f"GPU_PYTHON={python}", f"OUT={out}", "GPU_ARGS=--tune"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert log.read_text().splitlines() == [f"bench/device_run.py --out {out} --tune"]


STICKY = """
import pytest, torch

lost = False

@pytest.fixture(autouse=True)
def _device(monkeypatch):
    def synchronize():
        if lost:
            raise RuntimeError("an illegal memory access was encountered")
    torch.cuda.is_initialized, torch.cuda.synchronize = (lambda: True), synchronize

@pytest.mark.parametrize("i", range(8))
def test_one(i):
    global lost
    if i == 2:
        lost = True
    torch.cuda.synchronize()
"""


def test_a_lost_context_ends_its_process_alone(tmp_path: Path) -> None:
    """Of eight tests on two processes the third loses the device: the seven others pass, the last ones of its
    own process in a fresh one.
    """
    (tmp_path / "test_sticky.py").write_text(STICKY)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "load", "-p", "bench.device_tests"]
    environment = {**os.environ, device_run.RESULTS: str(tmp_path / "results"), "PYTHONPATH": str(ROOT)}
    command += ["-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    lines = device_run.lines(tmp_path / "results")
    outcomes: dict[str, set[str]] = {}
    for line in lines:
        if line["kind"] == "test":
            outcomes.setdefault(line["test"].split("[")[1], set()).add(line["outcome"])
    assert outcomes == {f"{i}]": {"failed"} if i == 2 else {"passed"} for i in range(8)}, done.stdout
    lost: list[Any] = [line for line in lines if line["kind"] == "lost"]
    assert len(lost) == 1 and "illegal memory access" in lost[0]["why"]
