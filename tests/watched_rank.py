"""A rank without a launcher for test_scaling.py: waits where a GPU's collective would hang, or in a real one."""

import sys
import time

import torch
import torch.distributed as dist

from vlsi_fast.ranks.watch import TellPlace, watch

if __name__ == "__main__":
    dist.init_process_group("gloo")
    watch.place = "stage sft, optimizer step 7"
    watch.begin()
    clone = dist.new_group(range(dist.get_world_size()))  # as DeepSpeed makes one, with torch's own timeout
    dist.barrier()
    print("ready", flush=True)
    if sys.argv[1] == "hang":
        time.sleep(600)
    TellPlace("sft", seconds=4.0).on_train_begin(None, None, None)
    if dist.get_rank() == 0:
        try:
            dist.all_reduce(torch.ones(1), group=clone)
        except RuntimeError as error:
            watch.failed(error)
            sys.exit(1)
    time.sleep(600)
