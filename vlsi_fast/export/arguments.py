"""Options of `vlsi-fast export`. Imports nothing heavy: `--help` is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..sizes import parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `export` command."""
    parser.add_argument("--run", required=True, type=Path, help="folder of the run (its output_dir)")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must be new or empty")
    parser.add_argument("--stage", choices=("interact", "sft"), help="whose student (default: the last finished stage)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the weights (default: as in the run)")
    parser.add_argument("--max-shard-size", type=parse_size, default="5GB", metavar="SIZE", help="of a file (5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --out")
    card = parser.add_argument_group("model card")
    card.add_argument("--model-name", help="its title (default: the name of --out)")
    card.add_argument("--license", metavar="ID", help="of the exported model (default: that of the student's own card)")
    card.add_argument("--base-model", metavar="HUB_ID", help="of the student, where student.path is a folder")
    card.add_argument("--teacher-model", metavar="HUB_ID", help="of the teacher, where teacher.path is a folder")
    card.add_argument("--datasets", nargs="+", default=[], metavar="HUB_ID", help="of the training data")
    card.add_argument("--results", nargs="+", default=[], type=Path, metavar="FILE", help="JSON of `vlsi-fast eval`")
