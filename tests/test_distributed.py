"""Several processes by torchrun: one process on the joined batch gives the same; killed, the same bits."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import ddp_worker
import pytest
import torch
from safetensors.torch import load_file

import dsprune

ROOT = Path(__file__).resolve().parent.parent

# Each launch starts three Pythons with torch, which a busy machine takes its time for.
pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="this torch has no gloo",
    ),
]


def torchrun(script: Path, *arguments: object, processes: int = 2) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(processes), str(script), *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}


def test_two_processes_are_one_on_the_joined_batch(tmp_path: Path) -> None:
    command = torchrun(ROOT / "tests" / "ddp_worker.py", tmp_path)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    torch.set_num_threads(1)
    one = ddp_worker.run()
    if importlib.util.find_spec("accelerate") is not None:
        one.update(ddp_worker.accelerated(0, 1, tmp_path))
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    assert ranks[0].keys() == ranks[1].keys() == one.keys()
    assert {"exact.logits.first", "exact.structure.second", "masked.logits", "packed.logits"} <= one.keys()
    for name, value in one.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        if value.is_floating_point():
            torch.testing.assert_close(ranks[0][name], value, rtol=1e-9, atol=1e-9)
        else:
            assert torch.equal(ranks[0][name], value), name
    # The comparison sees something: groups were learned and channels removed.
    assert any(not one[name].all() for name in one if ".structure." in name)
    learned = [
        value for name, value in one.items() if name.startswith(("exact.logits.", "accelerate.logits."))
    ]
    assert all(value.abs().max() > 1e-3 for value in learned)
    for rank in range(2):
        assert "differ in: noise (seed or generator)" in (tmp_path / f"{rank}.txt").read_text()


def save_badly(rank: int, folder: Path) -> None:
    """Saves where that cannot be, and then where it can; writes what was raised."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    (folder / "file").touch()
    raised = []
    parts = {"order": torch.Generator().manual_seed(rank)}
    for path, meta in ((folder / "file" / "a", {}), (folder / "a", {"bad": object()}), (folder / "a", {})):
        try:
            dsprune.save_training(path, parts, meta)
        except (OSError, TypeError, ValueError) as error:
            raised.append(f"{type(error).__name__}: {error}")
    (folder / f"{rank}.json").write_text(json.dumps(raised))
    torch.distributed.destroy_process_group()


def test_where_the_first_process_cannot_write_all_raise(tmp_path: Path) -> None:
    other = torch.multiprocessing.get_context("spawn").Process(target=save_badly, args=(1, tmp_path))
    other.start()
    save_badly(0, tmp_path)
    other.join(60)
    assert other.exitcode == 0
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert len(first) == len(second) == 2 and (tmp_path / "a").exists()
    for one, same in zip(first, second, strict=True):
        text = one.partition(": ")[2]
        assert text and same.endswith(f"process 0 could not save: {text}")
    assert second[0].startswith("OSError: ") and second[1].startswith("TypeError: ")


def kill(process: subprocess.Popen[str]) -> None:
    """Ends the launcher and the processes that it started, which have sessions of their own, at once."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
    parents = dict(map(int, line.split()) for line in table.stdout.splitlines())
    ours = [process.pid]
    for pid in ours:
        ours += [child for child, parent in parents.items() if parent == pid]
    for pid in ours:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert len(ours) >= 3


@pytest.mark.nightly
@pytest.mark.skipif(os.name != "posix", reason="kills processes")
def test_killed_at_a_random_step_it_ends_in_the_same_bits(tmp_path: Path) -> None:
    options = ["--steps", 4, "--batch", 8, "--save-every", 1]

    def command(folder: str) -> list[str]:
        return torchrun(ROOT / "examples" / "ddp_learn.py", "--out", tmp_path / folder, *options)

    whole = subprocess.run(command("whole"), env=environment(), capture_output=True, text=True, timeout=1200)
    assert whole.returncode == 0, whole.stderr
    stage, step = random.SystemRandom().choice(["learn", "finetune"]), random.SystemRandom().randint(1, 3)
    pause = random.SystemRandom().uniform(0, 0.2)
    killed = subprocess.Popen(
        command("killed"), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.startswith(f"{stage} {step}:"):
            break
    time.sleep(pause)
    where = f"killed {pause:.3f} s after step {step} of {stage}"
    assert killed.poll() is None, where
    kill(killed)
    assert not (tmp_path / "killed" / "packed.safetensors").exists(), where
    again = subprocess.run(command("killed"), env=environment(), capture_output=True, text=True, timeout=1200)
    assert again.returncode == 0, (where, again.stderr)
    assert f"{stage} 1:" not in again.stdout or step == 1, where
    for name in ("learn", "finetune", "packed"):
        files = [load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("whole", "killed")]
        assert files[0].keys() == files[1].keys()
        for key in files[0]:
            if key.startswith(("random.numpy", "random.python")):
                continue  # which the script neither seeds nor draws from
            assert files[0][key].numpy().tobytes() == files[1][key].numpy().tobytes(), (where, name, key)
