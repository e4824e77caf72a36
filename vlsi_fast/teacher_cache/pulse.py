"""What two jobs that share a folder tell each other: small JSON files with a counter that rises while a job lives.

    CACHE/builder.json      of the builder that runs ahead (`ahead.py`): `state` (running, finished or failed),
                            `kept_from` and `position`: the rows between them are in the cache; `most_ahead` rows and
                            `most_bytes` so far
    CACHE/students/ID.json  of a run that follows (`following.py`): `reached`, `needed_from` (its last checkpoint),
                            `end`, `finished`, and what its steps look like

Positions are rows of the run's order, counted from where stage interact begins, through all its epochs. Nobody compares
two machines' clocks: each notes by its own when it last saw another's counter change.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from pathlib import Path
from typing import Any

BUILDER = "builder.json"
STUDENTS = "students"
BEAT_SECONDS = 5.0
"""Between signs of life, at most."""


def read_facts(path: Path) -> dict[str, Any] | None:
    """What a job tells; None where the file is not there, or not readable just now."""
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and "count" in facts else None


class Pulse:
    """Tells others that this process lives, and how far it is. A thread writes the file again and again.

    Args:
        path: of the file, which is replaced whole.
        timeout: seconds after which others think that a job is gone.
        facts: to tell at first.
    """

    def __init__(self, path: Path, timeout: float, **facts: Any):
        self.path, self.facts = path, facts
        self._life, self._count = uuid.uuid4().hex[:12], 0
        self._seconds = min(BEAT_SECONDS, timeout / 4)
        self._lock, self._stopped = threading.Lock(), threading.Event()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread = threading.Thread(target=self._run, name="vlsi-fast pulse", daemon=True)
        self._thread.start()

    def tell(self, **facts: Any) -> None:
        """Change what is told, at once.

        Raises:
            OSError: it cannot be written.
        """
        with self._lock:
            self.facts |= facts
            self._write()

    def stop(self) -> None:
        """No more signs of life; what was told stays."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            with self._lock:
                try:
                    self._write()
                except OSError:
                    pass  # shared storage may fail for a while; the next beat tells

    def _write(self) -> None:
        self._count += 1
        told = {"life": self._life, "count": self._count, **self.facts}
        partial = self.path.with_name(f"{self.path.name}.{self._life}.partial")
        partial.write_text(json.dumps(told) + "\n")
        partial.replace(self.path)


class Silence:
    """How long another job has given no sign of life, by this process's clock."""

    def __init__(self):
        self._seen: tuple | None = None
        self._since = time.monotonic()

    def begin(self) -> None:
        """Count from now on: nobody has looked before."""
        self._since = time.monotonic()

    def seconds(self, facts: dict[str, Any] | None) -> float:
        """Since the last change, given what the other tells now."""
        seen = (facts["life"], facts["count"]) if facts is not None else None
        if seen is not None and seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        return time.monotonic() - self._since
