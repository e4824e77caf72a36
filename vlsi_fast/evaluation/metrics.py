"""How an answer is scored, and what type of question it answers.

A metric is a function of the prediction and the true answer, both text, that returns 0 to 1, or True and False. A
source's `metric` names those of its rows: built-in ones, or `package.module:function`.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config_data import METRIC_NAMES, check_metric_name
from ..config_files import ConfigError

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


METRICS: dict[str, Callable[[str, str], bool]] = dict(zip(METRIC_NAMES, (exact_match, relaxed_match)))
"""The built-in ones, by the names that a source's `metric` may have; a source that names none has all of them."""
MIXED = "headline"
"""Name of the scores of all rows by their own sources' first metrics, where these are not the same."""
TITLES = {
    "exact_match": "exact match",
    "relaxed_accuracy": "relaxed accuracy (numbers may be 5% off)",
    MIXED: "each source's first metric",
}
RESERVED = {MIXED, "id", "source", "type", "question", "answer", "prediction", "model", "path", "skipped"}
"""What else stands beside scores in files."""


@dataclass(frozen=True)
class Metric:
    """A function that scores answers, and what it is called in tables and files."""

    name: str
    """That of the function, or of the built-in metric."""
    origin: str
    """As written in the config: name of a built-in metric, or `package.module:function`."""
    function: Callable[[str, str], float | bool]

    def score(self, prediction: str, answer: str, row: str) -> float | bool:
        """Score of one row, 0 to 1.

        Args:
            prediction: the model's answer.
            answer: the true one.
            row: id of the row, for messages.

        Raises:
            ConfigError: the function failed, or returned something else than a number of 0 to 1.
        """
        try:
            value = self.function(prediction, answer)
        except Exception as error:
            raise ConfigError(
                f"metric {self.origin} failed on row {row} (answer {answer!r}, prediction {prediction!r}): "
                f"{type(error).__name__}: {error}; it must take any two texts"
            ) from error
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number <= 1:
            raise ConfigError(
                f"metric {self.origin} returned {value!r} on row {row} (answer {answer!r}, prediction {prediction!r}); "
                "it must return a number of 0 to 1, or True or False"
            )
        return value if isinstance(value, bool) else number


def load_metrics(names: Sequence[str], field: str = "metric") -> list[Metric]:
    """Import the functions behind metrics' names. Modules are also looked for in the working directory.

    Args:
        names: built-in names or `package.module:function`.
        field: where they stand, for messages.

    Raises:
        ConfigError: a module or function that is not there, or two metrics of one name.
    """
    found: dict[str, Metric] = {}
    for origin in names:
        try:
            check_metric_name(origin)
        except ValueError as error:
            raise ConfigError(f"{field}: {error}") from None
        function = METRICS.get(origin) or _import(origin, field)
        name = origin.rpartition(":")[2]
        if name in found or name in RESERVED:
            taken = "is a word that result files use" if name in RESERVED else "is named twice"
            raise ConfigError(f"{field}: {name} {taken}; rename the function, or name it once")
        found[name] = Metric(name, origin, function)
    return list(found.values())


def metrics_of_sources(names: Sequence[Sequence[str]], field: str) -> list[list[Metric]]:
    """`load_metrics` for each of several sources.

    Args:
        names: of each source's metrics.
        field: where the sources stand in the config, for messages.

    Raises:
        ConfigError: as `load_metrics`; two functions of one name.
    """
    found = [load_metrics(each, f"{field}.{i}.metric") for i, each in enumerate(names)]
    origins: dict[str, str] = {}
    for metric in (metric for each in found for metric in each):
        if origins.setdefault(metric.name, metric.origin) != metric.origin:
            raise ConfigError(
                f"{field}: {origins[metric.name]} and {metric.origin} would be one metric, {metric.name}; rename one"
            )
    return found


def _import(origin: str, field: str) -> Callable[[str, str], float | bool]:
    module, _, name = origin.partition(":")
    here = str(Path.cwd())
    sys.path.append(here)  # last, so that nothing there hides an installed package
    try:
        function = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # whatever the module does when it is imported
        raise ConfigError(
            f"{field}: {module} cannot be imported ({type(error).__name__}: {error}); install it, or start from the "
            f"folder that holds it (now {here})"
        ) from error
    finally:
        sys.path.remove(here)
    if not callable(function):
        raise ConfigError(f"{field}: {module} has no function {name}; write it as package.module:function")
    return function


def title(metric: str) -> str:
    """A metric's name for people."""
    return TITLES.get(metric) or re.sub(r"\bf1\b", "F1", metric.replace("_", " ").strip())


def is_graded(values: Iterable[float | bool]) -> bool:
    """Whether some score is neither 0 nor 1."""
    return any(value not in (0, 1) for value in values)


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
