"""Rows that cannot be used: why, how many, and when there are too many of them.

A row is skipped for one of `CAUSES`. Between a row and the program stands `row_boundary`: whatever a row raises there
is such a cause, and never the end of a run. The dataset replaces a skipped row by the next usable row and sends the
record along with the batch (so it also arrives from worker processes); `SkipLog` writes each skipped row once to a
JSON-lines file, counts by cause, and stops the run when the share grows past the configured limit.
"""

from __future__ import annotations

import errno
import json
import math
import os
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vlsi_fast.data.storage import is_transient
from vlsi_fast.errors import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system: appends there are not locked against other processes
    fcntl = None

CAUSES = {
    "missing_image": "the image file does not exist or cannot be opened",
    "truncated_image": "the image file is cut short, damaged, or no image",
    "decompression_bomb": "the image header announces more pixels than data.max_image_pixels",
    "path_outside_image_root": "the image path, links followed, leaves the source's image_root",
    "empty_answer": "an assistant turn has no text, or there is no assistant turn",
    "too_many_pixels": "the row's images announce more pixels together than data.max_row_pixels",
    "too_long": "the row has more tokens than data.max_length",
    "special_token": "the text holds a special token, and is not to be read as text (data.special_tokens) or cannot be",
    "answer_mismatch": "student and teacher have different answer tokens",
    "template": "the chat template does not show where the answer starts and ends",
    "bad_row": "the row is malformed, or its placeholders and images differ in number",
    "unexpected_error": "the program failed on the row; the detail names the exception and where it was raised",
}
MAX_DETAIL = 1000
"""Characters of a detail that are kept."""
RECORD = ("id", "cause", "detail", "file", "line")
"""What is written of a skipped row."""
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""How a file system says that it has no `flock`."""
CHANCE = 1e-6
"""A run is judged at every step, so what stops it must be far from chance."""


def printable(text: str) -> str:
    """Text without lone surrogates, which JSON may hold and no file or terminal takes."""
    return text.encode("utf-8", "backslashreplace").decode()


class UnusableRow(ValueError):
    """A row that cannot be trained on.

    Attributes:
        cause: one of `CAUSES`.
        detail: what exactly is wrong with this row, for a human.
    """

    def __init__(self, cause: str, detail: str):
        if cause not in CAUSES:
            raise ValueError(f"unknown cause {cause!r}; use one of {', '.join(CAUSES)}")
        if len(detail) > MAX_DETAIL:
            detail = f"{detail[:MAX_DETAIL]} .."
        detail = printable(detail)
        super().__init__(f"{cause}: {detail}")
        self.cause = cause
        self.detail = detail

    def __reduce__(self):
        return type(self), (self.cause, self.detail)


class SpecialTokenError(UserError, RuntimeError):
    """A row's text holds a special token, and `data.special_tokens` is error."""

    exit_code = 1
    of_one_rank = True


_ALLOCATOR = "DefaultCPUAllocator: "
"""How torch says, by a RuntimeError, that there is no memory left."""


@contextmanager
def row_boundary() -> Iterator[None]:
    """What stands between a row and the program: anything that a row raises inside is an `UnusableRow`.

    Out of memory, an interrupt, an exit and a file system that fails (`storage`) are no fault of a row and pass. An
    exception that no check foresaw has the cause unexpected_error; its type, message and place are the detail, since it
    may be the program's fault. Also a decorator.
    """
    try:
        yield
    except (UnusableRow, SpecialTokenError, MemoryError):
        raise
    except Exception as error:
        out_of_memory = type(error).__name__ == "OutOfMemoryError" or (
            type(error) is RuntimeError and _ALLOCATOR in str(error)
        )
        if out_of_memory or is_transient(error):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(last.filename)}:{last.lineno}"
        raise UnusableRow("unexpected_error", f"{type(error).__name__}: {error} ({where})") from error


class TooManySkippedRows(UserError, RuntimeError):
    """More rows were skipped than `data.max_skipped_share` allows."""

    exit_code = 1


def log_chance(skipped: int, read: int, share: float) -> float:
    """Logarithm of how likely so many or more of `read` rows are unusable where `share` of all rows are: an upper bound
    (Chernoff's). 0 where no more are than that."""
    if read == 0 or skipped <= share * read:
        return 0.0
    if share == 0:
        return -math.inf
    seen = skipped / read
    usable = (1 - seen) * math.log((1 - seen) / (1 - share)) if seen < 1 else 0.0
    return -read * (seen * math.log(seen / share) + usable)


class SkipLog:
    """Counts skipped rows and lists each of them once in a file, one JSON object a line: `id`, `cause`, `detail`, and
    where the row stands: `file` and, of a JSON file, `line` (1: the first).

    Several processes may share one file: each append happens under a lock, after reading what the others have added.
    Opening an existing file continues it; rows that it lists are not written or counted again.

    Args:
        path: the file; its folder is made where needed.
        total_rows: rows of the whole dataset.
        max_share: largest share of skipped rows, 0 to 1 (`data.max_skipped_share`).
    """

    def __init__(self, path: str | os.PathLike, total_rows: int, max_share: float):
        if total_rows < 1:
            raise ValueError(f"total_rows is {total_rows}; pass the number of rows of the dataset, at least 1")
        if not 0.0 <= max_share <= 1.0:
            raise ValueError(f"max_share is {max_share}; it is a share of rows, from 0 to 1")
        self.path = Path(path)
        self.total_rows = total_rows
        self.max_share = max_share
        self._causes: dict[str, str] = {}  # id -> cause, of every process that writes to the file
        self._read_to = 0  # bytes of the file that are in `_causes`
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._read_new_lines()
        self._told = set(self._causes.values())

    def record(self, skipped: Iterable[dict]) -> None:
        """Takes in one batch's "skipped": records with `id`, `cause`, `detail` and, where known, `file` and `line`."""
        skipped = list(skipped)
        if all(row["id"] in self._causes for row in skipped):
            return
        with self._locked_file() as file:
            self._read_new_lines()
            fresh = {row["id"]: row for row in skipped if row["id"] not in self._causes}
            lines = [json.dumps({k: row[k] for k in RECORD if k in row}) + "\n" for row in fresh.values()]
            file.write("".join(lines).encode())
            file.flush()
            self._read_new_lines()

    def check(self, skipped: int = 0, read: int = 0) -> None:
        """Stops the run where too many rows are skipped.

        Args:
            skipped: rows skipped so far, by all processes, where rows are read in a random order.
            read: rows read so far by all processes, the skipped ones included.

        Raises:
            TooManySkippedRows: the distinct rows skipped exceed `max_share * total_rows`; or `skipped` of `read` cannot
                be chance: were `max_share` of all rows unusable, so many would come with less than `CHANCE`.
        """
        self._read_new_lines()
        if len(self._causes) > self.max_share * self.total_rows:
            self._stop(len(self._causes), self.total_rows, "of the dataset's")
        if log_chance(skipped, read, self.max_share) < math.log(CHANCE):
            self._stop(skipped, read, "of the first")

    def summary(self) -> dict[str, int]:
        """Distinct skipped rows by cause, most frequent first, over all processes that share the file."""
        return dict(Counter(self._causes.values()).most_common())

    def news(self) -> list[str]:
        """A line for every cause that was not there before: what it means, its first row, where all rows are listed."""
        self._read_new_lines()
        first = {cause: row for row, cause in reversed(self._causes.items()) if cause not in self._told}
        self._told.update(first)
        listed = f"such rows are left out and listed in {self.path}"
        why = {cause: CAUSES.get(cause, "see there") for cause in first}
        return [f"row {row} skipped: {cause} ({why[cause]}); {listed}" for cause, row in first.items()]

    def total(self) -> str:
        """All skipped rows in a line, by cause; empty where there are none."""
        self._read_new_lines()
        if not self._causes:
            return ""
        causes = ", ".join(f"{cause} {count:,}" for cause, count in self.summary().items())
        return f"{len(self._causes):,} of {self.total_rows:,} rows skipped: {causes} ({self.path})"

    def _stop(self, skipped: int, rows: int, of: str) -> None:
        counts = "\n".join(f"  {cause}: {count} ({CAUSES[cause]})" for cause, count in self.summary().items())
        raise TooManySkippedRows(
            f"{skipped} {of} {rows} rows ({skipped / rows:.2%}) cannot be used; the limit is {self.max_share:.2%}.\n"
            f"By cause:\n{counts}\nEvery row is listed in {self.path}. Repair or remove those rows, or raise "
            f"data.max_skipped_share (now {self.max_share:g}) if they may be left out."
        )

    def _read_new_lines(self) -> None:
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._read_to)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # another process may be in the middle of a line
        self._read_to += len(whole)
        for line in whole.splitlines():
            try:
                row = json.loads(line)
                self._causes.setdefault(str(row["id"]), str(row["cause"]))
            except (ValueError, KeyError, TypeError):
                continue  # a line cut by a crash: its row is met and written again

    @contextmanager
    def _locked_file(self) -> Iterator:
        with open(self.path, "ab") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX)
                except OSError as error:
                    if error.errno not in NO_LOCKS:  # then a row may be listed by two ranks, and is counted once
                        raise
            if self._ends_inside_a_line():
                file.write(b"\n")
                file.flush()
            yield file

    def _ends_inside_a_line(self) -> bool:
        with open(self.path, "rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
