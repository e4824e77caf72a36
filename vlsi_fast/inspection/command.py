"""`vlsi-fast inspect`: print what a folder holds."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..sizes import format_count, format_size

HIDDEN = ("problems", "path", "kind", "settings", "planned")
STAGE_COLUMNS = ("state", "steps", "of", "ranks", "bytes")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Inspect. Returns the exit code: 0 all well, 1 something is missing or damaged, 2 no such folder."""
    from .folders import inspect_folder

    found = inspect_folder(arguments.path)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)
    return 1 if found["problems"] else 0


def show(found: dict[str, Any]) -> None:
    """Print what an inspector found as tables."""
    from rich.markup import escape

    from ..tabular import console as make_console

    console = make_console()
    console.print(f"[bold]{escape(found['path'])}[/bold]: {found['kind']}")
    if found["kind"] == "run":
        rows = []
        for name, stage in found["stages"].items():
            row = {"stage": name} | {key: stage[key] for key in STAGE_COLUMNS}
            rows.append(row | {"loss": stage["last_step"].get("loss"), "seconds": stage["summary"].get("seconds")})
        found = found | {"stages": rows, "parents": list(found["stages"].values())[-1]["parents"]}
    single = {key: value for key, value in found.items() if not _is_table(value) and key not in HIDDEN}
    _print(["", ""], [[key.replace("_", " "), _text(key, value)] for key, value in single.items()], False)
    if found.get("settings"):
        console.print("\n[bold]settings that differ from the defaults[/bold]")
        rows = [[name, _text(name, setting) or "none"] for name, setting in found["settings"].items()]
        _print(["", ""], rows, False)
    for key, value in found.items():
        if _is_table(value) and key not in HIDDEN:
            console.print(f"\n[bold]{key}[/bold]")
            rows = [[_text(name, cell) for name, cell in row.items()] for row in value]
            _print(list(value[0]), rows, True)
    for each in found["problems"]:
        console.print(f"\n[bold red]problem[/bold red]: {escape(each['what'])}\n    fix: {escape(each['fix'])}")


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _print(header: list[str], rows: list[list[str]], head: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    from ..tabular import print_table

    table = Table(*header, box=None, show_header=head, padding=(0, 2, 0, 0), pad_edge=False)
    for row in rows:
        if row[1] != "":
            table.add_row(*map(escape, row))
    print_table(table)


def _text(key: str, value: Any) -> str:
    """A value for readers; empty for nothing."""
    if value is None or value == {} or value == []:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(name, inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_text("", inner) for inner in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("bytes"):
        return format_size(value)
    if key.endswith("parameters") and isinstance(value, int):
        return f"{value:,} ({format_count(value)})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
