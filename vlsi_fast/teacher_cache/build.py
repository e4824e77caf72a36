"""`vlsi-fast teacher build`: run the verbalized teacher over rows, and keep what it says. No student but its head.

The rows come in the order in which stage interact reads them, and in its micro-batches where neither their number nor
`balance_batch` makes others, so that what is kept is what a teacher in the job would have said, to the last bit on the
same machine. Several ranks share them out as in training, in any `teacher.mode`: under ZeRO-3 all make the same
forwards. What is there already is left out, so a call that was interrupted goes on, and one with other rows adds them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import ConfigError, RunConfig
from ..data.sources import ConcatSource
from ..lineage import code_commit, rows_used, versions, weights_digest
from ..loading import read_head
from ..ranks.sharding import barrier, broadcast_object, rank, world_size
from ..stages.sampling import StepBatches, data_order
from ..terminal import say
from .following import Follow
from .forms import DEFAULT
from .manifest import (
    NAME,
    TEACHER,
    counts_of,
    identity_of_cache,
    read_manifest,
    require_same,
    tensor_digest,
    write_manifest,
)
from .reading import Reading, rows_in
from .speaking import Teacher, TeacherStage
from .store import CacheReader, ShardWriter, forget_lost, numbers_in, shards_of

SHARD_BYTES = 256 * 2**20
EPOCHS = 4
"""Passes over the data in which --rows looks for rows that it has not seen."""


@dataclass
class Chosen:
    """What to build.

    Attributes:
        out: folder of the cache; None: the config's.
        form: targets or hidden.
        numbers: of the targets: float32, float16, bfloat16 or int8.
        layers: of the teacher's target layers; None: all.
        split: train or eval: rows of data.train or data.eval.
        source: only rows of this source, by its name; None: all.
        rows: the first so many of the order; None: those that stage interact reads.
        shard_bytes: of a shard, about.
        progress: show a bar.
        follow: with students that train meanwhile (`ahead.py`); None: all at once.
    """

    out: Path | None = None
    form: str = "targets"
    numbers: str = DEFAULT
    layers: list[int] | None = None
    split: str = "train"
    source: str | None = None
    rows: int | None = None
    shard_bytes: int = SHARD_BYTES
    progress: bool = True
    follow: Follow | None = None


def build(config: RunConfig, chosen: Chosen) -> dict[str, Any]:
    """Write what a teacher says to rows, and return the cache's manifest. Collective.

    Raises:
        ConfigError, LineageError, FileNotFoundError: options, models or an earlier stage's results do not fit.
    """
    if chosen.form == "hidden":
        chosen = replace(chosen, numbers=config.dtype)
    stage = TeacherStage(config)
    stage.prepare(chosen.layers)
    folder = chosen.out or config.cache_dir
    student_head = None
    if chosen.form == "targets" or config.verbalizer.translates:
        student = stage.roles["student"]
        student_head = read_head(student.folder, student.config, config.dtype)
    manifest = _claim(stage, folder, chosen, student_head)
    if chosen.follow is not None:
        from .ahead import run_ahead

        manifest |= run_ahead(stage, chosen, folder, lambda: Teacher(stage, folder, chosen, student_head))
    else:
        work = _Work(stage, chosen, folder)
        if not work.is_done:
            manifest |= work.do(Teacher(stage, folder, chosen, student_head))
    barrier()
    manifest["counts"] = counts_of(folder)
    if rank() == 0:
        write_manifest(folder, manifest)
    for release in stage.releases:
        release()
    return manifest


def _claim(stage: TeacherStage, folder: Path, chosen: Chosen, student_head: Tensor | None) -> dict[str, Any]:
    """The manifest of a new cache, or of the one there, which must be of the same. Collective."""
    role, config = stage.roles["teacher"], stage.config
    facts = {name: value for name, value in role.facts.items() if name not in ("path", "layers")}
    spoken = "teacher" in config.speakers
    facts["verbalizers"] = weights_digest(role.verbalizer_folder()) if spoken else None
    if not spoken:
        facts["verbalizer"] = None
    identity = identity_of_cache(
        config,
        facts,
        form=chosen.form,
        numbers=chosen.numbers,
        layers=stage.chosen_layers,
        has_last=stage.settings.needs_teacher_last,
        vocab_size=stage.head_options.vocab_size,
        student_head=None if student_head is None else tensor_digest(student_head),
    )
    problem = None
    if rank() == 0:
        try:
            if (folder / NAME).is_file():
                require_same(folder, read_manifest(folder)["identity"], identity, "this call")
            elif folder.is_dir() and any(folder.iterdir()):
                raise ConfigError(f"{folder} is not empty and holds no cache; choose another with --out")
        except ConfigError as error:
            problem = str(error)
    problem = broadcast_object(problem)
    if problem:
        raise ConfigError(problem)
    teacher = {"path": str(role.folder), "verbalizers": str(role.verbalizer_folder()) if spoken else None}
    student = None if student_head is None else str(stage.roles["student"].folder)
    manifest = {"identity": identity, "teacher": teacher, "student": {"path": student}, "errors": None}
    if (folder / NAME).is_file():
        manifest = read_manifest(folder)
    manifest |= {"versions": versions(), "commit": code_commit()}
    barrier()
    if rank() == 0:
        for name in forget_lost(folder):
            say(f"{folder / name}: gone or cut short; its rows are made again")
        role.config.save_pretrained(folder / TEACHER)
        role.processor.save_pretrained(folder / TEACHER)
        write_manifest(folder, manifest)
    return manifest


class _Work:
    """The rows that are still to do, rank by rank."""

    def __init__(self, stage: TeacherStage, chosen: Chosen, folder: Path):
        self.stage, self.chosen, self.folder = stage, chosen, folder
        self.reading = Reading(stage, chosen.split)
        self.data, settings = self.reading.data, stage.config.stage_training("interact")
        order = _order(stage.config, chosen, self.reading.sources, folder)
        done = broadcast_object(done_rows(folder, self.data) if rank() == 0 else None)
        batches = StepBatches(_Listed(order), settings.per_device_train_batch_size, 1, world_size())
        rounds = list(_all_ranks(batches))
        position, self.rounds = itertools.count(), []
        for one in rounds:
            places = [[(number, next(position)) for number in rows] for rows in one]
            if any(number not in done for rows in one for number in rows):
                self.rounds.append(places[rank()])
        self.total = len(rounds)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left; the same on every rank."""
        return not self.rounds

    def do(self, teacher: Teacher) -> dict[str, Any]:
        """Run the teacher over the rows. Returns `errors`, what rounding costs, for the manifest."""
        from tqdm.auto import tqdm

        known, chosen = CacheReader(self.folder), self.chosen
        writer = ShardWriter(self.folder, chosen.shard_bytes, None, self.data)
        written: set[bytes] = set()
        loader, began = self.reading.loader(self.rounds), self.total - len(self.rounds)
        bar = tqdm(loader, "teacher", self.total, initial=began, disable=rank() != 0 or not chosen.progress)
        for batch in bar:
            for refused in batch["refused"]:
                writer.refuse(*refused)
            for key, answers, place, values in rows_in(batch, teacher.stored(batch)):
                is_new = key not in written and known.find(key) is None
                writer.add(key, answers, place, values if is_new else None)
                written.add(key)
        writer.flush()
        return teacher.told_errors()


class _Listed:
    """An order that is a list."""

    def __init__(self, rows: list[int]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)


def _all_ranks(batches: StepBatches) -> Iterator[list[list[int]]]:
    """Rounds of micro-batches, one of each rank."""
    ranks = []
    for number in range(batches.ranks):
        batches.rank = number
        ranks.append(list(batches))
    return zip(*ranks)


def _order(config: RunConfig, chosen: Chosen, sources: ConcatSource, folder: Path) -> list[int]:
    """Row numbers in the order of stage interact, each once; without those of sources that have another cache.

    Raises:
        ConfigError: no source of that name.
    """
    parts = [part.name for part in sources.parts]
    if chosen.source is not None and chosen.source not in parts:
        raise ConfigError(f"--source {chosen.source}: data.{chosen.split} has {', '.join(parts)}")
    training = config.stage_training("interact")
    if chosen.source is not None:
        rows: Iterable[int] = range(len(sources))
    elif chosen.split == "eval":
        count = min(training.max_eval_samples or len(sources), len(sources))
        rows = (i * len(sources) // count for i in range(count))
    else:
        order = data_order(config, sources, rows_used(config.stage_dir("verbalize")))
        per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * world_size()
        read = training.max_steps * per_step
        if training.max_steps == -1:
            read = math.ceil(training.num_train_epochs * len(order))
        elif chosen.rows is None and rank() == 0:
            say(
                f"rows of {training.max_steps} optimizer steps on as many ranks as here, {world_size()}: "
                f"{min(read, len(order))}; a run on more ranks reads more, which --rows N adds"
            )
        if chosen.rows is not None:  # each once, and the order has every row within so many passes
            read = EPOCHS * len(order)
        rows = itertools.islice(dict.fromkeys(order.order.rows(order.start, read)), chosen.rows)
    wanted = parts_of(config, chosen.split, folder)
    if chosen.source is not None:
        wanted = {i for i, name in enumerate(parts) if name == chosen.source}
    return list(dict.fromkeys(number for number in rows if sources.part_of(number) in wanted))


def parts_of(config: RunConfig, split: str, folder: Path) -> set[int]:
    """Numbers of the sources whose rows learn from the cache in this folder."""
    named = [source.teacher and Path(source.teacher) for source in getattr(config.data, split)]
    own = folder if folder in named else None
    return {i for i, name in enumerate(named) if name == own}


def done_rows(folder: Path, data: str) -> set[int]:
    """Numbers of the rows of this data that the cache has for good."""
    found: set[int] = set()
    for name, line in shards_of(folder).items():
        if line["data"] == data and not line.get("temporary"):
            found.update(numbers_in(folder, name))
    return found
