"""How the frozen teacher is held (`teacher.mode`). The loss is the same in all modes but int8 and nf4.

| mode       | where the weights are                     | bytes a parameter and rank (bfloat16, R ranks) |
|------------|-------------------------------------------|------------------------------------------------|
| zero3      | sharded over the ranks' devices           | 2 / R on the device                            |
| replicated | whole on every rank's device              | 2 on the device                                |
| offload    | CPU memory, layers gathered when they run | 2 / R in CPU memory (2 without DeepSpeed)      |
| int8       | whole on every rank's GPU (bitsandbytes)  | about 1 on the device                          |
| nf4        | whole on every rank's GPU (bitsandbytes)  | about 0.52 on the device                       |
| cached     | nowhere: what it said is on disk          | 0 in interact; elsewhere as auto               |

In zero3 the teacher is part of the module that the training engine wraps, which gathers its layers as it does the
student's. In all other modes it is held outside the module tree (`Held`): DeepSpeed would partition it, DDP would
broadcast it, and checkpoints would look at it. Its verbalizers stay in the tree, where they are trained. In stage
interact a teacher that runs once for several micro-batches (`teacher.window`) is outside the tree in zero3 too.

A teacher whose layers speak the student's language (`verbalizer.language`) is heard through the student's head. Its own
is let go of as soon as it is loaded, in all modes; a tied one stays, as the embedding.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .backbones import family_of
from .config import QUANTIZED, ConfigError
from .hidden_states import Held, VerbalizedBackbone
from .loading import load_backbone
from .ranks.shard_loading import empty_model
from .ranks.sharding import gathered, unsharded

OTHERS = "zero3 (sharded over the ranks), replicated, or offload (CPU memory)"


def resolve_mode(mode: str, device: torch.device) -> str:
    """The mode that a run uses, checked before anything is loaded.

    Raises:
        ConfigError: the mode cannot work here; names the fix.
    """
    mode = mode_under(mode, is_deepspeed_zero3_enabled())
    if mode in QUANTIZED:
        if device.type != "cuda":
            raise ConfigError(f"teacher.mode {mode} needs an NVIDIA GPU, this run is on {device.type}; use {OTHERS}")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"teacher.mode {mode} needs bitsandbytes, which is not installed: pip install bitsandbytes, or use "
                f"{OTHERS}"
            )
    return mode


def mode_under(mode: str, zero3: bool) -> str:
    """`teacher.mode` with auto resolved, for a run with or without ZeRO-3. Raises ConfigError: zero3 without it."""
    if mode in ("auto", "cached"):  # cached: where the teacher runs all the same, to be verbalized or to fill the cache
        return "zero3" if zero3 else "replicated"
    if mode == "zero3" and not zero3:
        raise ConfigError(
            "teacher.mode is zero3, but this stage does not train with ZeRO-3: set training.deepspeed to a ZeRO stage "
            "3 config (configs/zero3.json) and start with `deepspeed`, or teacher.mode to auto, replicated or offload"
        )
    return mode


def load_teacher(
    folder: Path,
    mode: str,
    dtype: str,
    attn_implementation: str,
    depth: int | None,
    args: TrainingArguments,
    has_head: bool = True,
) -> nn.Module | Held:
    """The teacher, placed as `mode` says. Collective.

    Args:
        folder: its checkpoint.
        mode: from `resolve_mode`.
        dtype: of the weights, by torch's name.
        attn_implementation: by its transformers name.
        depth: decoder layers that are needed; None: all.
        args: of the stage; its device and DeepSpeed config.
        has_head: whether losses read its language head; False: the head has no weight.

    Returns:
        A module to be made part of the stage's, or one that is held outside of it.
    """
    load = partial(_load, has_head, folder, dtype, attn_implementation, depth)
    if mode == "zero3":
        return load()
    if mode == "offload" and args.deepspeed is not None:
        return _offloaded_by_deepspeed(load, dtype, args)
    options: dict[str, Any] = {}
    if mode != "offload" and args.device.type == "cuda":
        options["device_map"] = {"": args.device}  # tensor by tensor to where it stays
    if mode in QUANTIZED:
        options["quantization_config"] = quantization(folder, mode)
    with unsharded():
        model = load(**options)
    if mode == "offload":
        return _offloaded_by_accelerate(model, args.device)
    return held(model)


def _load(has_head: bool, *arguments: Any, **options: Any) -> nn.Module:
    """`load_backbone`, without the head where nothing reads it."""
    model = load_backbone(*arguments, **options)
    if not has_head:
        drop_head(model)
    return model


def drop_head(model: nn.Module) -> None:
    """Let go of a stock model's head weight, in place; the embedding that it may be tied to stays."""
    family_of(model.config).head(model).register_parameter("weight", None)


def held(model: nn.Module) -> Held:
    """A whole model, outside the module tree."""
    family = family_of(model.config)
    return Held(model, _runner(model), family.final_norm(model), family.head(model).weight)


def _runner(model: nn.Module):
    backbone = family_of(model.config).backbone(model)
    return lambda inputs: backbone(**inputs, use_cache=False).last_hidden_state


# ---- int8, nf4 ----


def quantization(folder: Path, mode: str):
    """`BitsAndBytesConfig` of int8 or nf4 for a checkpoint. Head, vision tower and final norm stay as they are: the
    vocabulary operators read the head's weight, and images are where quantisation costs most."""
    from transformers import AutoConfig, BitsAndBytesConfig

    model = empty_model(AutoConfig.from_pretrained(folder))
    family = family_of(model.config)
    kept = [family.head(model), family.final_norm(model), *family.vision(model)]
    names = [name for name, module in model.named_modules() if any(module is part for part in kept)]
    if mode == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=names)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=names,
    )


# ---- out of the module tree (teacher.window) ----


def run_apart(teacher: VerbalizedBackbone, dtype: str, args: TrainingArguments) -> tuple[Callable, Callable[[], None]]:
    """What runs a teacher between the forwards of the training engine, and what gives its memory back. Collective.

    ZeRO-3 foresees which module comes next from the order in the micro-batch before. A teacher that runs once for
    several micro-batches would break that order, and nothing could be gathered ahead. So its backbone and verbalizers,
    where they are sharded, get an engine of their own, as in offload. The teacher must be no part of the module tree.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in teacher.parameters()):
        return teacher.__call__, lambda: None
    import deepspeed

    engine = deepspeed.initialize(model=teacher, config=inference_config(args.hf_deepspeed_config.config, dtype))[0]
    engine.eval()
    return engine.__call__, engine.destroy


# ---- offload ----


class _Runner(nn.Module):
    """The root of the teacher's own engine: ZeRO-3 counts a step from one forward of the root to the next."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: dict) -> torch.Tensor:
        """Processor tensors -> last hidden state [B, T, d]."""
        return _runner(self.model)(inputs)


def inference_config(deepspeed: dict[str, Any], dtype: str) -> dict[str, Any]:
    """DeepSpeed config of a teacher's own engine: ZeRO-3 for inference.

    Args:
        deepspeed: the run's own config; its numbers for gathering are kept.
        dtype: of the teacher.
    """
    kept = (
        "stage3_prefetch_bucket_size",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_param_persistence_threshold",
        "overlap_comm",
    )
    theirs = {name: deepspeed.get("zero_optimization", {}).get(name, "auto") for name in kept}
    return {
        "zero_optimization": {
            "stage": 3,
            **{name: value for name, value in theirs.items() if value != "auto"},
        },
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "train_micro_batch_size_per_gpu": 1,  # not used by an engine without optimizer, but asked for
        "steps_per_print": 1_000_000_000,
    }


def offload_config(deepspeed: dict[str, Any], dtype: str, pin_memory: bool) -> dict[str, Any]:
    """`inference_config` with shards in CPU memory; `pin_memory`: page-locked, for asynchronous copies to a GPU."""
    config = inference_config(deepspeed, dtype)
    config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": pin_memory}
    return config


def _offloaded_by_deepspeed(load: Callable[..., nn.Module], dtype: str, args: TrainingArguments) -> Held:
    """An inference-only engine of the teacher's own, as reference models of preference training are held."""
    import deepspeed

    config = offload_config(args.hf_deepspeed_config.config, dtype, args.device.type == "cuda")
    model = load(zero=config)
    engine = deepspeed.initialize(model=_Runner(model), config=config)[0]
    engine.eval()
    family = family_of(model.config)
    return Held(model, engine, _norm_apart(model, args.device), family.head(model).weight, engine.destroy)


def _offloaded_by_accelerate(model: nn.Module, device: torch.device) -> Held:
    """The whole model in this process's CPU memory; each layer visits the device while it runs.

    Final norm and head, if it has one, stay on the device: the losses read them outside of the modules' forward.
    """
    from accelerate import cpu_offload

    family = family_of(model.config)
    norm, head = _norm_apart(model, device), family.head(model).weight
    if head is not None:
        head = nn.Parameter(head.detach().to(device), requires_grad=False)
    cpu_offload(family.backbone(model), execution_device=device)
    return Held(model, _runner(model), norm, head)


def _norm_apart(model: nn.Module, device: torch.device) -> nn.Module:
    """A plain copy of the final norm: verbalizers' gradients flow through it long after its shards were released."""
    family = family_of(model.config)
    norm = copy.deepcopy(family.final_norm(empty_model(model.config))).to_empty(device=device)
    for target, source in zip(norm.parameters(), family.final_norm(model).parameters(), strict=True):
        with gathered([source]):
            target.data = source.detach().to(device, copy=True)
    return norm.requires_grad_(False).eval()
