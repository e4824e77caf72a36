"""A run's self-test (`vlsi_fast/self_test/`) at the sizes of real models, without a config or checkpoints.

    python benchmarks/self_test.py [--teacher 72b] [--student 7b] [--dtype bfloat16] [--json PATH]

Compares the operators, liger-kernel's modules where they are installed, and each attention that runs here with plain
PyTorch in float64, as a stage does at its start. The last line is JSON. Exits with 1 where something disagrees. For a
run of yours take `vlsi-fast check --config RUN.yaml --device`, which compares what that run will use.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from report import origin
from rich.console import Console
from rich.table import Table
from shapes import BACKBONES, VISION, Backbone

from vlsi_fast.attention import VARLEN
from vlsi_fast.self_test import backbone, operators
from vlsi_fast.self_test.probe import Probe, compare
from vlsi_kernels import resolve_impl

EPS = 1e-6
"""Of Qwen2's norms."""


def of_operators(student: Backbone, teacher: Backbone, dtype: torch.dtype, impl: str) -> Iterator[Probe]:
    """Those of all stages."""
    options = {"dtype": dtype, "impl": impl}
    yield operators.layer_kl(student.width, teacher.width, **options)
    for beta in (1.0, 0.5):
        yield operators.divergence(student.width, teacher.width, beta=beta, **options)
    for model in (student, teacher):
        yield operators.cross_entropy(model.width, trained_head=model is student, **options)
        for tokens in (operators.TOKENS, operators.MANY_TOKENS) if impl == "triton" else (operators.TOKENS,):
            yield operators.feed_forward(model.width, model.width, model.width, dtype, impl, tokens)


def of_backbones(model: Backbone, dtype: torch.dtype, device: torch.device) -> tuple[list[Probe], list[str]]:
    """Probes, and what cannot run here."""
    head = model.width // model.heads
    found, absent = [], []
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        found += [backbone.liger_rms_norm(model.width, EPS, dtype), backbone.liger_swiglu(model.ffn, dtype)]
        found.append(backbone.liger_rope(model.heads, model.kv_heads, head, dtype))
    else:
        absent.append("liger-kernel: not installed, or no CUDA")
    half = device.type == "cuda" and dtype != torch.float32
    usable = {
        "sdpa": True,
        VARLEN: half and torch.backends.cuda.is_flash_attention_available(),
        "flash_attention_2": half and importlib.util.find_spec("flash_attn") is not None,
    }
    vision = (VISION.heads, VISION.heads, VISION.width // VISION.heads)
    for name, runs in usable.items():
        if runs:
            sizes = (model.heads, model.kv_heads, head)
            found.append(backbone.attention(name, "attn_implementation", *sizes, dtype, causal=True))
            found.append(backbone.attention(name, "attn_implementation", *vision, dtype, causal=False))
        else:
            absent.append(f"{name}: not installed, or not for {dtype} on {device.type}")
    return found, absent


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", choices=BACKBONES, default="72b")
    parser.add_argument("--student", choices=BACKBONES, default="7b")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype)
    student, teacher = BACKBONES[arguments.student], BACKBONES[arguments.teacher]
    probes = list(of_operators(student, teacher, dtype, resolve_impl("auto", device)))
    more, absent = of_backbones(student, dtype, device)
    began = time.monotonic()
    outcomes = compare([*probes, *more], device)
    seconds = time.monotonic() - began
    table = Table("part", "by", "agrees", "found")
    for outcome in outcomes:
        table.add_row(outcome.name, outcome.chosen, "yes" if outcome.agrees else "NO", outcome.detail)
    Console(width=140).print(table)
    for line in absent:
        print(f"left out: {line}")
    result = {"benchmark": "self_test", "dtype": arguments.dtype, "device": device.type, **origin(device)}
    result |= {"teacher": arguments.teacher, "student": arguments.student, "seconds": seconds, "absent": absent}
    result["rows"] = [dataclasses.asdict(outcome) for outcome in outcomes]
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    sys.exit(0 if all(outcome.agrees for outcome in outcomes) else 1)


if __name__ == "__main__":
    main()
