"""Train: `deepspeed vlsi_fast/train.py --stage verbalize|interact|sft|all --config configs/X.yaml [--field value ..]`.

The same arguments run under plain `python` and under `torchrun`.
"""

import os
import sys

# Started as a file, Python puts this folder first on the path, where our module names could shadow other packages'.
_here = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [p for p in sys.path if os.path.abspath(p or os.getcwd()) != _here]
try:
    import vlsi_fast  # noqa: F401
except ModuleNotFoundError:  # a checkout that is not installed
    _root = os.path.dirname(_here)
    sys.path[:0] = [_root, os.path.join(_root, "kernels")]

from vlsi_fast.cli import train_main  # noqa: E402

if __name__ == "__main__":
    sys.exit(train_main())
