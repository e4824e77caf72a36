"""Translating verbalizers (`verbalizer.language: student`): a teacher's layers speak through the student's head.

    d, d_s     width of teacher and student        V, V_s   their vocabularies        K   tokens that both have
    W, W_s     heads [V, d], [V_s, d_s]             g, g_s   gains of their final norms [d], [d_s]

The paper asks for one tokenizer (its section on limitations). A verbalizer makes a layer speak through a frozen head; a
translating one makes it speak through the *student's* (`verbalizer.Verbalizer`). Both models then have the student's
vocabulary whatever their tokenizers are, and everything behind is as it was: KL, matching, cache. Answers are aligned
by their characters (`data.alignment`).

Where it starts: the linear map A under which the student's head says, on the tokens that both vocabularies have, what
the teacher's says, but for a number that is the same for all tokens, which a softmax does not see:

    A = argmin  sum_v w_v || (W_s[v] - mean W_s) diag(g_s) A - (W[v] - mean W) diag(g) ||^2

the pseudo-inverse between the centred heads. RMSNorm takes a state's size away on both sides, so A needs no norm in
front. Two models of one head and norm get the identity. A narrower head cannot say everything: w_v, how often answers
have a token, decides what it keeps (`benchmarks/translation_start.py`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .backbones import family_of
from .data.encoding import end_of_turn
from .data.skipped import UnusableRow
from .loading import read_head
from .ranks.shard_loading import empty_model, read_parameter

if TYPE_CHECKING:
    from .data.sources import ConcatSource

CHUNK = 16384
"""Tokens of both heads that are multiplied at once."""
COUNTED_ROWS = 2000
"""Rows of training data whose answers are counted."""
UNSEEN = 0.1
"""What is shared out among all tokens, beside 1 by how often answers have them."""
RIDGE = 1e-6
"""Added to the normal equations' diagonal, as a share of its mean: tokens fewer than d_s, or a gain of 0, leave
directions that nothing decides."""


def start_map(
    teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor], tokens: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Where A starts.

    Args:
        teacher: head [V, d] and gain of the final norm [d].
        student: head [V_s, d_s] and gain [d_s].
        tokens: [2, K] ids of the tokens that both have: the student's, the teacher's.
        weight: [K] of each token, >= 0; None: all alike.

    Returns:
        [d_s, d] float32, on the heads' device.

    Raises:
        ValueError: fewer than two tokens in common.
    """
    if tokens.shape[1] < 2:
        raise ValueError(f"the two vocabularies have {tokens.shape[1]} tokens in common; a translation has no start")
    (head, gain), (student_head, student_gain) = teacher, student
    weight = torch.ones(tokens.shape[1]) if weight is None else weight
    weight = (weight / weight.sum()).to(head.device, torch.float32)[:, None]
    parts = list(zip(*(ids.to(head.device).split(CHUNK) for ids in tokens), weight.split(CHUNK)))

    def rows(ids_s: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return student_head[ids_s].float() * student_gain.float(), head[ids].float() * gain.float()

    means = [0.0, 0.0]
    for ids_s, ids, w in parts:
        means = [mean + (w * each).sum(0) for mean, each in zip(means, rows(ids_s, ids))]
    gram = student_head.new_zeros(len(student_gain), len(student_gain), dtype=torch.float64)
    cross = student_head.new_zeros(len(student_gain), len(gain), dtype=torch.float64)
    for ids_s, ids, w in parts:
        s, t = (each - mean for each, mean in zip(rows(ids_s, ids), means))
        gram += s.T @ (w * s)
        cross += s.T @ (w * t)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, cross).float()


def gain_of(norm: nn.Module, width: int) -> Tensor:
    """[width] what a final norm (RMSNorm, however its weight is stored) multiplies a state of size 1 by."""
    with torch.no_grad():
        parameter = next(norm.parameters())
        return norm(torch.ones(1, width, dtype=parameter.dtype, device=parameter.device))[0]


def final_norm_of(folder: str | Path, config, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """A plain, frozen copy of a checkpoint's final norm; nothing else is loaded.

    Args:
        folder: checkpoint.
        config: its transformers config.
        dtype, device: of the copy.
    """
    family = family_of(config)
    norm = copy.deepcopy(family.final_norm(empty_model(config))).to_empty(device=device).to(dtype)
    for name, target in norm.named_parameters():
        stored = read_parameter(folder, config, lambda m, name=name: family.final_norm(m).get_parameter(name))
        target.data.copy_(stored)
    return norm.requires_grad_(False).eval()


def start_between(
    teacher: tuple[str | Path, object],
    student: tuple[str | Path, object],
    tokens: Tensor,
    weight: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """`start_map` of two checkpoints, each given as its folder and transformers config."""
    sides = []
    for folder, config in (teacher, student):
        norm = final_norm_of(folder, config, torch.float32, device)
        sides.append((read_head(folder, config).to(device), gain_of(norm, config.get_text_config().hidden_size)))
    return start_map(*sides, tokens, weight)


def token_weights(counts: Tensor, ids: Tensor) -> Tensor:
    """What tokens weigh: their share of the answers, and `UNSEEN` shared out among all.

    Args:
        counts: [V_s] how often answers have each token.
        ids: [K] the tokens that are asked about.

    Returns:
        [K] float32.
    """
    counts = counts[ids].float()
    return counts / counts.sum().clamp_min(1) + UNSEEN / len(ids)


def answer_counts(answers: Iterable[str], processor, rows: int) -> Tensor:
    """[rows] how often texts have each token, the one that ends a turn once each."""
    counts, end = torch.zeros(rows), end_of_turn(processor)
    for answer in answers:
        found = [*processor.tokenizer(answer, add_special_tokens=False)["input_ids"], end]
        counts += torch.bincount(torch.tensor(found), minlength=rows)[:rows]
    return counts


def some_answers(sources: ConcatSource, count: int = COUNTED_ROWS) -> Iterator[str]:
    """Texts of assistant turns of about `count` rows, spread evenly; rows that cannot be read are left out."""
    for i in range(0, len(sources), max(1, len(sources) // count)):
        with contextlib.suppress(UnusableRow):
            for message in sources[i].messages:
                if message["role"] == "assistant":
                    yield "".join(part.get("text", "") for part in message["content"])
