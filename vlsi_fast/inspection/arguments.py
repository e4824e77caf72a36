"""Options of `vlsi-fast inspect`. Imports nothing heavy: `--help` is quick."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `inspect` command."""
    parser.add_argument("path", type=Path, help="any folder of vlsi-fast, or a stock checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
