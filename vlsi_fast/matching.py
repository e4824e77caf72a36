"""Layer matching: a KL matrix in, the teacher layer of each student layer out. Pure functions.

    S student target layers, L teacher target layers, S <= L (VLsI, section 3.2, Algorithm 1; baselines: appendix D)

Algorithm 1 draws, for student layer i from shallow to deep, one candidate c with probability
softmax(-KL[i, c] / T) among `lower <= c <= L - S + i`; order preservation then sets `lower = c + 1`. The upper end
keeps one deeper teacher layer in reserve for each student layer still to come, so a candidate is always left.
(Line 11 of the paper's listing indexes with the already advanced counter; that is read as a slip.)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Strategy = Literal["multinomial", "random", "uniform", "bottom"]


def match_layers(
    kl: Tensor,
    *,
    strategy: Strategy = "multinomial",
    k: int = 1,
    search_range: bool = True,
    order_preservation: bool = True,
    adaptive_temperature: bool = True,
    scale: float = 2.0,
    eps: float = 1e-6,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose the teacher layer(s) of every student layer.

    Runs on the device of `kl` without waiting for it; draws come from `generator` on the generator's own device, so a
    CPU generator gives the same draws on every device.

    Args:
        kl: [S, L] mean KL divergence of every pair over the answer tokens, any float dtype; S <= L. No gradient flows.
        strategy: `multinomial` (Algorithm 1), `random` (any teacher layer, equal chances), `uniform` (layer
            i * floor(L / S)), `bottom` (the k smallest KLs of the row). The last three search all teacher layers.
        k: number of layers that `bottom` returns, 1 <= k <= L.
        search_range: multinomial only: student layer i looks no deeper than teacher layer L - S + i.
        order_preservation: multinomial only: matches get strictly deeper. Without search_range nothing is kept in
            reserve, so once the deepest teacher layer is taken the remaining student layers share it.
        adaptive_temperature: multinomial only: T = scale / (max - min + eps) over the candidates; otherwise T = 1.
        scale: see adaptive_temperature.
        eps: see adaptive_temperature.
        generator: source of the draws of `multinomial` and `random`.

    Returns:
        LongTensor of teacher indices in 0 .. L - 1: [S], or [S, k] where k > 1.

    Raises:
        ValueError: kl is not a matrix, S > L, unknown strategy, or k out of range.
    """
    if kl.dim() != 2:
        raise ValueError(f"kl must be [student layers, teacher layers], got shape {tuple(kl.shape)}")
    students, teachers = kl.shape
    if students > teachers:
        raise ValueError(
            f"{students} student target layers but only {teachers} of the teacher: matching needs t_s <= t_l; "
            "remove student layers or add teacher layers"
        )
    if k != 1 and strategy != "bottom":
        raise ValueError(f"k={k} applies to strategy 'bottom' only, not to {strategy!r}")
    kl = kl.detach()
    if strategy == "multinomial":
        return _multinomial(kl, search_range, order_preservation, adaptive_temperature, scale, eps, generator)
    if strategy == "random":
        return (_uniforms(students, kl.device, generator) * teachers).long().clamp_(max=teachers - 1)
    if strategy == "uniform":
        return torch.arange(students, device=kl.device) * (teachers // students)
    if strategy == "bottom":
        if not 1 <= k <= teachers:
            raise ValueError(f"k must be between 1 and the teacher's {teachers} target layers, got {k}")
        chosen = kl.topk(k, dim=1, largest=False).indices
        return chosen[:, 0] if k == 1 else chosen
    raise ValueError(f"unknown strategy {strategy!r}; choose multinomial, random, uniform or bottom")


def candidate_probabilities(
    kl_row: Tensor, candidates: Tensor, *, adaptive_temperature: bool = True, scale: float = 2.0, eps: float = 1e-6
) -> Tensor:
    """Sampling distribution of one student layer (Algorithm 1, lines 8-9).

    Args:
        kl_row: [L] KL to every teacher layer.
        candidates: [L] bool, at least one True.

    Returns:
        [L] float64 probabilities, 0 outside the candidates.
    """
    kl_row = kl_row.double()
    if adaptive_temperature:
        low = kl_row.masked_fill(~candidates, torch.inf).min()
        high = kl_row.masked_fill(~candidates, -torch.inf).max()
        scores = -kl_row * (high - low + eps) / scale
    else:
        scores = -kl_row
    return scores.masked_fill(~candidates, -torch.inf).softmax(dim=0)


def _multinomial(kl, search_range, order_preservation, adaptive_temperature, scale, eps, generator) -> Tensor:
    students, teachers = kl.shape
    draws = _uniforms(students, kl.device, generator)
    index = torch.arange(teachers, device=kl.device)
    lower = torch.zeros((), dtype=torch.long, device=kl.device)
    chosen = []
    for i in range(students):
        upper = teachers - students + i if search_range else teachers - 1
        candidates = (index >= lower) & (index <= upper)
        p = candidate_probabilities(kl[i], candidates, adaptive_temperature=adaptive_temperature, scale=scale, eps=eps)
        # Inverse of the cumulative distribution: torch.multinomial would wait for the device.
        c = (p.cumsum(0) <= draws[i]).sum().clamp(max=upper)
        chosen.append(c)
        if order_preservation:
            lower = (c + 1).clamp(max=teachers - 1)
    return torch.stack(chosen)


def _uniforms(count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    source = generator.device if generator is not None else "cpu"
    draws = torch.rand(count, dtype=torch.float64, generator=generator, device=source)
    if device.type == "cuda" and draws.device.type == "cpu":
        draws = draws.pin_memory()  # from other memory, the copy would wait for the device
    return draws.to(device, non_blocking=True)


def draw_generator(seed: int, step: int, micro_batch: int) -> torch.Generator:
    """The generator of one micro-batch's draws; `micro_batch` counts those of one optimizer step over all ranks.

    A function of where the run is, not of its history: a resumed run draws what the uninterrupted one would have, on
    any number of ranks, and every micro-batch draws its own.
    """
    import numpy as np

    state = np.random.SeedSequence([seed, 0, step, micro_batch]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
