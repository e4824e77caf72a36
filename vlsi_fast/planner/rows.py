"""Operations of one row as a polynomial of its size, read off `speed.operations`: what balancing weighs rows by."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..config import RunConfig
from .build import Models, stage_mode, step_of
from .memory import Batch, Setup, compute_bytes
from .speed import operations
from .walk import Step

_TOKENS = 1024
"""Where the polynomials are read off: large enough that their squares show."""


@dataclass(frozen=True)
class RowOperations:
    """FLOPs that one row adds in one model, forward and backward: with T tokens, P image patches and N answer tokens

    token T + token_pair T^2 + patch P + patch_pair P^2 / pictures + answer N

    Patches are in the unit of `data.row_sizes`. Pictures are images, or the tiles of which each is seen alone. The
    answers' part holds verbalizers and heads, the student's also what the teacher's layers cost there.
    """

    token: float
    token_pair: float
    patch: float
    patch_pair: float
    answer: float


def row_operations(config: RunConfig, stage: str, configs: dict) -> dict[str, RowOperations]:
    """Of each model that a stage runs.

    Args:
        config: of the run.
        stage: its name.
        configs: role -> transformers config, of the stage's models.
    """
    training = config.stage_training(stage)
    options = {"accumulation": training.gradient_accumulation_steps, "checkpointing": training.gradient_checkpointing}
    mode = stage_mode(config, stage, True)  # operations are the same wherever a teacher is held
    setup = Setup(1, None, compute_bytes(config), teacher_mode=mode, **options)
    step = step_of(Models(config, configs=configs), stage, setup, lambda shape: Batch(1, 0, 0, 0))
    return {role: _of_role(step, role) for role in step.roles}


def _of_role(step: Step, role: str) -> RowOperations:
    def total(tokens: int = 0, answers: int = 0, patches: int = 0) -> float:
        batches = step.batches | {role: Batch(1, tokens, answers, patches)}
        return sum(operations(dataclasses.replace(step, batches=batches)).values())

    def linear_and_square(one: float, two: float) -> tuple[float, float]:
        square = (two - 2 * one) / (2 * _TOKENS**2)
        return one / _TOKENS - square * _TOKENS, square

    token, token_pair = linear_and_square(total(_TOKENS), total(2 * _TOKENS))
    told = _TOKENS * step.roles[role].shape.told
    patch, patch_pair = linear_and_square(total(patches=told), total(patches=2 * told))
    return RowOperations(token, token_pair, patch, patch_pair, total(answers=_TOKENS) / _TOKENS)
