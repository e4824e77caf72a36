"""Load a stock checkpoint under ZeRO-3 tensor by tensor: no rank ever holds the whole model.

transformers' own `from_pretrained` gathers the merged checkpoint first: all of it is resident on rank 0 until the last
tensor is placed (as mapped pages, or as plain memory on file systems without mmap), and 5.17 in bfloat16 rounds the
rotary frequencies. Here the model is built partitioned, and rank 0 reads one tensor at a time, which is scattered
before the next one is read. Names are converted by transformers' own tables, so that checkpoints with older names
(Qwen2-VL's on the Hub) load as they do there. `tests/test_shard_loading.py` measures it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..backbones import family_of
from .secondary import partitioned_init
from .sharding import gathered, rank, world_size


def load_sharded(
    folder: str | Path, config, full_config, dtype: torch.dtype, attn_implementation: str, zero: dict[str, Any]
) -> nn.Module:
    """A stock model, partitioned over the ranks. Collective.

    Args:
        folder: checkpoint.
        config: transformers config of the model to build; it may have fewer decoder layers than the checkpoint.
        full_config: the checkpoint's own config. What only the whole model has is never read.
        dtype: of the weights.
        attn_implementation: attention, by its transformers name.
        zero: DeepSpeed config with ZeRO stage 3.

    Raises:
        ValueError: tensors that are missing, unknown, or of another shape; on every rank alike.
    """
    config.name_or_path = str(folder)
    with _partitioning(zero):
        model = model_class(config)._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    model.tie_weights()
    _gather_experts_together(model)
    whole = empty_model(full_config)
    targets = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    groups = _groups(folder, whole)
    _check_names(folder, groups, whole, {name: targets[name] for name in model.state_dict()})
    written: dict[int, str] = {}
    untied = []
    for group in groups:
        if not any(name in targets for name in group.names):
            continue  # of a layer that was left out
        for name, value in group.convert(_read if rank() == 0 else _shape_only, whole).items():
            target = targets[name]
            first = written.setdefault(id(target), name)
            if not _place(target, value, f"{folder}: {name}", compare=first != name):
                untied.append(f"{first} and {name}")
    _require_ties(folder, untied)
    return model.eval()


def model_class(config) -> type:
    """The stock class that `AutoModelForImageTextToText` takes for a config."""
    from transformers import AutoModelForImageTextToText

    found = AutoModelForImageTextToText._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def empty_model(config) -> nn.Module:
    """The stock model without storage: names, shapes and structure. Draws no random number."""
    from transformers.initialization import no_init_weights
    from transformers.modeling_utils import set_zero3_state

    with torch.device("meta"), no_init_weights(), set_zero3_state():
        return model_class(config)._from_config(config)


def weight_files(folder: str | Path) -> list[Path]:
    """Safetensors files of a checkpoint: those of its index, or the only one.

    Raises:
        FileNotFoundError: a file is missing.
    """
    folder = Path(folder)
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{folder}: {', '.join(absent[:5])} is missing; download the checkpoint again")
    return [folder / name for name in names]


def stored_names(folder: str | Path, model: nn.Module) -> dict[str, tuple[Path, list[str]]]:
    """What a checkpoint stores: name -> its file, and the parameters of the stock model that it becomes.

    Names on disk may be those of an older transformers. Only the files' headers are read.

    Args:
        folder: checkpoint.
        model: its `empty_model`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: tensors that are missing, unknown or there twice.
    """
    model.tie_weights()
    targets = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    groups = _groups(folder, model)
    found = {key: (file, list(group.names)) for group in groups for key, _, file in group.stored}
    _check_names(folder, groups, model, {name: targets[name] for name in model.state_dict()})
    return found


def read_parameter(folder: str | Path, config, parameter: Callable[[nn.Module], Tensor]) -> Tensor:
    """One parameter of a checkpoint, in CPU memory, whatever name it is stored under; no other is read.

    Args:
        folder: checkpoint.
        config: its transformers config.
        parameter: which of the stock model's.

    Raises:
        ValueError: the checkpoint does not have it.
    """
    whole = empty_model(config)
    whole.tie_weights()
    wanted = parameter(whole)
    names = {name for name, p in whole.named_parameters(remove_duplicate=False) if p is wanted}
    for group in _groups(folder, whole):
        for name in names.intersection(group.names):
            return group.convert(_read, whole)[name]
    raise ValueError(f"{folder} lacks {' or '.join(sorted(names))}; use a whole checkpoint")


@contextlib.contextmanager
def _partitioning(zero: dict[str, Any]):
    """Modules built inside are partitioned and keep whatever their memory holds: every value is read afterwards."""
    from deepspeed.accelerator import get_accelerator
    from transformers.initialization import no_init_weights
    from transformers.modeling_utils import set_zero3_state

    original, device = torch.arange, get_accelerator().current_device_name()

    def arange(*args, **kwargs):
        """zero.Init would round it to bfloat16, and with it the rotary frequencies that are computed from it."""
        return original(*args, **kwargs | {"device": kwargs.get("device") or device})

    try:
        with no_init_weights(), set_zero3_state(), partitioned_init(zero):
            torch.arange = arange
            yield
    finally:
        torch.arange = original


def _gather_experts_together(model: nn.Module) -> None:
    """One gather for a router and all of its experts (DeepSpeed's leaf modules).

    Which expert a token goes to differs between ranks. Gathered one by one as they are called, experts would be
    collectives that some ranks never join, and the order that prefetching foresees would change in every step. The
    stock classes hold a layer's experts in two parameters, which every rank calls; with this the order would be the
    same for a class that calls them one by one, too.
    """
    sparse = family_of(model.config).sparse_block
    if sparse is not None:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, [sparse])


# ---- from stored names to parameters ----


@dataclass
class _Group:
    """Stored tensors that become parameters together: one of one, or several through a converter of transformers."""

    target: str
    converter: Any = None
    stored: list[tuple[str, str, Path]] = field(default_factory=list)
    """(stored name, pattern that it matched, file)"""
    names: list[str] = field(default_factory=list)
    """Names of the parameters."""

    def convert(self, read: Callable[[Path, str], Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Parameter name -> value, with `read` giving a stored tensor."""
        if self.converter is None:
            ((key, _, file),) = self.stored
            return {self.target: read(file, key)}
        from transformers.core_model_loading import WeightConverter

        fresh = WeightConverter(  # it collects its inputs in itself
            source_patterns=self.converter.source_patterns,
            target_patterns=self.converter.target_patterns,
            operations=self.converter.operations,
        )
        for key, pattern, file in self.stored:
            fresh.add_tensor(self.target, key, pattern, read(file, key))
        made = fresh.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _groups(folder: str | Path, whole: nn.Module) -> list[_Group]:
    """What a checkpoint's stored tensors become, in transformers' order. Only the files' headers are read."""
    from safetensors import safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    files = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as stream:
            files |= dict.fromkeys(stream.keys(), file)
    transforms = get_model_conversion_mapping(whole)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    names, groups = whole.state_dict(), {}
    for key in sorted(files, key=dot_natural_key):
        target, pattern = rename_source_key(
            key, renamings, converters, base_model_prefix=whole.base_model_prefix, meta_state_dict=names
        )
        converter = None if pattern is None else by_pattern[pattern]
        slot = target if converter is not None else (target, key)  # two stored tensors of one name: seen below
        groups.setdefault(slot, _Group(target, converter)).stored.append((key, pattern, files[key]))
    for group in groups.values():
        group.names = list(group.convert(_shape_only, whole)) if group.converter is not None else [group.target]
    return list(groups.values())


def _check_names(folder: str | Path, groups: list[_Group], whole: nn.Module, targets: dict[str, Tensor]) -> None:
    """Raise ValueError unless the checkpoint has every tensor of `targets` once and none that is unknown."""
    made = [name for group in groups for name in group.names]
    known = whole.state_dict().keys()
    ignored = [*(whole._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    unknown = [n for n in made if n not in known and not any(re.search(pattern, n) for pattern in ignored)]
    for group in groups:
        group.names = [name for name in group.names if name in known]
    there = {id(targets[name]) for name in made if name in targets}
    optional = whole._keys_to_ignore_on_load_missing or ()
    missing = [
        n for n, t in targets.items() if id(t) not in there and not any(re.search(pattern, n) for pattern in optional)
    ]
    twice = sorted({name for name in made if made.count(name) > 1}) if len(set(made)) < len(made) else []
    problems = {"missing": missing, "not known to the model": unknown, "there twice": twice}
    found = [f"{kind}: {', '.join(n[:10])}{' ..' * (len(n) > 10)} ({len(n)})" for kind, n in problems.items() if n]
    if found:
        raise ValueError(
            f"{folder} does not fit {type(whole).__name__}; tensors " + "; ".join(found) + ". Use the checkpoint that "
            "belongs to this config.json, or a transformers that knows its names"
        )


# ---- one tensor ----


def _read(file: Path, key: str) -> Tensor:
    """One stored tensor. The file is opened anew each time: an open one would keep all pages read so far mapped."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stream:
        return stream.get_tensor(key)


def _shape_only(file: Path, key: str) -> Tensor:
    """A stored tensor's shape, for ranks that only take part."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stream:
        return torch.empty(stream.get_slice(key).get_shape(), device="meta")


@torch.no_grad()
def _place(target: Tensor, value: Tensor, name: str, compare: bool) -> bool:
    """Write rank 0's `value` into a parameter or buffer, or only `compare`: False where they differ. Collective."""
    shape = tuple(getattr(target, "ds_shape", target.shape))
    if shape != tuple(value.shape):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, its config.json asks for {shape}")
    with gathered([target], writer=None if compare else 0):
        if compare:
            return rank() != 0 or torch.equal(target, value.to(target))
        if rank() == 0:
            target.copy_(value)
        if not hasattr(target, "ds_id") and world_size() > 1:
            dist.broadcast(target.data, 0)
    return True


def _require_ties(folder: str | Path, untied: list[str]) -> None:
    """Raise on every rank where rank 0 found two values for one weight."""
    told = [untied]
    if world_size() > 1:
        dist.broadcast_object_list(told, 0)
    if told[0]:
        raise ValueError(
            f"{folder}: config.json ties {'; '.join(told[0])}, but they differ; set tie_word_embeddings to false there"
        )
