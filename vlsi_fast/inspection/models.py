"""Look into stock checkpoints, exports, adapters and verbalizers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..lineage import RECORD_NAME
from ..shrinking.record import SHRINK_NAME, describe, read_shrink_record
from ..weights import VERBALIZER_CONFIG, VERBALIZER_WEIGHTS, Weights, read_weights
from .looking import folder_bytes, parent, problem, read_json

PARTS = {  # the first that fits; checkpoints of older transformers name the same parts otherwise
    "vision": re.compile(r"visual|vision|image_newline|multi_modal_projector|\.connector\."),
    "head": re.compile(r"lm_head"),
    "embeddings": re.compile(r"embed_tokens"),
    "decoder": re.compile(r""),
}
LAYER = re.compile(r"(?:language_model|text_model|model)\.layers\.(\d+)\.")
EXPORT_RECORD = "vlsi_export.json"


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """A stock checkpoint, or an export."""
    copy = "copy the folder again, whole"
    problems: list[dict[str, str]] = []
    record = read_json(folder.parent / RECORD_NAME, [], copy)
    if record:
        copy = f"delete {folder.parent} and run --stage {record.get('stage')} again, or restore it from a copy"
    config = read_json(folder / "config.json", problems, copy)
    text = config.get("text_config") or config
    weights = read_weights(folder)
    problems += [problem(said, copy) for said in weights.problems]
    depth, found = text.get("num_hidden_layers"), _depth(weights)
    if depth and found and not weights.problems and found != depth:
        problems.append(problem(f"{folder} holds {found} decoder layers, its config says {depth}", copy))
    problems += _processor_problems(folder)
    exported = read_json(folder / EXPORT_RECORD, problems, copy) if (folder / EXPORT_RECORD).is_file() else {}
    facts = {
        "kind": "export" if exported else "checkpoint",
        "path": str(folder),
        "model": (config.get("architectures") or ["unknown"])[0],
        "decoder_layers": depth,
        "width": text.get("hidden_size"),
        "vocabulary": text.get("vocab_size"),
        "tied_head": config.get("tie_word_embeddings", text.get("tie_word_embeddings")),
        **_weight_facts(weights, folder),
        "parts": _parts(weights),
    }
    if record:
        facts["made_by"] = f"stage {record.get('stage')} of {folder.parent.parent} ({record.get('state')})"
    if (folder / SHRINK_NAME).is_file():
        shrunk = read_shrink_record(folder)
        source = shrunk["source"]
        facts["shrunk_copy_of"] = f"{describe(shrunk)} (method {shrunk['method']})"
        facts["parents"] = [parent("source of the shrunk copy", source["path"], source["digest"])]
    if exported:
        maker = exported.get("made_by", {})
        facts["made_by"] = {key: exported.get(key) for key in ("stage", "stages", "adapter_merged")}
        facts |= {"versions": maker.get("versions"), "commit": maker.get("commit")}
        facts["parents"] = [
            {"role": role, "digest": fact["checkpoint"][:12], "target layers": fact["layers"]}
            for role, fact in exported.get("parents", {}).items()
        ]
        card = folder / "README.md"
        open_places = card.read_text().count("to be filled in") if card.is_file() else 0
        facts["model_card"] = f"{open_places} places to fill in" if card.is_file() else "missing"
    return facts | {"problems": problems}


def _depth(weights: Weights) -> int:
    names = (name for name in weights.tensors if not PARTS["vision"].search(name))
    return len({found[1] for name in names if (found := LAYER.search(name))})


def _parts(weights: Weights) -> dict[str, int]:
    """Parameters of each part of the model."""
    counts = dict.fromkeys(PARTS, 0)
    for name, (_, shape) in weights.tensors.items():
        part = next(part for part, pattern in PARTS.items() if pattern.search(name))
        size = 1
        for length in shape:
            size *= length
        counts[part] += size
    return {part: count for part, count in counts.items() if count}


def _weight_facts(weights: Weights, folder: Path) -> dict[str, Any]:
    return {
        "parameters": weights.parameters,
        "tensors": len(weights.tensors),
        "dtype": ", ".join(weights.dtypes),
        "files": weights.files,
        "bytes": folder_bytes(folder),
    }


def _processor_problems(folder: Path) -> list[dict[str, str]]:
    """What `AutoProcessor` would miss."""
    names = {file.name for file in folder.iterdir()}
    wanted = {
        "tokenizer": {"tokenizer.json", "vocab.json"},
        "image processor": {"processor_config.json", "preprocessor_config.json"},
    }
    return [
        problem(f"{folder} has no {what} ({' or '.join(sorted(files))})", "copy it from the model that it comes from")
        for what, files in wanted.items()
        if not files & names
    ]


def inspect_adapter(folder: Path) -> dict[str, Any]:
    """A LoRA in peft's format."""
    again = "restore it from a copy, or run the stage that made it again"
    problems: list[dict[str, str]] = []
    config = read_json(folder / "adapter_config.json", problems, again)
    weights = read_weights(folder)
    problems += [problem(said, again) for said in weights.problems]
    base = config.get("base_model_name_or_path")
    facts = {
        "kind": "adapter",
        "path": str(folder),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "target_modules": config.get("target_modules"),
        "base": base,
        "base_now": "there" if base and Path(base).is_dir() else "not found from here (a Hub name, or moved)",
        **_weight_facts(weights, folder),
    }
    if (folder.parent / RECORD_NAME).is_file():
        facts["merge"] = f"vlsi-fast export --run {folder.parent.parent} --stage {folder.parent.name} --out FOLDER"
    return facts | {"problems": problems}


def inspect_verbalizers(folder: Path) -> dict[str, Any]:
    """The verbalizers of one model."""
    again = "run --stage verbalize again, or restore the folder from a copy"
    problems: list[dict[str, str]] = []
    spec = read_json(folder / VERBALIZER_CONFIG, problems, again)
    weights = read_weights(folder)
    problems += [problem(said, again) for said in weights.problems]
    layers = spec.get("layers") or []
    stored = {int(name.split(".")[1]) for name in weights.tensors if name.startswith("layers.")}
    if spec and not weights.problems and stored != set(layers):
        said = f"{folder / VERBALIZER_WEIGHTS} has layers {sorted(stored)}, {VERBALIZER_CONFIG} says {layers}"
        problems.append(problem(said, again))
    made_for = spec.get("made_for") or {}
    language, student = "its own", made_for.get("student", {}).get("checkpoint") or "unknown"
    if spec.get("translates"):
        language = f"the student's (checkpoint {student[:12]}), width {spec.get('output_size')}"
    return {
        "kind": "verbalizers",
        "path": str(folder),
        "architecture": spec.get("architecture"),
        "norm": spec.get("norm"),
        "residual": spec.get("residual"),
        "objective": made_for.get("objective", "answers"),
        "layers": layers,
        "width": spec.get("hidden_size"),
        "language": language,
        **_weight_facts(weights, folder),
        "parents": [parent("model", made_for.get("path"), made_for.get("checkpoint"))] if made_for else [],
        "problems": problems,
    }
