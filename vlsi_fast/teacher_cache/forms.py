"""How a token's numbers are stored, and how they come back.

    N  answer tokens of a row or batch        R  teacher layers kept, target layers first, then the last layer
    d_s, d_l  widths of student and teacher

    targets  negative entropy in float32, and the expectation g, d_s numbers:
               float32   4 + 4 d_s bytes a token and layer; the same bits come back
               float16   4 + 2 d_s; 11 bits
               bfloat16  4 + 2 d_s; 8 bits
               int8      6 + d_s, with a scale in bfloat16
    hidden   the verbalized state, d_l numbers as the model has them: 2 d_l bytes (4 d_l in float32); the same bits

For the forward KL against a frozen student head, negative entropy and expectation are all of the teacher's
distribution (`vlsi_kernels.teacher_targets`): nothing is cut off, whatever the vocabulary. Other divergences, and other
students, need the hidden states.

As a student comes near its teacher, the gradient e - g is a small difference, and what rounding costs it grows
(`benchmarks/teacher_cache.py`): float16 keeps the operators' own bar there, 5e-3; bfloat16 and int8 do not.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vlsi_kernels import TeacherTargets

from ..config_files import ConfigError

Form = Literal["targets", "hidden"]
FORMS = ("targets", "hidden")
NUMBERS = ("float32", "float16", "bfloat16", "int8")
"""Of the expectation."""
DEFAULT = "float16"
LEVELS = 127
"""Largest int8."""


def pack_targets(targets: TeacherTargets, numbers: str) -> dict[str, Tensor]:
    """Targets of N tokens as they are stored, on their device.

    Args:
        targets: `neg_entropy` [R, N], `expectation` [R, N, d_s], float32.
        numbers: one of `NUMBERS`.

    Returns:
        `neg_entropy` [N, R] float32, `expectation` [N, R, d_s] in `numbers`, and for int8 `scale` [N, R] bfloat16.

    Raises:
        ConfigError: a number is beyond float16.
    """
    stored = {"neg_entropy": targets.neg_entropy.T.float().contiguous()}
    values = targets.expectation.transpose(0, 1).float().contiguous()
    if numbers == "int8":
        # rounded up, so that the largest of a row is within reach of the scale that is kept
        scale = values.abs().amax(-1) / LEVELS * (1 + 2**-8)
        scale = scale.to(torch.bfloat16)
        divisor = scale.float().clamp_min(torch.finfo(torch.float32).tiny)[..., None]
        levels = (values / divisor).round_().clamp_(-LEVELS, LEVELS)
        return stored | {"expectation": levels.to(torch.int8), "scale": scale}
    kept = values.to(getattr(torch, numbers))
    if numbers == "float16" and bool(kept.isinf().any()):
        raise ConfigError("this head's rows are too large for float16: build with --numbers bfloat16")
    return stored | {"expectation": kept}


def unpack_targets(stored: dict[str, Tensor], vocab_size: int, temperature: float) -> TeacherTargets:
    """Targets in float32, as `vlsi_kernels.layer_kl_matrix` takes them, from `pack_targets`."""
    values = stored["expectation"].transpose(0, 1).float()
    if "scale" in stored:
        values = values * stored["scale"].T.float()[..., None]
    return TeacherTargets(stored["neg_entropy"].T.contiguous(), values.contiguous(), vocab_size, temperature)


def bytes_a_token_and_layer(form: str, numbers: str, width: int) -> int:
    """Stored of one answer token and layer; `width`: the student's for targets, the teacher's for hidden."""
    if form == "hidden":
        return width * (4 if numbers == "float32" else 2)
    return {"float32": 4 + 4 * width, "int8": 6 + width}.get(numbers, 4 + 2 * width)
