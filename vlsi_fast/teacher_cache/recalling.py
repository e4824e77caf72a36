"""A teacher that is not in the job: what stage interact knows of it, and the rows' targets as they come with the rows.

N  answer tokens        R  layers that are read, target layers first, then the last layer        L  target layers
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError, RunConfig
from ..config_data import SourceConfig
from ..config_stages import InteractConfig
from ..data.dataset import AnswerMismatchError, keep_answers
from ..data.messages import Sample
from ..data.skipped import UnusableRow
from ..lineage import checkpoint_digest, weights_digest
from ..loading import read_head, target_layers
from .forms import Form
from .manifest import HEAD, TEACHER, encoding_of, read_manifest, require_rows, require_same, tensor_digest
from .rows import IGNORED, answers_digest, row_key
from .store import CacheError, CacheReader, Refused


class CachedTeacher:
    """A cache of a teacher, checked against a run that learns from it.

    Args:
        config: of the run.
        folder: of the cache; None: `RunConfig.cache_dir`.

    Raises:
        ConfigError: no cache there, or one of something else; the message names both sides.
    """

    def __init__(self, config: RunConfig, folder: str | Path | None = None):
        from transformers import AutoConfig

        self.run, self.settings, self.folder = config, config.teacher, Path(folder or config.cache_dir)
        self.name = self.folder.name
        self.manifest = read_manifest(self.folder)
        self.identity = self.manifest["identity"]
        if not self.follows:
            require_rows(self.folder)
        self.config = AutoConfig.from_pretrained(self.folder / TEACHER)
        self._require_form(config.interact)
        self.layers = self._layers()
        self._require_this_run()

    @property
    def form(self) -> Form:
        """targets or hidden."""
        return self.identity["form"]

    @property
    def digest(self) -> str:
        """Of what the cache is of."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """What a stage records of its teacher; a cache that is not exact belongs to what was made with it."""
        facts = {"path": self.manifest["teacher"]["path"], **self.identity["teacher"], "layers": self.layers}
        del facts["verbalizers"]
        if not self.layers:  # no target layer is asked to speak: as a teacher in the job has it
            facts |= {"verbalizer": self.run.verbalizer.recorded, "layers": self._named_layers()}
        exact = self.form == "hidden" or self.identity["numbers"] == "float32"
        return facts | ({} if exact else {"targets": self.identity["numbers"]})

    @property
    def _is_own(self) -> bool:
        """Whether it is that of the config's teacher, and not of a source's own."""
        return self.folder == self.run.cache_dir

    @property
    def follows(self) -> bool:
        """Whether it is being built meanwhile."""
        return self._is_own and self.settings.cache_follow

    @property
    def verbalizers(self) -> str | None:
        """Digest of the teacher's verbalizers."""
        return self.identity["teacher"]["verbalizers"]

    @cached_property
    def processor(self):
        """Of the teacher."""
        from ..data.processors import load_processor

        return load_processor(self.folder / TEACHER)

    def head(self, device: torch.device) -> Tensor:
        """[V, d_l] language head of the teacher beside its hidden states, on the device."""
        from safetensors.torch import load_file

        return load_file(self.folder / HEAD, device=str(device))["head"]

    def rows(self, follow: bool = False) -> CachedRows:
        """What gives a row its targets; `follow`: where it is being built meanwhile, as soon as it has them."""
        columns = [self.identity["layers"].index(k) for k in self.layers]
        if self.run.interact.needs_teacher_last:
            columns.append(len(self.identity["layers"]))
        if follow and self.follows:
            from .following import FollowedRows, LiveReader

            return FollowedRows(LiveReader(self.folder), columns, self.settings.cache_timeout)
        return CachedRows(CacheReader(self.folder), columns)

    # ---- whether it fits ----

    def _layers(self) -> list[int]:
        """Those that the run names, or all that the cache has."""
        if not self.run.interact.matches_layers:
            return []
        there = self.identity["layers"]
        wanted = there
        if self.run.teacher.layers is not None and self._is_own:
            wanted = self._named_layers()
        absent = [k for k in wanted if k not in there]
        if absent or not wanted:
            raise ConfigError(
                f"{self.folder} has teacher layers {there}, this run needs {wanted or 'some'}: set teacher.layers to "
                "some of the cache's, or build another with `vlsi-fast teacher build --layers`"
            )
        return list(wanted)

    def _named_layers(self) -> list[int]:
        return target_layers(self.run.teacher, self.config, "teacher", self.run)

    def _require_form(self, settings: InteractConfig) -> None:
        """What a loss reads, the cache has."""
        if settings.headless:
            raise ConfigError(
                "interact.headless compares the teacher's verbalizers before its final norm, which no cache has: set "
                "teacher.mode to auto"
            )
        if settings.needs_teacher_last and not self.identity["has_last"]:
            raise ConfigError(
                f"interact.last is {settings.last}, but {self.folder} has no last layer of the teacher (it was built "
                "with interact.last none or ce): build another, or set interact.last to ce or none"
            )
        if self.form == "targets" and (settings.reads_teacher_layers or settings.reads_teacher_last):
            named = [f"interact.{n} l2" for n in ("intermediate", "last") if getattr(settings, n) == "l2"]
            named += [] if settings.kld_is_forward else [f"interact.divergence {settings.divergence}"]
            raise ConfigError(
                f"{' and '.join(named)} reads the teacher's hidden states, but {self.folder} has targets, which are "
                "enough for the forward KL alone: build another with `vlsi-fast teacher build --form hidden`"
            )

    def _require_this_run(self) -> None:
        there: dict[str, Any] = {"encoding": self.identity["encoding"], "dtype": self.identity["dtype"]}
        here: dict[str, Any] = {"encoding": encoding_of(self.run), "dtype": self.run.dtype}
        spoken_by = self.identity["teacher"]["verbalizer"] or {}
        there["verbalizer.language"] = spoken_by.get("language", "own")
        here["verbalizer.language"] = self.run.verbalizer.language
        if self.form == "targets":
            there["temperature"], here["temperature"] = self.identity["temperature"], self.run.interact.temperature
        digests: dict[str, Any] = {}
        # where the teacher itself is at hand it must be the one; where it is not, the cache speaks for it
        folder, spoken = Path(self.run.teacher.path), self._verbalizer_folder()
        if self._is_own and folder.is_dir():
            digests["checkpoint"] = checkpoint_digest(folder)
        if self._is_own and spoken.is_dir() and "teacher" in self.run.speakers:
            digests["verbalizers"] = weights_digest(spoken)
        there["teacher"] = {name: self.identity["teacher"][name] for name in digests}
        require_same(self.folder, there, here | {"teacher": digests}, "this run")

    def _verbalizer_folder(self) -> Path:
        return Path(self.run.teacher.verbalizers or self.run.stage_dir("verbalize") / "teacher")

    def require_student(self, folder: Path, config, vocab_size: int) -> None:
        """Refuse a student that the targets were not made for.

        Args:
            folder: its checkpoint.
            config: its transformers config.
            vocab_size: rows of both heads that the run compares.

        Raises:
            ConfigError: names both sides.
        """
        there, here = {"vocab_size": self.identity["vocab_size"]}, {"vocab_size": vocab_size}
        if self.form == "targets" or self.run.verbalizer.translates:
            there["student_head"] = self.identity["student_head"]
            here["student_head"] = tensor_digest(read_head(folder, config, self.run.dtype))
        if self.run.verbalizer.translates:  # its norm is spoken through as well
            there["student"] = self.identity["teacher"].get("student", {}).get("checkpoint")
            here["student"] = checkpoint_digest(folder)
        require_same(self.folder, there, here, "this run")


def cache_folders(config: RunConfig) -> list[Path]:
    """Folders of the caches that a run's rows are in, the config's own first."""
    sources = [*config.data.train, *(config.data.eval if config.stage_training("interact").eval_steps else ())]
    named = [Path(source.teacher or config.cache_dir) for source in sources]
    return sorted(dict.fromkeys(named), key=lambda folder: folder != config.cache_dir)


@dataclass(frozen=True)
class Said:
    """What a teacher said to a row."""

    teacher: int
    """Which one, of `of`."""
    of: int
    values: dict[str, Tensor] | CacheError
    kept: Tensor | None = None
    """[N] int64: which of the student's answer tokens it said something to; None: all."""


def rows_of(caches: list[CachedTeacher], sources: list[SourceConfig], follow: bool = False) -> Routed | None:
    """What gives a row its targets, by the source that it is of; None without caches. `follow`: see `CachedTeacher`."""
    if not caches:
        return None
    folders = [cached.folder for cached in caches]
    default = caches[0].run.cache_dir
    return Routed(
        [cached.rows(follow) for cached in caches], [folders.index(Path(s.teacher or default)) for s in sources]
    )


class Routed:
    """Rows of several caches. `routes`: source -> its cache."""

    def __init__(self, caches: list[CachedRows], routes: list[int]):
        self.caches, self.routes = caches, routes

    def __call__(self, sample: Sample, labels: Tensor) -> Said:
        teacher = self.routes[sample.source]
        values, kept = self.caches[teacher](sample, labels)
        return Said(teacher, len(self.caches), values, kept)


class CachedRows:
    """Rows of a cache, for the processes that read data.

    Args:
        reader: of the cache.
        columns: layers to read, of those that the cache has, the last layer being behind its target layers.
    """

    def __init__(self, reader: CacheReader, columns: list[int]):
        self.reader, self.columns = reader, columns

    def __call__(self, sample: Sample, labels: Tensor) -> tuple[dict[str, Tensor] | CacheError, Tensor | None]:
        """What is stored of a row, [N, R, ..] each; and `Said.kept`.

        A row that the cache does not have gives the error, to be raised where the row is used: rows are read ahead, and
        those behind a stage's last step need no targets.

        Args:
            sample: the row.
            labels: [1, T], the student's.

        Raises:
            UnusableRow: the teacher's side could not use the row.
            AnswerMismatchError: it read other answer tokens in it.
            CacheError: its shard is gone or damaged.
        """
        found = self.find(row_key(sample))
        if isinstance(found, Refused):
            raise UnusableRow(found.cause, f"in the teacher's cache: {found.detail}")
        if found is None:
            error = CacheError(
                f"row {sample.id} is not in {self.reader.folder}, which has {len(self.reader)} rows. Its words or "
                "image may have changed since; or the cache was built of other rows, or of fewer: `vlsi-fast teacher "
                "build` with this config adds what is missing"
            )
            return error, None
        values = self.reader.read(found)
        kept = values.pop("kept", None)
        if kept is not None:
            kept = kept.long()
            there = int((labels != IGNORED).sum())
            labels = keep_answers(labels, kept[kept < there])
        if found.answers != answers_digest(labels):
            raise AnswerMismatchError(
                f"row {sample.id}: the student's answer tokens are not those in {self.reader.folder}, so the two "
                "cannot be compared. Set the chat template on both that the teacher had when the cache was built"
            )
        if len(self.columns) == next(iter(values.values())).shape[1]:
            return values, kept
        return {name: value[:, self.columns] for name, value in values.items()}, kept

    def find(self, key: bytes):
        """Where a row is."""
        return self.reader.find(key)


def join_rows(rows: list[Said], counts: list[int]) -> dict[str, Tensor] | list[dict[str, Tensor]] | CacheError:
    """What was said to a micro-batch.

    Args:
        rows: of the micro-batch.
        counts: answer tokens of each.

    Returns:
        Of one teacher: the rows' values one after another, [N, R, ..] each. Of several: a mapping for each, with
        `tokens`, which of the micro-batch's answer tokens are its own; without values where none is. Or what is wrong
        with one of the rows.
    """
    for row in rows:
        if isinstance(row.values, CacheError):
            return row.values
    if rows[0].of == 1:
        return _end_to_end([row.values for row in rows])
    owners = torch.tensor([row.teacher for row in rows]).repeat_interleave(torch.tensor(counts))
    found = []
    for teacher in range(rows[0].of):
        own = [row.values for row in rows if row.teacher == teacher]
        found.append({"tokens": (owners == teacher).nonzero()[:, 0]} | (_end_to_end(own) if own else {}))
    return found


def _end_to_end(values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([value[name] for value in values]) for name in values[0]}
