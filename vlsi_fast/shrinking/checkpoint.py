"""Write a checkpoint with fewer decoder layers: tensors are copied as bytes, so any dtype stays as it is, and no model
is ever in memory.

Which stored tensors belong to which decoder layer is asked of the stock class and the family's adapter, by way of
transformers' own table of older names; a vision block cannot be taken for a decoder layer.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..backbones import family_of
from ..config_files import ConfigError
from ..ranks.shard_loading import stored_names
from ..weights import INDEX_NAME, read_weights

BLOCK_BYTES = 2**24
FLOATS = ("F64", "F32", "F16", "BF16")
QUANTISATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
NOT_COPIED = re.compile(
    r"config\.json|README\.md|vlsi_.*\.json|trainer_state\.json|"
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|index\.json|partial)"
)
"""Written anew, weights in any format, and what tells of another model's making."""


# ---- the config ----


def require_plain(folder: Path, fields: dict[str, Any]) -> None:
    """Raise ConfigError where a checkpoint is quantised: scales and packed weights belong to the whole model."""
    named = [part for part in (fields, fields.get("text_config")) if isinstance(part, dict)]
    keys = {"quantization_config", "compression_config"}
    if any(part.get(key) for part in named for key in keys) or any((folder / n).is_file() for n in QUANTISATION_FILES):
        raise ConfigError(f"{folder} is quantised; shrink the model that it was quantised from, then quantise the copy")


def shrunk_fields(fields: dict[str, Any], text, kept: list[int]) -> dict[str, Any]:
    """`config.json` of a copy with the layers `kept`: depth, and every list of the language model that has an entry a
    layer.

    Args:
        fields: the checkpoint's `config.json`; the language model's part is in `text_config`, in older ones flat.
        text: transformers text config of it.
        kept: layers, from 1.

    Raises:
        ConfigError: a list of layers that cannot be cut.
    """
    fields, depth = copy.deepcopy(fields), text.num_hidden_layers
    parts = [fields["text_config"]] if isinstance(fields.get("text_config"), dict) else [fields]
    if parts[0] is not fields and "num_hidden_layers" in fields:
        parts.append(fields)  # some versions wrote both
    for part in parts:
        for name, value in part.items():
            if "layer" not in name or "vision" in name or not isinstance(value, list) or not value:
                continue
            if len(value) != depth:
                raise ConfigError(
                    f"config.json: {name} has {len(value)} entries for {depth} layers, so it cannot be cut. If nothing "
                    "reads it, remove it there"
                )
            part[name] = [value[k - 1] for k in kept]
        part["num_hidden_layers"] = len(kept)
        kinds = getattr(text, "layer_types", None)
        if kinds and len(set(kinds)) > 1:  # where a file names none, the class counts anew (Gemma 3: every sixth)
            part["layer_types"] = [kinds[k - 1] for k in kept]
        window = getattr(text, "max_window_layers", None)  # layers deeper than so many slide their window
        if window is not None and window <= depth:
            part["max_window_layers"] = sum(k <= window for k in kept)
    return fields


# ---- the weights ----


NUMBER = re.compile(r"(?<=\blayers\.)\d+(?=\.)")
"""Of the layer, in a stored name."""


def layer_tensors(folder: Path, model: nn.Module) -> dict[str, tuple[Path, int | None]]:
    """Stored tensors: name -> its file, and the decoder layer that it belongs to, from 1; None for all others.

    Args:
        folder: checkpoint.
        model: its `ranks.shard_loading.empty_model`.

    Raises:
        ConfigError: the checkpoint is damaged, or quantised.
        ValueError: it is not whole, or a tensor's name does not tell its layer.
    """
    weights = read_weights(folder)
    if weights.problems:
        raise ConfigError(f"{weights.problems[0]}; download the checkpoint again")
    layers = family_of(model.config).decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    inside = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    found: dict[str, tuple[Path, int | None]] = {}
    for key, (file, names) in stored_names(folder, model).items():
        at = {int(match[1]) for name in names if (match := inside.match(name))}
        if at and weights.tensors[key][0] not in FLOATS:
            dtype = weights.tensors[key][0]
            raise ConfigError(f"{folder}: {key} is {dtype}, quantised; shrink the model that it was quantised from")
        if at and [int(number) for number in NUMBER.findall(key)] != list(at):
            raise ValueError(f"{folder}: {key} belongs to decoder layer {min(at) + 1}, which its name does not tell")
        found[key] = (file, min(at) + 1 if at else None)
    return found


def write_weights(out: Path, tensors: dict[str, tuple[Path, int | None]], kept_layers: list[int]) -> tuple[int, int]:
    """Copy the tensors of the layers kept and of no layer, a file for each file of the checkpoint, with an index where
    there are several.

    Args:
        out: folder to write into.
        tensors: `layer_tensors`.
        kept_layers: from 1; they are numbered anew.

    Returns:
        Numbers stored, and their bytes.
    """
    kept: dict[Path, dict[str, str]] = {}
    for key, (file, layer) in tensors.items():
        if layer is None:
            kept.setdefault(file, {})[key] = key
        elif layer in kept_layers:
            kept.setdefault(file, {})[key] = NUMBER.sub(str(kept_layers.index(layer)), key)
    kept = dict(sorted(kept.items()))
    total, numbers, places = 0, 0, {}
    for i, (file, renamed) in enumerate(tqdm(kept.items(), desc="weights", disable=len(kept) == 1, leave=False)):
        name = "model.safetensors" if len(kept) == 1 else f"model-{i + 1:05}-of-{len(kept):05}.safetensors"
        size, count = copy_tensors(file, out / name, renamed)
        total, numbers = total + size, numbers + count
        places |= dict.fromkeys(renamed.values(), name)
    if len(kept) > 1:
        metadata = {"total_parameters": numbers, "total_size": total}
        index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
        (out / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return numbers, total


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's table of tensors, and where their bytes begin."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length)), 8 + length


def copy_tensors(source: Path, target: Path, renamed: dict[str, str]) -> tuple[int, int]:
    """Write a safetensors file with some of another's tensors, in the same order.

    The bytes go through a small buffer: the library's writer would hold the whole file in memory.

    Args:
        source: file to read.
        target: file to write.
        renamed: name there -> name here.

    Returns:
        Bytes of the tensors, and how many numbers they hold.
    """
    table, begin = read_header(source)
    order = sorted(renamed, key=lambda name: table[name]["data_offsets"])
    header = {"__metadata__": {"format": "pt"} | table.get("__metadata__", {})}
    at = count = 0
    for name in order:
        first, last = table[name]["data_offsets"]
        header[renamed[name]] = table[name] | {"data_offsets": [at, at + last - first]}
        at, count = at + last - first, count + math.prod(table[name]["shape"])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants tensors aligned to 8 bytes
    with source.open("rb") as read, target.open("wb") as write:
        write.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            first, last = table[name]["data_offsets"]
            read.seek(begin + first)
            _copy_bytes(read, write, last - first)
    return at, count


def _copy_bytes(read, write, count: int) -> None:
    while count:
        block = read.read(min(count, BLOCK_BYTES))
        if not block:
            raise ValueError(f"{read.name} is cut off; download the checkpoint again")
        write.write(block)
        count -= len(block)


# ---- what else is in the folder ----


def copy_rest(folder: Path, out: Path) -> None:
    """Tokenizer, processor, chat templates, generation config, licence: every visible file that is not written anew."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not NOT_COPIED.fullmatch(file.name):
            shutil.copyfile(file, out / file.name)
    templates = folder / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, out / templates.name)


def write_card(folder: Path, out: Path, title: str, what: str, base: str | None) -> None:
    """A short model card with the licence of the source's own, whose other words are of another model."""
    from huggingface_hub import ModelCard, ModelCardData

    from ..export.card import license_of

    data = ModelCardData(
        **license_of(folder),
        base_model=base,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["vlsi-fast", "vision-language"],
    )
    text = (
        f"# {title}\n\n{what[0].upper()}{what[1:]}, written by `vlsi-fast shrink` ([what it did](vlsi_shrink.json)). "
        "Nothing has been trained since: it is a start for distillation, not a model to use.\n"
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(out / "README.md")
