"""`vlsi-fast data answer`: a teacher's answers to pictures without labels, as rows to train on.

Reading order: run.py (the course), prompts.py (what is asked), decoding.py (how answers are drawn), asking.py (a
batch), filters.py (what is kept), parts.py (what an interruption leaves), meeting.py (several ranks), teacher.py.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # the options of `vlsi-fast data` are read without torch and transformers
    if name == "answer":
        from .run import answer

        return answer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
