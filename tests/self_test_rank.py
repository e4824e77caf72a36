"""One of two ranks that compare their parts; rank 1's is wrong. `torchrun self_test_rank.py FOLDER`."""

import dataclasses
import json
import sys
from pathlib import Path

import tiny_runs as runs
import torch
from test_self_test import LIGER, wrong

from vlsi_fast import load_config
from vlsi_fast.self_test.start import start

folder = Path(sys.argv[1])
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
config = load_config(runs.write_config(runs.settings(folder, folder / "run"), folder / f"config{rank}.yaml"))
changed, record = start(config, [dataclasses.replace(wrong(*LIGER, by=float(rank)))], torch.device("cpu"))
assert changed.liger is False
(folder / f"{rank}.json").write_text(json.dumps(record))
torch.distributed.destroy_process_group()
