"""One pair of heads: KL, reverse KL and JSD of a student from a teacher, and the student's gradient, against Liger.

    python benchmarks/bench_divergence.py [--shapes 7b-to-2b:4096] [--betas 0 0.5 1]

Operations of ours: 2 N V (Dl + 3 Ds) at beta 0, which has no second pass, else 2 N V (2 Dl + 4 Ds): 0.015 and 0.024 s a
step at 700 TFLOP/s for 7b-to-2b:4096, less for the ragged one. Six tables of 10 rounds: well under a minute and a half,
most of it Liger's, whose chunks of 64 tokens read both heads again and again.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import peers
import torch
from harness import Case, Run, measure, need_impl, parse, require_memory
from inputs import PairProblem
from peers import PairLoss
from peers_published import cached_teacher, hidden_state_kl, kl_cache
from report import document, draw_rows, finish, print_rows
from roofline import pass_flops, passes, work
from torch import Tensor
from torch.nn import functional

SHAPES = {"cuda": ["7b-to-2b:4096", "7b-to-2b:1531"], "cpu": ["cpu"]}


def case_of(problem: PairProblem, beta: float, loss: PairLoss, flops: float | None = None, note: str = "") -> Case:
    """One call."""
    labels = torch.zeros(problem.shape.tokens, dtype=torch.long, device=problem.device)
    return Case(
        lambda: loss(problem.student, problem.teacher, labels), lambda: problem.errors(beta, loss), flops, note=note
    )


def flops(problem: PairProblem, beta: float) -> float:
    """What our algorithm multiplies."""
    shape = problem.shape
    widths = (1, 3) if beta in (0, 1) else (2, 4)
    return pass_flops(shape.tokens, shape.vocab, widths[0] * shape.teacher_width, widths[1] * shape.student_width)


def our_case(problem: PairProblem, beta: float, impl: str) -> Case:
    """`linear_divergence`."""
    note = need_impl(impl, problem.device)
    from vlsi_kernels.linear_divergence import linear_divergence

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return peers.with_gradient(
            lambda h: linear_divergence(
                h, problem.student_weight, teacher, problem.teacher_weight, beta=beta, labels=labels, impl=impl
            ),
            student,
        )

    return case_of(problem, beta, loss, flops(problem, beta), note)


def eager_case(problem: PairProblem, beta: float, accurate: bool) -> Case:
    """Both heads' log-probabilities materialized. `accurate`: products in float32."""
    shape, widths = problem.shape, problem.shape.student_width + problem.shape.teacher_width
    require_memory(problem.device, 4.0 * shape.vocab * (9 * shape.tokens + accurate * widths))

    def log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden.float() @ weight.float().T if accurate else (hidden @ weight.T).float()
        return logits.log_softmax(-1)

    def divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
        """[N]."""
        if beta == 0:
            return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        if beta == 1:
            return functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
        p, q = log_p.exp(), log_q.exp()
        log_m = (beta * p + (1 - beta) * q).log()
        return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        kept = labels != -100
        with torch.no_grad():
            log_p = log_softmax(teacher, problem.teacher_head)
        return peers.with_gradient(
            lambda h: (divergence(log_softmax(h, problem.student_head), log_p) * kept).sum() / kept.sum(), student
        )

    return case_of(problem, beta, loss)


def roofline_case(problem: PairProblem, beta: float, unchunked: bool) -> Case:
    """The products of our passes; between the ends both heads' logits are formed twice."""
    teacher, student, head = (problem.teacher, problem.teacher_head), problem.student, problem.student_head
    needed = [(*teacher, head), (student, head, head)]
    if beta not in (0, 1):
        needed = [(*teacher, None), (student, head, None), *needed]
    return Case(passes(needed, problem.vocab, unchunked), flops=flops(problem, beta))


def builders(problem: PairProblem, beta: float, run: Run) -> dict:
    """Name -> how to build the case."""
    heads = problem.student_head, problem.teacher_head
    compiled = run.arguments.get("compile") is True  # Liger compiles within each call: not unless asked
    found = {f"ours {impl}": partial(our_case, problem, beta, impl) for impl in ("torch", "triton")}
    found["eager"] = partial(eager_case, problem, beta, False)
    if run.dtype != torch.float32:
        found["eager, float32 products"] = partial(eager_case, problem, beta, True)
    found["Liger fused JSD"] = lambda: case_of(problem, beta, peers.liger_fused_jsd(*heads, beta))
    found["Liger chunked_loss JSD"] = lambda: case_of(
        problem, beta, peers.liger_chunked_jsd(*heads, beta, compiled), note=peers.not_compiled(compiled)
    )
    if beta in (0, 1):
        found["Nitrobrew-style KL"] = lambda: case_of(
            problem, beta, hidden_state_kl(*heads, beta == 1, run.compile), note=peers.not_compiled(run.compile)
        )
    if beta == 0:
        found["Liger fused KL"] = lambda: case_of(problem, beta, peers.liger_fused_kl(*heads))
        found["KL cache trick"] = lambda: case_of(problem, beta, kl_cache(*heads), note="cache made in the step")
        found["KL cache trick, cached"] = lambda: case_of(
            problem, beta, kl_cache(*heads, cached_teacher(problem.teacher, *heads)), note="no teacher in the step"
        )
    found["roofline"] = partial(roofline_case, problem, beta, False)
    found["roofline, unchunked"] = partial(roofline_case, problem, beta, True)
    return found


def main() -> int:
    """Measure every shape and beta, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--betas", nargs="+", type=float, default=[0.0, 0.5, 1.0], help="0 forward KL, 1 reverse KL")
    run = parse(__doc__, "bench_divergence", SHAPES, parser)
    parts = []
    for shape in run.shapes:
        problem = PairProblem(shape, run.device, run.dtype)
        for beta in run.arguments["betas"]:
            rows = measure(builders(problem, beta, run), run)
            title = f"divergence, beta {beta:g}, {shape.name}, {run.dtype}"
            print_rows(title, rows, [])
            tensors = problem.student, problem.teacher, problem.student_head, problem.teacher_head
            needed = work(flops(problem, beta), *tensors)
            parts.append({"title": title, "shape": vars(shape), "beta": beta, "work": needed, "rows": rows, "bars": []})
    return finish(run, document(run, parts=parts), lambda figure: draw_rows(figure, parts))


if __name__ == "__main__":
    sys.exit(main())
