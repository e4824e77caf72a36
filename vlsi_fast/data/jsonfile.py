"""Rows of a JSON list or a JSON-lines file by number, without holding the file in memory.

One pass over the file notes where each row starts and how long it is (`[rows, 2]` int64, 16 bytes a row). The table is
memory-mapped, so neither the file's size nor its number of rows shows in a process's memory, and worker processes and
ranks of one machine share it. For a large file the table is kept on disk and made again only when the file changes.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import mmap
import os
import re
import tempfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

try:
    import fcntl
except ImportError:  # not a POSIX system: several processes may make the same table, the last one's stays
    fcntl = None

CACHED_FROM_BYTES = 32 * 2**20
"""A smaller file is read through in less than a second; its table is not kept."""
CHUNK_BYTES = 4 * 2**20
MAX_ROW_BYTES = 256 * 2**20
"""A longer line is a bad row; a row of a JSON list that has no end within so many bytes is an error of the file."""
COUNTED_BYTES = 256 * 2**20
"""Lines are counted (to name a bad row's) up to here, which takes a tenth of a second or two."""
_VERSION = 1  # of the tables on disk
_OPENING = re.compile(r"[ \t\r\n]*\[")
_GAP = re.compile(r"[ \t\r\n,]*")
_SPACE = re.compile(r"[ \t\r\n]*")
_LIST = re.compile(rb"\[\s*[{\]]")
_ROW = re.compile(rb"^[ \t]*\{", re.MULTILINE)
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


class JsonFile:
    """Rows of one file.

    Args:
        path: a JSON list of rows, or JSON lines.
        keep: which parsed rows to count; default: all. A line that is not JSON is always counted, as a bad row.
        keep_key: names `keep` in the table on disk; the same key must mean the same rows.

    Raises:
        ValueError: neither of the two formats, or a list that is not valid JSON. The message names the path.
    """

    def __init__(self, path: Path, keep: Callable[[Any], bool] | None = None, keep_key: str = ""):
        self.path = str(path.absolute())
        with open(path, "rb") as file:
            head = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        lines = _is_lines(path, head)
        if not lines and not head.startswith(b"["):
            raise ValueError(f"{path} is neither a JSON list of rows nor JSON lines")
        scan = _scan_lines if lines else _scan_list
        self.table = _table(path, lambda out: _write_table(scan(path, keep), out), keep_key)

    def __len__(self) -> int:
        return len(self.table)

    def read(self, row: int) -> Any:
        """Row `row`, parsed.

        Raises:
            ValueError: it is not valid JSON, nested too deeply, or larger than any row is.
        """
        start, length = (int(value) for value in self.table[row])
        if length > MAX_ROW_BYTES:
            raise ValueError(f"{length} bytes, a row has at most {MAX_ROW_BYTES}")
        with open(self.path, "rb") as file:  # opened for each row: safe in worker processes
            file.seek(start)
            return _parse(file.read(length))

    def line(self, row: int) -> int | None:
        """The line (1: the first) on which row `row` starts; None far inside a large file."""
        start = int(self.table[row][0])
        if start > COUNTED_BYTES:
            return None
        with open(self.path, "rb") as file:
            blocks = (min(CHUNK_BYTES, start - at) for at in range(0, start, CHUNK_BYTES))
            return 1 + sum(file.read(size).count(b"\n") for size in blocks)

    def mentions(self, key: str) -> bool:
        """Whether a key stands anywhere in the file, as JSON writes it."""
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(json.dumps(key).encode()) >= 0


def cache_folder() -> Path:
    """Where tables are kept: $VLSI_FAST_CACHE, or `vlsi-fast` in the user's cache folder ($XDG_CACHE_HOME)."""
    own = os.environ.get("VLSI_FAST_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlsi-fast"


def _is_lines(path: Path, head: bytes) -> bool:
    """Whether a file that starts so is JSON lines. One that is called .jsonl stays so where its first row is bad."""
    if head.startswith(b"{") or path.suffix != ".jsonl":
        return head.startswith(b"{")
    first, _, rest = head.partition(b"\n")
    if _LIST.match(head):
        try:
            _parse(first)
        except ValueError:
            return False
    return _ROW.search(rest) is not None


def _scan_lines(path: Path, keep: Callable[[Any], bool] | None) -> Iterator[tuple[int, int]]:
    """(start, length) in bytes of every line that is a kept row."""
    at = 0
    with open(path, "rb") as file:
        while line := file.readline(MAX_ROW_BYTES + 1):
            length = len(line)
            while not line.endswith(b"\n") and (rest := file.readline(CHUNK_BYTES)):  # too long: told when it is read
                length, line = length + len(rest), rest
            if length > MAX_ROW_BYTES or (line.strip() and (keep is None or _line_is_kept(line, keep))):
                yield at, length
            at += length


def _line_is_kept(line: bytes, keep: Callable[[Any], bool]) -> bool:
    try:
        return keep(_parse(line))
    except ValueError:
        return True  # told when the row is read


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _integer(digits: str) -> int | float:
    """Python refuses to read an integer of thousands of digits, which is valid JSON."""
    return int(digits) if len(digits) < 1000 else float(digits)


def _end_of(text: str, at: int) -> int:
    """Where the list or object that starts at `at` ends, however deep. Raises ValueError where it has no end."""
    depth = 0
    for found in _BRACKET.finditer(text, at):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.end()
    raise ValueError("the row has no end")


def _scan_list(path: Path, keep: Callable[[Any], bool] | None) -> Iterator[tuple[int, int]]:
    """(start, length) in bytes of every kept element. Holds a chunk of the file at a time, never the whole list."""
    with open(path, "rb") as file:
        window = _Window(file, path)
        window.open_list()
        while (found := window.next_element()) is not None:
            value, start, length = found
            if keep is None or keep(value):
                yield start, length
        window.close_list()


class _Window:
    """The part of a JSON list that is being read: decoded text, and where in the file it stands."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.parse = json.JSONDecoder(parse_int=_integer).raw_decode
        self.byte = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0  # of text[at]
        file.seek(self.byte)
        self.text, self.at, self.ended = "", 0, False

    def open_list(self) -> None:
        while not (found := _OPENING.match(self.text)):
            self._more("it does not start with [")
        self._advance(found.end())

    def close_list(self) -> None:
        self._advance(self.at + 1)
        while not self.ended:
            self._advance(_SPACE.match(self.text, self.at).end())
            if self.at < len(self.text):
                raise ValueError(f"{self.path} is not valid JSON: something follows the list, at byte {self.byte}")
            self._more("")

    def next_element(self) -> tuple[Any, int, int] | None:
        """(value, start, length in bytes), or None at the end of the list."""
        while True:
            self._advance(_GAP.match(self.text, self.at).end())
            reason = "the list has no end"
            if self.at < len(self.text):
                if self.text[self.at] == "]":
                    return None
                try:
                    value, end = self._element()
                except ValueError as error:  # cut at the chunk's end, or wrong: known once there is no more to read
                    reason = str(error)
                else:
                    if end < len(self.text) or self.ended:  # a number may go on in the next chunk
                        start = self.byte
                        self._advance(end)
                        return value, start, self.byte - start
            self._more(reason)

    def _element(self) -> tuple[Any, int]:
        """(value, end in text); a value that is nested too deeply is None, and told when the row is read."""
        try:
            return self.parse(self.text, self.at)
        except RecursionError:
            return None, _end_of(self.text, self.at)

    def _advance(self, to: int) -> None:
        self.byte += len(self.text[self.at : to].encode())
        self.at = to

    def _more(self, reason: str) -> None:
        """Read a chunk. Raises ValueError for `reason` where there is none, or a row is larger than any row is."""
        if self.ended or len(self.text) - self.at > MAX_ROW_BYTES:
            raise ValueError(f"{self.path} is not valid JSON: {reason}; the row starts at byte {self.byte}")
        chunk = self.file.read(CHUNK_BYTES)
        self.ended = not chunk
        try:
            self.text = self.text[self.at :] + self.decode(chunk, self.ended)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not valid JSON: {error}") from error
        self.at = 0


def _write_table(rows: Iterator[tuple[int, int]], out: BinaryIO) -> None:
    block = array("q")
    for start, length in rows:
        block.extend((start, length))
        if len(block) >= 2**16:
            block.tofile(out)
            del block[:]
    block.tofile(out)
    out.flush()


def _table(path: Path, write: Callable[[BinaryIO], None], keep_key: str) -> np.ndarray:
    """The table [rows, 2], from disk where it is up to date."""
    facts = path.stat()
    if facts.st_size < CACHED_FROM_BYTES:
        return _temporary(write)
    key = [_VERSION, os.path.realpath(path), facts.st_size, facts.st_mtime_ns, keep_key]
    kept = cache_folder() / "rows" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.i64"
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with _locked(kept.with_suffix(".lock")):  # ranks that start together wait for the first one's table
            if not kept.is_file():
                partial = kept.with_suffix(".partial")  # only the holder of the lock writes it
                with open(partial, "wb") as out:
                    write(out)
                os.replace(partial, kept)
        return _mapped(kept)
    except OSError:  # no place to keep it: a table of this process's own
        return _temporary(write)


def _temporary(write: Callable[[BinaryIO], None]) -> np.ndarray:
    with tempfile.TemporaryFile() as out:
        write(out)
        return _mapped(out)


def _mapped(file: Path | BinaryIO) -> np.ndarray:
    size = os.fstat(file.fileno()).st_size if hasattr(file, "fileno") else file.stat().st_size
    if size == 0:
        return np.empty((0, 2), dtype=np.int64)
    return np.memmap(file, dtype=np.int64, mode="r").reshape(-1, 2)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "wb") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
