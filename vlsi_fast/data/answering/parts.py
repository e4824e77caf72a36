"""What ranks write while they answer, so that nothing is lost: `OUT.parts/`.

    settings.json        what the answers follow from; another start must have the same
    rank-00000.jsonl     batches that rank 0 answered, one a line: {"batch": number, "rows": [...]}

A batch is written as one line when it is whole. A line that a kill cut short is no line: its batch is answered again,
with the same neighbours, so the file that is merged in the end is the same. Any number of ranks may go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...lineage import LineageError, differences

try:
    import fcntl
except ImportError:  # not a POSIX system: two runs into one file are not noticed there
    fcntl = None


class Files:
    """The files of one output."""

    def __init__(self, out: str | Path):
        self.out = Path(out)
        beside = self.out.with_name
        self.manifest = beside(self.out.name + ".manifest.json")
        self.rejected = beside(self.out.name + ".rejected.jsonl")
        self.parts = beside(self.out.name + ".parts")
        self.settings = self.parts / "settings.json"

    def claim(self, settings: dict[str, Any], fresh: bool) -> None:
        """Makes the folder of parts, or finds it as a run with the same settings left it. On rank 0.

        Raises:
            LineageError: finished, another run's, or a file that is not ours.
        """
        if fresh:
            for path in (self.manifest, self.rejected, self.out):
                path.unlink(missing_ok=True)
            shutil.rmtree(self.parts, ignore_errors=True)
        if self.manifest.is_file():
            raise LineageError(f"{self.out} is finished; choose another --out, or --fresh to replace it")
        if self.settings.is_file():
            there = json.loads(self.settings.read_text())
            changed = [f"{name}: there {a!r}, now {b!r}" for name, a, b in differences(there, settings)]
            if changed:
                raise LineageError(
                    f"{self.parts} holds answers of other settings. Differences:\n  " + "\n  ".join(changed[:10]) + "\n"
                    "Start with those again, choose another --out, or --fresh to drop these answers"
                )
            return
        if self.out.exists():
            raise LineageError(f"{self.out} is another file; choose another --out, or --fresh to replace it")
        self.parts.mkdir(parents=True, exist_ok=True)
        write_whole(self.settings, json.dumps(settings, indent=1) + "\n")

    def done(self) -> dict[int, tuple[Path, int]]:
        """Batch -> the part and the byte where its line starts."""
        found = {}
        for path in sorted(self.parts.glob("rank-*.jsonl")):
            with open(path, "rb") as file:
                at = 0
                for line in file:
                    if (number := _batch_of(line)) is not None:
                        found.setdefault(number, (path, at))
                    at += len(line)
        return found

    @contextlib.contextmanager
    def part(self, rank: int) -> Iterator[Part]:
        """This rank's part, to add batches to.

        Raises:
            LineageError: another process writes it.
        """
        with open(self.parts / f"rank-{rank:05d}.jsonl", "ab+") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise LineageError(f"another process writes {self.parts}; wait for it, or end it") from None
            file.seek(0)
            whole = 0
            for line in file:
                whole += len(line) if line.endswith(b"\n") else 0
            file.truncate(whole)  # a line that was cut off
            yield Part(file)

    def merged(self, batches: int) -> Iterator[dict[str, Any]]:
        """Rows of all batches, in order.

        Raises:
            LineageError: a batch is missing.
        """
        done = self.done()
        missing = [number for number in range(batches) if number not in done]
        if missing:
            raise LineageError(
                f"{self.parts} lacks {len(missing)} of {batches} batches (the first: {missing[0]}). Ranks of several "
                "machines need one folder that all of them see; start again to answer what is missing"
            )
        with contextlib.ExitStack() as stack:
            files = {path: stack.enter_context(open(path, "rb")) for path in {path for path, _ in done.values()}}
            for number in range(batches):
                path, at = done[number]
                files[path].seek(at)
                yield from json.loads(files[path].readline())["rows"]


class Part:
    """An open part."""

    def __init__(self, file):
        self.file = file

    def add(self, batch: int, rows: list[dict[str, Any]]) -> None:
        """Writes a batch, so that it stays even where the machine stops."""
        self.file.write((json.dumps({"batch": batch, "rows": rows}) + "\n").encode())
        self.file.flush()
        os.fsync(self.file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader sees all of it, or the one before."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(partial, path)


def _batch_of(line: bytes) -> int | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)["batch"]
    except (ValueError, KeyError, TypeError):  # damaged where it lies: answered again
        return None
