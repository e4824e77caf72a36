"""What a stage leaves beside its results, so that the next stage, and a later reader, know what they hold.

`vlsi_stage.json` in each stage's folder: the stage, its state, base models, tokenizer, layers, verbalizers, settings.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config_files import ConfigError
from .errors import UserError

if TYPE_CHECKING:
    from .config import RunConfig

RECORD_NAME = "vlsi_stage.json"
FORMAT = 2
"""Of records; since 2 every checkpoint has a manifest."""
EVALUATION = ("eval_steps", "max_eval_samples", "load_best_model_at_end", "metric_for_best_model")
EVALUATION += ("early_stopping_patience", "early_stopping_threshold")
"""Options of `training` that change what a stage makes only where evaluations decide."""
ADDED = ("objective", "divergence", "jsd_beta", "intermediate_schedule")
"""Options of stages that came after the first records."""


class LineageError(UserError, RuntimeError):
    """Folders that do not belong together, or a folder that is taken. The message names both sides and the fix."""


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    packages = ("vlsi-fast", "torch", "transformers", "deepspeed", "peft", "accelerate", "datasets", "triton")
    for package in (*packages, "liger-kernel", "flash-attn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def code_commit() -> str | None:
    """The git commit of this code, `-dirty` where tracked files differ; None where it is in no checkout of its own."""
    package = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return None  # installed into a folder of another repository
        return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return None


def checkpoint_digest(folder: Path) -> str:
    """sha256 of a checkpoint's config and `weights_digest`: tells checkpoints apart, large ones by samples."""
    config = json.loads((folder / "config.json").read_text())
    for volatile in ("transformers_version", "_name_or_path"):
        config.pop(volatile, None)
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode() + weights_digest(folder).encode()).hexdigest()


def weights_digest(folder: Path) -> str:
    """sha256 over a folder's safetensors: of each the tensor table and 64 blocks spread evenly over the weights.

    All of a file up to 4 MiB is read. The blocks are spread because a stage may leave a stretch of a file as it was,
    such as the vision tower at its end.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = stream.read(8)
            digest.update(header + stream.read(int.from_bytes(header, "little")))
            begin, block = stream.tell(), 65536
            spare = max(0, file.stat().st_size - begin - block)
            for start in sorted({begin + min(spare, i * max(block, -(-spare // 63))) for i in range(64)}):
                stream.seek(start)
                digest.update(stream.read(block))
    return digest.hexdigest()


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """The record of a stage's folder, or None where there is none.

    Raises:
        ConfigError: the file is damaged.
    """
    path = Path(folder) / RECORD_NAME
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged ({error}); restore it from a copy, or delete {folder} and run the stage again"
        ) from None
    if not isinstance(record, dict):
        raise ConfigError(f"{path} holds no record; restore it from a copy, or delete {folder} and run the stage again")
    return record


def write_record(folder: str | Path, record: dict[str, Any]) -> None:
    """Write a record so that a reader sees the old or the new one, never half of it."""
    path = Path(folder) / RECORD_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"format": FORMAT, **record}, indent=2) + "\n")
    partial.replace(path)


def identity_of(
    config: RunConfig,
    stage: str,
    sections: tuple[str, ...],
    facts: dict[str, dict[str, Any]],
    *,
    rows_per_step: int,
    inputs: dict[str, str],
    data_start: int,
) -> dict[str, Any]:
    """What makes a stage this one and no other: where any of it differs, a folder holds another run.

    Args:
        config: of the run.
        stage: its name.
        sections: of the config, besides data, seed and the stage's own, whose change makes another run.
        facts: role -> what the stage found of that model.
        rows_per_step: rows of an optimizer step over all ranks.
        inputs: digests of what earlier stages made and this one starts from.
        data_start: rows of the run's data order that earlier stages have used.
    """
    settings = config.stage_training(stage)
    dump, training = config.model_dump(), settings.model_dump()
    for name in ("logging_steps", "save_steps", "save_minutes", "save_total_limit", "report_to", "persist_heads"):
        del training[name]  # may change between a run and its continuation
    for name in () if settings.evaluations_decide else EVALUATION:
        del training[name]
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "balance_batch"):
        del training[name]  # may change with the number of ranks; the rows of a step, so the product, may not
    training["extra"].pop("ddp_timeout", None)
    if isinstance(training["deepspeed"], dict):  # where second shards lie is no part of what is computed
        (training["deepspeed"].get("zero_optimization") or {}).pop("zero_hpz_partition_size", None)
    loose = ("num_workers", "max_skipped_share", "padding_free") + ("eval",) * (not settings.evaluations_decide)
    data = {name: value for name, value in dump["data"].items() if name not in loose}
    # what counts rows apart changes none of them; which teachers a stage learns from is among its inputs
    data["train"] = [{k: v for k, v in source.items() if k not in ("answered", "teacher")} for source in data["train"]]
    # a run that was begun before an option was there goes on with the option's default
    fields = type(getattr(config, stage)).model_fields
    own = {
        name: value
        for name, value in dump[stage].items()
        if name != "training" and not (name in ADDED and value == fields[name].default)
    }
    dump["verbalizer"] = config.verbalizer.recorded
    identity = {name: dump[name] for name in ("seed", "dtype", *sections)} | {stage: own}
    identity |= {"data": data, "training": training, "rows_per_step": rows_per_step}
    identity |= {"inputs": inputs, "data_start": data_start}
    for role, fact in facts.items():
        identity[role] = {name: value for name, value in fact.items() if name != "path"}
        identity[role] |= {name: dump[role][name] for name in ("min_pixels", "max_pixels")}
    return identity


def open_stage(folder: Path, record: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """Look whether a run may use a stage's folder.

    Returns:
        None for a new start. With `resume`: the record of the same run.

    Raises:
        LineageError: the folder holds another run, or this one and `resume` is not set.
    """
    found = read_record(folder)
    if found is None:
        if folder.is_dir() and any(folder.iterdir()):
            raise LineageError(f"{folder} is not empty and holds no run of vlsi-fast; choose another output_dir")
        return None
    changed = [
        f"{name}: there {there!r}, now {now!r}"
        for name, there, now in differences(found["identity"], json.loads(json.dumps(record["identity"])))
    ]
    if changed:
        raise LineageError(
            f"{folder} holds another run. Differences:\n  " + "\n  ".join(changed[:10]) + "\n"
            "Choose another output_dir (--output_dir), or delete that folder"
        )
    if not resume:
        state = "is finished" if found["state"] == "finished" else "is unfinished"
        raise LineageError(
            f"{folder} holds this very run, which {state}; pass --resume to continue it, or choose another output_dir"
        )
    return found


def differences(there: Any, now: Any, prefix: str = ""):
    """(dotted name, value there, value now) of what differs between nested mappings."""
    if isinstance(there, dict) and isinstance(now, dict):
        for key in sorted(there.keys() | now.keys()):
            yield from differences(there.get(key), now.get(key), f"{prefix}.{key}" if prefix else key)
    elif there != now:
        yield prefix, there, now


def require_predecessor(folder: Path, stage: str, needs: dict[str, Any]) -> dict[str, Any]:
    """The finished record of the stage before, checked against what this stage is about to use.

    Args:
        folder: the predecessor's folder.
        stage: its name.
        needs: role -> facts that must be those of the record.

    Raises:
        LineageError: missing, unfinished, or different; the message shows both sides.
    """
    record = read_record(folder)
    if record is None:
        raise LineageError(f"{folder} holds no results of the {stage} stage; run --stage {stage} first")
    if record["state"] != "finished":
        raise LineageError(f"{folder}: the {stage} stage is unfinished; continue it with --stage {stage} --resume")
    require_equal(folder, stage, record["facts"], needs)
    return record


def require_equal(folder: Path, stage: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise LineageError where facts of a role differ from those that a stage recorded; a path alone may differ."""
    for role, facts in here.items():
        for name, now in facts.items():
            found = there.get(role, {}).get(name)
            if name == "path" or found == now:
                continue
            both = f"{role}.{name} is {found!r} in the {stage} stage and {now!r} here"
            if name in ("checkpoint", "tokenizer"):  # digests say nothing to a reader
                both += f" ({there.get(role, {}).get('path')} there, {facts.get('path')} here)"
            raise LineageError(
                f"{folder} does not fit this run: {both}; run --stage {stage} again with this config, or correct it"
            )


def rows_used(folder: Path) -> int:
    """Rows of the run's data order used up to the end of a finished stage of this run; 0 where there is none."""
    record = read_record(folder)
    if record is None or record["state"] != "finished":
        return 0
    return record["identity"]["data_start"] + record["summary"]["rows"]
