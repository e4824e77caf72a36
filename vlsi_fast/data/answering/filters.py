"""Which answers are kept, and why others are not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...config import ConfigError
from ..skipped import CAUSES as UNUSABLE

NGRAM = 4
"""Tokens of a repeated stretch that counts."""
CAUSES = {
    "cut": "it had no end after --max-new-tokens",
    "empty": "it has no text",
    "special_token": "its text spells one of the tokenizer's special tokens, which training would read as such",
    "too_short": "fewer tokens than --min-tokens",
    "too_many_tokens": "more tokens than --max-tokens",
    "repetition": "it repeats itself more than --max-repetition",
    "disagreement": "fewer samples than --min-agreement say the same, or this one says something else",
    "not_kept": "another sample of the same question was kept (--keep)",
}
"""Why an answer is rejected. A row that cannot be asked has one of `skipped.CAUSES` instead."""


@dataclass(frozen=True)
class Filters:
    """What an answer must be like."""

    min_tokens: int = 0
    """Tokens of the teacher that an answer has at least, its end not counted."""
    max_tokens: int | None = None
    """Tokens that it has at most; None: no bound besides max_new_tokens."""
    keep_cut: bool = False
    """Keep answers that were cut at max_new_tokens."""
    max_repetition: float | None = None
    """Largest share, 0 to 1, of an answer's stretches of four tokens that were there before in it; None: no bound."""
    min_agreement: float | None = None
    """Share, 0 to 1, of a question's samples that must say the same; answers that say something else go."""
    keep: Literal["all", "first", "majority"] | None = None
    """Of the samples left: all, the first, or the first of those that most agree with. None: majority where
    min_agreement is set, else all."""

    def check(self, samples: int, max_new_tokens: int) -> None:
        """Raises ConfigError where an option is out of range or has no meaning for so many samples."""
        for name in ("max_repetition", "min_agreement"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it is a share, from 0 to 1")
        if self.min_tokens < 0:
            raise ConfigError(f"--min-tokens is {self.min_tokens}; use 0 or more")
        if self.max_tokens is not None and self.max_tokens < max(self.min_tokens, 1):
            raise ConfigError(f"--max-tokens {self.max_tokens} is below --min-tokens {max(self.min_tokens, 1)}")
        if self.min_tokens > max_new_tokens:
            raise ConfigError(f"--min-tokens {self.min_tokens} is above --max-new-tokens {max_new_tokens}; raise it")
        if self.keep not in (None, "all", "first", "majority"):
            raise ConfigError(f"--keep is {self.keep!r}; use all, first or majority")
        if samples == 1:
            for name in ("min_agreement", "keep"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"--{name.replace('_', '-')} compares a question's samples, but there is one; set --samples"
                    )

    def judge(self, answers: Sequence[dict[str, Any]]) -> tuple[list[str | None], float | None]:
        """A cause for each of a question's samples, None where it is kept, and the share of the largest group.

        Args:
            answers: the samples, each with `texts` (one a turn), `tokens`, `finished`, `repetition` of each turn, and
                `cause` where it could not be finished.
        """
        causes = [self._cause(answer) for answer in answers]
        said = [None if cause else tuple(map(normalised, a["texts"])) for cause, a in zip(causes, answers)]
        groups = Counter(text for text in said if text is not None)
        if len(answers) == 1 or not groups:
            return causes, None
        most, count = groups.most_common(1)[0]  # among equals the one said first
        share = count / len(answers)
        keep = self.keep or ("all" if self.min_agreement is None else "majority")
        kept = False
        for i, text in enumerate(said):
            if text is None:
                continue
            if self.min_agreement is not None and (share < self.min_agreement or text != most):
                causes[i] = "disagreement"
            elif keep != "all" and (kept or (keep == "majority" and text != most)):
                causes[i] = "not_kept"
            else:
                kept = True
        return causes, share

    def _cause(self, answer: dict[str, Any]) -> str | None:
        if not self.keep_cut and not all(answer["finished"]):
            return "cut"
        if answer.get("cause"):
            return answer["cause"]
        if min(answer["tokens"]) < self.min_tokens:
            return "too_short"
        if self.max_tokens is not None and max(answer["tokens"]) > self.max_tokens:
            return "too_many_tokens"
        if self.max_repetition is not None and max(answer["repetition"]) > self.max_repetition:
            return "repetition"
        return None


def meaning(cause: str) -> str:
    """What a cause of `CAUSES`, or of a row that cannot be asked, means."""
    return CAUSES.get(cause) or UNUSABLE[cause]


def normalised(text: str) -> str:
    """An answer for comparison: case, spacing and punctuation at its end do not count."""
    return re.sub(r"\s+", " ", text).strip().casefold().rstrip(" .!")


def repetition(tokens: Sequence[int]) -> float:
    """Share, 0 to 1, of the stretches of `NGRAM` tokens that were there before in the same answer."""
    stretches = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(stretches)) / len(stretches) if stretches else 0.0
