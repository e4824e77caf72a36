"""Continue a run with another number of ranks.

A step of the optimizer must go on meaning the same rows, so micro-batch x accumulation x ranks stays what it was. The
optimizer's state is another matter: ZeRO-3 stores each rank's part, which DeepSpeed's universal checkpoint joins to
whole tensors that any number of ranks can read. Without DeepSpeed every checkpoint is whole already.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .lineage import LineageError, last_checkpoint, read_record
from .sharding import barrier, rank, world_size

UNIVERSAL_MARK = "latest_universal"
"""DeepSpeed's file beside a conversion that is complete; it holds the conversion's name."""


def rows_per_step(training: Any, ranks: int) -> int:
    """Rows of one optimizer step over all ranks."""
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * ranks


def require_same_batch(folder: Path, stage: str, training: Any) -> None:
    """Refuse to continue the stage in `folder` with another number of rows a step.

    Raises:
        LineageError: names the accumulation that fits, or says that none does.
    """
    record = read_record(folder)
    there = record["identity"].get("rows_per_step") if record else None
    now = rows_per_step(training, world_size())
    if there in (None, now):
        return
    unit = training.per_device_train_batch_size * world_size()
    if there % unit == 0:
        name = "training.gradient_accumulation_steps"
        fix = f"set --{name} {there // unit} (--{stage}.{name} where that stage has its own)"
    else:
        fix = f"choose ranks and training.per_device_train_batch_size whose product divides {there}"
    raise LineageError(
        f"{folder} holds another run: there {there} rows an optimizer step, now {now} "
        f"({training.per_device_train_batch_size} a micro-batch x {training.gradient_accumulation_steps} accumulated "
        f"x {world_size()} ranks). To continue it on {world_size()} ranks, {fix}; otherwise choose another output_dir"
    )


def drop_incomplete(folder: Path) -> None:
    """Delete checkpoints that were being written when a run died: their files, one a rank, would stay among those of
    a new checkpoint of the same step that fewer ranks write. Rank 0's work."""
    kept = last_checkpoint(folder)
    last = int(kept.rsplit("-", 1)[1]) if kept else -1
    for found in folder.glob("checkpoint-*"):
        if int(found.name.rsplit("-", 1)[1]) > last:
            shutil.rmtree(found)


def require_same_engine(checkpoint: str, deepspeed: bool) -> None:
    """Raise LineageError where DeepSpeed wrote a checkpoint and does not read it, or the other way round."""
    written = bool(list(Path(checkpoint).glob("global_step*")))
    if written and not deepspeed:
        raise LineageError(
            f"{checkpoint} was written under DeepSpeed: continue with the deepspeed launcher and training.deepspeed "
            "(one rank: deepspeed --num_gpus 1 ..)"
        )
    if deepspeed and not written:
        raise LineageError(
            f"{checkpoint} was written without DeepSpeed: continue with training.deepspeed null, or without a launcher"
        )


@contextlib.contextmanager
def universal_where_needed(engine, checkpoint: str):
    """Inside, DeepSpeed's `engine` loads `checkpoint` whatever number of ranks wrote it. Collective.

    Raises:
        LineageError: written by another number of ranks, and of a kind that DeepSpeed cannot convert.
    """
    (source,) = (p for p in Path(checkpoint).glob("global_step*") if not p.name.endswith("_universal"))
    writers = len(list(source.glob("*_optim_states.pt")))
    if writers == world_size():
        yield
        return
    _require_convertible(engine, checkpoint, writers)
    if rank() == 0:
        print(f"vlsi-fast: {checkpoint} is of {writers} ranks; converting it for {world_size()}", flush=True)
        _convert(source)
    barrier()
    optimizer = engine.optimizer.optimizer
    own = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False
    # Two slips of DeepSpeed 0.19's loading. Every group got the first one's options, so that biases and norms had the
    # matrices' weight decay; only the learning rate, one for all groups, must come from the checkpoint. And all groups
    # got one and the same tensor as their count of steps, which torch's AdamW then raises once for each.
    for group, options in zip(optimizer.param_groups, own):
        group.update(options)
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def _require_convertible(engine, checkpoint: str, writers: int) -> None:
    """DeepSpeed's converter knows ZeRO-3 and the two moments of Adam."""
    optimizer = type(engine.optimizer.optimizer).__name__
    if engine.zero_optimization_stage() == 3 and optimizer in ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"):
        return
    raise LineageError(
        f"{checkpoint} was written by {writers} ranks and can be read by {writers} only: other numbers need ZeRO stage "
        f"3 and Adam (here stage {engine.zero_optimization_stage()}, {optimizer}); continue on {writers} ranks"
    )


def _convert(source: Path) -> None:
    """`source` (checkpoint-N/global_stepM) -> `<source>_universal`, unless it is there already.

    A process of its own: the converter forks workers, which is unsafe where communication threads run.
    """
    mark, target = source.with_name(UNIVERSAL_MARK), source.with_name(f"{source.name}_universal")
    if mark.is_file() and mark.read_text().strip() == target.name and target.is_dir():
        return
    shutil.rmtree(target, ignore_errors=True)  # half of one
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode or not mark.is_file():
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")
