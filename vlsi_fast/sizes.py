"""Sizes in bytes on the command line and in tables, one spelling for every command."""

from __future__ import annotations

import argparse
import re

UNITS = {"": 1, "B": 1} | {
    f"{letter}{unit}": base**power
    for power, letter in enumerate("KMGT", 1)
    for unit, base in (("B", 1000), ("IB", 1024))
}


def parse_size(text: str) -> int:
    """`80GiB` (powers of 1024), `5GB` (of 1000) or a number of bytes -> bytes. An argparse type."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([A-Z]*)", text.strip().upper())
    if found is None or found[2] not in UNITS or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write e.g. 500MB, 5GB or 80GiB")
    return int(float(found[1]) * UNITS[found[2]])


def format_size(size: float) -> str:
    """Bytes in the binary unit that fits: `1.5 GiB`."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power:
            return f"{size / 1024**power:.1f} {unit}"
    return f"{size:.0f} B"


def format_count(count: float) -> str:
    """A number of parameters: `8.3B`, `0.6M`, `512`."""
    for unit, one in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= one:
            return f"{count / one:.1f}{unit}"
    return str(int(count))
