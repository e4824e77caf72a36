"""The verbalizer's network, down(silu(gate x) * up x), with its gradients.

    python benchmarks/bench_verb_ffn.py [--shapes 7b-to-2b:4096] [--dtype bfloat16]

The teacher's side of a shape: x [N, D], weights [D, D], D its width, one layer. Two steps are timed: "weights", as in
stage verbalize (gradients of the three weights), and "input", as in stage interact (the gradient of x). Operations:
14 and 12 N D^2; 1 ms and less a step at 700 TFLOP/s for 7b-to-2b:4096, 5 ms for 72b-to-7b:4096. Seconds in all, and
as much again to compile. Accuracy: errors of output and gradients over those of eager PyTorch in the same dtype, at
most 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from harness import Case, Run, measure, need_impl, parse
from inputs import relative_error
from peers import need_compile, need_triton
from report import document, draw_rows, finish, print_rows
from roofline import work
from shapes import Shape
from torch import Tensor
from torch.nn import functional

from vlsi_kernels import verb_ffn
from vlsi_kernels.verb_ffn import reference_verb_ffn

SHAPES = {"cuda": ["7b-to-2b:4096", "7b-to-2b:512", "72b-to-7b:4096", "2b-to-0.5b:1531"], "cpu": ["cpu"]}
NORM_EPS = 1e-6
Network = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Problem:
    """x, weights and an upstream gradient, and the float64 truth."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, mode: str):
        self.device, self.mode = device, mode
        n, d = shape.tokens, shape.teacher_width
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*size, generator=generator, device=device) * scale).to(dtype)

        self.x, self.upstream = normal(n, d), normal(n, d)
        self.weights = [normal(d, d, scale=d**-0.5) for _ in range(3)]
        self.norm_weight = (1 + normal(d, scale=0.1)).to(dtype)
        self.flops = (14.0 if mode == "weights" else 12.0) * n * d * d
        self._truth: dict[bool, list[Tensor]] = {}
        self._eager: dict[bool, list[float]] = {}

    def step(self, network: Network, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Output, then the gradients of the mode."""
        x, *weights = (t.detach().to(dtype or t.dtype) for t in (self.x, *self.weights))
        leaves = weights if self.mode == "weights" else [x]
        for leaf in leaves:
            leaf.requires_grad_()
        y = network(x, *weights)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.upstream.to(y.dtype))]

    def normed(self, x: Tensor) -> Tensor:
        """transformers' Qwen2RMSNorm."""
        wide = x.float()
        scaled = wide * (wide.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
        return self.norm_weight * scaled.to(x.dtype)

    def errors(self, network: Network, norm: bool) -> dict[str, float]:
        """Largest ratio of an error to eager's own in this dtype, over the output and each gradient."""
        if norm not in self._truth:
            norm_weight = self.norm_weight if norm else None
            self._truth[norm] = self.step(lambda *t: reference_verb_ffn(*t, norm_weight, NORM_EPS), torch.float64)
            self._eager[norm] = self._against_truth(self.eager_network(norm), norm)
        return {"over_eager": max(a / b for a, b in zip(self._against_truth(network, norm), self._eager[norm]))}

    def eager_network(self, norm: bool) -> Network:
        return (lambda x, *weights: eager(self.normed(x), *weights)) if norm else eager

    def _against_truth(self, network: Network, norm: bool) -> list[float]:
        return [relative_error(value, truth) for value, truth in zip(self.step(network), self._truth[norm])]


def eager(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """What one would write first."""
    return (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def case_of(problem: Problem, network: Network, norm: bool = False, note: str = "") -> Case:
    """One step of the mode."""
    return Case(lambda: problem.step(network), lambda: problem.errors(network, norm), flops=problem.flops, note=note)


def our_case(problem: Problem, impl: str, norm: bool) -> Case:
    """`verb_ffn`, with the norm in front or without."""
    note = need_impl(impl, problem.device)
    options = {"norm_weight": problem.norm_weight, "norm_eps": NORM_EPS} if norm else {}
    return case_of(problem, lambda *tensors: verb_ffn(*tensors, impl=impl, **options), norm, note)


def compiled_case(problem: Problem, run: Run, part: int) -> Case:
    """torch.compile."""
    need_compile(run, part)
    return case_of(problem, torch.compile(eager, dynamic=False))


def liger_case(problem: Problem) -> Case:
    """Liger's fused SiLU and product between torch's linear layers."""
    need_triton(problem.device)
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return case_of(problem, lambda x, gate, up, down: LigerSiLUMulFunction.apply(x @ gate.T, x @ up.T) @ down.T)


def roofline_case(problem: Problem) -> Case:
    """The matrix products alone: 3 forward; backward 1 through down, and 3 for the weights or 2 for x."""
    (gate, up, down), x, other = problem.weights, problem.x, problem.upstream

    def step() -> None:
        x @ gate.T, x @ up.T, other @ down.T
        other @ down
        if problem.mode == "weights":
            other.T @ x, other.T @ x, other.T @ x
        else:
            other @ gate, other @ up

    return Case(step, flops=problem.flops)


def builders(problem: Problem, run: Run, part: int) -> dict:
    """Name -> how to build the case."""
    found = {}
    for impl in ("torch", "triton"):
        found[f"ours {impl}"] = partial(our_case, problem, impl, False)
        found[f"ours {impl}, with norm"] = partial(our_case, problem, impl, True)
    found["eager"] = lambda: case_of(problem, eager)
    found["eager, with norm"] = lambda: case_of(problem, problem.eager_network(True), True)
    found["torch.compile"] = partial(compiled_case, problem, run, part)
    found["Liger SwiGLU"] = partial(liger_case, problem)
    found["roofline"] = partial(roofline_case, problem)
    return found


def main() -> int:
    """Measure every shape and mode, print, write."""
    run = parse(__doc__, "bench_verb_ffn", SHAPES)
    parts = []
    for part, shape in enumerate(run.shapes):
        for mode in ("weights", "input"):
            problem = Problem(shape, run.device, run.dtype, mode)
            rows = measure(builders(problem, run, part), run)
            title = f"verb-FFN, N {shape.tokens}, D {shape.teacher_width}, gradients of {mode}, {run.dtype}"
            print_rows(title, rows, [])
            needed = work(problem.flops, problem.x, *problem.weights)
            parts.append({"title": title, "shape": vars(shape), "mode": mode, "work": needed, "rows": rows, "bars": []})
    return finish(run, document(run, parts=parts), lambda figure: draw_rows(figure, parts))


if __name__ == "__main__":
    sys.exit(main())
