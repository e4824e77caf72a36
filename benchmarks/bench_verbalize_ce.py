"""The verbalize stage's loss: cross-entropy of L verbalized layers through one frozen head, and its gradient.

    python benchmarks/bench_verbalize_ce.py [--shapes 7b-to-2b:4096] [--dtype bfloat16]

The teacher's side of a shape: hidden states [L, N, Dl] and the labels of N answer tokens. Operations: 4 N L V Dl, which
is 0.09 s a step at 700 TFLOP/s for 7b-to-2b:4096, 0.03 s for 7b-to-2b:1531 and 0.58 s for 72b-to-7b:4096. Up to ten
cases, each checked, measured and then timed for 10 rounds or 2 s: 25, 8 and 40 s, and 20 s to compile.
"""

from __future__ import annotations

import sys
from functools import partial

import peers
import torch
from harness import ABSENT, OK, Case, Run, bar, measure, need_impl, parse, ratio, require_memory, seconds_of
from inputs import HeadProblem
from peers import CrossEntropy
from report import document, draw_rows, finish, print_rows
from roofline import pass_flops, passes, waves_note, work
from torch import Tensor

from vlsi_kernels import linear_cross_entropy

SHAPES = {"cuda": ["7b-to-2b:4096", "7b-to-2b:1531", "72b-to-7b:4096"], "cpu": ["cpu"]}


def flops(problem: HeadProblem) -> float:
    """Logits and expected rows."""
    shape = problem.shape
    return pass_flops(shape.tokens * shape.teacher_layers, shape.vocab, shape.teacher_width, shape.teacher_width)


def our_case(problem: HeadProblem, impl: str) -> Case:
    """As `vlsi_fast.losses.AnswerLoss` calls it."""
    note = need_impl(impl, problem.device)

    def run(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return peers.with_gradient(
            lambda h: linear_cross_entropy(h, problem.weight, labels, vocab_size=problem.vocab, impl=impl), hidden
        )

    return case_of(problem, run, note)


def case_of(problem: HeadProblem, run: CrossEntropy, note: str = "") -> Case:
    """All layers in one call."""
    hidden, labels = problem.flat, problem.flat_labels
    return Case(lambda: run(hidden, labels), lambda: problem.errors(run), flops=flops(problem), note=note)


def eager_case(problem: HeadProblem, accurate: bool) -> Case:
    """A layer at a time: they are independent, so no more need be held."""
    shape = problem.shape
    require_memory(problem.device, 4.0 * shape.vocab * (4 * shape.tokens + accurate * shape.teacher_width))
    head = problem.weight[: problem.vocab]
    return case_of(problem, peers.eager_cross_entropy(head, shape.teacher_layers, accurate))


def compiled_case(problem: HeadProblem, run: Run, part: int) -> Case:
    """torch.compile over chunks of tokens."""
    peers.need_compile(run, part)
    return case_of(problem, peers.compiled_cross_entropy(problem.weight[: problem.vocab]))


def roofline_case(problem: HeadProblem, unchunked: bool) -> Case:
    """The products of the one pass."""
    head = problem.weight[: problem.vocab]
    needed = [(problem.flat, head, head)]
    note = "" if unchunked else waves_note(needed, problem.vocab)
    return Case(passes(needed, problem.vocab, unchunked), flops=flops(problem), note=note)


def builders(problem: HeadProblem, run: Run, part: int) -> dict:
    """Name -> how to build the case."""
    head = problem.weight[: problem.vocab]
    found = {f"ours {impl}": partial(our_case, problem, impl) for impl in ("torch", "triton")}
    found["eager, a layer at a time"] = partial(eager_case, problem, False)
    if run.dtype != torch.float32 and part == 0:  # slow, so for the first shape only
        found["eager, float32 products"] = partial(eager_case, problem, True)
    found["torch.compile, token chunks"] = partial(compiled_case, problem, run, part)
    found["Liger fused linear CE"] = lambda: case_of(problem, peers.liger_cross_entropy(head))
    found["cut-cross-entropy"] = lambda: case_of(problem, peers.cut_cross_entropy(head))
    found["torch linear_cross_entropy"] = lambda: case_of(problem, peers.torch_cross_entropy(head))
    found["roofline"] = partial(roofline_case, problem, False)
    found["roofline, unchunked"] = partial(roofline_case, problem, True)
    return found


def bars(problem: HeadProblem, rows: list[dict]) -> list[dict]:
    """GPU: at least as fast as the best peer that is accurate."""
    if problem.device.type != "cuda":
        return []
    times = {row["name"]: row["seconds"] for row in rows if row["role"] == "peer" and row["status"] == OK}
    absent = [row["name"] for row in rows if row["role"] == "peer" and row["status"] == ABSENT]
    best = min(times, key=times.get, default=None)
    name = f"speed over the best accurate peer ({best}; absent: {', '.join(absent) or 'none'})"
    return [bar(name, ratio(times.get(best), seconds_of(rows, "ours triton")), at_least=1.0)]


def main() -> int:
    """Measure every shape, print, write."""
    run = parse(__doc__, "bench_verbalize_ce", SHAPES)
    parts = []
    for part, shape in enumerate(run.shapes):
        problem = HeadProblem(shape, run.device, run.dtype)
        rows = measure(builders(problem, run, part), run)
        title = f"cross-entropy of {shape.teacher_layers} layers, {shape.name}, D {shape.teacher_width}, {run.dtype}"
        kept = bars(problem, rows)
        print_rows(title, rows, kept)
        needed = work(flops(problem), problem.hidden, problem.weight[: problem.vocab])
        parts.append({"title": title, "shape": vars(shape), "work": needed, "rows": rows, "bars": kept})
    return finish(run, document(run, parts=parts), lambda figure: draw_rows(figure, parts))


if __name__ == "__main__":
    sys.exit(main())
