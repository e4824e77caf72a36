"""How far a share of right answers, and the difference of two on the same rows, can be trusted.

Letters: n rows, x of them right, b rows that only the first model has right, c rows that only the second has right.
"""

from __future__ import annotations

import math

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
    rows, first, second = n + 2, b + 0.5, c + 0.5
    middle = (second - first) / rows
    half = Z95 * math.sqrt((first + second) - (second - first) ** 2 / rows) / rows
    return max(-1.0, middle - half), min(1.0, middle + half)
