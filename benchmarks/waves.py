"""Waves of the heads' matrix products on GPUs that are not there: arithmetic alone, nothing is measured.

    python benchmarks/waves.py [--shapes NAME ..] [--workspace BYTES] [--json PATH]

For each pass over the vocabulary of an interact micro-batch: blocks of equal rows, and those that the operators take
(`vlsi_kernels._waves`), with the waves of both products and the share of whole waves that does work. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from shapes import Shape, shape

from vlsi_kernels._common import DEFAULT_WORKSPACE_BYTES, HeadOptions, plan_tiles
from vlsi_kernels._waves import pass_waves

GPUS = {"A100": 108, "H100, H200": 132, "B200": 148}
"""Multiprocessors, by the datasheets."""
SHAPES = tuple(f"{pair}:{tokens}" for pair in ("7b-to-2b", "72b-to-2b", "72b-to-7b") for tokens in (1024, 4096))


def rows_of(found: Shape, workspace: int) -> list[dict]:
    """One dictionary a pass and GPU; the last layers are read with the target layers."""
    rows = []
    passes = {
        "teacher": ((found.teacher_layers + 1) * found.tokens, found.teacher_width),
        "student": ((found.student_layers + 1) * found.tokens, found.student_width),
    }
    options, width = HeadOptions(found.vocab, 1.0, "triton", workspace), found.student_width
    for gpu, sms in GPUS.items():
        for name, (count, key) in passes.items():
            plans = {
                "equal": plan_tiles(count, width, torch.float16, options),
                "ours": plan_tiles(count, width, torch.float16, options, key=key, sms=sms),
            }
            row = {"shape": found.name, "gpu": gpu, "pass": name, "rows": count}
            for kind, (block, columns) in plans.items():
                waves = pass_waves(count, block, key, width, columns, sms)
                row[kind] = {"block": block, "columns": columns, **waves._asdict()}
            rows.append(row)
    return rows


def main() -> None:
    """Print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="TEACHER-to-STUDENT:TOKENS")
    parser.add_argument("--workspace", type=int, default=DEFAULT_WORKSPACE_BYTES["cuda"], help="bytes of scratch")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    rows = [row for name in arguments.shapes for row in rows_of(shape(name), arguments.workspace)]
    table = Table("shape", "GPU", "pass", "rows", "equal blocks", "waves", "full", "blocks", "waves", "full")
    for row in rows:
        told = []
        for kind in ("equal", "ours"):
            found = row[kind]
            told += [str(found["block"]), f"{found['logits']} + {found['expectation']}", f"{found['efficiency']:.1%}"]
        table.add_row(row["shape"], row["gpu"], row["pass"], str(row["rows"]), *told)
    Console(width=120).print(table)
    result = {"benchmark": "waves", "kind": "on paper", "workspace_bytes": arguments.workspace, "rows": rows}
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
