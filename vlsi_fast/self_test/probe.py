"""One fast part of a run against its plain form: outputs and gradients on the same random inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlsi_kernels._common import exact_matmul

from ..errors import UserError

BARS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest error (`error_of`) of a tensor that counts as agreement, by its dtype: three times and more what the parts
have on a CPU and in Triton's interpreter (tests/test_kernels_probes.py holds them to half). A wrong one is off by 1."""

GATED_SLACK = ATTENTION_SLACK = 3.0
"""`Probe.slack` of parts that round between their products, gated networks and attention: in bfloat16 plain PyTorch has
up to 3e-2 there, in the gradients."""

Inputs = dict[str, Tensor]
Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Probe:
    """One comparison. `fast` and `plain` take the tensors that `inputs` makes, by name."""

    name: str
    """What is compared, and at which sizes."""
    option: str
    """The option by which the run chose it, e.g. `liger`."""
    chosen: str
    """What was chosen by it, e.g. `triton`."""
    dtype: torch.dtype
    """That of the run: `inputs` are rounded to it. `plain` gets them in float64."""
    inputs: Callable[[torch.Generator], Inputs]
    """Makes the tensors on the generator's device; those of whole numbers stay as they are."""
    fast: Callable[..., Outputs]
    plain: Callable[..., Outputs]
    learns: tuple[str, ...] = ()
    """Inputs whose gradients are compared."""
    slack: float = 1.0
    """Factor of the bars, for parts that round in between."""


@dataclass(frozen=True)
class Outcome:
    """What a probe found; errors are `error_of`, the largest of all outputs and of all gradients."""

    name: str
    option: str
    chosen: str
    dtype: str
    agrees: bool
    outputs: float | None = None
    gradients: float | None = None
    message: str = ""
    """Why it does not agree."""

    @property
    def detail(self) -> str:
        """Errors in words."""
        if self.outputs is None:
            return self.message
        errors = f"outputs {self.outputs:.1e}" + (f", gradients {self.gradients:.1e}" if self.gradients else "")
        return f"{self.message} ({errors})" if self.message else errors


class DeviceLostError(UserError):
    """A kernel has left the device unusable for this process, which must end."""

    exit_code = 1
    of_one_rank = True


def compare(probes: Iterable[Probe], device: torch.device) -> list[Outcome]:
    """Run probes on a device, each whatever became of the others.

    Raises:
        DeviceLostError: after an illegal memory access and the like no further call to CUDA works.
    """
    return [_compare(probe, device) for probe in probes]


def error_of(value: Tensor, truth: Tensor) -> float:
    """Largest |value - truth| / (|truth| + root mean square of the truth) over the elements; inf where not finite."""
    value, truth = value.detach().double(), truth.detach().double()
    if not truth.numel():
        return 0.0
    scale = truth.abs() + truth.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    worst = ((value - truth).abs() / scale).max().item()  # a NaN stays one
    return worst if math.isfinite(worst) else math.inf


def _compare(probe: Probe, device: torch.device) -> Outcome:
    facts = (probe.name, probe.option, probe.chosen, str(probe.dtype).removeprefix("torch."))
    try:
        # TF32 is the user's choice and no fault of a part: products of float32 are made exactly on both sides
        with exact_matmul(device):
            found = _errors(probe, device)
    except Exception as error:
        _require_device(probe, device, error)
        return Outcome(*facts, False, message=f"{type(error).__name__}: {_first_line(error)}")
    wrong = [f"{name} is off by {error:.1e}, the bar is {bar:.0e}" for name, error, bar in found if not error <= bar]
    wrong = [text.replace("off by inf", "not finite") for text in wrong]
    outputs, gradients = (
        [error for name, error, _ in found if name.startswith(kind)] for kind in ("output", "gradient")
    )
    errors = [max(group) if group and math.isfinite(max(group)) else None for group in (outputs, gradients)]
    return Outcome(*facts, not wrong, *errors, message="; ".join(wrong))


def _errors(probe: Probe, device: torch.device) -> list[tuple[str, float, float]]:
    """(what, error, bar) of every output and gradient."""
    generator = torch.Generator(device).manual_seed(0)
    made = probe.inputs(generator)
    rounded = {name: t.to(probe.dtype) if t.is_floating_point() else t for name, t in made.items()}
    fast = _outputs(probe.fast, rounded, probe.learns)
    # both sides are given the same gradients of their outputs; each its own copy, since kernels may write into them
    weights = [torch.randn(o.shape, generator=generator, device=device).to(o.dtype) for o in fast[0]]
    grads = _gradients(*fast, weights)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in rounded.items()}
    plain = _outputs(probe.plain, wide, probe.learns)
    truths = _gradients(*plain, [w.double() for w in weights])
    found = [(f"output {i}", a, b) for i, (a, b) in enumerate(zip(fast[0], plain[0]))]
    found += [(f"gradient of {n}", a, b) for n, a, b in zip(probe.learns, grads, truths)]
    return [(name, error_of(value, truth), probe.slack * BARS[value.dtype]) for name, value, truth in found]


def _outputs(function: Callable[..., Outputs], inputs: Inputs, learns: tuple[str, ...]):
    """Its outputs, and the leaves whose gradients are wanted."""
    leaves = {name: t.detach().clone().requires_grad_(name in learns) for name, t in inputs.items()}
    with torch.enable_grad():
        outputs = function(**leaves)
    return [outputs] if isinstance(outputs, Tensor) else list(outputs), [leaves[name] for name in learns]


def _gradients(outputs: list[Tensor], leaves: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, leaves, [w.clone() for w in weights]) if leaves else ()


def _require_device(probe: Probe, device: torch.device, error: Exception) -> None:
    """Raises DeviceLostError where the device does nothing any more."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except Exception:
        raise DeviceLostError(
            f"{probe.name} ({probe.dtype}) has crashed on {torch.cuda.get_device_name(device)}, and this process can "
            f"use the device no longer ({_first_line(error)}): set {probe.option}, by which the run has chosen "
            f"{probe.chosen}, to another value and start again (preflight: false goes past this)"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
