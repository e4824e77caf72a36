"""The run that checks look at, and what a check may find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ... import hub
from ...config import STAGES, RunConfig
from ...config_data import SourceConfig
from ...data.processors import load_processor
from ...data.sources import ConcatSource, open_part
from ...loading import resolve_folder
from ..build import Models, setup_of, step_of
from ..recalled import teacher_beside
from ..report import rows_of
from ..shapes import read_config
from ..walk import Step

PASS, NOTICE, FAILURE, UNCHECKED = "pass", "notice", "FAILURE", "not checked"


@dataclass(frozen=True)
class Result:
    """What one check found."""

    name: str
    status: str
    detail: str
    fix: str = ""


class Failed(Exception):
    """Raised by a check: what was found, and what to do."""

    def __init__(self, detail: str, fix: str):
        super().__init__(detail)
        self.detail, self.fix = detail, fix


class Unchecked(Exception):
    """Raised by a check that cannot be made here; says why."""


class Notice(Exception):
    """Raised by a check that passes, but has something to say."""


@dataclass
class Subject:
    """The run to look at. Models are read on first use, so that one that fails leaves the other's checks."""

    config: RunConfig
    stages: tuple[str, ...] = STAGES
    rows: int = 16
    ranks: int = 1
    roles: tuple[str, ...] = ("student", "teacher")
    found: dict[Any, Any] = field(default_factory=dict)  # (role or source, kind) -> what was read, or why it was not

    def processor(self, role: str):
        def read():
            folder = self._folder(role)
            try:
                return load_processor(folder)
            except OSError as error:
                raise error if Path(folder).is_dir() else FileNotFoundError(hub.explain(folder, error)) from error

        return self._once(role, "processor", read)

    def model_config(self, role: str):
        def read():
            return read_config(getattr(self.config, role), role, self._beside(role))

        return self._once(role, "config", read)

    def sources(self, part: str = "train") -> dict[str, Callable[[], ConcatSource]]:
        """Name -> opener of each source of data.train, or of data.eval."""
        found = {f"data.{part}[{i}]": source for i, source in enumerate(getattr(self.config.data, part))}
        return {name: partial(self._source, name, source) for name, source in found.items()}

    def planned_models(self) -> Models:
        """Both models, or the stage's, as the planner sees them."""

        def make() -> Models:
            return Models(self.config, configs={role: self.model_config(role) for role in self.roles})

        return self._once("planner", "models", make)

    def planned_steps(self) -> dict[str, Step]:
        """Stage -> its step on the longest row, as the planner sees it."""

        def make() -> dict[str, Step]:
            config, models = self.config, self.planned_models()
            rows = rows_of(config, models)
            return {
                stage: step_of(
                    models,
                    stage,
                    setup_of(config, stage, self.ranks),
                    rows.batch(config.stage_training(stage).per_device_train_batch_size),
                )
                for stage in self.stages
            }

        return self._once("planner", "shapes", make)

    def _source(self, name: str, source: SourceConfig) -> ConcatSource:
        return self._once(name, "source", lambda: ConcatSource([open_part(source, name)]))

    def _once(self, name: str, kind: str, make: Callable[[], Any]) -> Any:
        if (name, kind) not in self.found:
            try:
                self.found[name, kind] = make()
            except Exception as error:
                self.found[name, kind] = error
        value = self.found[name, kind]
        if isinstance(value, Exception):
            raise Unchecked(f"needs {name}: {kind}, which cannot be read") from value
        return value

    @property
    def reads_cache(self) -> bool:
        """Whether a stage learns from a teacher on disk."""
        settings = self.config.interact
        return "interact" in self.stages and self.config.teacher.mode == "cached" and "teacher" in settings.roles

    def _beside(self, role: str) -> str | None:
        """Where a cache stands for the teacher, its folder there."""
        runs = "verbalize" in self.stages and "teacher" in self.config.verbalize.models
        return teacher_beside(self.config) if role == "teacher" and not runs else None

    def _folder(self, role: str) -> str:
        """A checkpoint's folder, or the Hub name: processors are read from there without the weights."""
        if self._beside(role) is not None:
            return self._beside(role)
        path = getattr(self.config, role).path
        return str(resolve_folder(path, f"{role}.path")) if Path(path).is_dir() or path.count("/") != 1 else path
