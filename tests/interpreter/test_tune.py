"""The tuner of launches on the CPU: its whole path with tiny layers, interpreted, and clocks made to fit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import tune
from dsp_kernels.conv import chain, launches
from dsp_kernels.conv import triton as room
from dsp_kernels.conv.launches import ChainLaunch, Launch

CPU = torch.device("cpu")
Clock = Callable[[Callable[[], Any], Any, Any], float]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    room.forget()
    yield
    room.forget()


def likes(**wanted: int) -> Clock:
    """A clock for which each field of a configuration that is not as ``wanted`` costs a tenth more."""

    def clock(call: Any, config: Any, work: Any) -> float:
        return 1e-5 * 1.1 ** sum(getattr(config, name, value) != value for name, value in wanted.items())

    return clock


def tuner(folder: Path, clock: Clock, **options: Any) -> tune.Tuner:
    options = {"minutes": 10.0, **options}
    return tune.Tuner(CPU, folder / "table.json", folder / "journal.json", timer=clock, **options)


def test_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best by the clock gets into the table, other rows stay, and calls are launched by it."""
    before = {"sm_90": {"grad_weight/half": Launch(32, 64, 64, 4, 3, 0)}}
    (tmp_path / "table.json").write_text(launches.to_json(before))
    every = tune.candidates

    def fewer(best: Any, key: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """All of the forward's; of the others what the clock likes."""
        if key.startswith("conv/"):
            yield from every(best, key)
        else:
            yield from (("stages", (2,)), ("warps", (8,)), ("BLOCK_M", (128,)))
            if key.startswith("chain/"):
                yield "BLOCK_S", (16,)

    monkeypatch.setattr(tune, "candidates", fewer)
    mine = tuner(tmp_path, likes(BLOCK_M=128, BLOCK_S=16, stages=2, warps=8))
    assert mine.run(tune.tiny()) == []
    found = launches.read(tmp_path / "table.json")
    assert found["sm_90"] == before["sm_90"] and set(found) == {"sm_90", "interpreter"}
    rows = found["interpreter"]
    assert rows["conv/half/n16/small/taps"] == Launch(128, 16, 64, 8, 2, 0)
    assert rows["grad_input/half/n16/small/taps"] == Launch(128, 16, 64, 8, 2, 0)
    assert rows["grad_weight/half"] == Launch(128, 64, 64, 8, 2, 0)
    assert rows["chain/half/s32/t2x16/n16"] == ChainLaunch(128, 16, 8, 2)
    text = tune.report(mine, ["conv/half/n128/large"])
    assert "conv/half/n16/small/taps: BLOCK_M 128" in text and "conv/half/n128/large: no time left" in text

    layout, shape = tune.tiny()[0].layouts[0], ("half", tune.tiny()[0].layouts[0], (3, 3), 16, "interpreter")
    assert room.choose_launch("conv", *shape).stages == 4
    monkeypatch.setenv(launches.ENVIRONMENT, str(tmp_path / "table.json"))
    room.forget()
    for op in ("conv", "grad_input", "grad_weight"):
        assert room.choose_launch(op, *shape).warps == 8
    assert room.choose_launch("conv", "half", layout, (3, 3), 1 << 20, "interpreter").warps == 4
    of = tune.tiny()[3].layouts
    assert chain.config_of(of, torch.float16, arch="interpreter").block_m == 128
    assert chain.config_of(of, torch.float16, arch="interpreter", shared_memory=24 * 1024).block_m == 64
    assert chain.config_of(of, torch.float16, arch="sm_90").block_m == 64


def few(best: Any, key: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "BLOCK_M", (128, 256)
    yield "warps", (8,)


def test_a_candidate_that_is_wrong_or_fails_cannot_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "candidates", few)
    real = room.forward
    seen: list[int] = []

    def broken(*args: Any) -> torch.Tensor:
        forced = room._forced.get()
        assert forced is not None
        if forced.BLOCK_M == 128:  # the fastest by the clock below; a part is never written
            whole = real(*args)
            out = torch.empty(whole.shape, dtype=whole.dtype)
            out[:, 1:] = whole[:, 1:]
            return out
        if forced.BLOCK_M == 256:
            raise RuntimeError("out of resource: shared memory\nand more")
        if forced.warps == 8:
            seen.append(1)
            return real(*args) * (1 + 2e-3 * (len(seen) % 2))
        return real(*args)

    monkeypatch.setattr(room, "forward", broken)
    mine = tuner(tmp_path, likes(BLOCK_M=128, warps=8))
    assert mine.run(tune.tiny()[:1]) == []
    assert launches.read(tmp_path / "table.json") == {}, "the configuration in use stays"
    tried = json.loads((tmp_path / "journal.json").read_text())["buckets"]["conv/half/n16/small/taps"][
        "candidates"
    ]
    dropped = {json.loads(name)["BLOCK_M"]: row.get("dropped") for name, row in tried.items()}
    assert "not written" in dropped[128] and "RuntimeError: out of resource: shared memory" in dropped[256]
    (eight,) = (row for name, row in tried.items() if json.loads(name)["warps"] == 8)
    assert "times the bound" in eight["dropped"] or eight["dropped"].endswith("not the same bits twice")
    assert sum("us" in row for row in tried.values()) == 1


def test_a_run_that_was_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "candidates", few)
    work = tune.tiny()[:1]
    timed: list[Any] = []
    mine: list[tune.Tuner] = []

    def clock(call: Any, config: Any, work: Any) -> float:
        timed.append(config)
        if len(timed) == 2:
            mine[0].end = 0.0  # the time is over
        return likes(warps=8)(call, config, work)

    mine.append(tuner(tmp_path, clock))
    assert mine[0].run(work) == ["conv/half/n16/small/taps"] and len(timed) == 2
    assert launches.read(tmp_path / "table.json") == {}
    again = tuner(tmp_path, clock)
    assert again.resumed and again.run(work) == []
    assert len(timed) == len(set(timed)) == 4, "nothing is measured twice"
    (row,) = launches.read(tmp_path / "table.json")["interpreter"].values()
    assert row.warps == 8
    # All done: nothing to do. Another Triton: all anew.
    assert tuner(tmp_path, clock).run(work) == [] and len(timed) == 4
    journal = json.loads((tmp_path / "journal.json").read_text())
    journal["environment"]["triton"] = "3.0"
    (tmp_path / "journal.json").write_text(json.dumps(journal))
    assert not tuner(tmp_path, clock).resumed


def test_a_candidate_that_takes_the_device_along_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "candidates", few)
    monkeypatch.setattr(tune, "seconds_of", likes(warps=8))
    real = room.forward

    def fails(*args: Any) -> torch.Tensor:
        forced = room._forced.get()
        assert forced is not None
        if forced.BLOCK_M == 128:
            raise RuntimeError("an illegal memory access was encountered")
        return real(*args)

    def lost(self: tune.Tuner, why: str) -> None:
        raise tune.DeviceLost(why)

    monkeypatch.setattr(room, "forward", fails)
    monkeypatch.setattr(tune.Tuner, "_check_device", lost)
    table = tmp_path / "table.json"
    command = ["--dry-run", "--only", "conv/", "--table", str(table)]
    assert tune.main(command) == 3
    assert "run this again to go on" in capsys.readouterr().err
    assert tune.main(command) == 0
    assert "1 dropped" in capsys.readouterr().out
    assert "illegal memory access" in (tmp_path / "table.journal.json").read_text()
    assert launches.read(table)["interpreter"]["conv/half/n16/small/taps"].warps == 8


def test_what_is_not_worth_compiling() -> None:
    limit = 99 * 1024
    assert tune.too_large(Launch(128, 64, 32, 4, 3, 1), "conv/half/n64/large", limit) is None
    assert "shared memory" in str(
        tune.too_large(Launch(128, 128, 128, 8, 3, 1), "conv/half/n128/large", limit)
    )
    assert "256 sums" in str(tune.too_large(Launch(256, 128, 32, 4, 2, 1), "conv/half/n128/large", limit))
    assert tune.too_large(Launch(64, 64, 64, 4, 3, 1), "grad_weight/half", limit) is None
    assert "shared" in str(tune.too_large(Launch(64, 64, 64, 4, 4, 1), "grad_weight/tf32", limit))


def test_every_bucket_has_several_candidates_that_fit() -> None:
    for work in tune.workloads():
        key = work.bucket("sm_90")
        start: Any = ChainLaunch(64, 64, 4, 3)
        if work.op != "chain":
            kernel = work.geometry[0]
            start = room.choose_launch(work.op, work.precision, work.layouts[0], kernel, work.pixels, "sm_90")
            assert work.op == "grad_weight" or f"/n{start.BLOCK_N}/" in key
        limit = 99 * 1024
        assert tune.too_large(start, key, limit) is None
        fitting = {
            other
            for name, values in tune.candidates(start, key)
            for value in values
            if (other := dataclasses.replace(start, **{name: value})) != start
            and tune.too_large(other, key, limit) is None
        }
        assert len(fitting) >= 4, key


def test_every_bucket_of_the_shipped_table_has_layers() -> None:
    """Whatever the table distinguishes is measured, but for tiles that no layer of two groups gets."""
    buckets = {work.bucket("sm_90") for work in tune.workloads()}
    for key in launches.read(launches.SHIPPED)["default"]:
        assert key in buckets or f"{key}/taps" in buckets, key
    assert sum(key.startswith("chain/") for key in buckets) == 2


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--list", "--dry-run"]) == 0
    assert "chain/half/s32/t2x16/n16: chain, tiny" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tune.main(["--dry-run"])
    assert "--table must name a file" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert tune.main([]) == 2
        assert "no CUDA device" in capsys.readouterr().err
    table = tmp_path / "new" / "table.json"
    assert tune.main(["--dry-run", "--only", "grad_input", "--minutes", "0", "--table", str(table)]) == 0
    assert "grad_input/half/n16/small/taps: no time left" in capsys.readouterr().out
    assert launches.read(table) == {}


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "{}", '{"format": 2}', '{"format": 1, "sm_90": 3}',
        '{"format": 1, "sm_90": {"conv/half/n16/large": {"BLOCK_M": 64}}}',
        '{"format": 1, "sm_90": {"chain/half/s64": {"BLOCK_M": 48, "BLOCK_S": 16, "warps": 4, "stages": 2}}}',
        '{"format": 1, "sm_90": {"chain/half/s64": {"BLOCK_M": 64, "BLOCK_S": 16, "warps": 0, "stages": 2}}}',
    ],
)  # fmt: skip
def test_a_broken_table_is_refused(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"table\.json: not a table of launches"):
        launches.read(path)
    monkeypatch.setenv(launches.ENVIRONMENT, str(path))
    with pytest.raises(ValueError, match="not a table of launches"):
        launches.rows_of("sm_90")
