"""`vlsi-fast completion SHELL`: shell completion, written by shtab from the very parser that the command uses."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `completion` command."""
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="for which shell")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print the script. Returns the exit code."""
    import shtab

    from .cli import build_parser

    print(shtab.complete(build_parser(), shell=arguments.shell))
    return 0
