"""Options of `vlsi-fast verbalize` and `vlsi-fast app`; imports nothing heavy."""

from __future__ import annotations

import argparse


def add_verbalize_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `verbalize` command."""
    _add_run(parser)
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="image to show; may be repeated")
    parser.add_argument("--question", help="what to ask (with --run demo: default a drawing of its test split)")
    parser.add_argument("--answer", help="what is right: layers that say it (by the run's own metric) are marked")
    parser.add_argument(
        "--compare",
        nargs="*",
        default=["base", "teacher"],
        metavar="MODEL",
        help="what stands beside the distilled student: base, teacher, or a checkpoint that fits the run's verbalizers "
        "(default: base teacher; nothing behind it: the distilled student alone)",
    )
    parser.add_argument(
        "--layers", nargs="+", type=_layer, metavar="K", help="target layers of the student, and last (default: all)"
    )
    parser.add_argument(
        "--teacher-layers", nargs="+", type=_layer, metavar="K", help="target layers of the teacher (default: all)"
    )
    parser.add_argument("--num-beams", type=_count, default=1, metavar="N", help="beams (default: 1, greedy)")
    _add_length(parser)
    parser.add_argument("--probabilities", action="store_true", help="show every token's probability and its rivals")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--html", metavar="FILE", help="write a page that needs no network as well")
    _add_device(parser)


def add_app_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `app` command."""
    _add_run(parser)
    parser.add_argument(
        "--compare", default="base", metavar="MODEL", help="base, teacher or a checkpoint (default: %(default)s)"
    )
    _add_length(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=_count, default=7860, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--max-upload-mib", type=_count, default=20, metavar="N", help="largest image file (default: %(default)s MiB)"
    )
    parser.add_argument(
        "--max-megapixels", type=_count, default=50, metavar="N", help="largest image (default: %(default)s)"
    )
    _add_device(parser)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, help="a run's output_dir; demo: the small example that is shipped")


def _add_length(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-new-tokens", type=_count, default=64, metavar="N", help="longest answer, tokens (default: %(default)s)"
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 .. (default: the GPU where there is one)")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def _layer(text: str) -> int | None:
    if text == "last":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no layer: give numbers from 1, or last")
    return int(text)
