"""A run in one sentence, made from its numbers alone: scores where there are some, else losses.

Reads plain numbers: no files, no torch. `vlsi-fast demo` prints the same sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LABELS = {"teacher": "teacher", "before": "student before", "after": "student after"}


@dataclass(frozen=True)
class Score:
    """One model's mean score on a set of questions."""

    label: str
    """In charts."""
    role: str
    """teacher, before, after (the run's student), control (the same student and labels, trained without VLsI), more
    (VLsI or not, trained on more than these labels), other."""
    mean: float
    """0 to 1."""
    interval: Sequence[float] | None = None
    """95%, 0 to 1."""

    @property
    def short(self) -> str:
        """What the sentence calls it: two numbers of steps of one control are one control there."""
        return self.label.split(",")[0]


def of_scores(scores: Sequence[Score]) -> str | None:
    """The sentence: where the student came from and got to, and whatever it must be compared with.

    A control that does better is named first, and as better. Differences below a tenth of a point are none.

    Args:
        scores: of all models, on the same questions and by the same metric.

    Returns:
        None where the run's student has no score.
    """
    by_role = {score.role: score for score in scores}
    after, before, teacher = (by_role.get(role) for role in ("after", "before", "teacher"))
    if after is None:
        return None
    text = _course(before, after)
    rivals: dict[str, Score] = {}  # the best of those that have one name
    for score in sorted((s for s in scores if s.role in ("control", "other")), key=lambda s: -s.mean):
        rivals.setdefault(score.short, score)
    named = list(rivals.values())
    if named and _points(named[0]) > _points(after):
        text += f", less than {_told(named.pop(0))}"
    beside = [f"teacher {percent(teacher.mean)}"] if teacher else []
    beside += [_told(score) for score in named if score.role == "other"]
    controls = [score for score in named if score.role == "control"]
    if len(controls) == 1:
        beside.append(_told(controls[0]))
    parts = [", ".join(beside)] if beside else []
    if len(controls) > 1:
        parts.append("on the same labels, " + ", ".join(f"{score.short} {percent(score.mean)}" for score in controls))
    return text + (f" ({'; '.join(parts)})" if parts else "") + "."


def of_losses(stage: str, first: float, last: float, steps: int) -> str:
    """The sentence of a run whose answers were not scored.

    Args:
        stage: the last one with steps.
        first: its loss at the start, nats a token.
        last: at the end.
        steps: optimizer steps of the stage.
    """
    if steps == 1:
        return f"One step of {stage} is done, at a loss of {last:.3g} nats a token; no answers were scored."
    verb = "fell" if f"{last:.3g}" != f"{first:.3g}" and last < first else "rose"
    moved = f"{verb} from {first:.3g} to {last:.3g}" if f"{last:.3g}" != f"{first:.3g}" else f"stayed at {last:.3g}"
    return f"The loss of {stage} {moved} nats a token in {steps:,} steps; no answers were scored."


NOTHING = "No optimizer step of this run is recorded yet."


def percent(share: float) -> str:
    """0.9653 -> 96.5%."""
    return f"{100 * share:.1f}%"


def _course(before: Score | None, after: Score) -> str:
    if before is None:
        return f"The student is at {percent(after.mean)}"
    if _points(after) == _points(before):
        return f"The student stayed at {percent(after.mean)}"
    way = f"went from {percent(before.mean)} to {percent(after.mean)}"
    return f"The student {way}" if after.mean > before.mean else f"The student got worse: it {way}"


def _told(score: Score) -> str:
    return f"{score.short}{' on the same labels' * (score.role == 'control')} {percent(score.mean)}"


def _points(score: Score) -> float:
    return round(100 * score.mean, 1)
