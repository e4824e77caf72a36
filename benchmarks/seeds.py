"""What several seeds say: means with intervals, differences paired by seed, and how far two orderings agree."""

from __future__ import annotations

import itertools
import math
import os
import platform
import statistics
from pathlib import Path

import numpy as np

STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95% quantile of Student's t for n seeds (n - 1 degrees of freedom)."""
EXACT_UP_TO = 8
"""Rows up to which a rank correlation's p-value goes over all orderings; above, over `DRAWS` random ones."""
DRAWS = 50_000


def interval(values: list[float]) -> dict[str, float | list[float] | None]:
    """Mean, half width of its 95% interval (None for one value), and the values themselves."""
    half = STUDENT_T[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "half_width_95": half, "values": values}


def ranks(values: list[float]) -> list[float]:
    """1 for the smallest; equal values share the mean of their ranks."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def spearman(xs: list[float], ys: list[float]) -> float:
    """Pearson's correlation of the ranks; NaN where all of one side are equal."""
    return _pearson(np.array(ranks(xs)), np.array(ranks(ys)))


def kendall(xs: list[float], ys: list[float]) -> float:
    """Kendall's tau-b: concordant less discordant pairs, corrected for ties; NaN where all of one side are equal."""
    return _pearson(_signs(xs), _signs(ys))


def rank_correlation(xs: list[float], ys: list[float]) -> dict[str, float | int | None]:
    """Both, with two-sided permutation p-values: the share of orderings of `ys` that agree or disagree as much."""
    n = len(xs)
    result = {"rows": n, "spearman": None, "spearman_p": None, "kendall": None, "kendall_p": None}
    if n < 3 or len(set(xs)) == 1 or len(set(ys)) == 1:
        return result
    if n <= EXACT_UP_TO:
        orders = np.array(list(itertools.permutations(range(n))))
    else:
        rng = np.random.default_rng(0)
        orders = np.vstack([np.arange(n), *(rng.permutation(n) for _ in range(DRAWS))])
    rank, sign = np.array(ranks(ys)), _signs(ys).reshape(n, n)
    for name, mine, theirs in (
        ("spearman", np.array(ranks(xs)), rank[orders]),
        ("kendall", _signs(xs), sign[orders[:, :, None], orders[:, None, :]].reshape(len(orders), -1)),
    ):
        mine = mine - mine.mean()
        scores = (theirs - theirs.mean(1, keepdims=True)) @ mine
        identity = _pearson(mine, rank if name == "spearman" else sign.ravel())
        result[name] = identity
        result[f"{name}_p"] = float(np.mean(np.abs(scores) >= abs(scores[0]) - 1e-9))  # orders[0] is that of ys
    return result


def _signs(values: list[float]) -> np.ndarray:
    """Of every ordered pair: 1, 0, -1."""
    v = np.array(values)
    return np.sign(v[:, None] - v[None]).ravel()


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else math.nan


def processor_name() -> str:
    """The CPU as the system names it."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def machine() -> dict[str, str | int | None]:
    """Processor and cores, for results."""
    return {"processor": processor_name(), "cores": os.cpu_count()}
