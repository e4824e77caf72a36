"""Run by test_hpz.py on four ranks that stand for two machines of two: stages with hpZ and without, in one launch.

    torchrun --nproc_per_node 4 tests/hpz_ranks.py OUT.json NAME=STAGE=CONFIG ..

A job named NAME:SOURCE:STEP continues a copy of the folder SOURCE, as a run that died after checkpoint-STEP leaves it.
Rank 0 writes bytes and calls of all-gathers of each job by the number of
ranks that take part, from its second optimizer step on, and whether DeepSpeed still needs `ranks.secondary`.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

os.environ["LOCAL_WORLD_SIZE"] = "2"

import deepspeed
import tiny_runs as runs
import torch
from deepspeed.comm.torch import TorchBackend
from transformers import TrainerCallback

from vlsi_fast import load_config, run
from vlsi_fast.ranks.sharding import rank
from vlsi_fast.stages.trainer import StageTrainer

moved: Counter[str] = Counter()


def count(name: str) -> None:
    """Have one of DeepSpeed's all-gathers counted, by the number of ranks."""
    collective = getattr(TorchBackend, name)

    def counted(self, output_tensor, *args, group=None, **kwargs):
        ranks = torch.distributed.get_world_size(group)
        moved[f"calls of {ranks}"] += 1
        moved[f"bytes of {ranks}"] += output_tensor.numel() * output_tensor.element_size()
        return collective(self, output_tensor, *args, group=group, **kwargs)

    setattr(TorchBackend, name, counted)


class AfterFirstStep(TrainerCallback):
    """Leaves in `moved` what came after the first optimizer step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            moved.clear()

    def on_train_end(self, args, state, control, **kwargs):
        self.found = dict(moved)


def deepspeed_still_fails() -> dict[str, str | bool]:
    """What DeepSpeed does where `ranks.secondary` helps: entered twice by itself, and a frozen weight's gather."""
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        linear = torch.nn.Linear(8, 8, bias=False)
    linear.requires_grad_(False)
    try:
        with deepspeed.zero.Init(config_dict_or_path=config):
            torch.nn.Linear(8, 8)
        said = ""
    except AssertionError as error:
        said = str(error)
    moved.clear()
    with deepspeed.zero.GatheredParameters([linear.weight]):
        pass
    return {"second Init": said, "gathers over all ranks": moved["calls of 4"] > 0}


def main(out: str, *jobs: str) -> None:
    count("all_gather_into_tensor")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    results = {"deepspeed": deepspeed_still_fails()}
    start, watch = StageTrainer.__init__, AfterFirstStep()

    def with_watch(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self.add_callback(watch)

    StageTrainer.__init__ = with_watch
    for job in jobs:
        name, stage, path, resume = runs.begin_job(job)
        run(load_config(path), stage, resume=resume)
        results[name] = watch.found
    if rank() == 0:
        Path(out).write_text(json.dumps(results))
    runs.leave_ranks()


if __name__ == "__main__":
    main(*(a for a in sys.argv[1:] if not a.startswith("--local_rank")))
