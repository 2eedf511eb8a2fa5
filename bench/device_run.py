"""Everything that needs a GPU, in one command of nine minutes: what ``make gpu`` runs.

    python bench/device_run.py --out DIR [--commit NAME] [--launches FILE]
    python bench/device_run.py --out DIR --tune       the second call: the table of launches
    python bench/device_run.py --out DIR --others     the third: other networks, cuts and batches

A device is seldom at hand, and then for minutes. So nothing is assumed of the machine but a Python with
torch: no git, no make, no network; this file needs the standard library alone. Each phase is a process of its
own (with a process group of its own) under a hard limit; one that fails, hangs or dies takes nothing with it.
Every result is a line of ``results.jsonl`` as soon as there is one:

    {"kind": "environment" | "phase" | "test" | "ceilings" | "network" | "layer" | ..., "at": seconds, ...}

The files, eight at most: results.jsonl, log.txt (what the phases printed), summary.md, networks.md,
forms.json (the table that packing goes by), launch_table.json and launch_table.journal.json (tuning).

Exit status: 0 if every phase ended well, 1 if some did not, 2 where there is no device or no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 540.0
GRACE = 2.0  # from SIGTERM to SIGKILL
FILES = ("results.jsonl", "log.txt", "summary.md", "networks.md")  # made anew by each run
LOG_BYTES = 8 << 20  # of log.txt: the end of each phase's output
RESULTS, START, SCRATCH = "DSP_DEVICE_RESULTS", "DSP_DEVICE_START", "DSP_DEVICE_SCRATCH"


def emit(kind: str, **fields: Any) -> None:
    """Writes one result as a line, at once and whole, into the file that DSP_DEVICE_RESULTS names; prints it
    where none is named. For the phases as for the driver.
    """
    start = float(os.environ.get(START, "0")) or time.time()
    line = json.dumps({"kind": kind, "at": round(time.time() - start, 2), **fields}) + "\n"
    path = os.environ.get(RESULTS)
    if path is None:
        print(line, end="", flush=True)
        return
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


@dataclass(frozen=True)
class Phase:
    """A command that must be over ``ends`` seconds after the start, and begins when those of ``after`` have
    ended, however they ended. It is left out where fewer than ``least`` seconds remain.
    """

    name: str
    command: Sequence[str]
    ends: float
    after: tuple[str, ...] = ()
    least: float = 5.0
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class _Running:
    phase: Phase
    process: subprocess.Popen[bytes]
    log: Path
    began: float
    told: float | None = None  # when it was asked to end


def _last_words(text: str) -> str:
    """The last line that is not blank: what a program that failed said."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


class Driver:
    """Runs phases by their plan. ``seconds``: of the whole, from ``start`` on (a time of day; now)."""

    def __init__(
        self, out: Path, phases: Sequence[Phase], *, seconds: float = SECONDS, start: float | None = None
    ) -> None:
        self.out, self.phases, self.seconds = out, list(phases), seconds
        self.start = time.time() if start is None else start
        self.ended: dict[str, str] = {}
        self.running: list[_Running] = []
        self.scratch = Path(tempfile.mkdtemp(prefix="device_run_"))

    def left(self, end: float) -> float:
        return self.start + min(end, self.seconds) - time.time()

    def environment(self, extra: dict[str, str]) -> dict[str, str]:
        paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
        own = {
            RESULTS: str(self.out / "results.jsonl"),
            START: repr(self.start),
            SCRATCH: str(self.scratch),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
        }
        return {**os.environ, **own, **extra}

    def begin(self, phase: Phase) -> None:
        """Starts a phase, or says why it is not."""
        if (left := self.left(phase.ends)) < phase.least:
            self.report(phase, "left out", f"{max(0.0, left):.0f} s are left, {phase.least:.0f} needed", 0.0)
            return
        log = self.scratch / f"{phase.name.replace(' ', '_')}.log"
        try:
            with log.open("wb") as file:
                process = subprocess.Popen(
                    list(phase.command),
                    cwd=ROOT,
                    env=self.environment(phase.environment),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            self.report(phase, "not started", str(error), 0.0)
            return
        self.running.append(_Running(phase, process, log, time.time()))

    def report(self, phase: Phase, status: str, why: str | None, seconds: float) -> None:
        self.ended[phase.name] = status
        emit("phase", phase=phase.name, status=status, why=why, seconds=round(seconds, 1))
        print(f"{phase.name}: {status}, {seconds:.0f} s" + (f": {why}" if why else ""), flush=True)

    def look(self, run: _Running) -> bool:
        """Whether a phase has ended; asks it to where its time is over, then makes it."""
        code = run.process.poll()
        if code is None:
            if run.told is None and self.left(run.phase.ends) <= GRACE:
                run.told = time.time()
                _signal(run.process, signal.SIGTERM)
            elif run.told is not None and time.time() - run.told >= GRACE:
                _signal(run.process, signal.SIGKILL)
            return False
        _signal(run.process, signal.SIGKILL)  # what it left running
        text = run.log.read_text(encoding="utf-8", errors="replace")
        self.keep_log(run.phase.name, text)
        if run.told is not None:
            status, why = (
                "out of time",
                f"the limit was {run.phase.ends:.0f} s; last words: {_last_words(text)}",
            )
        elif code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
            status, why = "died", f"of {name}; last words: {_last_words(text)}"
        elif code > 0:
            status, why = "failed", f"status {code}: {_last_words(text)}"
        else:
            status, why = "ended", None
        self.report(run.phase, status, why, time.time() - run.began)
        return True

    def keep_log(self, name: str, text: str) -> None:
        path = self.out / "log.txt"
        room = LOG_BYTES - (path.stat().st_size if path.exists() else 0)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"==== {name}\n{text[-max(0, min(room, LOG_BYTES // 4)) :] if room > 0 else ''}\n")

    def run(self) -> bool:
        """All phases; whether each of them ended well."""
        waiting = list(self.phases)
        try:
            while waiting or self.running:
                for phase in list(waiting):
                    if all(name in self.ended for name in phase.after):
                        waiting.remove(phase)
                        self.begin(phase)
                self.running = [run for run in self.running if not self.look(run)]
                time.sleep(0.02)
        finally:  # also where this process is told to end
            for run in self.running:
                _signal(run.process, signal.SIGKILL)
            shutil.rmtree(self.scratch, ignore_errors=True)
        return all(status == "ended" for status in self.ended.values())


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """To the whole group of a process that leads one."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


# ---- the machine ----


def commit(named: str | None) -> str | None:
    """The commit that is measured: as named, or by DSP_COMMIT, or by the file COMMIT that was written
    beforehand, or by git where there is one.
    """
    if named or (named := os.environ.get("DSP_COMMIT")):
        return named
    file = ROOT / "COMMIT"
    if file.is_file():
        return file.read_text(encoding="utf-8").strip() or None
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def ask(command: Sequence[str], seconds: float) -> tuple[str | None, str]:
    """What a command printed, or None and why there is nothing."""
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer in {seconds:.0f} s"
    except OSError as error:
        return None, str(error)
    return (done.stdout, "") if done.returncode == 0 else (None, _last_words(done.stderr or done.stdout))


PROBE = """
import json, sys
try:
    import torch
except ImportError as error:
    sys.exit(f"no torch: {error}")
try:
    import triton
    version = triton.__version__
except Exception as error:
    version = None
cuda = torch.cuda.is_available()
print(json.dumps({
    "python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda,
    "triton": version,
    "device": torch.cuda.get_device_name() if cuda else None,
    "capability": list(torch.cuda.get_device_capability()) if cuda else None,
    "memory": torch.cuda.get_device_properties(0).total_memory if cuda else None,
}))
"""


def machine(named_commit: str | None) -> dict[str, Any]:
    """GPU, driver, torch, Triton, Python and commit. Raises SystemExit where there is no torch."""
    told, why = ask([sys.executable, "-c", PROBE], 60)
    if told is None:
        print(f"device_run: {sys.executable}: {why}. Name a Python that has torch.", file=sys.stderr)
        raise SystemExit(2)
    found: dict[str, Any] = json.loads(told.splitlines()[-1])
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver, why = ask(query, 20)
    return {
        "commit": commit(named_commit),
        "driver": driver.split()[0] if driver and driver.split() else None,
        "cores": os.cpu_count(),
        **found,
    }


# ---- the plan ----


def build(capability: Sequence[int] | None, seconds: float) -> Phase:
    """The native core for the device at hand, in place."""
    architecture = "{}{}".format(*capability) if capability else "native"
    given = os.environ.get("DSP_KERNELS_CMAKE_ARGS", "")
    return Phase(
        "build",
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        seconds,
        environment={
            "DSP_KERNELS_NATIVE": "1",
            "DSP_KERNELS_CMAKE_ARGS": f"-DCMAKE_CUDA_ARCHITECTURES={architecture} {given}".strip(),
        },
    )


def gpu_tests() -> list[str]:
    """The files that hold tests for a device."""
    found = [
        p for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text(encoding="utf-8")
    ]
    return [str(p.relative_to(ROOT)) for p in found]


def tests(ends: float, after: tuple[str, ...]) -> Phase:
    """The device tests in six processes. ``bench.device_tests`` writes their lines, and ends a process whose
    CUDA context is lost. Warnings of a torch that the project was not tested with are no failures here.
    """
    has = {
        name: ask([sys.executable, "-c", f"import {name}"], 20)[0] is not None
        for name in ("xdist", "pytest_timeout")
    }
    spread = ["-n", "6", "--dist", "load", "--max-worker-restart", "40"] if has["xdist"] else []
    limits = (
        ["--timeout", "40", "--timeout-method", "thread"] if has["pytest_timeout"] else ["-o", "timeout=0"]
    )
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "bench.device_tests", "-W", "default"]
    return Phase(
        "tests", [*command, *spread, *limits, *gpu_tests()], ends, after, environment={"OMP_NUM_THREADS": "2"}
    )


def sanitizer() -> str:
    """compute-sanitizer, from PATH or from where CUDA is usually installed."""
    named = shutil.which("compute-sanitizer")
    return named or "/usr/local/cuda/bin/compute-sanitizer"


def _step(name: str, out: Path) -> list[str]:
    return [sys.executable, "-m", "bench.device_steps", name, "--out", str(out)]


def plan(out: Path, found: dict[str, Any]) -> list[Phase]:
    """Nine minutes. The structure of the pruned network, and the kernels that it needs, are made beside the
    build and the tests; what is timed runs alone.
    """

    def step(name: str, ends: float, *after: str, least: float = 10.0, **environment: str) -> Phase:
        return Phase(name, _step(name.split()[0], out), ends, after, least, environment)

    races = [sanitizer(), "--tool", "racecheck", "--kernel-regex", "kns=conv2d", "--error-exitcode", "9"]
    return [
        build(found["capability"], 100),
        step("ceilings", 60),
        step("structure", 150),
        tests(150, ("build", "ceilings")),
        step("networks", 210, "tests", "structure"),
        step("autotune", 330, "networks", least=40),
        # An Inductor change made one convolutional model six times slower: pytorch#189488.
        step("autotune as before", 360, "autotune", least=25, TORCHINDUCTOR_LOOP_REINDEXING_AFTER_FUSION="0"),
        step("layers", 480, "autotune as before"),
        step("again", 510, "layers"),
        Phase("races", [*races, sys.executable, "-m", "bench.device_steps", "corners"], 538, ("again",)),
    ]


def tuning_plan(out: Path, found: dict[str, Any]) -> list[Phase]:
    """The second call: the table of launches."""
    command = [
        sys.executable,
        "-m",
        "bench.tune",
        "--minutes",
        "8.3",
        "--table",
        str(out / "launch_table.json"),
    ]
    return [build(found["capability"], 100), Phase("tune", command, 535)]


def others_plan(out: Path, found: dict[str, Any]) -> list[Phase]:
    """The third call: what the first had no time for."""
    ceilings = Phase("ceilings", _step("ceilings", out), 60)
    others = Phase("others", _step("others", out), 535, ("build", "ceilings"))
    return [build(found["capability"], 100), ceilings, others]


# ---- the whole ----


def lines(path: Path) -> list[dict[str, Any]]:
    """The results so far; half a line that a dying process left is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def summary(results: Sequence[dict[str, Any]]) -> str:
    """The results as a page; what failed stands in it like what did not."""
    of: Callable[[str], list[dict[str, Any]]] = lambda kind: [r for r in results if r["kind"] == kind]  # noqa: E731
    out = []
    for row in of("environment"):
        facts = [f"{k} {row.get(k)}" for k in ("device", "driver", "torch", "triton", "python", "commit")]
        out += [", ".join(facts), ""]
    out += ["| phase | | s | |", "|---|---|---|---|"]
    out += [f"| {r['phase']} | {r['status']} | {r['seconds']:.0f} | {r['why'] or ''} |" for r in of("phase")]
    tests = of("test")
    if tests:
        count = {o: sum(t["outcome"] == o for t in tests) for o in ("passed", "failed", "skipped")}
        out += ["", "Tests: " + ", ".join(f"{n} {o}" for o, n in count.items()) + ".", ""]
        out += [f"- {t['test']}: {t['why']}" for t in tests if t["outcome"] == "failed"]
    for row in of("ceilings"):
        out += ["", "Ceilings: " + ", ".join(f"{k} {v:.4g}" for k, v in row["found"].items() if v), ""]
    return "\n".join(out) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/device_run.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--commit", help="the commit that is measured (also: DSP_COMMIT, or a file COMMIT)")
    parser.add_argument("--launches", type=Path, help="a table of launches that was measured")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tune", action="store_true", help="the table of launches, in place of all else")
    which.add_argument("--others", action="store_true", help="other networks, cuts and batches")
    parser.add_argument(
        "--anyway",
        action="store_true",
        help="go on without a device: what needs one fails, the rest is tried",
    )
    options = parser.parse_args(arguments)
    start = time.time()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    found = machine(options.commit)
    if found["device"] is None and not options.anyway:
        print(
            f"device_run: no CUDA device: torch.cuda.is_available() is False in {sys.executable} "
            f"(torch {found['torch']})",
            file=sys.stderr,
        )
        return 2
    for name in (*FILES, *(() if options.tune or options.others else ("forms.json",))):
        (out / name).unlink(missing_ok=True)
    if found["commit"]:
        os.environ["DSP_COMMIT"] = found["commit"]
    if options.launches is not None:
        os.environ["DSP_KERNELS_LAUNCHES"] = str(options.launches.resolve())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    wanted = tuning_plan if options.tune else others_plan if options.others else plan
    return drive(out, wanted(out, found), found, start=start)


def drive(
    out: Path,
    phases: Sequence[Phase],
    found: dict[str, Any],
    *,
    seconds: float = SECONDS,
    start: float | None = None,
) -> int:
    """Runs a plan, with its page at the end however it ends."""
    driver = Driver(out, phases, seconds=seconds, start=start)
    os.environ.update({RESULTS: str(out / "results.jsonl"), START: repr(driver.start)})
    try:
        emit("environment", **found)
        return 0 if driver.run() else 1
    finally:
        for name in (RESULTS, START):
            os.environ.pop(name, None)
        page = summary(lines(out / "results.jsonl"))
        (out / "summary.md").write_text(page, encoding="utf-8")
        print(page)


if __name__ == "__main__":
    sys.exit(main())
