"""A run's folder as its tools see it: what the stages recorded, and where the models and verbalizers lie."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoints import EVALUATIONS_NAME
from .config import STAGES, ConfigError, RunConfig
from .config_stages import InteractConfig
from .lineage import FORMAT, RECORD_NAME, read_record

METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class Run:
    """A folder that stages of one run wrote; `open_run` makes it."""

    folder: Path
    records: dict[str, dict[str, Any]]
    """Stage name -> its `vlsi_stage.json`, in the stages' order; a stage that was not run is absent."""

    @property
    def last_stage(self) -> str:
        """Name of the last stage with a record."""
        return list(self.records)[-1]

    @property
    def config_tree(self) -> dict[str, Any]:
        """Every setting, as the last stage recorded it, not checked: a record of an older version may lack some."""
        return self.records[self.last_stage]["config"]

    @property
    def config(self) -> RunConfig:
        """Every setting, as the last stage recorded it."""
        return RunConfig(**self.config_tree)

    def finished(self, stage: str) -> bool:
        """Whether a stage ran to its end."""
        return self.records.get(stage, {}).get("state") == "finished"

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """One record an optimizer step; a last line that is being written, or was cut off, is left out."""
        return self._lines(stage, METRICS_NAME)

    def evaluations(self, stage: str) -> list[dict[str, Any]]:
        """One record an evaluation while training (`training.eval_steps`); none where there were none."""
        return self._lines(stage, EVALUATIONS_NAME)

    def _lines(self, stage: str, name: str) -> list[dict[str, Any]]:
        path = self.folder / stage / name
        lines = path.read_text().splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    @property
    def student(self) -> Path:
        """The trained student: that of the last finished stage which makes one.

        Raises:
            FileNotFoundError: neither interact nor sft is finished.
        """
        for stage in ("sft", "interact"):
            if self.finished(stage):
                return self.folder / stage / "student"
        raise FileNotFoundError(f"{self.folder}: neither interact nor sft is finished; run --stage interact first")

    def student_of(self, stage: str) -> Path:
        """Folder of the student that a finished stage made; it may have been deleted since.

        Raises:
            FileNotFoundError: the stage makes none, or is not finished.
        """
        if stage not in ("interact", "sft") or not self.finished(stage):
            made = "makes no student" if stage == "verbalize" else "is not finished"
            raise FileNotFoundError(f"{self.folder}: stage {stage} {made}; run --stage interact or sft first")
        return self.folder / stage / "student"

    def stages_behind(self, stage: str) -> list[str]:
        """The stages whose results are in what `stage` made, itself included, in order; those with a record."""
        names = [name for name in STAGES if name in self.records and STAGES.index(name) <= STAGES.index(stage)]
        if stage == "sft" and self.records["sft"]["config"]["sft"]["start_from"] == "base":
            return ["sft"]
        recorded = self.records.get("interact", {}).get("config", {})
        settings = InteractConfig.model_construct(**recorded.get("interact", {}))  # an older version's may lack some
        translates = recorded.get("verbalizer", {}).get("language") == "student"
        speaks = settings.speakers or (translates and settings.needs_teacher_last)
        return [name for name in names if name != "verbalize" or speaks]

    def base(self, role: str) -> str:
        """Path or Hub name of the student or teacher that the run started from.

        A relative path is looked for from here, as the stages did, then from the run's folder: so a run can be moved
        together with its models.
        """
        path = self.records[self.last_stage]["config"][role]["path"]
        beside = self.folder / path
        return str(beside.resolve()) if not Path(path).is_dir() and beside.is_dir() else path

    def verbalizers(self, role: str) -> Path:
        """Folder of a role's verbalizers: those named in the config, or this run's own.

        Raises:
            FileNotFoundError: there are none.
        """
        named = self.records[self.last_stage]["config"][role].get("verbalizers")
        folder = Path(named) if named else self.folder / "verbalize" / role
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} holds no verbalizers of the {role}; run --stage verbalize first")
        return folder


def open_run(folder: str | Path) -> Run:
    """Read a run's folder (its `output_dir`), or the folder of one of its stages.

    Raises:
        FileNotFoundError: no stage has written there.
        ConfigError: a record of a newer format.
    """
    folder = Path(folder)
    if (folder / RECORD_NAME).is_file():
        folder = folder.parent
    records = {stage: record for stage in STAGES if (record := read_record(folder / stage)) is not None}
    if not records:
        raise FileNotFoundError(
            f"{folder} holds no run: no stage has left a {RECORD_NAME} there; give a run's output_dir, e.g. runs/demo"
        )
    for stage, record in records.items():
        if record.get("format", 0) > FORMAT:
            raise ConfigError(f"{folder / stage}: its record has format {record['format']}; update vlsi-fast")
    return Run(folder, records)
