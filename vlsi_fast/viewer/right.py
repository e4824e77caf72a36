"""Whether a layer says what is right, and how sure it is of what it says. Imports nothing heavy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..evaluation.metrics import exact_match

if TYPE_CHECKING:
    from ..speech import Speech


def is_right(speech: Speech, answer: str | None) -> bool | None:
    """Exact match with the right answer, as `vlsi-fast eval` counts it; None where that is not known."""
    return None if answer is None else exact_match(speech.text, answer)


def probability(speech: Speech) -> float:
    """Of the whole answer, under the layer's own distribution: the product of its tokens' (0 to 1)."""
    return math.prod(speech.token_probabilities)
