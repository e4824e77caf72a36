"""Tables on a terminal and in a pipe: lines are broken between words, and no word is cut."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

PIPE_WIDTH = 160
"""Columns of a table that no terminal shows, where its words need no more."""


def console(width: int | None = None) -> Console:
    """A console for text; in a pipe its lines are not broken."""
    found = Console(highlight=False, width=width)
    found.soft_wrap = not found.is_terminal
    return found


def print_table(table: Table, room: int | None = None) -> None:
    """Print a table as wide as it needs within the terminal; wider only where its longest words are.

    Args:
        table: its columns' widths are set.
        room: columns there are; None: of the terminal, or `PIPE_WIDTH` where there is none.
    """
    screen = Console(highlight=False)
    room = room or (screen.width if screen.is_terminal else PIPE_WIDTH)
    screen = Console(highlight=False, width=_fit(table, room))
    screen.print(table)


def text_of(table: Table) -> str:
    """The table as plain text, as wide as `print_table` makes it."""
    screen = Console()
    room = screen.width if screen.is_terminal else PIPE_WIDTH
    plain = Console(width=_fit(table, room), color_system=None)
    with plain.capture() as capture:
        plain.print(table)
    return capture.get()


def _fit(table: Table, room: int) -> int:
    """Set the columns' widths: every one holds its longest word, what is left goes to those with longer lines."""
    wide = Console(width=10_000)
    bounds = [_bounds(wide, [column.header, *column.cells, column.footer]) for column in table.columns]
    frame = table._extra_width + sum(table._get_padding_width(i) for i in range(len(bounds)))
    widths = _share([least for least, _ in bounds], [most for _, most in bounds], room - frame)
    for column, width in zip(table.columns, widths):
        column.width, column.overflow = width, "fold"
    title = max((_bounds(wide, [text])[0] for text in (table.title, table.caption) if text), default=1)
    return max(frame + sum(widths), title)


def _bounds(wide: Console, cells: Sequence) -> tuple[int, int]:
    found = [Measurement.get(wide, wide.options, cell) for cell in cells]
    return max(each.minimum for each in found), max(each.maximum for each in found)


def _share(least: list[int], most: list[int], room: int) -> list[int]:
    """Widths between `least` and `most`, of a sum of at most `room` or that of `least`; small wishes are met first."""
    widths, spare = list(least), room - sum(least)
    waiting = sorted(range(len(widths)), key=lambda i: most[i] - least[i])
    for place, i in enumerate(waiting):
        given = max(0, min(most[i] - least[i], spare // (len(waiting) - place)))
        widths[i] += given
        spare -= given
    return widths
