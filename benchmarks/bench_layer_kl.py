"""The interaction head: KL of every pair of S student and L teacher layers, and the gradient of the pairs drawn.

    python benchmarks/bench_layer_kl.py [--shapes 72b-to-7b:4096 7b-to-2b:2048] [--dtype bfloat16]

A step takes hidden states of all layers and returns the [S, L] matrix and the gradient of one pair a student layer.
"30 pairs" rows take the gradient of all pairs that Algorithm 1 may score instead. Liger's and other published operators
know one pair: a step is one call, and its time is multiplied by S * L, since matching needs the whole matrix.

Operations: ours 2 N V (L (Dl + Ds) + 2 S Ds); eager 2 N V (L Dl + 2 S Ds). At 700 TFLOP/s a step of the default GPU
shapes takes 0.52 s (72b-to-7b:4096), 0.20, 0.10, 0.05, 0.01 (7b-to-2b:8192, 4096, 2048, 512), 0.02, 0.01 and 0.14 s. A
shape has twelve cases, each checked, measured and then timed for 10 rounds or 2 s: 50 s, 25 s, and less than 15 s for
the others; and a minute for torch.compile and float32 products, which the first shape alone gets. Three minutes.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from harness import Absent, Case, Run, bar, measure, need_impl, parse, ratio, require_memory, seconds_of
from inputs import LayerProblem, Pair
from peers import PairLoss, liger_chunked_jsd, liger_fused_jsd, liger_fused_kl, need_compile, not_compiled
from peers_published import hidden_state_kl, kl_cache
from report import document, draw_rows, finish, print_rows
from roofline import pass_flops, passes, waves_note, work
from shapes import shape as named
from torch import Tensor

from vlsi_kernels import FrozenHead, TeacherTargets, _common, layer_kl_matrix, teacher_targets

SHAPES = {
    "cuda": [
        "7b-to-2b:4096",
        "72b-to-7b:4096",
        "7b-to-2b:8192",
        "7b-to-2b:2048",
        "7b-to-2b:512",
        "7b-to-0.5b:2048",
        "2b-to-0.5b:2048",
        "72b-to-2b:1531",
    ],
    "cpu": ["cpu"],
}
TOKEN_CHUNK = 256
"""Tokens of a chunk under torch.compile."""


# ---- ours ----


def our_case(problem: LayerProblem, impl: str, pairs: list[Pair], frozen: bool = False) -> Case:
    """All pairs, and the gradient of `pairs`; `frozen`: the student's head is converted once, before the first step."""
    note = need_impl(impl, problem.device)
    head = FrozenHead(problem.student_weight) if frozen else problem.student_weight
    rows, columns = (list(side) for side in zip(*pairs))

    def targets_of() -> TeacherTargets:
        return teacher_targets(problem.teacher, problem.teacher_weight, head, impl=impl)

    def step() -> Tensor:
        leaf = problem.student.detach().requires_grad_()
        kl = layer_kl_matrix(leaf, head, targets_of(), impl=impl)
        return torch.autograd.grad(kl[rows, columns].sum(), leaf)[0]

    def check() -> dict[str, float]:
        gradient, targets = step(), targets_of()
        groups = {s: tuple(pair for pair in pairs if pair[0] == s) for s in rows}
        everything = [(s, l) for s in range(problem.shape.student_layers) for l in range(problem.shape.teacher_layers)]
        return problem.errors(
            everything,
            lambda weight: layer_kl_matrix(problem.student, head, targets, token_weight=weight, impl=impl).flatten(),
            {group: gradient[s] for s, group in groups.items()},
        )

    if problem.device.type == "cpu":
        note = f"{note}; products by {'oneDNN' if _common.by_onednn(problem.device, torch.float32) else 'MKL'}".lstrip(
            "; "
        )
    return Case(step, check, flops=our_flops(problem), note=note)


def mkl_case(problem: LayerProblem) -> Case:
    """Ours with the products that eager has, where ours takes others."""
    if not _common.by_onednn(problem.device, torch.float32):
        raise Absent("ours multiplies by the same library as eager here")

    def without_onednn(action):
        def run():
            with mock.patch.object(_common, "_slow_mkl", lambda: False):
                return action()

        return run

    case = our_case(problem, "torch", problem.matched)
    return replace(case, step=without_onednn(case.step), check=without_onednn(case.check), note="products by MKL")


def our_flops(problem: LayerProblem) -> float:
    """A pass over both heads for each teacher layer, one over the student's head, twice, for each student layer."""
    shape = problem.shape
    teacher = pass_flops(shape.tokens * shape.teacher_layers, shape.vocab, shape.teacher_width, shape.student_width)
    return teacher + pass_flops(shape.tokens * shape.student_layers, shape.vocab, *[shape.student_width] * 2)


# ---- eager ----


def log_softmax(hidden: Tensor, weight: Tensor, accurate: bool) -> Tensor:
    """[.., V] float32. `accurate`: the product in float32, where a half-precision one would round the logits."""
    logits = hidden.float() @ weight.float().T if accurate else (hidden @ weight.T).float()
    return logits.log_softmax(-1)


def eager_matrix(
    problem: LayerProblem, student: Tensor, tokens: Tensor | slice, pairs: list[Pair], accurate: bool, score_all: bool
) -> Tensor:
    """[S, L, n] KLs of the tokens, those of `pairs` with a gradient, the others only where `score_all`, else 0.

    Each layer's softmax is taken once, and a teacher layer is dropped as soon as its column is done.
    """
    log_q = [log_softmax(h[tokens], problem.student_head, accurate) for h in student]
    wanted, columns = set(pairs), []
    for j, hidden in enumerate(problem.teacher):
        with torch.no_grad():
            log_p = log_softmax(hidden[tokens], problem.teacher_head, accurate)
            p = log_p.exp()
        column = []
        for i, q in enumerate(log_q):
            drawn = (i, j) in wanted
            with torch.set_grad_enabled(drawn and torch.is_grad_enabled()):
                column.append((p * (log_p - q)).sum(-1) if drawn or score_all else p.new_zeros(p.shape[0]))
        columns.append(torch.stack(column))
    return torch.stack(columns, 1)


def eager_case(problem: LayerProblem, pairs: list[Pair], accurate: bool = False, score_all: bool = True) -> Case:
    """Everything materialized: what one would write first. Scores all pairs, and takes the gradient of `pairs`."""
    shape = problem.shape
    # log q of S layers, p of the drawn pairs for backward, and the temporaries of one pair, of softmax and its gradient
    alive = shape.student_layers + len({l for _, l in pairs}) + 5
    require_memory(problem.device, 4.0 * shape.tokens * shape.vocab * alive)

    def step() -> Tensor:
        leaf = problem.student.detach().requires_grad_()
        kl = eager_matrix(problem, leaf, slice(None), pairs, accurate, score_all).mean(-1)
        return torch.autograd.grad(sum(kl[pair] for pair in pairs), leaf)[0]

    def kl_of(weight: Tensor) -> Tensor:
        tokens = weight.nonzero()[:, 0]
        with torch.no_grad():
            kl = eager_matrix(problem, problem.student, tokens, pairs, accurate, score_all).mean(-1)
        return torch.stack([kl[pair] for pair in scored])

    scored = [(s, l) for s in range(shape.student_layers) for l in range(shape.teacher_layers)] if score_all else pairs

    def check() -> dict[str, float]:
        gradient = step()
        groups = {s: tuple(pair for pair in pairs if pair[0] == s) for s, _ in pairs}
        return problem.errors(scored, kl_of, {group: gradient[s] for s, group in groups.items()})

    flops = pass_flops(shape.tokens * shape.student_layers, shape.vocab, *[shape.student_width] * 2)
    flops += pass_flops(shape.tokens * shape.teacher_layers, shape.vocab, shape.teacher_width)
    return Case(step, check, flops=flops, note="" if score_all else "drawn pairs only: no matrix, so it cannot match")


def compiled_case(problem: LayerProblem, run: Run, part: int) -> Case:
    """torch.compile over chunks of tokens: all pairs without, the drawn ones with a gradient."""
    need_compile(run, part)
    pairs, tokens = problem.matched, problem.shape.tokens

    @torch.compile(dynamic=False)
    def chunk_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """student [S, n, Ds], teacher [L, n, Dl] -> [S, L, n] without gradient, and the sum over the drawn pairs."""
        log_q = log_softmax(student, problem.student_head, False)
        log_p = [log_softmax(hidden, problem.teacher_head, False) for hidden in teacher]
        matrix = [(p.exp() * (p - log_q.detach())).sum(-1) for p in log_p]
        drawn = sum((log_p[j].exp() * (log_p[j] - log_q[i])).sum() for i, j in pairs)
        return torch.stack(matrix, 1), drawn

    def step() -> tuple[Tensor, Tensor]:
        kl, gradients = [], []
        for student, teacher in zip(problem.student.split(TOKEN_CHUNK, 1), problem.teacher.split(TOKEN_CHUNK, 1)):
            leaf = student.detach().requires_grad_()
            matrix, drawn = chunk_kl(leaf, teacher)
            gradients += torch.autograd.grad(drawn / tokens, leaf)
            kl.append(matrix)
        return torch.cat(kl, -1), torch.cat(gradients, 1)

    def check() -> dict[str, float]:
        kl, gradient = step()
        everything = [(s, l) for s in range(kl.shape[0]) for l in range(kl.shape[1])]
        return problem.errors(
            everything,
            lambda weight: (kl * weight).sum(-1).flatten() / weight.sum(),
            {(pair,): gradient[pair[0]] for pair in pairs},
        )

    return Case(step, check)


# ---- others, a pair at a time ----


def per_pair_case(problem: LayerProblem, loss: PairLoss, note: str = "") -> Case:
    """One call a pair. Checked on the near pairs, and one that is far; timed on the first."""
    shape, checked = problem.shape, problem.matched[:3]
    labels = torch.zeros(shape.tokens, dtype=torch.long, device=problem.device)

    def call(pair: Pair, labels: Tensor) -> tuple[Tensor, Tensor]:
        return loss(problem.student[pair[0]], problem.teacher[pair[1]], labels)

    def kl_of(weight: Tensor) -> Tensor:
        masked = labels.masked_fill(weight == 0, -100)
        return torch.stack([call(pair, masked)[0] for pair in checked])

    def check() -> dict[str, float]:
        return problem.errors(checked, kl_of, {(pair,): call(pair, labels)[1] for pair in checked})

    calls = shape.student_layers * shape.teacher_layers
    return Case(lambda: call(checked[0], labels), check, calls=calls, note=note)


# ---- rooflines ----


def roofline_case(problem: LayerProblem, unchunked: bool) -> Case:
    """The products of the teachers' pass and of the students'."""
    head = problem.student_head
    needed = [
        (problem.teacher.flatten(0, 1), problem.teacher_head, head),
        (problem.student.flatten(0, 1), head, head),
    ]
    note = "" if unchunked else waves_note(needed, problem.vocab)
    return Case(passes(needed, problem.vocab, unchunked), flops=our_flops(problem), note=note)


# ---- the comparison ----


def builders(problem: LayerProblem, run: Run, part: int) -> dict:
    """Name -> how to build the case."""
    many = f", {len(problem.candidates)} pairs"
    heads = problem.student_head, problem.teacher_head
    found = {f"ours {impl}": partial(our_case, problem, impl, problem.matched) for impl in ("torch", "triton")}
    impl = "triton" if problem.device.type == "cuda" else "torch"
    if impl == "triton":
        found["ours triton, frozen head"] = partial(our_case, problem, impl, problem.matched, frozen=True)
    found[f"ours {impl}{many}"] = partial(our_case, problem, impl, problem.candidates)
    found["ours torch, eager's products"] = partial(mkl_case, problem)
    found["eager"] = partial(eager_case, problem, problem.matched)
    found["eager, drawn pairs only"] = partial(eager_case, problem, problem.matched, score_all=False)
    if run.dtype != torch.float32 and part == 0:  # slow, so for the first shape only
        found["eager, float32 products"] = partial(eager_case, problem, problem.matched, accurate=True)
    found["torch.compile, token chunks"] = partial(compiled_case, problem, run, part)
    found["Liger fused JSD, per pair"] = lambda: per_pair_case(problem, liger_fused_jsd(*heads, 0.0))
    compiled = run.arguments.get("compile") is True  # Liger compiles within each call: not unless asked
    found["Liger chunked_loss JSD, per pair"] = lambda: per_pair_case(
        problem, liger_chunked_jsd(*heads, 0.0, compiled), not_compiled(compiled)
    )
    found["Liger fused KL, per pair"] = lambda: per_pair_case(problem, liger_fused_kl(*heads))
    found["Nitrobrew-style KL, per pair"] = lambda: per_pair_case(
        problem, hidden_state_kl(*heads, False, run.compile), not_compiled(run.compile)
    )
    found["KL cache trick, per pair"] = lambda: per_pair_case(problem, kl_cache(*heads), "cache made in each call")
    found["roofline"] = partial(roofline_case, problem, False)
    found["roofline, unchunked"] = partial(roofline_case, problem, True)
    return found


def bars(problem: LayerProblem, rows: list[dict]) -> list[dict]:
    """The promises of this benchmark that apply to the shape."""
    shape, gpu = problem.shape, problem.device.type == "cuda"
    ours = "ours triton" if gpu else "ours torch"
    time = partial(seconds_of, rows)
    memory = {row["name"]: row["peak_extra_bytes"] for row in rows}
    many = ratio(time(f"{ours}, {len(problem.candidates)} pairs"), time(ours))
    found = [bar(f"time with {len(problem.candidates)} pairs over {len(problem.matched)}", many, at_most=1.15)]
    if not gpu and (shape != named("cpu") or problem.dtype != torch.float32):
        return found  # the promises on time and memory are for one shape
    if not gpu:
        found.append(bar("faster than eager", ratio(time("eager"), time(ours)), at_least=3))
        liger = ratio(time("Liger chunked_loss JSD, per pair"), time(ours))
        found.append(bar("faster than Liger's chunked_loss per pair", liger, at_least=2.5))
        found.append(bar("less extra memory than eager", ratio(memory["eager"], memory[ours]), at_least=15))
        return found
    wide = shape.tokens >= 2048 and shape.student_width + shape.teacher_width >= 4480
    found.append(bar("of the roofline", ratio(time("roofline"), time(ours)), at_least=0.85 if wide else 0.75))
    if (shape.student_layers, shape.teacher_layers) == (7, 20):
        liger = ratio(time("Liger fused JSD, per pair"), time(ours))
        found.append(bar("faster than Liger per pair", liger, at_least=5))
    return found


def main() -> int:
    """Measure every shape, print, write."""
    run = parse(__doc__, "bench_layer_kl", SHAPES)
    parts = []
    for part, shape in enumerate(run.shapes):
        problem = LayerProblem(shape, run.device, run.dtype)
        rows = measure(builders(problem, run, part), run)
        title = f"layer KL, {shape.student_layers} x {shape.teacher_layers} layers, {shape.name}, {run.dtype}"
        kept = bars(problem, rows)
        print_rows(title, rows, kept)
        needed = work(our_flops(problem), problem.student, problem.teacher, problem.student_head, problem.teacher_head)
        parts.append({"title": title, "shape": vars(shape), "work": needed, "rows": rows, "bars": kept})
    return finish(run, document(run, parts=parts), lambda figure: draw_rows(figure, parts))


if __name__ == "__main__":
    sys.exit(main())
