"""The `vlsi-fast` command and `train.py`: one table of commands, each with its options and its example.

A command is a line in `COMMANDS`. Its options come from a module that imports nothing heavy, so that `--help` and shell
completion are quick; its `main(arguments, overrides) -> exit code` is imported only when it runs. Exit codes: 0 all
well, 1 something did not work, 2 bad input.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import textwrap
from dataclasses import dataclass

from . import __version__
from .errors import SELF_EXPLAINING, UserError
from .terminal import hush, say

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""
DESCRIPTION = """Distil a large vision-language model into a small one with VLsI.

In Python:
    from vlsi_fast import load_config, run
    run(load_config("configs/demo.yaml"), stage="all")"""
STAGE_CHOICES = ("verbalize", "interact", "sft", "all")


@dataclass(frozen=True)
class Command:
    """One command of `vlsi-fast`."""

    name: str
    summary: str
    """A line for `vlsi-fast --help`."""
    options: str
    """`module:function` that adds its options to a parser."""
    main: str
    """`module:function`, called as (arguments, overrides)."""
    examples: str
    """Shown below the options."""
    takes_overrides: bool = False
    """Whether `--section.field VALUE` of the config may follow."""


COMMANDS = (
    Command(
        "demo",
        "distil a tiny model that describes drawings, end to end, minutes on a laptop",
        ".demo.run:add_arguments",
        ".demo.run:main",
        "vlsi-fast demo --fresh",
    ),
    Command(
        "train",
        "run stages of a config (in one process; see train.py for launchers)",
        ".cli:add_train_arguments",
        ".cli:train",
        "vlsi-fast train --stage all --config configs/demo.yaml --output_dir runs/mine",
        takes_overrides=True,
    ),
    Command(
        "plan",
        "memory, time and communication of a run, on paper",
        ".planner.arguments:add_plan_arguments",
        ".planner.report:main",
        "vlsi-fast plan --config configs/qwen2vl_72b_to_7b.yaml --gpus 8 --gpu-memory 80GiB",
        takes_overrides=True,
    ),
    Command(
        "check",
        "look at everything that a run needs, before it starts",
        ".planner.arguments:add_check_arguments",
        ".planner.checks.command:main",
        "vlsi-fast check --config configs/demo.yaml\n"
        "  vlsi-fast check --config configs/qwen2vl_72b_to_7b.yaml --dry-run --gpu h200",
        takes_overrides=True,
    ),
    Command(
        "data",
        "convert, check and count the rows of a config",
        ".data.command:add_arguments",
        ".data.command:main",
        "vlsi-fast data stats --config configs/demo.yaml",
        takes_overrides=True,
    ),
    Command(
        "teacher",
        "keep what a teacher says on disk, so that interact trains without it",
        ".teacher_cache.arguments:add_arguments",
        ".teacher_cache.command:main",
        "vlsi-fast teacher build --config configs/demo.yaml\n"
        "  deepspeed --module vlsi_fast teacher build --config configs/qwen2vl_72b_to_2b.yaml --out /data/cache\n"
        "  vlsi-fast teacher check --config configs/demo.yaml\n"
        "  vlsi-fast teacher verify runs/mine/teacher_cache",
        takes_overrides=True,
    ),
    Command(
        "shrink",
        "make a student of a teacher by leaving out decoder layers",
        ".shrinking.arguments:add_arguments",
        ".shrinking.command:main",
        "vlsi-fast shrink --model Qwen/Qwen2-VL-7B-Instruct --keep-layers 14 --out runs/students/qwen2vl_7b_14_layers\n"
        "  vlsi-fast shrink --model vlsi_fast/demo/models/teacher --keep-layers 1,3,5,7 --out runs/students/demo\n"
        "  vlsi-fast shrink --model MODEL --keep-layers 14 --by influence --config configs/demo.yaml --out STUDENT",
        takes_overrides=True,
    ),
    Command(
        "verbalize",
        "what each target layer answers: base student, distilled student, teacher",
        ".viewer.options:add_verbalize_arguments",
        ".viewer.command:main",
        "vlsi-fast verbalize --run demo\n"
        "  vlsi-fast verbalize --run runs/mine --image cat.png --question 'what is it?' --html cat.html",
    ),
    Command(
        "app",
        "a local page to ask two models and see every layer's answer",
        ".viewer.options:add_app_arguments",
        ".viewer.app:main",
        "vlsi-fast app --run demo",
    ),
    Command(
        "report",
        "one HTML page of a run: accuracy, cost, layers, matches; several runs compared",
        ".report.command:add_arguments",
        ".report.command:main",
        "vlsi-fast report runs/demo --open",
    ),
    Command(
        "eval",
        "score checkpoints on your rows, or on the paper's benchmarks",
        ".evaluation.arguments:add_arguments",
        ".evaluation.command:main",
        "vlsi-fast eval --run runs/demo --model runs/demo/start/student\n"
        "  vlsi-fast eval --model Qwen/Qwen2-VL-2B-Instruct --data rows.jsonl --reader messages\n"
        "  vlsi-fast eval --run runs/mine --benchmarks mmb,mmmu,mmstar",
        takes_overrides=True,
    ),
    Command(
        "export",
        "write a run's student as a checkpoint to publish, with a model card",
        ".export.arguments:add_arguments",
        ".export.command:main",
        "vlsi-fast export --run runs/demo --out exported/demo-student --license apache-2.0",
    ),
    Command(
        "inspect",
        "tell what a folder holds: a run, a stage, a checkpoint, verbalizers, data",
        ".inspection.arguments:add_arguments",
        ".inspection.command:main",
        "vlsi-fast inspect runs/demo",
    ),
    Command(
        "completion",
        "print a script that completes these commands in a shell",
        ".completion:add_arguments",
        ".completion:main",
        'eval "$(vlsi-fast completion bash)"      # or add the output to your shell\'s completions',
    ),
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `vlsi-fast` with all commands."""
    parser = argparse.ArgumentParser(
        prog="vlsi-fast",
        description=DESCRIPTION,
        epilog="vlsi-fast COMMAND --help tells more of each, with an example.",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"vlsi-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS:
        child = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        _named(command.options)(child)
        child.epilog = f"example:\n  {command.examples}"
        if command.takes_overrides:
            child.epilog = f"any option of the config can be overridden: --section.field VALUE\n\n{child.epilog}"
        _add_verbose(child)
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions and examples keep their lines, and every command has its summary beside it."""

    def __init__(self, prog: str, **options):
        super().__init__(prog, max_help_position=26, **options)

    def add_argument(self, action):
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):  # argparse forgets that their names are indented
            self._action_max_length += 2


def _add_verbose(parser: argparse.ArgumentParser) -> None:
    """`--verbose`, wherever among a command's words it stands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                _add_verbose(child)
    parser.add_argument(
        "--verbose", action="store_true", default=argparse.SUPPRESS, help="show all that the libraries have to say"
    )


def main(argv: list[str] | None = None) -> int:
    """The `vlsi-fast` command. Returns the exit code."""
    parser = build_parser()
    try:
        arguments, overrides = parser.parse_known_args(argv)
    except BrokenPipeError:
        return _reader_left()
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    if "verbose" not in arguments:
        hush()
    command = next(c for c in COMMANDS if c.name == arguments.command)
    if overrides and not command.takes_overrides:
        parser.error(f"unknown arguments: {' '.join(overrides)}")
    try:
        return _named(command.main)(arguments, overrides)
    except SELF_EXPLAINING as error:
        return report(error, exit_code(error))
    except KeyboardInterrupt:
        say("stopped")
        return INTERRUPTED
    except BrokenPipeError:
        return _reader_left()


def _reader_left() -> int:
    """The reader of our output (`| head`) has had enough: no error, and nothing more to write at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _named(path: str):
    module, name = path.split(":")
    return getattr(importlib.import_module(module, __package__), name)


def exit_code(error: Exception) -> int:
    """Of a command that ends with one of `SELF_EXPLAINING`."""
    return error.exit_code if isinstance(error, UserError) else 2


def report(error: BaseException, code: int) -> int:
    """Errors whose message is the whole story: no traceback, and once a machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0" or (isinstance(error, UserError) and error.of_one_rank):
        say(str(error))
    return code


# ---- train ----


class _ListOptions(argparse.Action):
    """`--options`: print every option of the config with its default and meaning."""

    def __call__(self, parser, namespace, values, option_string=None):
        from .config import RunConfig, field_names

        width = max(40, shutil.get_terminal_size().columns - 2)
        for name, info in field_names(RunConfig).items():
            default = "required" if info.is_required() else repr(info.get_default(call_default_factory=True))
            print(f"--{name}   (default: {default})" if default != "required" else f"--{name}   (required)")
            meaning = " ".join((info.description or "").split())
            lines = textwrap.wrap(meaning, width - 4, break_long_words=False, break_on_hyphens=False)
            print(textwrap.indent("\n".join(lines), "    "))
        parser.exit()


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `train` and `train.py`."""
    stage = "which stage to run, or all: those of the config's `stages`, in order"
    parser.add_argument("--stage", required=True, choices=STAGE_CHOICES, help=stage)
    parser.add_argument("--config", required=True, help="YAML file of the run, e.g. configs/demo.yaml")
    parser.add_argument("--resume", action="store_true", help="continue this run from its last checkpoint")
    parser.add_argument("--options", nargs=0, action=_ListOptions, help="list every --section.field with its meaning")
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)  # from deepspeed


def train_main(argv: list[str] | None = None) -> int:
    """`train.py`: parse `--stage --config [--resume] [--field value ..]`, run. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Run stages of VLsI. Any option of the config can be overridden: --section.field VALUE.",
        allow_abbrev=False,
    )
    add_train_arguments(parser)
    _add_verbose(parser)
    arguments, overrides = parser.parse_known_args(argv)
    if "verbose" not in arguments:
        hush()
    return train(arguments, overrides)


def train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Run stages. Returns the exit code."""
    from .config import load_config

    try:
        config = load_config(arguments.config, overrides)
    except SELF_EXPLAINING as error:
        return report(error, exit_code(error))
    try:
        return _train(config, arguments)
    except SELF_EXPLAINING as error:
        return report(error, exit_code(error))
    except KeyboardInterrupt:
        report(KeyboardInterrupt(_where(config)), INTERRUPTED)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            os._exit(INTERRUPTED)  # the other ranks are gone, or wait in a collective: no tidy end is to be had
        return INTERRUPTED


def _where(config) -> str:
    """Where Ctrl-C found a run, and where it goes on from."""
    from .checkpoints import last_checkpoint

    place = sys.modules["vlsi_fast.ranks.watch"].watch.place if "vlsi_fast.ranks.watch" in sys.modules else ""
    stage = next((name for name in STAGE_CHOICES if place.startswith(f"stage {name},")), None)
    if stage is None:
        return "stopped before training"
    checkpoint = last_checkpoint(config.stage_dir(stage))
    begun = f"step {checkpoint.rsplit('-', 1)[1]}" if checkpoint else "the start of that stage"
    return f"stopped in {place}; continue from {begun} with --resume"


def _train(config, arguments: argparse.Namespace) -> int:
    import torch

    from .stages import run

    run(config, arguments.stage, arguments.resume)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0
