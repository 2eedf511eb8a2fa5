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
from dsp_kernels.program import Program

signal.alarm(60)  # a wait for threads that are not there
torch.set_num_threads(2)
layout = GroupLayout(8, 8, [(range(5), range(4)), (range(3, 8), range(4, 8))])
generator = torch.Generator().manual_seed(0)
x = torch.randn(8, 8, 32, 32, generator=generator)
weight = torch.randn(layout.pairs * 9, generator=generator)

def run_operator():
    return [permuted_grouped_conv2d(x, weight, layout, kernel_size=3, padding=1, backend="native")]

program = Program((8, 32, 32))
middle = program.conv(program.input, weight, layout, kernel_size=3, padding=1)
program.build(program.conv(middle, weight, layout, kernel_size=3, padding=1))

def run_program():  # whole images on each thread, then one on both
    return [program(x), program(x[:7]), program(x[:1])]

def same(a, b):
    torch.set_num_threads(1)  # in a forked child torch's own loops would wait
    equal = all(map(torch.equal, a, b))
    torch.set_num_threads(2)
    return equal

def threads():
    return len(os.listdir("/proc/self/task"))

native = backends.native_module()
"""


def in_a_process(code: str, form: str = "operator", **environment: str) -> str:
    begin = BEGIN + f"run = run_{form}\n"
    done = subprocess.run(
        [sys.executable, "-c", begin + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=1200,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


FORMS = pytest.mark.parametrize("form", ["operator", "program"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
@FORMS
def test_loops_run_on_torch_s_own_threads(form: str) -> None:
    if backends._torch_team() == 0:
        pytest.skip("this torch is not built on an OpenMP runtime with GOMP_parallel")
    seen = in_a_process(
        """
        torch.randn(1 << 20).add_(1)  # torch's own loop has made its threads
        before = threads()
        expected = run()
        with_team = threads()
        native.use_team(0)
        out = run()
        print(with_team - before, threads() - before, same(out, expected))
        """,
        form,
    )
    assert seen == "0 1 True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@FORMS
@pytest.mark.parametrize("team", [True, False])
def test_a_forked_child_does_not_wait_for_its_parent_s_threads(team: bool, form: str) -> None:
    seen = in_a_process(
        f"""
        if not {team}:
            native.use_team(0)
        expected = run()
        child = os.fork()
        if child == 0:
            os._exit(0 if same(run(), expected) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), same(run(), expected))
        """,
        form,
    )
    assert seen == "0 True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_that_is_the_first_to_load_the_core() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, torch\n"
            "torch.set_num_threads(2)\n"
            "torch.randn(1 << 20).add_(1)\n"
            "child = os.fork()\n"
            "if child:\n"
            "    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0)\n"
            + BEGIN
            + "run_operator(); run_program()",
        ],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@FORMS
def test_calls_from_several_threads(form: str) -> None:
    seen = in_a_process(
        """
        import concurrent.futures
        expected = run()
        with concurrent.futures.ThreadPoolExecutor(4) as callers:
            outs = list(callers.map(lambda _: run(), range(32)))
        print(all(same(out, expected) for out in outs))
        """,
        form,
    )
    assert seen == "True"


@FORMS
def test_a_team_that_is_smaller_than_asked(form: str) -> None:
    seen = in_a_process(
        """
        expected = run()
        native.use_team(0)
        print(same(run(), expected))
        """,
        form,
        OMP_THREAD_LIMIT="1",
    )
    assert seen == "True"
