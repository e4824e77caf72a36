"""Options of `vlsi-fast teacher`. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..sizes import parse_size

AHEAD = 1024
OVERRIDES = "Any option of the config can be overridden: --section.field VALUE."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`teacher`'s own commands and options."""
    commands = parser.add_subparsers(dest="teacher_command", required=True)
    build = commands.add_parser(
        "build",
        help="run the teacher over rows and keep what it says, for teacher.mode cached",
        epilog=f"{OVERRIDES} On several GPUs: deepspeed --module vlsi_fast teacher build --config ..",
    )
    build.add_argument("--config", required=True, metavar="FILE", help="YAML file of the run")
    build.add_argument("--out", type=Path, metavar="CACHE", help="folder of the cache (default: the config's)")
    build.add_argument(
        "--form",
        choices=("targets", "hidden"),
        default="targets",
        help="targets: all that the forward KL needs, for students with this head; hidden: the teacher's states, for "
        "any student, divergence and temperature (default: %(default)s)",
    )
    build.add_argument(
        "--numbers",
        choices=("float32", "float16", "bfloat16", "int8"),
        help="of targets: float32 is exact, the others take 2, 2 and 4 times less (default: float16)",
    )
    build.add_argument("--layers", type=_layers, metavar="K,K,..", help="some of its target layers (default: all)")
    build.add_argument(
        "--rows",
        type=_positive,
        metavar="N",
        help="the first N of the order (default: as many as interact reads on these ranks)",
    )
    build.add_argument("--source", metavar="NAME", help="only rows of this source, all of them")
    build.add_argument(
        "--split",
        choices=("train", "eval"),
        default="train",
        help="rows of data.train or data.eval (default: %(default)s)",
    )
    build.add_argument(
        "--shard-size", type=parse_size, default=256 * 2**20, metavar="SIZE", help="of a file, about (default: 256MiB)"
    )
    build.add_argument(
        "--follow",
        action="store_true",
        help="beside a run with teacher.cache_follow: keep ahead of it, and delete what it has used",
    )
    build.add_argument(
        "--ahead",
        type=_positive,
        metavar="N",
        help=f"with --follow: rows that it may be ahead of the run (default: {AHEAD})",
    )
    build.add_argument("--keep", action="store_true", help="with --follow: delete nothing")
    build.add_argument(
        "--students", type=_positive, metavar="K", help="with --follow: runs that read the cache (default: 1)"
    )
    build.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)  # from deepspeed
    check = commands.add_parser("check", help="compare a cache with the teacher itself, on some rows", epilog=OVERRIDES)
    check.add_argument("--config", required=True, metavar="FILE", help="YAML file of the run")
    check.add_argument("--cache", type=Path, metavar="CACHE", help="folder of the cache (default: the config's)")
    check.add_argument("--rows", type=_positive, default=8, metavar="N", help="rows to compare (default: %(default)s)")
    verify = commands.add_parser("verify", help="compare a cache's files with what was written")
    verify.add_argument("cache", type=Path)
    verify.add_argument("--quick", action="store_true", help="sizes only, no checksums")
    merge = commands.add_parser("merge", help="join caches of different rows into one")
    merge.add_argument("caches", type=Path, nargs="+")
    merge.add_argument("--out", type=Path, required=True, metavar="CACHE", help="folder to write, new or a cache")
    for command in (build, check, verify, merge):
        command.add_argument("--json", action="store_true", help="print the result as JSON")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rows; give 1 or more")
    return int(text)


def _layers(text: str) -> list[int]:
    try:
        return sorted({int(k) for k in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers; write e.g. 10,30,50") from None
