"""Optimizers of a dry run, as they are in a run under way: moments exist, and gradients of earlier micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...config import TrainingConfig
from ..memory import Setup
from .device import DEVICE
from .tape import Tape


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """Every tensor of nested containers."""
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


class Plain:
    """AdamW on float32 weights, with gradients that stay between micro-batches where there are several."""

    def __init__(self, trained: list[nn.Parameter], setup: Setup, training: TrainingConfig, tape: Tape):
        self.trained, self.tape = trained, tape
        self.keep, self.norm = setup.accumulation > 1, training.max_grad_norm
        self.adam = torch.optim.AdamW(trained, training.learning_rate)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        self.step()
        for state in self.adam.state.values():
            for tensor in tensors_of(state):
                if tensor.dim():
                    tape.hold(tensor, "optimizer")
        for parameter in trained:
            if self.keep:
                parameter.grad = torch.zeros_like(parameter)
                tape.hold(parameter.grad, "gradients")
            parameter.register_post_accumulate_grad_hook(lambda p: tape.hold(p.grad, "gradients"))

    def step(self) -> None:
        if self.norm:
            nn.utils.clip_grad_norm_(self.trained, self.norm)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


class Masters:
    """DeepSpeed's on one rank: float32 masters in flat sub-groups; gradients go into float32 sums as they come."""

    def __init__(self, trained: list[nn.Parameter], setup: Setup, training: TrainingConfig, tape: Tape):
        limit = int(setup.number("sub_group_size", 1e9))
        kind = {4: torch.float32, 2: torch.bfloat16}[setup.accumulate_bytes]
        self.groups, self.flats, self.tape = _groups(trained, limit), [], tape
        self.sums = {id(p): torch.zeros_like(p, dtype=kind) for p in trained}
        for group in self.groups:
            size = sum(p.numel() for p in group)
            self.flats.append(nn.Parameter(torch.empty(size, dtype=torch.float32, device=DEVICE)))
        self.adam = torch.optim.AdamW(self.flats, training.learning_rate)
        self.step()
        for tensor in (*self.flats, *tensors_of(dict(self.adam.state))):
            if tensor.dim():
                tape.hold(tensor, "optimizer")
        for parameter in trained:
            tape.hold(self.sums[id(parameter)], "gradients")
            parameter.register_post_accumulate_grad_hook(self._add)

    def _add(self, parameter: nn.Parameter) -> None:
        self.tape.hold(parameter.grad, "gradients")
        self.sums[id(parameter)].add_(parameter.grad)
        parameter.grad = None

    def step(self) -> None:
        for group, flat in zip(self.groups, self.flats):
            flat.grad = torch.cat([self.sums[id(p)].flatten() for p in group]).float()
            self.tape.hold(flat.grad, "gradients")
            self.adam.param_groups[0]["params"] = [flat]
            self.adam.step()
            flat.grad = None
            with torch.no_grad():
                for parameter, part in zip(group, flat.split([p.numel() for p in group])):
                    parameter.copy_(part.view_as(parameter))
        torch._foreach_zero_(list(self.sums.values()))


def _groups(parameters: list[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """Sub-groups of at most `limit` elements, or of one parameter."""
    groups: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        if not groups or size + parameter.numel() > limit:
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += parameter.numel()
    return groups
