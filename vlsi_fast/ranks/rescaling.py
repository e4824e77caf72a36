"""Continue a run with another number of ranks.

A step of the optimizer must go on meaning the same rows, so micro-batch x accumulation x ranks stays what it was. The
optimizer's state is another matter: ZeRO-3 stores each rank's part, which DeepSpeed's universal checkpoint joins to
whole tensors that any number of ranks can read. Without DeepSpeed every checkpoint is whole already.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import MANIFEST_NAME, damage, describe, files_of, read_manifest, write_manifest
from ..lineage import LineageError, read_record
from ..unpickling import data_only
from .sharding import gathered_objects, rank, world_size

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
    problem = gathered_objects(_converted(Path(checkpoint), source) if rank() == 0 else None)[0]
    if problem:
        raise LineageError(problem)
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


def _converted(checkpoint: Path, source: Path) -> str | None:
    """Have `source` (checkpoint-N/global_stepM) converted to `<source>_universal`, unless that is done already.

    A process of its own: the converter forks workers, which is unsafe where communication threads run.

    Returns:
        None, or why a file of the checkpoint is refused.
    """
    mark, target = source.with_name(UNIVERSAL_MARK), source.with_name(f"{source.name}_universal")
    manifest = read_manifest(target)
    if manifest and manifest.get("source") == _fingerprint(checkpoint) and mark.is_file() and not damage(target):
        return None
    command = [sys.executable, "-m", "vlsi_fast.ranks.rescaling", str(checkpoint)]
    package = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([package, *sys.path])}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == 2:
        return done.stdout.rpartition("vlsi-fast: ")[2].strip()
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")
    return None


def convert(checkpoint: Path) -> None:
    """Join a checkpoint's parts, one a rank, to whole tensors in `global_stepM_universal` beside them.

    Raises:
        LineageError: no checkpoint of DeepSpeed; or a file of it is refused, see `data_only`.
    """
    from deepspeed.checkpoint import ds_to_universal

    source = next((p for p in checkpoint.glob("global_step*") if not p.name.endswith("_universal")), None)
    if source is None or not (checkpoint / MANIFEST_NAME).is_file():
        raise LineageError(f"{checkpoint} is no complete checkpoint of DeepSpeed; give a folder <stage>/checkpoint-N")
    target = source.with_name(f"{source.name}_universal")
    shutil.rmtree(target, ignore_errors=True)  # half of one, or of other files
    multiprocessing.set_start_method("fork", force=True)  # workers, too, load data only
    sys.argv[1:] = ["--input_folder", str(source), "--output_folder", str(target)]
    with data_only():
        ds_to_universal.main(ds_to_universal.parse_arguments())
    write_manifest(target, describe(target, files_of(target)), source=_fingerprint(checkpoint))


def _fingerprint(checkpoint: Path) -> str:
    return hashlib.sha256((checkpoint / MANIFEST_NAME).read_bytes()).hexdigest()


if __name__ == "__main__":  # python -m vlsi_fast.ranks.rescaling <stage>/checkpoint-N
    if len(sys.argv) != 2:
        sys.exit("usage: python -m vlsi_fast.ranks.rescaling <output_dir>/<stage>/checkpoint-N")
    try:
        convert(Path(sys.argv[1]))
    except LineageError as refused:
        print(f"vlsi-fast: {refused}", flush=True)
        sys.exit(2)
