"""Configurations of the Triton kernels: a table by architecture and bucket of shapes, read and written.

The shipped table is ``launch_table.json``; rows of the file that ``DSP_KERNELS_LAUNCHES`` names go before it.
``python -m bench.tune`` measures and writes such a file. Either is read once, when a configuration is first
needed.

Keys: ``conv/half/n64/large`` (operation, precision, width of a tile of filters, pixels), for kernels of more
than one tap ``conv/half/n64/large/taps`` before it, ``grad_input/...`` the same, ``grad_weight/half``,
``chain/half/s256/t2x32/n64`` (stream, tiles of the first convolution, last one's columns), or one shape
exactly (:func:`dsp_kernels.conv.triton.exact_key`).

Rows under ``sm_90+verified`` go before those of ``sm_90`` where :data:`VERIFIED` names the architecture. They
have eight warps, which compiled kernels of this kind were seen to go silently wrong with elsewhere
(pytorch#173068): ``pytest tests/test_gpu.py -k eight_warps`` has to pass on such a device first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = [
    "ENVIRONMENT",
    "SHIPPED",
    "VERIFIED",
    "ChainLaunch",
    "Launch",
    "Table",
    "forget",
    "read",
    "rows_of",
    "to_json",
]

ENVIRONMENT = "DSP_KERNELS_LAUNCHES"
VERIFIED = "DSP_KERNELS_VERIFIED"  # architectures, as in "sm_90,sm_100"
# How often a tile of a k x k fetches its pixels where the first-level cache has what it read before: its own,
# and the rows beside them; 128 pixels of rows of 56 need 1.9 times as many, of 14 1.2. For choosing widths.
HALO = 2.0
# Multiply-adds that take as long as one element from the second-level cache, of the order of every device in
# devices.json with matrix instructions.
BALANCE = 128
SHIPPED = Path(__file__).with_name("launch_table.json")
_FORMAT = 1


@dataclass(frozen=True)
class Launch:
    """A configuration: tile sizes (pixels, filters, K; powers of two from 16), warps a program, stages of the
    copy pipeline, into how many shares the sum is split (0: by the number of multiprocessors), and the bytes
    of a copy of the input: those of 16 go past the first-level cache, those of 8 through it, where the taps
    of a kernel find again what another tap has read.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    warps: int
    stages: int
    split: int
    copy: int = 16

    def read(self, taps: int, halo: float = HALO) -> float:
        """Elements that come from the second-level cache for each pixel of a tile and each row of K: of the
        input 1, or ``halo / taps`` where the first-level cache has the rest, and a share of the weights.
        ``halo``: how often a tile fetches its pixels, those beside them included.
        """
        kept = self.copy < 16 and taps > 1
        return (min(1.0, halo / taps) if kept else 1.0) + self.BLOCK_N / self.BLOCK_M

    def effort(self, taps: int) -> float:
        """What a tile takes for each pixel and row of K, in elements from the second-level cache: these, or
        the multiply-adds, whichever take longer.
        """
        return max(self.read(taps), self.BLOCK_N / BALANCE)

    def to_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class ChainLaunch:
    """A configuration of the chain kernel: pixels of a tile, channels of the stream made at a time (powers of
    two from 16), warps, stages, whether (1) or not (0) the 1x1s' weights stay in shared memory while a
    program goes from tile to tile, and the bytes of a copy of the input, as in :class:`Launch`.
    """

    BLOCK_M: int
    BLOCK_S: int
    warps: int
    stages: int
    resident: int = 0
    copy: int = 16

    def to_json(self) -> dict[str, int]:
        return asdict(self)


Table = dict[str, dict[str, Launch | ChainLaunch]]


def _row(key: str, value: Any) -> Launch | ChainLaunch:
    kind = ChainLaunch if key.startswith("chain/") else Launch
    row = kind(**value)
    for name, number in asdict(row).items():
        if type(number) is not int or number < (name not in ("split", "resident")):
            raise ValueError(f"{key}: {name} is {number!r}")
        if name.startswith("BLOCK") and (number < 16 or number & (number - 1)):
            raise ValueError(f"{key}: {name} is {number}, no power of two from 16")
        if name == "copy" and number not in (8, 16):
            raise ValueError(f"{key}: copy is {number}; it must be 8 or 16 bytes")
    return row


def read(path: str | Path) -> Table:
    """A table from a file: architecture ("sm_90", "default") -> key -> configuration.

    Raises ValueError, naming the file, for one of another form; OSError for one that cannot be read.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data.pop("format", None) != _FORMAT:
            raise ValueError(f"format must be {_FORMAT}")
        return {a: {key: _row(key, value) for key, value in rows.items()} for a, rows in data.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a table of launches: {error}") from None


def to_json(table: Mapping[str, Mapping[str, Launch | ChainLaunch]]) -> str:
    """The text of a table's file."""
    rows = {arch: {key: row.to_json() for key, row in rows.items()} for arch, rows in table.items()}
    return json.dumps({"format": _FORMAT, **rows}, indent=1) + "\n"


@cache
def _tables() -> tuple[Table, ...]:
    named = os.environ.get(ENVIRONMENT)
    shipped = read(SHIPPED)
    return (read(named), shipped) if named else (shipped,)


def rows_of(arch: str) -> dict[str, Launch | ChainLaunch]:
    """The rows of one architecture, or "default"; empty where there are none.

    Raises ValueError, naming the file, for a file that is no table; OSError for one that cannot be read.
    """
    verified = arch in os.environ.get(VERIFIED, "").replace(" ", "").split(",")
    out: dict[str, Launch | ChainLaunch] = {}
    for table in reversed(_tables()):
        out |= table.get(arch, {})
        if verified:
            out |= table.get(f"{arch}+verified", {})
    return out


def forget() -> None:
    """Reads the tables again when they are next needed."""
    _tables.cache_clear()
