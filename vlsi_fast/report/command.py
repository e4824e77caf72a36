"""`vlsi-fast report RUN [RUN ..]`."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path

DEFAULT_NAME = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `report` command."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run; several are compared")
    parser.add_argument("--out", type=Path, help=f"file to write (default: {DEFAULT_NAME} in the first run's folder)")
    parser.add_argument(
        "--results", nargs="+", type=Path, default=[], metavar="FILE", help="JSON files of `vlsi-fast eval --json`"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=4,
        help="rows that every layer answers; 0: none, and no model is loaded (default: %(default)s)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of such an answer (default: %(default)s)")
    parser.add_argument("--open", action="store_true", help="show it in the browser")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Write the page and print its path. Returns the exit code."""
    path = write_report(arguments.runs, arguments.out, arguments.results, arguments.samples, arguments.max_new_tokens)
    print(path)
    if arguments.open:
        webbrowser.open(path.resolve().as_uri())
    return 0


def write_report(
    folders: list, out: Path | None = None, results: list[Path] = (), samples: int = 4, max_new_tokens: int = 64
) -> Path:
    """Write one page about one or several runs.

    Args:
        folders: output_dir of each run.
        out: the file; default `report.html` in the first run's folder.
        results: JSON files of `vlsi-fast eval --json`, for the headline.
        samples: rows of data.eval (else data.train) that every layer of base student, trained student and teacher
            answers; 0: none.
        max_new_tokens: length of these answers.

    Returns:
        The file.

    Raises:
        FileNotFoundError: a folder holds no run; a file of results is missing.
        ConfigError: a file of results holds no accuracy; numbers out of range.
    """
    from ..config import ConfigError
    from ..runs import open_run
    from .collect import read_results
    from .page import build_page
    from .samples import what_layers_say

    if samples < 0 or max_new_tokens < 1:
        raise ConfigError("--samples must be 0 or more, --max-new-tokens 1 or more")
    runs = [open_run(folder) for folder in folders]
    found = [row for path in results for row in read_results(path)]
    said = {run.folder: what_layers_say(run, samples, max_new_tokens) for run in runs} if samples else {}
    out = out or runs[0].folder / DEFAULT_NAME
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(build_page(runs, found, said), encoding="utf-8")
    partial.replace(out)
    return out
