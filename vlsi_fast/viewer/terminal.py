"""What the layers say, as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..speech import Speech
from ..tabular import print_table as print_fitted
from .columns import Column
from .right import RightAnswer, is_right, probability


def visible(text: str) -> str:
    """Text with line breaks, control and other unprintable characters as escapes, so that none acts on a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def aligned(columns: Sequence[Column]) -> list[list[Speech | None]]:
    """Rows of the table: each column's answers spread evenly over those of the longest, last beside last."""
    height = max(len(column.speeches) for column in columns)
    rows: list[list[Speech | None]] = [[None] * len(columns) for _ in range(height)]
    for j, column in enumerate(columns):
        count = len(column.speeches)
        for i, speech in enumerate(column.speeches):
            rows[height - 1 if count == 1 else i * (height - 1) // (count - 1)][j] = speech
    return rows


def label(speech: Speech) -> str:
    """What to call a layer."""
    return "last layer" if speech.layer is None else f"layer {speech.layer}"


def rivals(token: str, alternatives: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """What else might have been said: up to two other tokens of at least one percent."""
    return [(other, p) for other, p in alternatives if other != token and p >= 0.01][:2]


def print_table(
    columns: Sequence[Column], question: str, probabilities: bool, answer: RightAnswer | None = None
) -> None:
    """Models side by side, layers from shallow (top) to deep; right answers are marked where `answer` is known."""
    table = Table(title=Text(visible(question)), show_lines=True)
    for column in columns:
        head = Text(visible(column.source.name), style="bold")
        table.add_column(head)
    for row in aligned(columns):
        table.add_row(*(Text() if speech is None else _cell(speech, probabilities, answer) for speech in row))
    print_fitted(table)
    console = Console(soft_wrap=True, highlight=False)
    for column in columns:
        where = f"{visible(column.source.name)}: {visible(str(column.source.checkpoint))}, {column.source.note}"
        console.print(Text(where, style="dim"))
    if answer is not None:
        console.print(Text(f"right answer: {visible(answer.text)}", style="dim"))


def _cell(speech: Speech, probabilities: bool, answer: RightAnswer | None) -> Text:
    cell = Text(f"{label(speech)}, {probability(speech):.0%} a token\n", style="")
    cell.stylize("dim")
    right = is_right(speech, answer)
    mark = {True: "✓ ", False: "✗ ", None: ""}[right]
    colour = {True: " green", False: " red", None: ""}[right]
    text = visible(speech.text) or "(nothing)"
    cell.append(mark + text, style=f"not dim bold{colour}" if speech.text else f"dim{colour}")
    if probabilities:
        for i, (token, p) in enumerate(zip(speech.tokens, speech.token_probabilities)):
            cell.append(f"\n{visible(token)!r} {p:.2f}", style="not dim green" if p >= 0.5 else "not dim yellow")
            others = [f"{visible(t)!r} {q:.2f}" for t, q in rivals(token, speech.alternatives[i])]
            cell.append("  " * bool(others) + ", ".join(others), style="dim")
    return cell
