"""Options of `vlsi-fast shrink`. Imports nothing heavy: `--help` is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

METHODS = ("even", "influence")
READERS = ("qa", "llava", "messages", "hf", "easy_vqa")
"""As in `data.readers`, which a test compares."""
DEFAULT_ROWS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `shrink` command."""
    parser.add_argument("--model", required=True, help="the large model, a stock checkpoint: a folder or a Hub name")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="to write; must be new or empty")
    parser.add_argument(
        "--keep-layers",
        required=True,
        type=keep_layers,
        metavar="N|LIST",
        help="how many decoder layers to keep, or which, counted from 1: 1,3,6,8 (a list of one ends in a comma)",
    )
    parser.add_argument(
        "--by",
        choices=METHODS,
        default="even",
        help="which N layers: even (default) spreads them, the first and the last kept; influence keeps those that "
        "change their input most, on rows of data",
    )
    rows = parser.add_argument_group("with --by influence")
    rows.add_argument("--config", help="YAML file of a run: rows of its data.train")
    rows.add_argument("--data", metavar="FILE", help="rows of a file or saved dataset, read by --reader")
    rows.add_argument("--reader", choices=READERS, help="format of --data; its fields: --data.train.0.FIELD VALUE")
    rows.add_argument(
        "--limit",
        type=_positive,
        metavar="N",
        help=f"rows, taken evenly from all parts of the data (default {DEFAULT_ROWS})",
    )
    rows.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, float32 elsewhere")
    rows.add_argument("--device", help="default: the GPU where there is one, else cpu; auto: spread over all there are")
    parser.add_argument("--json", action="store_true", help="print vlsi_shrink.json instead of tables")


def keep_layers(text: str) -> int | list[int]:
    """`14` -> 14; `1,3,6,8` and `5,` -> a list."""
    parts = [part.strip() for part in text.strip("[] ").split(",")]
    numbers = parts[:-1] if len(parts) > 1 and parts[-1] == "" else parts
    if not all(part.isdigit() and int(part) > 0 for part in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: give a number such as 14, or layers from 1 on such as 1,3,6,8")
    return [int(part) for part in numbers] if len(parts) > 1 else int(parts[0])


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: use a whole number, 1 or more")
    return int(text)
