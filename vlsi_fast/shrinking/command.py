"""`vlsi-fast shrink`: which rows to measure on, and what is printed."""

from __future__ import annotations

import argparse
import json
import sys

from ..config import load_config
from ..config_data import DataConfig
from ..config_files import ConfigError
from ..sizes import format_count, format_size
from .arguments import DEFAULT_ROWS


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Shrink. Returns the exit code: 0, 2 (bad input)."""
    rows = rows_config(arguments, overrides)
    from .student import shrink

    try:
        made = shrink(
            arguments.model,
            arguments.out,
            arguments.keep_layers,
            arguments.by,
            rows,
            arguments.limit or DEFAULT_ROWS,
            arguments.device,
            arguments.dtype,
        )
    except (ValueError, ImportError, FileNotFoundError) as error:  # of checkpoints and readers: all say what to do
        print(f"vlsi-fast: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(made.record, indent=2))
    else:
        show(made)
    return 0


def rows_config(arguments: argparse.Namespace, overrides: list[str]) -> DataConfig | None:
    """The rows that influence is measured on, as `data.train`; None without `--by influence`.

    Raises:
        ConfigError: none or two of --config and --data, or options that have no meaning here.
    """
    if arguments.by != "influence":
        given = [n for n in ("config", "data", "reader", "limit", "dtype", "device") if getattr(arguments, n)]
        if given or overrides:
            name = f"--{given[0]}" if given else overrides[0]
            raise ConfigError(f"{name} is for --by influence; add that, or remove it")
        return None
    if isinstance(arguments.keep_layers, list):
        raise ConfigError("--by influence chooses the layers, and --keep-layers names them: give a number there")
    if bool(arguments.data) != bool(arguments.reader) and arguments.reader != "easy_vqa":
        raise ConfigError("--data FILE and --reader NAME go together; give both")
    if bool(arguments.config) == bool(arguments.reader):
        both = "both say which rows; remove one" if arguments.config else "say which rows to measure on; give one"
        raise ConfigError(f"--config FILE (its data.train) and --data FILE --reader NAME {both}")
    if arguments.reader:
        from ..evaluation.command import file_rows

        return file_rows(arguments.data, arguments.reader, overrides, "train")
    return _of_model(load_config(arguments.config, overrides), arguments.model)


def _of_model(config, model: str) -> DataConfig:
    """data of a config, with the image bounds that it has for this model alone."""
    data = config.data
    for settings in (config.student, config.teacher):
        if settings.path == model:
            bounds = {name: getattr(settings, name) for name in ("min_pixels", "max_pixels")}
            data = data.model_copy(update={name: value for name, value in bounds.items() if value is not None})
    return data


def show(made) -> None:
    """Print the influence of every layer, where it was measured, and what was written."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False, markup=False)
    if made.influence:
        table = Table("layer", "influence", "")
        for k, value in enumerate(made.influence, 1):
            table.add_row(str(k), f"{value:.4f}", "kept" if k in made.kept_layers else "")
        console.print(table)
        measured = made.record["influence"]
        skipped = ", ".join(f"{cause} {n}" for cause, n in measured["skipped"].items())
        console.print(
            f"1 - mean cosine of a layer's input and output, {measured['tokens']} tokens of {measured['rows']} rows"
            + (f"; skipped rows: {skipped}" if skipped else "")
        )
    kept = ", ".join(map(str, made.kept_layers))
    console.print(
        f"{made.folder}: {len(made.kept_layers)} of {made.depth} decoder layers ({kept}), "
        f"{format_count(made.parameters)} parameters, {format_size(made.bytes)}\n"
        f"To train it: student.path: {made.folder}, student.layers: auto, teacher.layers: auto"
    )
