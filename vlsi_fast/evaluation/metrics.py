"""When an answer counts as right, and what type of question it answers."""

from __future__ import annotations

import math
from collections.abc import Callable

RELAXED_TOLERANCE = 0.05
"""Share of the true number by which an answer may differ (ChartQA, arXiv:2203.10244, section 5.1)."""


def normalise(text: str) -> str:
    """Answers are compared without case and surrounding space."""
    return " ".join(text.split()).lower()


def exact_match(prediction: str, answer: str) -> bool:
    """Whether both are the same word for word."""
    return normalise(prediction) == normalise(answer)


def relaxed_match(prediction: str, answer: str) -> bool:
    """ChartQA's relaxed accuracy: a number may be 5% off, anything else must be the same word for word.

    As in the evaluation that is commonly used: 12% is the number 0.12, and where the true answer is 0 or no number,
    or the prediction is none, the words are compared.
    """
    found, true = _number(prediction), _number(answer)
    if found is None or not true:
        return exact_match(prediction, answer)
    return abs(found - true) / abs(true) <= RELAXED_TOLERANCE


METRICS: dict[str, Callable[[str, str], bool]] = {"exact_match": exact_match, "relaxed_accuracy": relaxed_match}


def question_type(answer: str) -> str:
    """Type of a question by its true answer: `yes/no`, `choice` (a letter, as A or (A)), `number` or `other`."""
    word = normalise(answer).rstrip(".")
    if word in ("yes", "no"):
        return "yes/no"
    if len(word.strip("()")) == 1 and "a" <= word.strip("()") <= "z":
        return "choice"
    return "other" if _number(word.replace(",", "")) is None else "number"


def _number(text: str) -> float | None:
    """A finite number, `12%` being 0.12; None for anything else."""
    text = text.strip()
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
