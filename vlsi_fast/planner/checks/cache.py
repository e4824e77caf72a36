"""The check of a teacher on disk: it is of this run, whole, and has the rows that stage interact will read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from ...config import ConfigError
from ...data.messages import Sample
from ...data.skipped import UnusableRow
from ...data.sources import build_source
from ...lineage import rows_used
from ...loading import require_same_tokens, shared_rows
from ...teacher_cache.recalling import CachedTeacher, cache_folders
from ...teacher_cache.rows import row_key
from ...teacher_cache.store import CacheError, CacheReader, Refused
from ...teacher_cache.verifying import problems_of
from .subject import Failed, Subject

SAMPLED, AT_START = 256, 64
"""Rows that are looked for, evenly over those that stage interact reads: by `check`, and by a stage's every rank."""
BUILD = "`vlsi-fast teacher build` with this config makes what is missing"


def check_cache(subject: Subject) -> str:
    """Every cache that rows of the run are in fits the run, its shards are there, and it has the sampled rows."""
    readers: dict[Path, CacheReader] = {}
    for folder in cache_folders(subject.config):
        try:
            found = CachedTeacher(subject.config, folder)
            if "teacher" in subject.roles:  # else the stage has compared them
                _require_student(subject, found)
        except (ConfigError, CacheError) as error:
            raise Failed(str(error), f"see the message; {BUILD}") from error
        wrong = [] if found.follows else list(problems_of(folder, quick=True))  # else shards come and go
        if wrong:
            fix = "delete the shards that are named, and run the `vlsi-fast teacher build` that made them again"
            raise Failed(f"{len(wrong)} problems, first: {wrong[0]}", fix)
        readers[folder] = CacheReader(folder)
    looked = refused = 0
    absent = []
    for folder, sample in _sampled(subject, SAMPLED if "teacher" in subject.roles else AT_START):
        try:
            entry = readers[folder].find(row_key(sample))
        except UnusableRow:
            continue  # `data` counts them
        looked, refused = looked + 1, refused + isinstance(entry, Refused)
        absent += [sample.id] if entry is None else []
    names = ", ".join(map(str, readers))
    said = f"{looked - len(absent)} of {looked} sampled rows that interact reads are in {names}"
    if absent and subject.config.teacher.cache_follow:
        return f"{said}; the others are waited for"
    if absent:
        raise Failed(f"{said}; first that is not: {absent[0]}", BUILD)
    return said + (f", {refused} of them as rows that its teacher could not use" if refused else "")


def _require_student(subject: Subject, found: CachedTeacher) -> None:
    """The student's head is the one that targets were made for, where its weights are at hand."""
    folder = Path(subject.config.student.path)
    if not list(folder.glob("*.safetensors")):
        return
    student, config = subject.processor("student"), subject.model_config("student")
    if subject.config.verbalizer.translates:
        found.require_student(folder, config, config.get_text_config().vocab_size)
        return
    tokens = require_same_tokens(student.tokenizer, found.processor.tokenizer, str(folder), str(found.folder))
    rows = [each.get_text_config().vocab_size for each in (config, found.config)]
    found.require_student(folder, config, shared_rows(rows, tokens))


def _sampled(subject: Subject, most: int) -> Iterator[tuple[Path, Sample]]:
    """(cache, row), evenly over the rows that stage interact reads in its first pass."""
    from ...stages.sampling import data_order  # stages import the checks

    config = subject.config
    sources = build_source(config.data.train)
    order = data_order(config, sources, rows_used(config.stage_dir("verbalize")))
    training = config.stage_training("interact")
    read = math.ceil(min(training.num_train_epochs, 1) * len(order))
    if training.max_steps > 0:
        a_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * subject.ranks
        read = min(training.max_steps * a_step, len(order))
    count = min(most, read)
    for place in (i * read // count for i in range(count)):
        (number,) = order.order.rows(order.start + place, 1)
        named = config.data.train[sources.part_of(number)].teacher
        try:
            yield Path(named or config.cache_dir), sources[number]
        except UnusableRow:
            continue
