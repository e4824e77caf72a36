"""Look into runs, stages and training checkpoints."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ..checkpoints import MANIFEST_NAME, last_checkpoint, looks_whole
from ..config import STAGES, RunConfig, field_names
from ..lineage import RECORD_NAME
from ..runs import METRICS_NAME
from ..weights import read_weights
from .caches import brief_of_cache
from .looking import folder_bytes, parent, problem, read_json, step_of
from .models import inspect_adapter, inspect_checkpoint, inspect_verbalizers

SUMMARY = ("rows", "answer_tokens", "seconds", "device", "best", "stopped_early_at")
SHOWN = ("loss", "learning_rate", "step_seconds", "answer_tokens_per_second", "mfu", "data_wait_share", "eta_seconds")


def inspect_run(folder: Path) -> dict[str, Any]:
    """All stages of a run."""
    stages = {name: inspect_stage(folder / name) for name in STAGES if is_stage(folder / name)}
    last = list(stages)[-1]
    facts = {
        "kind": "run",
        "path": str(folder),
        "bytes": folder_bytes(folder),
        "stages": stages,
        "next": _next(stages, stages[last]["planned"]),
        "settings": stages[last]["settings"],
        "problems": [one for stage in stages.values() for one in stage["problems"]],
    }
    summary = folder / "summary.json"
    if summary.is_file():
        numbers = read_json(summary, facts["problems"], "delete it, or run the demo again")
        facts["scores"] = {name: value for name, value in numbers.items() if name.endswith("_accuracy")}
    caches = brief_of_cache(folder, stages[last]["settings"])
    if caches:
        facts["teacher_cache"] = caches
    others = [child.name for child in sorted(folder.iterdir()) if child.name not in STAGES and is_run(child)]
    return facts | ({"runs_inside": others} if others else {})


def is_stage(folder: Path) -> bool:
    """Whether a stage has written here, be its record there or not."""
    return (folder / RECORD_NAME).is_file() or (folder.name in STAGES and (folder / METRICS_NAME).is_file())


def is_run(folder: Path) -> bool:
    """Whether stages have written below."""
    return folder.is_dir() and any(is_stage(folder / name) for name in STAGES)


def _next(stages: dict[str, dict], planned: list[str]) -> str:
    for name in STAGES:
        state = stages.get(name, {}).get("state")
        skipped = any(later in stages for later in STAGES[STAGES.index(name) :]) or name not in planned
        if state is None and not skipped:
            return f"--stage {name}"
        if state not in (None, "finished"):
            return stages[name]["resume"]
    if not {"interact", "sft"} & stages.keys():
        return "all its stages are finished: other runs may take its verbalizers (student.verbalizers, ..)"
    return "all stages are finished: vlsi-fast export"


def inspect_stage(folder: Path) -> dict[str, Any]:
    """One stage: state, what it was made from, where it stands, what it left."""
    problems: list[dict[str, str]] = []
    again = f"restore it from a copy, or delete {folder} and run --stage {folder.name} again"
    record = read_json(folder / RECORD_NAME, problems, again)
    name, summary = record.get("stage", folder.name), record.get("summary") or {}
    steps = _metrics(folder / METRICS_NAME, problems, again)
    checkpoints = [_brief(path) for path in sorted(folder.glob("checkpoint-*[0-9]"), key=step_of)]
    facts = {
        "kind": "stage",
        "path": str(folder),
        "stage": name,
        "state": record.get("state", "unknown"),
        "steps": len(steps) and steps[-1].get("step"),
        "of": max((c["of"] for c in checkpoints if c["of"]), default=summary.get("optimizer_steps")),
        "resume": _resume(folder, name, record),
        "last_step": _last(steps, folder / METRICS_NAME),
        "summary": {key: summary[key] for key in SUMMARY if key in summary},
        "layers": {role: fact.get("layers") for role, fact in record.get("facts", {}).items()},
        "dtype": record.get("config", {}).get("dtype"),
        "ranks": record.get("world_size"),
        "rows_a_step": record.get("identity", {}).get("rows_per_step"),
        "versions": record.get("versions", {}),
        "commit": record.get("commit"),
        "parents": _parents(folder, record),
        "checkpoints": checkpoints,
        "bytes": folder_bytes(folder),
        "settings": differing_settings(record.get("config", {})),
        "planned": record.get("config", {}).get("stages") or list(STAGES),
    }
    facts["results"] = _results(folder, record, problems)
    return facts | {"problems": problems}


def _metrics(path: Path, problems: list, fix: str) -> list[dict[str, Any]]:
    """Records of the steps; a last line that is being written is none."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    steps = []
    for number, line in enumerate(lines, 1):
        try:
            steps.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            if number < len(lines):
                problems.append(problem(f"{path}, line {number} is damaged", f"delete that line, or {fix}"))
    return steps


def _last(steps: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    if not steps:
        return {}
    last = steps[-1]
    shown = {key: value for key, value in last.items() if key in SHOWN or key.startswith("loss/")}
    peak = max(last.get("peak_memory_bytes") or [0])
    return shown | {"peak_memory_bytes": peak, "seconds_ago": round(time.time() - path.stat().st_mtime)}


def _resume(folder: Path, name: str, record: dict[str, Any]) -> str:
    if record.get("state") == "finished":
        return "finished: nothing to continue"
    if not record:
        return "not possible without its record"
    kept = last_checkpoint(folder)
    rows = record.get("identity", {}).get("rows_per_step")
    if kept is None and list(folder.glob(f"checkpoint-*/{MANIFEST_NAME}")):
        return "not possible: every checkpoint is damaged; restore one, or delete them to start from step 0"
    start = f"goes on after step {step_of(Path(kept))}" if kept else "starts from step 0: no complete checkpoint"
    return f"--stage {name} --resume {start} (unless it is still running); {rows} rows a step must stay"


def _parents(folder: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Base models, verbalizers and the student that a stage was made from."""
    found = [parent(role, fact.get("path"), fact.get("checkpoint")) for role, fact in record.get("facts", {}).items()]
    for role, digest in record.get("identity", {}).get("inputs", {}).items():
        if role.endswith("_verbalizers"):
            owner = role.removesuffix("_verbalizers")
            path = record["config"][owner].get("verbalizers") or folder.parent / "verbalize" / owner
            found.append(parent(role, path, digest, verbalizers=True))
        else:
            found.append(parent("distilled student", folder.parent / "interact" / role, digest))
    return found


def _results(folder: Path, record: dict[str, Any], problems: list) -> list[dict[str, Any]]:
    """What a stage left; of a finished one all of it must be there."""
    name = record.get("stage")
    wanted = {
        "verbalize": {role: inspect_verbalizers for role in _verbalized(record)},
        "interact": {"student": inspect_checkpoint, "adapter": inspect_adapter},
        "sft": {"student": inspect_checkpoint},
    }.get(name, {})
    if name == "sft" and record["config"]["sft"]["method"] == "lora":
        wanted["adapter"] = inspect_adapter
    rows = []
    for child, look in wanted.items():
        if not (folder / child).is_dir():
            if record.get("state") == "finished":
                problems.append(problem(f"{folder / child} is missing", _fix_missing(folder, name, child)))
            continue
        found = look(folder / child)
        problems += found["problems"]
        rows.append({key: found[key] for key in ("path", "kind", "parameters", "dtype", "bytes")})
    return rows


def _verbalized(record: dict[str, Any]) -> list[str]:
    """Models that got verbalizers; stage verbalize may read the student's rows for the teacher alone."""
    wanted = record.get("config", {}).get("verbalize", {}).get("models")
    return [role for role in record.get("facts", {}) if wanted is None or role in wanted]


def _fix_missing(folder: Path, name: str, child: str) -> str:
    if child == "student" and (folder / "adapter").is_dir():
        merge = f"vlsi-fast export --run {folder.parent} --stage {name} --out FOLDER"
        return f"{merge} makes it again from the adapter; move FOLDER to {folder / child}"
    return f"restore it from a copy, or delete {folder} and run --stage {name} again"


def differing_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted name -> value of a recorded config, where it is not the default; sources of data by name."""
    found = {}
    for name, info in field_names(RunConfig).items():
        value, known = config, True
        for part in name.split("."):
            known = known and isinstance(value, dict) and part in value
            value = value[part] if known else None
        if not known:
            continue
        default = ... if info.is_required() else info.get_default(call_default_factory=True)
        if name in ("data.train", "data.eval"):
            value = [source.get("name") or source.get("path") or source.get("reader") for source in value]
        if value != default:
            found[name] = value
    return found


# ---- training checkpoints ----


def _brief(folder: Path) -> dict[str, Any]:
    try:
        total = json.loads((folder / "trainer_state.json").read_text()).get("max_steps")
    except (OSError, ValueError, AttributeError):
        total = None
    return {"name": folder.name, "complete": looks_whole(folder), "of": total, "engine": _engine(folder)}


def _engine(folder: Path) -> str:
    """Who wrote it, which decides who can read it."""
    parts = [p for p in folder.glob("global_step*") if p.is_dir() and not p.name.endswith("_universal")]
    if not parts:
        return "plain"
    converted = ", converted for other numbers" if (folder / "latest_universal").is_file() else ""
    return f"DeepSpeed, {len(list(parts[0].glob('*_optim_states.pt')))} ranks{converted}"


def inspect_training_checkpoint(folder: Path) -> dict[str, Any]:
    """A `checkpoint-N` of a stage."""
    problems: list[dict[str, str]] = []
    brief = _brief(folder)
    last = last_checkpoint(folder.parent)
    if not brief["complete"]:
        damaged = (folder / MANIFEST_NAME).exists()
        over = "restore it from a copy, or delete it to start over" if damaged else "--resume starts the stage over"
        fix = f"--resume goes on from {last} and removes this one" if last else over
        why = "a file of its manifest is missing or has another size" if damaged else "the run ended while writing it"
        problems.append(problem(f"{folder} is incomplete: {why}", fix))
    record = read_json(folder.parent / RECORD_NAME, problems, "keep checkpoints in their stage's folder")
    state = read_json(folder / "trainer_state.json", problems, "see above") if brief["complete"] else {}
    weights = read_weights(folder) if list(folder.glob("*.safetensors")) else None
    if weights is not None:
        fix = "delete this checkpoint: --resume takes the one before"
        problems += [problem(said, fix) for said in weights.problems]
    logged = (state.get("log_history") or [{}])[-1]
    if record.get("state") == "finished":
        use = "its stage is finished: only a record of the way"
    else:
        use = "--resume goes on from here" if last and Path(last) == folder else f"--resume goes on from {last} instead"
    return {
        "kind": "training checkpoint",
        "path": str(folder),
        "stage": record.get("stage"),
        "step": step_of(folder),
        "of": brief["of"],
        "use": use,
        "engine": brief["engine"],
        "trained_parameters": weights.parameters if weights is not None else "in DeepSpeed's own files",
        "dtype": ", ".join(weights.dtypes) if weights is not None else None,
        "loss": logged.get("loss"),
        "bytes": folder_bytes(folder),
        "problems": problems,
    }
