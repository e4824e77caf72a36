"""`TrainingArguments` of a stage from the run's config, and the start of DeepSpeed."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..config import ConfigError, RunConfig, TrainingConfig
from ..named_files import read_deepspeed
from ..ranks.secondary import KEY, ranks_per_node, require_same_nodes, resolved
from ..ranks.sharding import gathered_objects
from ..terminal import say

DEEPSPEED_FLOOR = "0.19.2"
"""The first that casts parameters alone; as in pyproject.toml."""


def launched() -> bool:
    """Whether a launcher (deepspeed, torchrun, ..) started this process."""
    return "LOCAL_RANK" in os.environ


def training_arguments(config: RunConfig, stage: str) -> TrainingArguments:
    """`TrainingArguments` of one stage. Made before any model, since it switches ZeRO-3 loading on.

    Raises:
        ConfigError: DeepSpeed asked for but not installed or not readable, or its hpZ does not fit the machines.
    """
    t = config.stage_training(stage)
    deepspeed = read_deepspeed(t.deepspeed)
    _require_trackers(t.report_to)
    if deepspeed is not None and not launched():
        say("no launcher, so training.deepspeed is not used (start with `deepspeed` or `torchrun`)")
        deepspeed = None
    if deepspeed is not None:
        _require_deepspeed()
        deepspeed = resolved(deepspeed, int(os.environ.get("WORLD_SIZE", 1)), ranks_per_node())
    schedule, schedule_kwargs = t.lr_scheduler_type, {}
    if schedule == "cosine":
        schedule, schedule_kwargs = "cosine_with_min_lr", {"min_lr_rate": t.min_learning_rate / t.learning_rate}
    elif schedule == "constant" and t.warmup_steps:
        schedule = "constant_with_warmup"
    on_cpu = not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu"
    arguments = {
        **t.model_dump(
            include={
                "learning_rate",
                "warmup_steps",
                "num_train_epochs",
                "max_steps",
                "per_device_train_batch_size",
                "gradient_accumulation_steps",
                "weight_decay",
                "adam_beta2",
                "max_grad_norm",
                "optim",
                "logging_steps",
                "save_steps",
            }
        ),
        **_loading_arguments(config.data.num_workers),
        "lr_scheduler_type": schedule,
        "lr_scheduler_kwargs": schedule_kwargs,
        "report_to": t.report_to or "none",
        "output_dir": str(config.stage_dir(stage)),
        "deepspeed": deepspeed,
        "seed": config.seed,
        "bf16": config.dtype == "bfloat16",
        "use_cpu": on_cpu,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "disable_tqdm": False,
        "ddp_find_unused_parameters": False,
        **_evaluation_arguments(t, stage),
        **t.extra,
    }
    arguments["run_name"] = f"{run_group(config, stage)}-{stage}"
    if deepspeed is None:  # an earlier stage of this process may have used it
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        unset_hf_deepspeed_config()
    args = TrainingArguments(**arguments)
    _ = args.device  # starts the process group
    if deepspeed is not None:
        _start_deepspeed(on_cpu)
        if KEY in read_deepspeed(t.deepspeed).get("zero_optimization", {}):
            require_same_nodes(gathered_objects(ranks_per_node()))
    if not launched():
        args._n_gpu = 1  # one process, one GPU: the Trainer would wrap several in DataParallel
    return args


def _require_deepspeed() -> None:
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError("training.deepspeed is set but deepspeed is not installed: pip install deepspeed") from None
    if Version(found) < Version(DEEPSPEED_FLOOR):
        raise ConfigError(
            f"deepspeed {found} rounds a model's buffers to bfloat16, its rotary frequencies among them, and positions "
            f"beyond a few hundred tokens are lost: pip install 'deepspeed>={DEEPSPEED_FLOOR}'"
        )


def _require_trackers(names: list[str]) -> None:
    """The Trainer would miss a tracker's package only after the models are loaded."""
    from transformers.integrations import get_available_reporting_integrations

    missing = [name for name in names if name not in (*get_available_reporting_integrations(), "all", "none")]
    if missing:
        raise ConfigError(
            f"training.report_to: the package of {', '.join(missing)} is not installed; pip install it, or remove it"
        )


def _loading_arguments(workers: int) -> dict[str, Any]:
    """Fields of TrainingArguments that let batches be made while the device computes.

    Copies to the device do not block: a blocking one would wait for all work queued before it, and count as data wait.
    """
    arguments = {"dataloader_num_workers": workers, "accelerator_config": {"non_blocking": True}}
    if workers:  # both are errors without workers
        arguments |= {"dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2}
    return arguments


def _evaluation_arguments(training: TrainingConfig, stage: str) -> dict[str, Any]:
    """The best checkpoint is not the Trainer's matter: it would save one only at a multiple of eval_steps, and load it
    also where a run has to leave before its end."""
    if training.eval_steps is None:
        return {}
    if stage == "verbalize" and training.metric_for_best_model == "exact_match":
        raise ConfigError(
            "training.metric_for_best_model exact_match is of a model's own answers, which stage verbalize does not "
            "train: set verbalize.training.metric_for_best_model to loss"
        )
    return {
        "eval_strategy": "steps",
        "eval_steps": training.eval_steps,
        "metric_for_best_model": training.metric_for_best_model,
        "greater_is_better": training.greater_is_better,
        # for the patience that is left
        "restore_callback_states_from_checkpoint": training.early_stopping_patience is not None,
    }


def run_group(config: RunConfig, stage: str) -> str:
    """What trackers call the whole run: `training.extra.run_name`, or the name of its folder."""
    return config.stage_training(stage).extra.get("run_name") or Path(config.output_dir).absolute().name


def _start_deepspeed(on_cpu: bool) -> None:
    """Hand torch's process group to DeepSpeed: without it, loading under ZeRO-3 would count one rank."""
    import deepspeed

    if deepspeed.comm.is_initialized():
        return
    if on_cpu:
        # An all-reduce for inference that training never calls, but that needs a C++ compiler and minutes to build.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
