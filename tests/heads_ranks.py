"""Run by test_heads.py on two ranks: stages whose frozen heads are kept for an optimizer step, and stages without.

    torchrun --nproc_per_node 2 tests/heads_ranks.py OUT.json NAME=STAGE=CONFIG ..

A job named NAME:SOURCE:STEP continues a copy of the folder SOURCE, as a run that died after checkpoint-STEP leaves it.
Rank 0 writes for each job, by optimizer step and by evaluation: how often each model's head was gathered, told from
other tensors by the numbers that this rank sends; and the whole tensors of a head's shape that were alive after each
micro-batch, and after the step.
"""

import gc
import json
import sys
from collections import Counter
from pathlib import Path

import deepspeed
import tiny_runs as runs
import torch
from deepspeed.comm.torch import TorchBackend
from transformers import TrainerCallback

from vlsi_fast import load_config, run
from vlsi_fast.ranks.sharding import rank
from vlsi_fast.stages.trainer import StageTrainer

FIELDS = ("gathers", "alive_in_step", "alive_after")


class Watch(TrainerCallback):
    """Counts for the job that runs."""

    def __init__(self):
        self.heads, self.now, self.found = {}, None, {}

    def gathers(self, sent: torch.Tensor) -> None:
        """Look whether this rank's shard of a head is among the numbers that it sends."""
        sent = sent.detach().flatten()
        for name, parameter in self.heads.items():
            shard = parameter.ds_tensor.flatten()
            starts = (sent == shard[0]).nonzero()[:, 0].tolist()
            if self.now is not None and any(torch.equal(sent[i : i + shard.numel()], shard) for i in starts):
                self.now["gathers"][name] += 1

    def alive(self) -> int:
        """Whole tensors, by their storage, of a head's shape; those that training has beside heads are no such."""
        shapes = {tuple(parameter.ds_shape) for parameter in self.heads.values()}
        gc.collect()
        tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and tuple(t.shape) in shapes]
        return len({t.untyped_storage().data_ptr() for t in tensors})

    def begin(self, name: str) -> None:
        self.now = {"gathers": Counter(), "alive_in_step": [], "alive_after": None}
        self.found[name] = self.now

    def on_train_begin(self, args, state, control, **kwargs):
        self.found = {}

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin(f"step {state.global_step + 1}")

    def on_substep_end(self, args, state, control, **kwargs):
        self.now["alive_in_step"].append(self.alive())

    def on_step_end(self, args, state, control, **kwargs):
        self.now["alive_after"] = self.alive()
        self.begin(f"evaluation {state.global_step}")

    def on_evaluate(self, args, state, control, **kwargs):
        self.now["alive_after"] = self.alive()


def heads_of(module) -> dict:
    """Role -> its head's parameter."""
    parts = getattr(module, "backbones", None) or {n: getattr(module, n) for n in module.roles}
    return {name: parts[name].head_weight for name in module.roles}


def main(out: str, *jobs: str) -> None:
    watch, gather, start = Watch(), TorchBackend.all_gather_into_tensor, StageTrainer.__init__

    def counted(self, output_tensor, input_tensor, *args, **kwargs):
        watch.gathers(input_tensor)
        return gather(self, output_tensor, input_tensor, *args, **kwargs)

    def watched(self, *args, **kwargs):
        start(self, *args, **kwargs)
        watch.heads = heads_of(self.module)
        self.add_callback(watch)

    TorchBackend.all_gather_into_tensor, StageTrainer.__init__ = counted, watched
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    gc.freeze()  # imported modules are not looked through for tensors: that takes longer than a tiny stage
    results = {}
    for job in jobs:
        name, stage, path, resume = runs.begin_job(job)
        watch.now = None
        run(load_config(path), stage, resume=resume)
        watch.heads = {}
        gc.freeze()
        results[name] = watch.found
    if rank() == 0:
        Path(out).write_text(json.dumps(results))
    runs.leave_ranks()


if __name__ == "__main__":
    main(*(a for a in sys.argv[1:] if not a.startswith("--local_rank")))
