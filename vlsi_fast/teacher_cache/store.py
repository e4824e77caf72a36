"""The shards of a cache: written whole or not at all, found by key, read row by row.

    CACHE/manifest.json                   what the cache is of (`manifest.py`)
    CACHE/teacher/                        the teacher's config and processor, for a job that does not have the teacher
    CACHE/head.safetensors                the teacher's head, beside hidden states alone
    CACHE/shards/WRITER-N.safetensors     rows
    CACHE/shards/WRITER.jsonl             WRITER's catalogue: a line for each of its shards, written after the shard

A writer is one rank of one call of `vlsi-fast teacher build`, under a name of its own: writers never meet, and what
several calls on several machines have written is one cache. A shard that is in no catalogue was never finished.

Tensors of a shard, of n rows with M answer tokens in all: `keys` [n, 16] and `answers` [n, 8] uint8 (`rows.py`), `ends`
[n] int64 (a row's tokens end there), `numbers` int64 (of rows in their data that are done with: kept here, kept already
by another shard, or refused), in shards that are deleted after use `positions` int64 of these, and what `forms.py`
stores, [M, ..]; where the teacher speaks the tokens of a student with another tokenizer, `kept` [M] int32: which of the
row's answer tokens each is, counted among the student's. Tokens come first, so that a row is one stretch of the file.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

SHARDS = "shards"
CATALOGUE = ".jsonl"
OPEN_SHARDS = 8
"""Shards that a reader holds open, mapped into memory."""
VALUES = ("neg_entropy", "expectation", "scale", "hidden", "kept")


class CacheError(UserError, RuntimeError):
    """A cache of teacher targets that is damaged, incomplete, or of another run. The message names the fix."""

    exit_code = 1
    of_one_rank = True


@dataclass
class Entry:
    """A row that is kept."""

    shard: str
    first: int
    end: int
    """Its tokens in the shard."""
    answers: bytes


@dataclass
class Refused:
    """A row that the teacher's side could not use, and why; as `data.skipped.UnusableRow` has it."""

    cause: str
    detail: str


# ---- writing ----


@dataclass
class ShardWriter:
    """Collects rows and writes them shard by shard.

    Args:
        folder: of the cache.
        shard_bytes: size at which a shard is closed.
        shard_rows: rows at which it is closed whatever its size; None: any number.
        data: digest of the data that `numbers` count in.
        temporary: the shards are deleted after use (`ahead.py`), so each has its rows' `positions` as well.
    """

    folder: Path
    shard_bytes: int
    shard_rows: int | None
    data: str
    temporary: bool = False
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    written: int = 0
    """Shards so far."""
    _rows: list[tuple[bytes, bytes, dict[str, Tensor]]] = field(default_factory=list)
    _numbers: list[int] = field(default_factory=list)
    _positions: list[int] = field(default_factory=list)
    _last: int = -1
    _refused: dict[bytes, tuple[str, str]] = field(default_factory=dict)
    _bytes: int = 0

    def add(self, key: bytes, answers: bytes, place: tuple[int, int], values: dict[str, Tensor] | None) -> None:
        """One row, at `place` (its number in its data, its position in the order).

        Its values are [N, ..] tensors in CPU memory, which are held until the shard is written; None: it is kept
        already. A position -1 - p is that of a row which comes again behind position p, to fill an epoch's last round.
        """
        self._numbers.append(place[0])
        self._positions.append(place[1])
        self._last = max(self._last, place[1] if place[1] >= 0 else -1 - place[1])
        if values is not None:
            self._rows.append((key, answers, values))
            self._bytes += sum(value.numel() * value.element_size() for value in values.values())
        if self._bytes >= self.shard_bytes or len(self._numbers) == self.shard_rows:
            self.flush()

    def refuse(self, key: bytes, cause: str, detail: str) -> None:
        """One row that cannot be used."""
        self._refused[key] = (cause, detail)

    def flush(self) -> None:
        """Write what is collected."""
        if not self._numbers:
            return
        from safetensors.torch import save_file

        keys, answers, values = zip(*self._rows) if self._rows else ((), (), ())
        counts = [len(next(iter(row.values()))) for row in values]
        tensors = {
            "keys": _bytes_tensor(keys, 16),
            "answers": _bytes_tensor(answers, 8),
            "ends": torch.tensor(counts, dtype=torch.int64).cumsum(0),
            "numbers": torch.tensor(self._numbers, dtype=torch.int64),
        }
        if self.temporary:
            tensors["positions"] = torch.tensor(self._positions, dtype=torch.int64)
        for name in values[0] if values else ():
            tensors[name] = torch.cat([row[name] for row in values])
        refused = [[key.hex(), *why] for key, why in self._refused.items()]
        shards = self.folder / SHARDS
        shards.mkdir(parents=True, exist_ok=True)
        path = shards / f"{self.name}-{self.written:06d}.safetensors"
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, {"refused": json.dumps(refused)})
        line = {
            "file": path.name,
            "bytes": partial.stat().st_size,
            "sha256": file_digest(partial),
            "rows": len(keys),
            "tokens": sum(counts),
            "refused": len(refused),
            "data": self.data,
            "last_position": self._last,
        } | ({"temporary": True} if self.temporary else {})
        partial.replace(path)
        append_line(shards / f"{self.name}{CATALOGUE}", line)
        self.written += 1
        self._rows, self._numbers, self._positions, self._refused, self._bytes, self._last = [], [], [], {}, 0, -1


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line to a catalogue of this process's own."""
    with path.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _bytes_tensor(values: Sequence[bytes], size: int) -> Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(values), np.uint8).reshape(-1, size).copy())


# ---- reading ----


def catalogue(folder: Path) -> Iterator[dict[str, Any]]:
    """Lines of all catalogues of a cache, in the order of their files' names. A last line cut short is left out."""
    for path in sorted((folder / SHARDS).glob(f"*{CATALOGUE}")):
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                break  # being written, or its writer died


def shards_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Shard file -> its line, without those that are told to be gone."""
    found, gone = {}, set()
    for line in catalogue(folder):
        if line.get("deleted"):
            gone.add(line["file"])
        else:
            found[line["file"]] = line
    return {name: line for name, line in found.items() if name not in gone}


def forget_lost(folder: Path) -> list[str]:
    """Tell the catalogues of shards that are gone or cut short, so that their rows are made again. Returns their names.

    For a builder, before it looks for what is done; a reader that meets such a shard must not go on.
    """
    lost = []
    for name, line in shards_of(folder).items():
        path = folder / SHARDS / name
        if not path.is_file() or path.stat().st_size != line["bytes"]:
            lost.append(name)
    for name in lost:
        append_line(folder / SHARDS / f"lost-{uuid.uuid4().hex[:12]}{CATALOGUE}", {"file": name, "deleted": True})
        (folder / SHARDS / name).unlink(missing_ok=True)
    return lost


def numbers_in(folder: Path, shard: str, name: str = "numbers") -> list[int]:
    """Numbers, in their data, of the rows that a shard is done with; or their `positions`."""
    from safetensors import safe_open

    with safe_open(folder / SHARDS / shard, framework="pt") as opened:
        return opened.get_tensor(name).tolist()


class CacheReader:
    """Rows of a cache by key. Only keys are held in memory, some 50 bytes a row; values are read when asked for."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files: list[str] = []
        self._known: set[str] = set()
        self._refused: dict[bytes, Refused] = {}
        self._low = np.zeros(0, np.uint64)
        self._columns = {name: np.zeros(0, kind) for name, kind in COLUMNS.items()}
        self._opened: OrderedDict[str, Any] = OrderedDict()
        self.refresh()

    def __getstate__(self):  # a file that is open does not go to another process
        return self.__dict__ | {"_opened": OrderedDict()}

    def __len__(self) -> int:
        """Rows kept; one that is there twice counts twice."""
        return len(self._low)

    def refresh(self) -> bool:
        """Take in shards that have come since. Returns whether any has."""
        from safetensors import SafetensorError

        new = [name for name in self._news() if name not in self._known]
        low, columns = [self._low], {name: [value] for name, value in self._columns.items()}
        for name in new:
            self._known.add(name)
            try:
                with self._open(name) as shard:
                    found = {each: shard.get_tensor(each).numpy() for each in ("keys", "answers", "ends")}
                    refused = json.loads((shard.metadata() or {}).get("refused", "[]"))
            except FileNotFoundError:
                continue  # deleted after use, or lost: its rows are not there
            except (SafetensorError, OSError) as error:
                raise CacheError(self._damaged(name, f"is damaged ({error})")) from error
            for key, *why in refused:
                self._refused[bytes.fromhex(key)] = Refused(*why)
            keys = np.ascontiguousarray(found["keys"]).view(np.uint64)
            low.append(keys[:, 0])
            parts = {
                "high": keys[:, 1],
                "answers": np.ascontiguousarray(found["answers"]).view(np.uint64)[:, 0],
                "shard": np.full(len(keys), len(self._files)),
                "end": found["ends"],
                "count": np.diff(found["ends"], prepend=0),
            }
            self._files.append(name)
            for each, value in parts.items():
                columns[each].append(value.astype(COLUMNS[each]))
        if new:
            low = np.concatenate(low)
            order = np.argsort(low, kind="stable")
            self._low = low[order]
            self._columns = {name: np.concatenate(value)[order] for name, value in columns.items()}
        return bool(new)

    def _news(self) -> Iterable[str]:
        """Shards, those not known yet among them."""
        return shards_of(self.folder)

    def _is_live(self, shard: str) -> bool:
        """Whether rows of a shard may be read."""
        return True

    def find(self, key: bytes) -> Entry | Refused | None:
        """Where a row is; None where it is not."""
        low, high = np.frombuffer(key, np.uint64)
        at = int(np.searchsorted(self._low, low))
        while at < len(self._low) and self._low[at] == low:
            if self._columns["high"][at] == high and self._is_live(self._files[self._columns["shard"][at]]):
                row = {name: value[at] for name, value in self._columns.items()}
                end = int(row["end"])
                answers = row["answers"].tobytes()
                return Entry(self._files[row["shard"]], end - int(row["count"]), end, answers)
            at += 1
        return self._refused.get(key)

    def read(self, entry: Entry) -> dict[str, Tensor]:
        """What is stored of a row, [N, ..] each, as copies.

        Raises:
            CacheError: the shard is gone or damaged.
        """
        from safetensors import SafetensorError

        try:
            shard = self._shard(entry.shard)
            return {name: shard.get_slice(name)[entry.first : entry.end] for name in VALUES if name in shard.keys()}
        except FileNotFoundError:
            what = "is gone; it may have been deleted after use (build --follow without --keep)"
        except (SafetensorError, OSError) as error:
            what = f"is damaged ({error})"
        raise CacheError(self._damaged(entry.shard, what))

    def _damaged(self, name: str, what: str) -> str:
        return (
            f"{self.folder / SHARDS / name} {what}: `vlsi-fast teacher verify {self.folder}` tells which shards are no "
            "more what was written; delete those, and the `vlsi-fast teacher build` that made them makes them again"
        )

    def _open(self, name: str):
        from safetensors import safe_open

        return safe_open(self.folder / SHARDS / name, framework="pt")

    def _shard(self, name: str):
        if name in self._opened:
            self._opened.move_to_end(name)
        else:
            self._opened[name] = self._open(name)
            if len(self._opened) > OPEN_SHARDS:
                self._opened.popitem(last=False)
        return self._opened[name]


COLUMNS = {"high": np.uint64, "answers": np.uint64, "shard": np.int32, "end": np.int64, "count": np.int32}
"""Of `CacheReader`, besides the first half of the key."""
