"""How far a share of right answers or a mean score, and the difference of two on the same rows, can be trusted.

Letters: n rows, x of them right, b rows that only the first model has right, c rows that only the second has right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054
"""Standard normal quantile of a two-sided 95% interval."""


def wilson(x: int, n: int) -> tuple[float, float]:
    """95% interval of a share x / n, by Wilson's score (1927): sound for shares near 0 and 1 and for few rows."""
    if not 0 <= x <= n or n == 0:
        raise ValueError(f"{x} right of {n} rows is no share; pass 0 <= x <= n, n >= 1")
    share, z2 = x / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # at the ends the exact bound is 0 or 1; rounding may miss it
    return (0.0 if x == 0 else middle - half), (1.0 if x == n else middle + half)


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p-value of McNemar's test (1947): could b and c rows be as unequal if both models were as good?

    Rows that both have right, or both wrong, say nothing about it. Where b = c the p-value is 1.
    """
    discordant, below = b + c, min(b, c)
    ways, total = 1, 0  # whole numbers, however many rows there are
    for k in range(below + 1):
        total += ways
        ways = ways * (discordant - k) // (k + 1)
    return min(1.0, 2 * total / 2**discordant)


def paired_difference(b: int, c: int, n: int) -> tuple[float, float]:
    """95% interval of the second model's share less the first's, (c - b) / n, on the same n rows.

    Wald's interval after half a row is added to each cell of the 2 x 2 table (Agresti and Min, 2005).
    """
    if min(b, c) < 0 or b + c > n or n == 0:
        raise ValueError(f"{b} and {c} of {n} rows is no table of pairs; pass b, c >= 0, b + c <= n, n >= 1")
    return _padded(c - b, b + c, n, DIFFERENCES)


def mean_score(scores: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean of scores of 0 to 1.

    The normal interval after two rows of score 0 and two of score 1 are added: for scores of 0 and 1 alone that is
    Agresti and Coull's (1998), and it keeps a width where few rows, or rows all alike, show no spread of their own.
    """
    return _padded(sum(scores), sum(x * x for x in scores), len(scores), SCORES)


def mean_difference(differences: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean of differences of -1 to 1, one for each row that two models answered.

    As `paired_difference`, which it is for differences of -1, 0 and 1: half a row of -1, half a row of 1 and one of 0
    are added.
    """
    total, squares = sum(differences), sum(x * x for x in differences)
    return _padded(total, squares, len(differences), DIFFERENCES)


@dataclass(frozen=True)
class _Padding:
    """Rows that are added before Wald's interval is taken, and the least a value can be (the most is 1)."""

    least: float
    total: float
    squares: float
    rows: int


SCORES = _Padding(0.0, 2.0, 2.0, 4)
DIFFERENCES = _Padding(-1.0, 0.0, 1.0, 2)


def _padded(total: float, squares: float, n: int, padding: _Padding) -> tuple[float, float]:
    if n == 0:
        raise ValueError("no scores, no interval; pass at least one")
    rows = n + padding.rows
    middle = (total + padding.total) / rows
    half = Z95 * math.sqrt(max(0.0, (squares + padding.squares) / rows - middle**2) / rows)
    return max(padding.least, middle - half), min(1.0, middle + half)
