"""`vlsi-fast teacher build --follow`: a teacher in a job of its own that keeps ahead of the runs that learn from it.

It walks the order of stage interact, repetitions and all, as the runs do, and is never more than `ahead` rows before
the last of them. Shards whose rows lie before every run's last checkpoint are deleted, so the cache holds what is ahead
and what a run that is killed reads again. Either side may be killed: what is in the shards is not made again, and where
a run goes back behind what was deleted, the builder goes back as well.
"""

from __future__ import annotations

import bisect
import itertools
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import ConfigError
from ..lineage import rows_used
from ..locking import claimed
from ..ranks.sharding import barrier, broadcast_object, rank, world_size
from ..stages.sampling import data_order
from ..terminal import say
from .build import Chosen, done_rows, parts_of
from .following import new_lines, order_digest
from .pulse import BUILDER, STUDENTS, Pulse, read_facts
from .reading import Reading, rows_in
from .speaking import Teacher, TeacherStage
from .store import CATALOGUE, SHARDS, CacheError, ShardWriter, append_line, numbers_in, shards_of
from .students import Students

WRITER = "ahead"
"""How names of shards begin that are deleted after use."""
WAIT_SECONDS = 5.0
"""After which ranks that wait for students meet, so that no collective waits for long."""
PAUSE_SECONDS = 0.05
PARTS = 8
"""Shards, of all ranks alike, that `ahead` rows are written in: a run waits for a whole one."""


@dataclass(frozen=True)
class Word:
    """What rank 0 says to all."""

    kind: str
    """go, wait, back (a run needs rows that were deleted), over (no run needs more), or error."""
    end: int
    """Position where the last run ends, as far as is known."""
    again: int
    """Rows that come again at an epoch's end."""
    error: str = ""


def run_ahead(stage: TeacherStage, chosen: Chosen, folder: Path, teacher: Callable[[], Teacher]) -> dict[str, Any]:
    """Keep ahead of the students until they have all they need. Collective.

    Args:
        stage: of the teacher.
        chosen: what to build; `chosen.follow` says how.
        folder: of the cache.
        teacher: loads it.

    Returns:
        What the manifest gets: `errors`, as of any cache, and `ahead`: `most_ahead` rows, `most_bytes` of shards that
        were there at once.

    Raises:
        ConfigError: `ahead` is less than the job's round of micro-batches; another builder is at work.
        CacheError: a student is gone, reads another order, or needs more rows a step than may be ahead.
    """
    with claimed(folder):
        pulse = None
        if rank() == 0:
            facts = {"state": "running", "position": 0, "kept_from": 0}
            pulse = Pulse(folder / BUILDER, stage.config.teacher.cache_timeout, **_before(folder), **facts)
        try:
            found = _Ahead(stage, chosen, folder, pulse).run(teacher())
        except BaseException as error:
            if pulse is not None:
                pulse.tell(state="failed", error=f"{type(error).__name__}: {error}".splitlines()[0])
            raise
        finally:
            if pulse is not None:
                pulse.stop()
        return found


def _before(folder: Path) -> dict[str, Any]:
    told = read_facts(folder / BUILDER) or {}
    return {name: told.get(name, 0) for name in ("most_ahead", "most_bytes")}


class _Ahead:
    """The builder at work. All ranks walk alike; rank 0 alone looks at the students and deletes."""

    def __init__(self, stage: TeacherStage, chosen: Chosen, folder: Path, pulse: Pulse | None):
        config = stage.config
        self.folder, self.follow, self.pulse = folder, chosen.follow, pulse
        self.size = config.stage_training("interact").per_device_train_batch_size
        self.round = self.size * world_size()
        if self.follow.ahead <= self.round:
            raise ConfigError(
                f"--ahead {self.follow.ahead}: this job makes {self.round} rows at once; give more than that"
            )
        # a row that the student cannot use is passed over, as the student does
        self.reading = Reading(stage, "train", ("student", "teacher"))
        self.order = data_order(config, self.reading.sources, rows_used(config.stage_dir("verbalize")))
        self.wanted = parts_of(config, "train", folder)
        self.writer = self._new_writer(chosen)
        self.every = max(1, self.follow.ahead // (PARTS * self.round))
        training = config.stage_training("interact")
        epochs = math.ceil(training.num_train_epochs * len(self.order))
        self.guess = (
            epochs
            if training.max_steps == -1
            else (training.max_steps * self.round * training.gradient_accumulation_steps)
        )
        self.students = None
        if rank() == 0:
            order = order_digest(self.reading.data, config, self.order.start)
            self.students = Students(
                folder, self.follow.students, order, self.follow.ahead - self.round, config.teacher.cache_timeout
            )
        # where the walk is
        self.position, self.kept_from, self.unwritten = 0, 0, 0
        self.done: set[int] = set()
        self.numbers: set[int] = set()
        self._epoch: tuple[int, list[tuple[int, int]]] = (-1, [])
        # rank 0's
        self.shards: dict[str, tuple[int, int]] = {}
        self._offsets: dict[str, int] = {}
        self._own = folder / SHARDS / f"used{uuid.uuid4().hex[:12]}{CATALOGUE}"

    def _new_writer(self, chosen: Chosen) -> ShardWriter:
        temporary = not self.follow.keep
        name = f"{WRITER if temporary else ''}{uuid.uuid4().hex[:12]}"
        return ShardWriter(self.folder, chosen.shard_bytes, None, self.reading.data, temporary, name)

    # ---- the walk ----

    def run(self, teacher: Teacher) -> dict[str, Any]:
        """Until no student needs more."""
        self._begin()
        while True:
            word = self._agree(complete=self.position >= self.guess)
            if word.kind != "back" and self.position >= word.end:
                word = self._rest()
                if word.kind == "over":
                    break
            if word.kind == "back" or not self._walk(word, teacher):
                self._begin()
        found = teacher.told_errors()
        if rank() == 0:
            found["ahead"] = {name: self.pulse.facts[name] for name in ("most_ahead", "most_bytes")}
        return broadcast_object(found)

    def _begin(self) -> None:
        """Start, or start over, at the first row that a student needs."""
        self._write()
        found = None
        if rank() == 0:
            try:
                self.students.look()
                found = self._looked()
            except CacheError as error:
                found = str(error)
        found = broadcast_object(found)
        if isinstance(found, str):
            raise CacheError(found)
        self.position, self.done, self.numbers = found
        self.kept_from = self.position
        if rank() == 0:
            self.pulse.tell(state="running", position=self.position, kept_from=self.kept_from)

    def _looked(self) -> tuple[int, set[int], set[int]]:
        """Where to begin, positions that are there, and numbers of rows that are there for good."""
        self._count()
        there = shards_of(self.folder)
        for path in (self.folder / SHARDS).glob(f"{WRITER}*"):
            if path.suffix != CATALOGUE and path.name not in there:
                path.unlink(missing_ok=True)  # of a builder that was killed
        done: set[int] = set()
        for name, line in there.items():
            if line.get("temporary") and line["data"] == self.reading.data:
                done.update(p for p in numbers_in(self.folder, name, "positions") if p >= 0)
        first = self.students.first("needed_from")
        return int(min(first, self.students.end)), done, done_rows(self.folder, self.reading.data)

    def _walk(self, word: Word, teacher: Teacher) -> bool:
        """Make rounds up to the last full one of this epoch, or the rest of it. Returns whether all were made."""
        rows = len(self.order)
        epoch, end = self.position // rows, min(rows, word.end - self.position // rows * rows)
        places = self._places(epoch)
        positions = [position for _, position in places]
        first = bisect.bisect_left(positions, self.position)
        first -= first % self.round
        last = bisect.bisect_left(positions, epoch * rows + end)
        full = last - last % self.round
        if first < full:
            rounds = [places[i : i + self.round] for i in range(first, full, self.round)]
            if not self._make(rounds, [(one[0][1], one[-1][1] + 1) for one in rounds], teacher):
                return False
            if full < last or end < rows:
                return True
        rest, again = places[full:last], []
        if end == rows:
            word = self._agree(complete=True)  # how many rows come again is the students' matter
            if word.kind == "back":
                return False
            again = places[: bisect.bisect_left(positions, epoch * rows + word.again)]
            again = [(number, -(epoch + 1) * rows) for number, _ in again]
        rest += again
        if world_size() > 1 and rest:
            fill = itertools.islice(itertools.cycle(places), len(again), None)
            while len(rest) % self.round:
                rest.append((next(fill)[0], None))
        rounds = [rest[i : i + self.round] for i in range(0, len(rest), self.round)]
        end += epoch * rows
        if not self._make(rounds, [(one[0][1] if one[0][1] >= 0 else end, end) for one in rounds], teacher):
            return False
        self.position = end
        return True

    def _places(self, epoch: int) -> list[tuple[int, int]]:
        """(number, position) of an epoch's rows that are of this cache."""
        if self._epoch[0] != epoch:
            first, rows = epoch * len(self.order), len(self.order)
            numbers = enumerate(self.order.order.rows(self.order.start + first, rows), first)
            part_of = self.reading.sources.part_of
            self._epoch = (epoch, [(n, position) for position, n in numbers if part_of(n) in self.wanted])
        return self._epoch[1]

    def _is_done(self, place: tuple[int, int | None]) -> bool:
        number, position = place
        if position is None or number in self.numbers:
            return True
        return position >= 0 and (position < self.position or position in self.done)

    def _make(self, rounds: list[list[tuple[int, Any]]], spans: list[tuple[int, int]], teacher: Teacher) -> bool:
        """Make rounds of (number, position; None: it only fills the round) at these spans of positions, but those that
        are there. Returns False where a student has gone back."""
        ours, spans_left = [], []
        for one, span in zip(rounds, spans):
            places = [(number, None if self._is_done((number, position)) else position) for number, position in one]
            if all(position is None for _, position in places):
                continue
            ours.append(places[rank() * self.size : (rank() + 1) * self.size])
            spans_left.append(span)
            if self.follow.keep:
                self.numbers.update(number for number, position in places if position is not None)
        for span, batch in zip(spans_left, self.reading.loader(ours)) if ours else ():
            if self._agree(span).kind == "back":
                return False
            self._keep(batch, teacher.stored(batch))
            self.position, self.unwritten = span[1], self.unwritten + 1
            if self.unwritten >= self.every:
                self._write()
        self.position = spans[-1][1] if spans else self.position
        return True

    def _keep(self, batch: dict[str, Any], stored: dict[str, Tensor]) -> None:
        for refused in batch["refused"]:
            self.writer.refuse(*refused)
        for key, answers, place, values in rows_in(batch, stored):
            if place[1] is not None:
                self.writer.add(key, answers, place, values)

    def _write(self) -> None:
        """Write what is made, on all ranks, then tell. Collective."""
        if not self.unwritten:
            return
        self.writer.flush()
        self.unwritten = 0
        barrier()
        if rank() == 0:
            self._count()
            self.pulse.tell(position=self.position)

    # ---- the students ----

    def _rest(self) -> Word:
        """All is made: wait until the students need nothing more."""
        self._write()
        if rank() == 0:
            self.pulse.tell(state="finished", position=self.position)
        word = self._agree(over=True)
        if word.kind == "over" and rank() == 0:
            self._clear()
        elif rank() == 0:
            self.pulse.tell(state="running")
        return word

    def _agree(self, span: tuple[int, int] | None = None, complete: bool = False, over: bool = False) -> Word:
        """Wait for the students, on all ranks alike.

        Args:
            span: where the next round begins and ends, for which they must be near enough.
            complete: wait until all have come.
            over: wait until none needs more, or one needs rows behind this position.

        Raises:
            CacheError: one is gone, or cannot be served.
        """
        began = True
        while True:
            word = self._decide(span, complete, over, began) if rank() == 0 else None
            word = broadcast_object(word)
            if word.kind == "error":
                raise CacheError(word.error)
            if word.kind != "wait":
                return word
            self._write()
            began = False

    def _decide(self, span: tuple[int, int] | None, complete: bool, over: bool, began: bool) -> Word:
        """Rank 0's word; `began`: not to wait yet."""
        first, until = span or (0, 0)
        deadline, students = time.monotonic() + WAIT_SECONDS, self.students
        if began:
            students.begin_waiting()
        try:
            while True:
                students.look()
                end = students.end if students.complete else max(self.guess, students.end)
                facts = {"end": end, "again": students.again}
                needed = students.first("needed_from")
                if needed < self.kept_from:
                    return Word("back", **facts)
                self._delete_before(needed)
                if over:
                    kind = "over" if students.finished else "go" if end > self.position else "wait"
                elif complete:
                    kind = "go" if students.complete else "wait"
                else:
                    lead = until - min(students.first("reached"), until)
                    # where other rows have other caches, a round may span more than `ahead`
                    kind = "go" if lead <= self.follow.ahead or first < students.needed_now else "wait"
                    if kind == "go":
                        self.pulse.facts["most_ahead"] = max(self.pulse.facts["most_ahead"], int(lead))
                if kind != "wait" or began:
                    return Word(kind, **facts)
                problem = students.missing(math.inf if complete or over else until - self.follow.ahead)
                if problem and over:
                    say(f"{problem}. All rows are made, and the last are left for it")
                    return Word("over", **facts)
                if problem:
                    return Word("error", error=problem, **facts)
                if time.monotonic() > deadline:
                    return Word("wait", **facts)
                time.sleep(PAUSE_SECONDS)
        except CacheError as error:
            return Word("error", 0, 0, str(error))

    # ---- what was used ----

    def _count(self) -> None:
        """Take in new shards, of all ranks."""
        for line in new_lines(self.folder, self._offsets):
            if line.get("deleted"):
                self.shards.pop(line["file"], None)
            elif line.get("temporary"):
                self.shards[line["file"]] = (line["last_position"], line["bytes"])
        there = sum(size for _, size in self.shards.values())
        self.pulse.facts["most_bytes"] = max(self.pulse.facts["most_bytes"], there)

    def _delete_before(self, needed: float) -> None:
        """Delete shards all of whose rows lie before this position."""
        if self.follow.keep:
            return
        used = [name for name, (last, _) in self.shards.items() if last < needed]
        if not used:
            return
        self.kept_from = int(min(needed, self.position))
        self.pulse.tell(kept_from=self.kept_from)
        for name in used:
            append_line(self._own, {"file": name, "deleted": True})
            (self.folder / SHARDS / name).unlink(missing_ok=True)
            del self.shards[name]

    def _clear(self) -> None:
        """No student needs anything any more."""
        if self.students.finished:
            self._delete_before(math.inf)
            for name in self.students.told:
                (self.folder / STUDENTS / name).unlink(missing_ok=True)
