"""The runs that read a cache while it is built, as the builder that runs ahead of them sees them (`pulse.py`)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .pulse import STUDENTS, Silence, read_facts
from .store import CacheError


class Students:
    """The runs that read a cache, as they tell. Rank 0's.

    Args:
        folder: of the cache.
        count: how many there are to be.
        order: `order_digest` that theirs must be.
        least: rows that a step may have at most.
        timeout: seconds after which one that tells nothing is gone.
    """

    def __init__(self, folder: Path, count: int, order: str, least: int, timeout: float):
        self.folder, self.count, self.order, self.least, self.timeout = folder / STUDENTS, count, order, least, timeout
        self.told: dict[str, dict[str, Any]] = {}
        self._silences: dict[str, Silence] = {}
        self._began = Silence()

    def look(self) -> None:
        """Read what they tell.

        Raises:
            CacheError: there are too many, or one cannot be served.
        """
        told = {}
        for path in sorted(self.folder.glob("*.json")):
            facts = read_facts(path) or self.told.get(path.name)  # it may not be readable just now
            if facts is not None:
                told[path.name] = facts
                self._silences.setdefault(path.name, Silence()).seconds(facts)
        self.told = told
        if len(self.told) > self.count:
            raise CacheError(
                f"{self.folder} has {len(self.told)} runs ({', '.join(self.told)}) and --students is {self.count}: "
                "delete the files of those that are no more, or raise --students"
            )
        for name, facts in self.told.items():
            if facts["order"] != self.order:
                raise CacheError(
                    f"{self.folder / name}: that run reads its rows in another order: give builder and run the same "
                    "data, seed and verbalize stage; or, if the run is no more, delete the file"
                )
            if facts["step_rows"] > self.least:
                raise CacheError(
                    f"{self.folder / name}: that run needs {facts['step_rows']} rows for a step, and --ahead is too "
                    f"small: raise it by {facts['step_rows'] - self.least} or more"
                )

    @property
    def complete(self) -> bool:
        """Whether all have come."""
        return len(self.told) == self.count

    @property
    def finished(self) -> bool:
        """Whether all need no more."""
        return self.complete and all(facts["finished"] for facts in self.told.values())

    def first(self, name: str) -> float:
        """The least of `reached` or `needed_from`; those who are to come begin at 0."""
        found = [math.inf if facts["finished"] else facts[name] for facts in self.told.values()]
        return min([*found, *([] if self.complete else [0])])

    @property
    def needed_now(self) -> float:
        """Where the step ends that holds up the last of them."""
        return self.first("reached") + max((facts["step_rows"] for facts in self.told.values()), default=0)

    @property
    def end(self) -> int:
        """Where the last of them ends; 0 while none has come."""
        return max((facts["end"] for facts in self.told.values()), default=0)

    @property
    def again(self) -> int:
        """Rows that come again at an epoch's end."""
        return max((facts["again"] for facts in self.told.values()), default=0)

    def begin_waiting(self) -> None:
        """For those who are to come."""
        self._began.begin()

    def missing(self, until: float) -> str | None:
        """What to say of those that hold up the row before position `until`, where one is gone."""
        for name, facts in self.told.items():
            held = not facts["finished"] and facts["reached"] < until
            if held and self._silences[name].seconds(facts) >= self.timeout:
                return (
                    f"{self.folder / name}: that run has given no sign of life for {self.timeout:g} s "
                    "(teacher.cache_timeout). Start it again with --resume, and this builder, which goes on where it "
                    "was; or, if it is not to go on, delete the file and give --students one less"
                )
        if not self.complete and self._began.seconds(None) >= self.timeout:
            return (
                f"{len(self.told)} of {self.count} runs (--students) have begun to read {self.folder.parent} within "
                f"{self.timeout:g} s (teacher.cache_timeout): start them with teacher.mode cached and "
                "teacher.cache_follow true, then this builder again"
            )
        return None
