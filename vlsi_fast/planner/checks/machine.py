"""Checks of this machine: room on its disk and its GPUs, operators that compute what they should."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from ...sizes import format_size
from ..memory import RESERVE_BYTES, compute_bytes
from ..walk import walk
from .subject import Failed, Subject, Unchecked

SELF_CHECK_ELEMENTS = 2**25
"""Size of the random head of the self-check: the teacher's width, and as much of its vocabulary as this allows."""


def check_disk(subject: Subject) -> str:
    """Room for the checkpoints and results of the stages to come."""
    need = checkpoint_bytes(subject)
    folder = Path(subject.config.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    said = f"{format_size(free)} free at {folder}, checkpoints and results need {format_size(need)}"
    if free < need:
        raise Failed(said, "make room, choose another output_dir, or lower training.save_total_limit")
    return said


def checkpoint_bytes(subject: Subject) -> int:
    """Bytes that the stages write: kept checkpoints and one in the making (master weights and two moments of what is
    trained), and the results."""
    total, e = 0, compute_bytes(subject.config)
    for stage, step in subject.planned_steps().items():
        trained = sum(n for spoken in step.roles.values() for n in spoken.split()[0])
        training = subject.config.stage_training(stage)
        kept = training.save_total_limit
        if kept is None:  # all: one every save_steps, where the number of steps is known
            kept = max(1, training.max_steps // training.save_steps) if training.max_steps > 0 else 10
        total += 12 * trained * (kept + 1 + training.load_best_model_at_end)
        total += 4 * trained if stage == "verbalize" else e * sum(step.roles["student"].shape.parameters)
    return total


def check_memory(subject: Subject) -> str:
    """The planner's need of the longest row against the GPU at hand."""
    if not torch.cuda.is_available():
        raise Unchecked("no GPU here; `vlsi-fast plan` tells what one must have")
    have = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    said = []
    for stage, step in subject.planned_steps().items():
        peak = walk(step).peak
        said.append(f"{stage} {format_size(peak.total)}")
        if peak.total + RESERVE_BYTES > have:
            raise Failed(
                f"stage {stage} needs {format_size(peak.total)} and {format_size(RESERVE_BYTES)} of reserve on each "
                f"of {subject.ranks} GPUs of {format_size(have)} (at its peak, {peak.moment})",
                "see `vlsi-fast plan`: fewer rows a micro-batch, a lower data.max_length, gradient_checkpointing, or "
                "more GPUs",
            )
    return f"of {format_size(have)}: {', '.join(said)} (predicted, longest row)"


def check_self_kl(subject: Subject) -> str:
    """KL(teacher || teacher) = 0 by the operators that train, on random hidden states and a random head.

    No weights are read: the head has the teacher's width and as much of its vocabulary as `SELF_CHECK_ELEMENTS` holds;
    the student's, where the teacher speaks through it.
    """
    from vlsi_kernels import layer_kl_matrix, teacher_targets

    role = "student" if subject.config.verbalizer.translates else "teacher"
    text = subject.model_config(role).get_text_config()
    rows = min(text.vocab_size, max(256, SELF_CHECK_ELEMENTS // text.hidden_size))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    head = (torch.randn(rows, text.hidden_size, generator=generator) * text.hidden_size**-0.5).to(device)
    hidden = torch.randn(2, 8, text.hidden_size, generator=generator).to(device) * 3
    options = {"impl": subject.config.impl}
    kl = layer_kl_matrix(hidden, head, teacher_targets(hidden, head, head, **options), **options).cpu()
    same, other = float(kl.diagonal().abs().max()), float((kl + torch.eye(2) * 1e9).min())
    if not (same < 1e-4 < other):
        raise Failed(
            f"KL of a layer with itself is {same:.1e}, of two layers {other:.1e}",
            "set impl: torch, and report it with the versions of torch and triton",
        )
    return f"{same:.0e} against itself, {other:.2f} between two layers ({rows} x {text.hidden_size} random head)"
