"""Command lines: `train.py` / `vlsi-fast train`, `vlsi-fast demo`, `plan`, `check` and `data`."""

from __future__ import annotations

import argparse
import os
import sys

from . import __version__

STAGE_CHOICES = ("verbalize", "interact", "sft", "all")


class _ListOptions(argparse.Action):
    """`--options`: print every option of the config with its default and meaning."""

    def __call__(self, parser, namespace, values, option_string=None):
        from rich.console import Console
        from rich.table import Table

        from .config import RunConfig, field_names

        table = Table("option", "default", "meaning")
        for name, info in field_names(RunConfig).items():
            default = "required" if info.is_required() else repr(info.get_default(call_default_factory=True))
            table.add_row(f"--{name}", default, " ".join((info.description or "").split()))
        Console().print(table)
        parser.exit()


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", required=True, choices=STAGE_CHOICES, help="which stage to run, or all in order")
    parser.add_argument("--config", required=True, help="YAML file of the run, e.g. configs/demo.yaml")
    parser.add_argument("--resume", action="store_true", help="continue this run from its last checkpoint")
    parser.add_argument("--options", nargs=0, action=_ListOptions, help="list every --section.field with its meaning")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # from deepspeed


def train_main(argv: list[str] | None = None) -> int:
    """Parse `--stage --config [--resume] [--field value ..]`, run. Returns the exit code (2: bad input)."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Run stages of VLsI. Any option of the config can be overridden: --section.field VALUE.",
        allow_abbrev=False,
    )
    _add_train_arguments(parser)
    arguments, overrides = parser.parse_known_args(argv)
    return _train(arguments, overrides)


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from .config import ConfigError, load_config

    try:
        config = load_config(arguments.config, overrides)
    except (ConfigError, FileNotFoundError) as error:
        return _report(error, 2)
    import torch

    from .data import AnswerMismatchError, NoUsableRowError, TooManySkippedRows
    from .lineage import LineageError
    from .stages import NonFiniteLossError, run

    try:
        run(config, arguments.stage, arguments.resume)
    except (ConfigError, LineageError, FileNotFoundError) as error:
        return _report(error, 2)
    except (AnswerMismatchError, NoUsableRowError, NonFiniteLossError, TooManySkippedRows) as error:
        return _report(error, 1)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _look_ahead(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """`plan` and `check`: 0 all well, 1 something will not work, 2 bad input."""
    from .config import ConfigError, load_config
    from .planner.report import main as plan
    from .preflight import main as check

    try:
        config = load_config(arguments.config, overrides)
        return (plan if arguments.command == "plan" else check)(config, arguments)
    except (ConfigError, FileNotFoundError) as error:
        return _report(error, 2)


def _report(error: Exception, code: int) -> int:
    """Errors whose message is the whole story: no traceback, and once a machine."""
    # What every rank finds is said once a machine; what one rank's rows did, by that rank.
    if os.environ.get("LOCAL_RANK", "0") == "0" or type(error).__name__ in ("AnswerMismatchError", "NoUsableRowError"):
        print(f"vlsi-fast: {error}", file=sys.stderr, flush=True)
    return code


def main(argv: list[str] | None = None) -> int:
    """The `vlsi-fast` command."""
    parser = argparse.ArgumentParser(prog="vlsi-fast", description=__import__("vlsi_fast").__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"vlsi-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="run stages of a config (in one process; see train.py for launchers)")
    _add_train_arguments(train)
    demo = commands.add_parser("demo", help="distil a tiny model end to end on easy-VQA, minutes on a laptop")
    from .demo.run import add_arguments

    add_arguments(demo)
    data = commands.add_parser("data", help="convert, check and count the rows of a config", allow_abbrev=False)
    from .data.command import add_arguments as add_data_arguments
    from .planner.arguments import add_check_arguments, add_plan_arguments

    add_data_arguments(data)
    add_plan_arguments(commands.add_parser("plan", help="memory, time and communication of a run, on paper"))
    add_check_arguments(commands.add_parser("check", help="look at everything that a run needs, before it starts"))
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.command == "train":
        return _train(arguments, overrides)
    if arguments.command in ("plan", "check"):
        return _look_ahead(arguments, overrides)
    if arguments.command == "data":
        from .data.command import main as data_main

        if arguments.data_command != "verify" or not overrides:
            return data_main(arguments, overrides)
    if overrides:
        parser.error(f"unknown arguments: {' '.join(overrides)}")
    from .demo.run import main as demo_main

    return demo_main(arguments)
