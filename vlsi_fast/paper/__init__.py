"""The numbers of the paper's tables, as printed: one JSON file a table, notes where the paper contradicts itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def load_table(name: str) -> dict[str, Any]:
    """A table of the paper (arXiv:2412.01822).

    Args:
        name: its file without ending, e.g. `table_1` or `appendix_b`.

    Returns:
        `title`; `source`; `columns`; `rows`, each with `name` and `values` (one a column, None for the paper's dash);
        `notes`.

    Raises:
        ValueError: no such table.
    """
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.json")))
        raise ValueError(f"no table {name!r} of the paper is recorded; known: {known}")
    return json.loads(path.read_text(encoding="utf-8"))
