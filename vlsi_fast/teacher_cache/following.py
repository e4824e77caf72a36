"""Training beside a teacher that runs ahead: stage interact waits for its rows, and tells how far it is.

The builder's side is `ahead.py`; `pulse.py` has what the two tell each other. A row is read from shards whose rows
reach into its own optimizer step or beyond: older ones, from an epoch before, may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from transformers import TrainerCallback

from ..config import RunConfig
from ..config_data import DataConfig
from ..data.dataset import VlsiDataset
from ..data.messages import Sample
from ..data.sources import ConcatSource
from ..ranks.sharding import rank
from ..terminal import say
from .manifest import NAME
from .pulse import BUILDER, STUDENTS, Pulse, Silence, read_facts
from .recalling import CachedRows, Routed
from .store import CATALOGUE, SHARDS, CacheError, CacheReader

if TYPE_CHECKING:
    from ..stages.sampling import StepBatches
    from ..stages.trainer import StageTrainer

PAUSES = (0.02, 1.0)
"""Seconds between looks for a row, at first and at most."""
SETTLE_SECONDS = 30.0
"""After which a row that the builder has made, and that is not to be seen, is missing: shared storage may lag."""


@dataclass(frozen=True)
class Follow:
    """How a teacher runs ahead.

    Attributes:
        ahead: rows that it may be ahead of the last of its students.
        keep: delete nothing.
        students: runs that read the cache.
    """

    ahead: int
    keep: bool = False
    students: int = 1


def data_digest(config: RunConfig, split: str, sources: ConcatSource) -> str:
    """Tells data apart by which row numbers count."""
    told = [source.model_dump(mode="json") for source in getattr(config.data, split)]
    sizes = [[part.name, len(part)] for part in sources.parts]
    return hashlib.sha256(json.dumps([split, told, sizes], sort_keys=True).encode()).hexdigest()[:16]


def order_digest(data: str, config: RunConfig, start: int) -> str:
    """Tells apart orders of rows, in which builder and student count positions.

    Args:
        data: digest of what row numbers count in.
        config: of the run.
        start: row of the run's order at which stage interact begins.
    """
    told = [data, config.seed, config.data.stopping_strategy, start]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


# ---- rows ----


class LiveReader(CacheReader):
    """A reader of a cache whose shards come and go. Only what is new in the catalogues is read again."""

    def __init__(self, folder: str | Path):
        self.since = 0
        """Shards without a row from this position on may be deleted any time, and are not read."""
        self._offsets: dict[str, int] = {}
        self._last: dict[str, float] = {}
        super().__init__(folder)

    def refresh(self) -> bool:
        """Take in shards that have come since, and let go those that were used. Returns whether any has come."""
        found = super().refresh()
        if found:
            live = np.array([self._is_live(name) for name in self._files], bool)[self._columns["shard"]]
            if 2 * live.sum() < len(live):
                self._low = self._low[live]
                self._columns = {name: value[live] for name, value in self._columns.items()}
        return found

    def _news(self) -> list[str]:
        fresh = []
        for line in new_lines(self.folder, self._offsets):
            if line.get("deleted"):
                self._last[line["file"]] = -1
            else:
                fresh.append(line["file"])
                self._last.setdefault(line["file"], line["last_position"] if line.get("temporary") else math.inf)
        return [name for name in fresh if self._is_live(name)]

    def _is_live(self, shard: str) -> bool:
        return self._last[shard] >= self.since


def new_lines(folder: Path, offsets: dict[str, int]) -> list[dict[str, Any]]:
    """Lines that a cache's catalogues have got since; `offsets`, bytes read of each, is brought up to date."""
    found = []
    for path in sorted((folder / SHARDS).glob(f"*{CATALOGUE}")):
        with path.open("rb") as stream:
            stream.seek(offsets.get(path.name, 0))
            text = stream.read()
        whole = text.rfind(b"\n") + 1  # the last line may be being written
        offsets[path.name] = offsets.get(path.name, 0) + whole
        for line in text[:whole].splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # its writer died, and another writes below it
    return found


class FollowedDataset(VlsiDataset):
    """Rows by `stages.sampling.Placed` numbers, whose place `rows` is told; else as `VlsiDataset`."""

    def __init__(
        self,
        sources: ConcatSource,
        processors: dict,
        data_config: DataConfig,
        taught: Routed,
        rows: FollowedRows,
        translated: bool = False,
    ):
        super().__init__(sources, processors, data_config, taught, translated)
        self.rows = rows

    def __getitem__(self, index: int) -> dict:
        self.rows.place = (index.first, index.end)
        return super().__getitem__(index)


class FollowedRows(CachedRows):
    """Rows of a cache that is being built meanwhile: one that is not there yet is waited for.

    Args:
        reader: of the cache.
        columns: see `CachedRows`.
        timeout: seconds without a sign of life of the builder.
    """

    def __init__(self, reader: LiveReader, columns: list[int], timeout: float):
        super().__init__(reader, columns)
        self.timeout = timeout
        self.place = (0, 0)
        """Where the optimizer step of the row to come begins and ends."""
        self.total: float = math.inf
        """Where the stage's last step ends: rows behind it are read ahead, and not waited for."""
        self._silence, self._is_gone = Silence(), False

    def __call__(self, sample: Sample, labels: Tensor) -> tuple[dict[str, Tensor] | CacheError, Tensor | None]:
        try:
            return super().__call__(sample, labels)
        except CacheError as error:
            return error, None  # raised where the row is used, so as it is, and not in a worker

    def find(self, key: bytes):
        """Where a row is, once it is there.

        Returns:
            None where it will not come: the builder is past it, or no step of the stage reads it.

        Raises:
            CacheError: the builder has given no sign of life for too long.
        """
        first, end = self.place
        self.reader.since = first
        pause, missing_since = PAUSES[0], None
        if not self._is_gone:
            self._silence.begin()
        while (found := self.reader.find(key)) is None:
            told = read_facts(self.reader.folder / BUILDER)  # before the shards, which are there before it says so
            if self.reader.refresh():
                continue
            if first >= self.total:
                return None
            if (
                told is not None
                and told["kept_from"] <= first
                and (told["position"] >= end or told["state"] == "finished")
            ):
                missing_since = missing_since or time.monotonic()
                if time.monotonic() - missing_since >= min(self.timeout, SETTLE_SECONDS):
                    return None
            else:
                missing_since = None
            self._require_life(told)
            _end_with_parent()
            time.sleep(pause)
            pause = min(1.5 * pause, PAUSES[1])
        return found

    def _require_life(self, told: dict[str, Any] | None) -> None:
        self._is_gone = self._silence.seconds(told) >= self.timeout
        if self._is_gone:
            raise CacheError(gone(self.reader.folder, told, self.timeout))


def gone(folder: Path, told: dict[str, Any] | None, timeout: float) -> str:
    """What a student says of a builder that is gone."""
    state = "there is none" if told is None else "it gave no sign of life"
    if told is not None and told["state"] != "running":
        state = f"it has {told['state']}" + (f" ({told['error']})" if told.get("error") else "")
    return (
        f"waited {timeout:g} s (teacher.cache_timeout) for the teacher that builds {folder}: {state}. Start `vlsi-fast "
        "teacher build --follow` with this config again, which goes on where it was, then this run with --resume"
    )


def _end_with_parent() -> None:
    """A worker whose run was killed must not wait on."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)


def wait_for_cache(folder: Path, timeout: float) -> None:
    """Wait until a builder has said what the cache is of.

    Raises:
        CacheError: no builder gave a sign of life for too long.
    """
    silence, said = Silence(), False
    while not (folder / NAME).is_file():
        told = read_facts(folder / BUILDER)
        if silence.seconds(told) >= timeout:
            raise CacheError(gone(folder, told, timeout))
        if not said and rank() == 0:
            say(f"waiting for `vlsi-fast teacher build --follow`, which makes {folder}")
            said = True
        time.sleep(PAUSES[1] / 4)


# ---- the run ----


def dataset_of(
    sources: ConcatSource, processors: dict, data_config: DataConfig, taught: Routed | None, translated: bool = False
) -> VlsiDataset:
    """A stage's rows, which follow a teacher where one of their caches does; `translated`: see `VlsiDataset`."""
    rows = [each for each in taught.caches if isinstance(each, FollowedRows)] if taught is not None else []
    if not rows:
        return VlsiDataset(sources, processors, data_config, taught, translated)
    return FollowedDataset(sources, processors, data_config, taught, rows[0], translated)


@contextlib.contextmanager
def followed(trainer: StageTrainer) -> Iterator[None]:
    """Around training: tell the teacher that runs ahead, where there is one, how far it is."""
    dataset, config = trainer.train_dataset, trainer.config
    if not isinstance(dataset, FollowedDataset):
        yield
        return
    data = data_digest(config, "train", dataset.sources)
    order = order_digest(data, config, trainer.batches.order.start)
    follower = Follower(dataset.rows, trainer.batches, config.output_dir, order)
    trainer.add_callback(follower)
    finished = False
    try:
        yield
        finished = trainer.state.global_step >= trainer.state.max_steps or trainer.is_over()
    finally:
        follower.end(finished)


class Follower(TrainerCallback):
    """Tells the builder how far a run is, and where its last checkpoint is. Rank 0's work.

    Args:
        rows: of the cache.
        batches: the run's.
        output_dir: of the run; its name in the cache follows from it, so that a run that goes on is the same student.
        order: `order_digest`.
    """

    def __init__(self, rows: FollowedRows, batches: StepBatches, output_dir: str, order: str):
        self.rows, self.batches, self.order = rows, batches, order
        batches.placed = True
        place = Path(output_dir).resolve()
        name = f"{place.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}.json"
        self.path = rows.reader.folder / STUDENTS / name
        self.pulse: Pulse | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        batches, reached = self.batches, self.batches.position(state.global_step)
        self.rows.total = batches.position(state.max_steps)
        if rank() != 0:
            return
        self.pulse = Pulse(
            self.path,
            self.rows.timeout,
            order=self.order,
            reached=reached,
            needed_from=reached,
            end=self.rows.total,
            # a step begins once the loader also has the micro-batch behind it, by which it knows an epoch's end
            step_rows=batches.rows * (batches.accumulation + 1) * batches.ranks,
            again=batches.again,
            finished=False,
        )

    def on_step_end(self, args, state, control, **kwargs):
        if self.pulse is not None:
            self._tell(reached=self.batches.position(state.global_step))

    def on_save(self, args, state, control, **kwargs):
        if self.pulse is not None:
            self._tell(needed_from=self.batches.position(state.global_step))

    def _tell(self, **facts: Any) -> None:
        try:
            self.pulse.tell(**facts)
        except OSError:
            pass  # the next beat tells it

    def end(self, finished: bool) -> None:
        """The run is at its end, and needs no more rows; or it has left before."""
        if self.pulse is None:
            return
        if finished:
            self._tell(finished=True)
        self.pulse.stop()
        self.pulse = None
