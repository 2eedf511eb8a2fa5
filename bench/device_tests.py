"""A pytest plugin of the device run: each test's outcome as a line of its results, and an end to processes
whose CUDA context is lost: after an illegal access every later call of that process would fail too.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

from bench.device_run import emit

LOST = 71  # the exit status of such a process

_failed = False


def lost() -> str | None:
    """CUDA's error where this process's context answers nothing any more."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return str(error).splitlines()[0]
    return None


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


class _Lines:
    def __init__(self, config: pytest.Config) -> None:
        self.worker = _is_worker(config)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        global _failed
        _failed = _failed or report.failed
        if self.worker:  # the process that spreads the tests hears of it
            return
        if report.when == "call" or report.failed or (report.when == "setup" and report.skipped):
            why = None if report.passed else _why(report)
            outcome = report.outcome
            emit("test", test=report.nodeid, outcome=outcome, seconds=round(report.duration, 2), why=why)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        global _failed
        failed, _failed = _failed, False
        if not failed or (error := lost()) is None:
            return
        emit("lost", test=nodeid, why=error, process=os.getpid())
        sys.stderr.flush()
        os._exit(LOST)


def _why(report: pytest.TestReport) -> str:
    told: Any = report.longrepr
    if isinstance(told, tuple):  # a skip: file, line, reason
        return str(told[2])
    crash = getattr(told, "reprcrash", None)
    text = str(crash.message if crash is not None else told).strip()
    return text.splitlines()[0][:300] if text else "no word"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Lines(config), "device-lines")
