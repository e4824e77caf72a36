"""Whether a layer says what is right, and how sure it is of what it says. Imports nothing heavy."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..evaluation.metrics import Metric, load_metrics
from ..runs import Run

if TYPE_CHECKING:
    from ..speech import Speech


@dataclass(frozen=True)
class RightAnswer:
    """What is right, and how answers are compared with it."""

    text: str
    metric: Metric

    @classmethod
    def of(cls, run: Run, text: str) -> RightAnswer:
        """Compared as `vlsi-fast eval` does for the run's first source of data.eval: by its headline metric."""
        sources = run.config.data.eval
        names = sources[0].metrics if sources and not isinstance(sources[0], str) else ["exact_match"]
        return cls(text, load_metrics(names[:1])[0])


def is_right(speech: Speech, answer: RightAnswer | None) -> bool | None:
    """Whether the metric gives the whole score of 1; None where the right answer is not known."""
    return None if answer is None else float(answer.metric.score(speech.text, answer.text, "asked here")) == 1


def probability(speech: Speech) -> float:
    """Of a token of the answer, under the layer's own distribution: the geometric mean (0 to 1; 0 for no token).

    The probability of a whole answer, the product, is near 0 for every long one.
    """
    tokens = speech.token_probabilities
    return statistics.geometric_mean(tokens) if tokens and min(tokens) > 0 else 0.0
