"""Options of `vlsi-fast data answer`. Imports nothing heavy: `--help` is quick."""

from __future__ import annotations

import argparse

EXAMPLES = """\
Any option of the config can be overridden: --teacher.mode nf4, --data.max_pixels 200000.

examples:
  vlsi-fast data answer --config configs/mine.yaml --images pictures/ --questions "What is shown?" --out answered.jsonl
  vlsi-fast data answer --model Qwen/Qwen2-VL-7B-Instruct --images rows.jsonl --temperature 1 --samples 4 \\
      --min-agreement 0.75 --out answered.jsonl
  torchrun --nproc-per-node 8 -m vlsi_fast data answer --config configs/mine.yaml ..     (or: deepspeed --module)

Started again, it goes on with what is missing."""


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `data answer` command."""
    parser.epilog = EXAMPLES
    who = parser.add_argument_group("who answers")
    who.add_argument("--config", help="YAML file of a run: its teacher, and data's bounds on images and rows")
    who.add_argument("--model", metavar="FOLDER", help="another checkpoint instead: a folder or a Hub name")
    who.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: the config's; without one, bfloat16 on a GPU and float32 elsewhere",
    )
    who.add_argument("--device", help="default: the rank's GPU, all GPUs without a launcher, or cpu")
    what = parser.add_argument_group("what is asked")
    what.add_argument(
        "--images",
        required=True,
        metavar="PATH",
        help="a folder of pictures (with those in it, hidden ones left out), or rows in a JSON or JSONL file",
    )
    what.add_argument(
        "--questions",
        metavar="FILE|TEXT",
        help="a question a line, or one question; each picture gets all of them (default: the rows' own)",
    )
    what.add_argument("--questions-per-image", type=int, metavar="N", help="N of the questions, drawn by --seed")
    what.add_argument("--image-root", metavar="FOLDER", help="where rows' image paths start (default: beside the file)")
    what.add_argument("--limit", type=int, metavar="N", help="only the first N pictures or rows")
    how = parser.add_argument_group("how it answers")
    how.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): greedy")
    how.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest P (1: all)")
    how.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest (0: all)")
    how.add_argument("--samples", type=int, default=1, metavar="N", help="answers to each question (default: 1)")
    how.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of an answer (default: %(default)s)")
    how.add_argument(
        "--batch-size",
        type=int,
        default=64,
        metavar="N",
        help="questions at once (default %(default)s); halved where memory is short",
    )
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of samples and drawn questions (default: 0)")
    keep = parser.add_argument_group("which answers are kept", "the others go to OUT.rejected.jsonl with the cause")
    keep.add_argument("--keep-cut", action="store_true", help="also answers without an end after --max-new-tokens")
    keep.add_argument("--min-tokens", type=int, default=0, metavar="N", help="shorter ones go")
    keep.add_argument("--max-tokens", type=int, metavar="N", help="longer ones go")
    keep.add_argument(
        "--max-repetition",
        type=float,
        metavar="SHARE",
        help="answers go of whose stretches of four tokens a larger share (0 to 1) was there before",
    )
    keep.add_argument(
        "--min-agreement",
        type=float,
        metavar="SHARE",
        help="questions go of whose samples a smaller share says the same; case, spacing and a full stop do not count",
    )
    keep.add_argument(
        "--keep",
        choices=("all", "first", "majority"),
        help="of a question's samples that are left (default: all; majority with --min-agreement)",
    )
    out = parser.add_argument_group("output")
    out.add_argument("--out", required=True, metavar="FILE", help="JSONL to write; beside it FILE.manifest.json")
    out.add_argument("--fresh", action="store_true", help="remove what is there, and start over")
    out.add_argument("--json", action="store_true", help="print the manifest")


OPTIONS = (
    "model",
    "dtype",
    "device",
    "questions_per_image",
    "image_root",
    "limit",
    "temperature",
    "top_p",
    "top_k",
    "samples",
    "max_new_tokens",
    "batch_size",
    "seed",
    "keep_cut",
    "min_tokens",
    "max_tokens",
    "max_repetition",
    "min_agreement",
    "keep",
    "fresh",
)
"""Those that `answer` takes by the same name."""
