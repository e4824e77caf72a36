"""Options of `vlsi-fast eval`. Imports nothing heavy: `--help` is quick."""

from __future__ import annotations

import argparse

READERS = ("qa", "llava", "messages", "hf", "easy_vqa")
"""As in `data.readers`, which a test compares."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `eval` command."""
    models = parser.add_argument_group("models", "one or more; with several, differences are taken from the first")
    models.add_argument(
        "--run",
        dest="models",
        action="append",
        type=_run,
        metavar="FOLDER",
        help="a run: its trained student; alone, it also says what to answer: data.eval of its config",
    )
    models.add_argument(
        "--model",
        dest="models",
        action="append",
        type=_model,
        metavar="FOLDER",
        help="a stock checkpoint: a folder or a Hub name",
    )
    rows = parser.add_argument_group("rows to answer")
    rows.add_argument("--config", help="YAML file of a run: its data.eval")
    rows.add_argument("--data", metavar="FILE", help="rows of a file or saved dataset, read by --reader")
    rows.add_argument("--reader", choices=READERS, help="format of --data; its fields: --data.eval.0.FIELD VALUE")
    rows.add_argument(
        "--metric",
        nargs="+",
        metavar="NAME",
        help="how answers are scored, the headline first: exact_match, relaxed_accuracy or package.module:function of "
        "(prediction, answer) -> 0 to 1; default: the sources' own",
    )
    rows.add_argument("--limit", type=_positive, metavar="N", help="only the first N rows of each source, or benchmark")
    bench = parser.add_argument_group("the paper's benchmarks, by lmms-eval")
    bench.add_argument(
        "--benchmarks", metavar="NAMES", help="e.g. mmb,mmmu, or all; --benchmarks list tells names, tasks and gaps"
    )
    bench.add_argument("--tasks", metavar="NAMES", help="further lmms-eval tasks, by lmms-eval's names")
    bench.add_argument("--include-path", metavar="FOLDER", help="folder of lmms-eval tasks of your own")
    bench.add_argument(
        "--model-args", metavar="K=V,..", help="further arguments of lmms-eval's model, e.g. max_pixels=N"
    )
    bench.add_argument("--out", metavar="FOLDER", help="where lmms-eval writes (default: RUN/benchmarks, of a --run)")
    bench.add_argument("--results", nargs="+", metavar="FOLDER", help="run nothing: show results that lmms-eval wrote")
    answers = parser.add_argument_group("answering and output")
    answers.add_argument("--num-beams", type=_positive, default=1, metavar="N", help="beams; 1 (default) is greedy")
    answers.add_argument("--batch-size", type=_positive, metavar="N", help="rows at once (default 8; benchmarks: 1)")
    answers.add_argument(
        "--max-new-tokens",
        type=_positive,
        default=128,
        metavar="N",
        help="tokens of an answer (default %(default)s); benchmarks have their own",
    )
    answers.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, float32 elsewhere"
    )
    answers.add_argument("--device", help="default: the GPU where there is one, else cpu")
    answers.add_argument("--predictions", metavar="FILE", help="write every answer to this JSONL file")
    answers.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _run(text: str) -> tuple[str, str]:
    return "run", text


def _model(text: str) -> tuple[str, str]:
    return "model", text


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: use a whole number, 1 or more")
    return int(text)
