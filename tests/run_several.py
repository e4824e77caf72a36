"""Several stages, of configs of their own, in one launch: `run_several.py --resume|--fresh stage=config ..`.

Stage `build` is `vlsi-fast teacher build` with exact targets.
"""

import gc
import sys

import tiny_runs as runs

from vlsi_fast import load_config, run
from vlsi_fast.teacher_cache.build import Chosen, build

if __name__ == "__main__":
    resume, *jobs = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    for job in jobs:
        stage, config = job.split("=", 1)
        if stage == "build":
            build(load_config(config), Chosen(numbers="float32", progress=False))
        else:
            run(load_config(config), stage, resume == "--resume")
        gc.freeze()  # imported modules are not looked through again: that takes longer than a tiny stage
    runs.leave_ranks()
