"""Whose threads the native core's loops run on."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from dsp_kernels import available_backends, backends

pytestmark = pytest.mark.skipif(
    available_backends()["native"] is not None, reason=f"native backend: {available_backends()['native']}"
)

BEGIN = """
import os, signal, sys
import torch
from dsp_kernels import GroupLayout, backends, permuted_grouped_conv2d

signal.alarm(60)  # a wait for threads that are not there
torch.set_num_threads(2)
layout = GroupLayout(8, 8, [(range(5), range(4)), (range(3, 8), range(4, 8))])
generator = torch.Generator().manual_seed(0)
x = torch.randn(8, 8, 32, 32, generator=generator)
weight = torch.randn(layout.pairs * 9, generator=generator)

def run():
    return permuted_grouped_conv2d(x, weight, layout, kernel_size=3, padding=1, backend="native")

def threads():
    return len(os.listdir("/proc/self/task"))

native = backends.native_module()
"""


def in_a_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_loops_run_on_torch_s_own_threads() -> None:
    if backends._torch_team() == 0:
        pytest.skip("this torch is not built on an OpenMP runtime with GOMP_parallel")
    seen = in_a_process("""
        torch.randn(1 << 20).add_(1)  # torch's own loop has made its threads
        before = threads()
        expected = run()
        with_team = threads()
        native.use_team(0)
        same = torch.equal(run(), expected)
        print(with_team - before, threads() - before, same)
        """)
    assert seen == "0 1 True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("team", [True, False])
def test_a_forked_child_does_not_wait_for_its_parent_s_threads(team: bool) -> None:
    seen = in_a_process(f"""
        if not {team}:
            native.use_team(0)
        expected = run()
        child = os.fork()
        if child == 0:
            out = run()
            torch.set_num_threads(1)  # torch's own loops would wait
            os._exit(0 if torch.equal(out, expected) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.equal(run(), expected))
        """)
    assert seen == "0 True"


def test_calls_from_several_threads() -> None:
    assert (
        in_a_process("""
        import concurrent.futures
        expected = run()
        with concurrent.futures.ThreadPoolExecutor(4) as callers:
            outs = list(callers.map(lambda _: run(), range(32)))
        print(all(torch.equal(out, expected) for out in outs))
        """)
        == "True"
    )
