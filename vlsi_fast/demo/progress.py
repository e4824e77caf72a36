"""How far the whole demo is: a line a part, and on a terminal a bar with the time that is left."""

from __future__ import annotations

import time
from contextlib import contextmanager


class Progress:
    """Parts of known shares, done one after another.

    Args:
        parts: title -> about how long it takes, in any unit.
    """

    def __init__(self, parts: dict[str, float]):
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self.console = Console(highlight=False, soft_wrap=True)
        self.parts, self.done, self.title, self.began = parts, 0.0, "", time.perf_counter()
        self.seconds: dict[str, float] = {}
        """Title -> what it took."""
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
        self._bar = Bar(
            *columns,
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=1.0, left="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    @contextmanager
    def part(self, title: str):
        """Around the work of one part."""
        self.title, began = title, time.perf_counter()
        number = list(self.parts).index(title) + 1
        self.say(f"[bold]{number} of {len(self.parts)}: {title}[/bold]  {self.left()}")
        self.at(0.0)
        yield
        self.seconds[title] = time.perf_counter() - began
        self.done += self.parts[title]
        self.title = ""

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text)

    def share(self, of_part: float = 0.0) -> float:
        """Share of all parts that is done."""
        return (self.done + of_part * self.parts.get(self.title, 0.0)) / sum(self.parts.values())

    def at(self, of_part: float) -> None:
        """Show that so much (0 to 1) of the current part is done."""
        share = self.share(of_part)
        self._bar.update(self._task, completed=share, description=self.title, left=self.left(of_part))

    def left(self, of_part: float = 0.0) -> str:
        """About how long it will still take, at the speed so far."""
        share, passed = self.share(of_part), time.perf_counter() - self.began
        if share < 0.02:
            return ""
        minutes = passed * (1 - share) / share / 60
        return f"about {minutes:.0f} min left" if minutes >= 1 else "less than a minute left"
