"""The course of `vlsi-fast shrink`: look, choose, write beside `out`, prove, put in place."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import AutoConfig

from ..backbones import family_of
from ..config import explain
from ..config_data import DataConfig
from ..config_files import ConfigError
from ..lineage import checkpoint_digest, code_commit, versions
from ..loading import resolve_folder
from ..ranks.shard_loading import empty_model, stored_names
from ..sizes import format_size
from ..weights import read_weights
from .arguments import DEFAULT_ROWS, METHODS
from .checkpoint import copy_rest, layer_tensors, require_plain, shrunk_fields, write_card, write_weights
from .influence import Influence, measure
from .layers import even_layers, influential_layers, require_count, require_list
from .record import FORMAT, SHRINK_NAME, describe, shrunk_targets


@dataclass(frozen=True)
class Shrunk:
    """A shrunk copy."""

    folder: Path
    kept_layers: list[int]
    """Of the source, counted from 1: layer j of the copy is layer kept_layers[j - 1] of the source."""
    depth: int
    """Decoder layers of the source."""
    parameters: int
    """Numbers stored in the copy's files; tied tensors count once."""
    bytes: int
    influence: list[float] | None
    """Of each layer of the source, with method influence."""
    record: dict[str, Any]
    """`vlsi_shrink.json`."""


def shrink(
    model: str | Path,
    out: str | Path,
    keep_layers: int | list[int],
    method: str = "even",
    rows: DataConfig | dict[str, Any] | None = None,
    limit: int = DEFAULT_ROWS,
    device: str | None = None,
    dtype: str | None = None,
) -> Shrunk:
    """Write a copy of a checkpoint with fewer decoder layers: a stock checkpoint, a student where there is none.

    Weights are copied file by file as bytes (the model is loaded for method influence alone). The folder appears when
    it is complete. Depth pruning as in ShortGPT (arXiv:2403.03853) and Minitron (arXiv:2408.11796).

    Args:
        model: stock checkpoint of a known family; a folder or a Hub name.
        out: folder to write; new or empty.
        keep_layers: how many decoder layers to keep, or which, counted from 1.
        method: which, where a number is given. "even": spread, the first and the last kept. "influence": those that
            change their input most, on `rows`.
        rows: for influence: a config's `data` section; its `train` sources, image bounds and `max_length` are used.
        limit: for influence: rows, taken evenly from all parts of the data.
        device: for influence; default: the GPU where there is one, else the CPU; "auto": spread over what there is.
        dtype: for influence: of the loaded model, not of the copy; default: bfloat16 on a GPU, float32 elsewhere.

    Raises:
        FileNotFoundError: no such checkpoint, or no such data.
        ConfigError: `out` is taken, layers that cannot be kept, a quantised or damaged checkpoint.
        ValueError: a checkpoint that does not fit its config.json, or data that cannot be read.
    """
    data = _require_options(keep_layers, method, rows, limit)
    out = Path(out)
    _require_free(out)
    folder = resolve_folder(str(model), "--model")
    if out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"--out {out} lies in the model's own folder; choose another folder")
    fields = json.loads((folder / "config.json").read_text())
    require_plain(folder, fields)
    config = AutoConfig.from_pretrained(folder)
    fixed, depth = family_of(config).layers_added_to(config), config.get_text_config().num_hidden_layers
    if isinstance(keep_layers, list):
        require_list(keep_layers, depth, fixed)
        kept = keep_layers
    else:
        require_count(depth, keep_layers, fixed)
        kept = even_layers(depth, keep_layers, fixed) if data is None else None
    tensors = layer_tensors(folder, empty_model(config))
    influence = None
    if kept is None:
        influence = measure(folder, data, limit, device, dtype)
        kept = influential_layers(influence.values, keep_layers, fixed)
    hub_name = None if Path(model).is_dir() else str(model)
    method = "list" if kept is keep_layers else method
    record = _record(hub_name or folder.resolve().name, folder, config, kept, method, influence)
    cut = shrunk_fields(fields, config.get_text_config(), kept)
    parameters, size = _write(folder, out, tensors, cut, record, hub_name)
    return Shrunk(out, kept, depth, parameters, size, influence.values if influence else None, record)


def _write(
    folder: Path, out: Path, tensors: dict, fields: dict[str, Any], record: dict[str, Any], hub_name: str | None
) -> tuple[int, int]:
    """Everything into a folder beside `out`, which takes its place when all is well. Returns parameters and bytes."""
    kept = record["kept_layers"]
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _require_room(folder, partial, [key for key, (_, layer) in tensors.items() if layer is None or layer in kept])
        parameters, size = write_weights(partial, tensors, kept)
        copy_rest(folder, partial)
        for name, tree in (("config.json", fields), (SHRINK_NAME, record)):
            (partial / name).write_text(json.dumps(tree, indent=2) + "\n")
        write_card(folder, partial, out.resolve().name, describe(record), hub_name)
        _prove(partial, AutoConfig.from_pretrained(folder), kept)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return parameters, size


def _require_options(keep_layers, method: str, rows, limit: int) -> DataConfig | None:
    """Raise ConfigError where options contradict each other. Returns the data of method influence."""
    if method not in METHODS:
        raise ConfigError(f"method {method!r} is unknown; use one of {', '.join(METHODS)}")
    numbers = keep_layers if isinstance(keep_layers, list) else [keep_layers]
    if not all(type(k) is int for k in numbers):
        raise ConfigError(f"keep_layers is {keep_layers!r}; give a number, or a list of layers from 1 on")
    if method == "influence" and isinstance(keep_layers, list):
        raise ConfigError("method influence chooses the layers, and keep_layers names them: give a number there")
    if method != "influence":
        if rows is not None:
            raise ConfigError(f"rows of data are for method influence, not for {method}; remove them")
        return None
    if limit < 1:
        raise ConfigError(f"limit is {limit}; measure on at least 1 row")
    if rows is None:
        raise ConfigError("influence is measured on rows of data: give --config FILE, or --data FILE --reader NAME")
    try:
        return rows if isinstance(rows, DataConfig) else DataConfig(**rows)
    except ValidationError as error:
        raise ConfigError(explain(error, DataConfig, "data.")) from None


def _require_free(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; choose another folder")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out {out} is not empty; choose another folder, or delete it")


def _require_room(folder: Path, out: Path, names: list[str]) -> None:
    """Raise ConfigError where the disk is too full; the share of tensors that stay tells about the share of bytes."""
    weights = read_weights(folder)
    stay = sum(math.prod(weights.tensors[name][1]) for name in names)
    need = int(weights.bytes * stay / max(1, weights.parameters))
    free = shutil.disk_usage(out).free
    if free < need:
        raise ConfigError(f"the copy needs {format_size(need)}, {out.parent} has {format_size(free)} free; make room")


def _record(name: str, folder: Path, config, kept: list[int], method: str, influence: Influence | None) -> dict:
    student = shrunk_targets(len(kept))
    return {
        "format": FORMAT,
        "source": {
            "name": name,
            "path": str(folder.resolve()),
            "digest": checkpoint_digest(folder),
            "model_type": config.model_type,
            "decoder_layers": config.get_text_config().num_hidden_layers,
        },
        "kept_layers": kept,
        "method": method,
        "influence": asdict(influence) if influence else None,
        "target_layers": {"student": student, "teacher": [kept[k - 1] for k in student]},
        "versions": versions(),
        "commit": code_commit(),
    }


def _prove(out: Path, config, kept: list[int]) -> None:
    """Raise RuntimeError unless stock code sees the copy as it should be: depth, kind of each layer, every tensor."""
    copy = AutoConfig.from_pretrained(out)
    here, there = copy.get_text_config(), config.get_text_config()
    kinds = getattr(there, "layer_types", None)
    if here.num_hidden_layers != len(kept) or (kinds and here.layer_types != [kinds[k - 1] for k in kept]):
        raise RuntimeError(f"{out}/config.json does not describe the layers {kept}; please report it with that file")
    stored_names(out, empty_model(copy))
