"""`vlsi-fast export`: write, prove, describe; only then does the result take its place."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..lineage import code_commit, versions
from ..runs import Run, open_run
from ..sizes import format_count, format_size

RECORD_NAME = "vlsi_export.json"
"""In an export: what it was made from. It holds no paths, since exports are published."""
FORMAT = 1


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Export. Returns the exit code: 0, 1 (what was written is not the student), 2 (bad input)."""
    from .card import Choices
    from .checkpoint import ExportError, find_source
    from .scores import read_scores

    try:
        run = open_run(arguments.run)
        stage = arguments.stage or _last_student(run)
        source = find_source(run, stage)
        _require_free(run, arguments.out, arguments.overwrite)
        places = [run.student_of(stage), arguments.out]
        choices = Choices(
            title=arguments.model_name or arguments.out.resolve().name,
            license=arguments.license,
            base_model=arguments.base_model,
            teacher_model=arguments.teacher_model,
            datasets=arguments.datasets,
            scores=[score for path in arguments.results for score in read_scores(path, places)],
        )
        notices = _export(run, stage, source, choices, arguments)
    except ExportError as error:
        raise ExportError(f"{error}; nothing was left in {arguments.out}") from error
    for notice in notices:
        print(f"notice: {notice}")
    print(f"Fill in what {arguments.out}/README.md leaves open, then: hf upload NAME/{choices.title} {arguments.out}")
    return 0


def _export(run: Run, stage: str, source, choices, arguments: argparse.Namespace) -> list[str]:
    """Everything into a folder beside `--out`, which takes its place when all is well. Returns notices."""
    from transformers.utils import is_torchvision_available

    from .card import make_card
    from .checkpoint import write_checkpoint

    out, partial = arguments.out, arguments.out.with_name(arguments.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        written = write_checkpoint(run, stage, source, partial, arguments.dtype, arguments.max_shard_size)
        card, notices = make_card(run, stage, written, choices)
        card.save(partial / "README.md")
        record = _record(run, stage, written, merged=source.adapter is not None)
        (partial / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n")
        if out.exists():
            shutil.rmtree(out)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if not is_torchvision_available():
        notices.append(
            "torchvision is not installed: the processor was loaded without its video part, AutoProcessor was not tried"
        )
    made = " (adapter merged into the model it was trained on)" if source.adapter else ""
    print(
        f"{out}: student of stage {stage}{made}, {written.architecture}, {format_count(written.parameters)} parameters "
        f"in {written.tensors} tensors, {written.dtype}, {format_size(written.bytes)}\n"
        f"loaded again by stock code: all tensors, logits as written (relative error {written.loaded_error:.1e})"
        + (f"; the cast changed them by {written.cast_error:.1e}" if written.cast_error is not None else "")
    )
    return notices


def _record(run: Run, stage: str, written, merged: bool) -> dict[str, Any]:
    stages = run.stages_behind(stage)
    parents = {role: fact for name in stages for role, fact in run.records[name]["facts"].items()}
    return {
        "format": FORMAT,
        "stage": stage,
        "stages": {name: run.records[name].get("summary", {}).get("optimizer_steps") for name in stages},
        "parents": {role: {key: fact[key] for key in ("checkpoint", "layers")} for role, fact in parents.items()},
        "tokenizer": written.tokenizer,
        "dtype": written.dtype,
        "adapter_merged": merged,
        "made_by": {"versions": versions(), "commit": code_commit()},
    }


def _last_student(run: Run) -> str:
    return run.student.parent.name


def _require_free(run: Run, out: Path, overwrite: bool) -> None:
    """Raise ConfigError where `out` is taken, or is a part of the run."""
    target, root = out.resolve(), run.folder.resolve()
    if root.is_relative_to(target) or any(target.is_relative_to(root / stage) for stage in run.records):
        raise ConfigError(f"--out {out} is a part of the run {run.folder}; choose another folder")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; choose another folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / RECORD_NAME).is_file():
        raise ConfigError(f"--out {out} is not empty and holds no export; choose another folder")
    if not overwrite:
        raise ConfigError(f"--out {out} holds an export; add --overwrite to replace it, or choose another folder")
