"""One DeepSpeed rank that runs all stages as train.py does, for test_planner_ranks.py.

    deepspeed --num_accelerators 2 tests/measured_rank.py CONFIG OUT.json

Rank 0 writes, for each stage and its second optimizer step (DeepSpeed knows the order of modules from then on), the
bytes alive (`live_bytes`), the micro-batches, and the bytes of whole tensors that were gathered and reduced.
"""

import json
import sys
from collections import Counter

import live_bytes
import tiny_runs as runs
from deepspeed.comm.torch import TorchBackend
from pytest import MonkeyPatch
from transformers import TrainerCallback

from vlsi_fast import load_config
from vlsi_fast.config import STAGES
from vlsi_fast.ranks.sharding import rank
from vlsi_fast.stages.trainer import StageTrainer

STEP = 1
moved: Counter[str] = Counter()


def count(name: str, whole: str) -> None:
    """Have a collective of DeepSpeed's add the bytes of its unsharded tensor to `moved`."""
    collective = getattr(TorchBackend, name)

    def counted(self, *args, **kwargs):
        tensor = kwargs[whole] if whole in kwargs else args[0]
        moved[name] += tensor.numel() * tensor.element_size()
        return collective(self, *args, **kwargs)

    setattr(TorchBackend, name, counted)


class OneStep(TrainerCallback):
    """Leaves in `moved` what step STEP moved."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == STEP:
            moved.clear()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == STEP + 1:
            self.found = dict(moved)


if __name__ == "__main__":
    config_path, out = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    count("all_gather_into_tensor", "output_tensor")
    count("reduce_scatter_tensor", "input_tensor")
    start, watch, results = StageTrainer.__init__, OneStep(), {}

    def with_watch(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self.add_callback(watch)

    StageTrainer.__init__ = with_watch
    for stage in STAGES:
        measured = live_bytes.measure(load_config(config_path), stage, MonkeyPatch(), STEP)
        results[stage] = {"peak": measured.peak, "batches": measured.batches, "moved": watch.found}
    if rank() == 0:
        with open(out, "w") as stream:
            json.dump(results, stream)
    runs.leave_ranks()
