"""Where rows come from: the sources of the config as one list of samples.

Sources are concatenated in the order of the config; how often and in which order their rows are read says mixing.py.
What is wrong with a file or a field is an error at load; what is wrong with one row is an `UnusableRow` when that row
is read.
"""

from __future__ import annotations

import bisect
import os
import sys
from itertools import accumulate
from typing import Any

from vlsi_fast.config_data import SourceConfig
from vlsi_fast.data.messages import Sample
from vlsi_fast.data.readers import READERS, Reader
from vlsi_fast.data.skipped import UnusableRow, row_boundary


class ConcatSource:
    """Sources one after another, as one list of samples.

    Attributes:
        parts: the sources.
        weights: each one's share of an epoch, or None: every row once.
    """

    def __init__(self, parts: list[Reader], weights: list[float] | None = None):
        self.parts, self.weights = parts, weights
        self._ends = list(accumulate(len(part) for part in parts))
        names = [part.name for part in parts]
        self._prefix = [f"{i}:" if names.count(name) > 1 else "" for i, name in enumerate(names)]

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def sizes(self) -> list[int]:
        """Rows of each source."""
        return [len(part) for part in self.parts]

    def part_of(self, index: int) -> int:
        """Number of the source that row `index` is of."""
        return self._locate(index)[0]

    def row_id(self, index: int) -> str:
        """Id of row `index`: the source's name and the row's number there, unique among all rows."""
        part, row = self._locate(index)
        return f"{self._prefix[part]}{self.parts[part].name}#{self.parts[part].number(row)}"

    def __getitem__(self, index: int) -> Sample:
        """Row `index`.

        Raises:
            UnusableRow: the row is malformed, or reading it failed in any other way.
        """
        part, row = self._locate(index)
        with row_boundary():
            sample = self.parts[part].read(row, self.row_id(index))
            sample.source = part
            return sample

    def skip_record(self, index: int, error: UnusableRow) -> dict[str, Any]:
        """What is written of row `index`, which cannot be used: `id`, `cause`, `detail`, `file`, `line` if known."""
        part, row = self._locate(index)
        found = {"id": self.row_id(index), "cause": error.cause, "detail": error.detail}
        return found | self.parts[part].where(row)

    def _locate(self, index: int) -> tuple[int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        part = bisect.bisect_right(self._ends, index)
        return part, index - (self._ends[part - 1] if part else 0)


def build_source(configs: list[SourceConfig], field: str = "data.train") -> ConcatSource:
    """Opens sources and concatenates them in order.

    Args:
        configs: the sources.
        field: where they stand in the config, for messages.

    Raises:
        FileNotFoundError: a path does not exist; the message names the field.
        ValueError: a file is not of the reader's format, or has no rows.
        ImportError: a reader's package is missing; the message names the install command.
    """
    if not configs:
        raise ValueError(f"{field} is empty; add at least one source, e.g. {{reader: easy_vqa}}")
    parts = [open_part(config, f"{field}[{i}]") for i, config in enumerate(configs)]
    weights = [config.weight for config in configs]
    return ConcatSource(parts, weights if None not in weights else None)


def open_part(config: SourceConfig, field: str) -> Reader:
    """Opens one source; `field` is where it stands. Raises as `build_source`."""
    part = READERS[config.reader](config, field)
    if len(part) == 0:
        raise ValueError(f"{field} ({part.name}) has no rows")
    _check_count(config, part, field)
    return part


def _check_count(config: SourceConfig, part: Reader, field: str) -> None:
    """Compares the rows found with those expected. Raises ValueError where they differ by more than the tolerance."""
    found, expected = part.rows, config.count
    if expected is None or found == expected:
        return
    message = f"{field} ({part.name}): {found} rows found, {expected} expected ({found / expected - 1:+.2%})"
    if abs(found - expected) > config.count_tolerance * expected:
        raise ValueError(
            f"{message}. Complete the download or correct path and images_under; if these are the rows you want, set "
            f"{field}.count to {found}, or raise count_tolerance (now {config.count_tolerance:g})"
        )
    if os.environ.get("RANK", "0") == "0":
        print(f"vlsi-fast: {message}; within count_tolerance {config.count_tolerance:g}", file=sys.stderr)
