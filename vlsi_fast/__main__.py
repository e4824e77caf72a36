"""`python -m vlsi_fast`, for launchers: `torchrun --nproc-per-node 8 -m vlsi_fast data answer ..`."""

import sys

from vlsi_fast.cli import main

if __name__ == "__main__":
    # deepspeed's launcher puts the rank in front of what it passes on
    sys.exit(main([word for word in sys.argv[1:] if not word.startswith("--local_rank=")]))
