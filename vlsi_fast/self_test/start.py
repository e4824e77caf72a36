"""What a stage does about its probes: all ranks take the same decision, and the record tells it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

import torch

from ..config import ConfigError, RunConfig
from ..ranks.sharding import gathered_objects, rank
from ..terminal import say
from .probe import Outcome, Probe, compare

PLAIN = {"impl": "torch", "liger": False, "student.attn_implementation": "sdpa", "teacher.attn_implementation": "sdpa"}
"""Option -> its value with which the run goes on where what `auto` chose disagrees."""


class SelfTestError(ConfigError):
    """A part that was asked for by name computes something else than plain PyTorch on this device."""

    def __init__(self, found: str, fix: str):
        super().__init__(f"{found}. {fix}")
        self.fix = fix


def is_needed(device: torch.device) -> bool:
    """Whether a stage on this device compares its parts before it starts."""
    return device.type == "cuda"


def start(config: RunConfig, probes: Iterable[Probe], device: torch.device) -> tuple[RunConfig, dict[str, Any]]:
    """Run probes on every rank, and take out of the run what disagrees on any of them. Collective.

    Returns:
        The config with which the run goes on, and what the stage's record keeps of it.

    Raises:
        SelfTestError: something that was asked for by name, or plain PyTorch itself, disagrees.
        DeviceLostError: a kernel has left this rank's device unusable.
    """
    began = time.monotonic()
    outcomes = over_ranks(compare(probes, device))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    changed = switched_off(config, outcomes, name_of(device))
    if rank() == 0:
        for option, value in changed.items():
            wrong = [f"{o.name} ({o.dtype}): {o.detail}" for o in outcomes if o.option == option and not o.agrees]
            say(
                f"{option} auto is {yaml_of(value)} in this stage, since on {name_of(device)} a part of it is not what "
                f"plain PyTorch computes: {'; '.join(wrong)}"
            )
    record = {
        "device": name_of(device),
        "seconds": round(time.monotonic() - began, 1),
        "switched_off": changed,
        "probes": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    return changed_config(config, changed), record


def name_of(device: torch.device) -> str:
    """E.g. NVIDIA A100-SXM4-80GB."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def over_ranks(outcomes: list[Outcome]) -> list[Outcome]:
    """The worst of all ranks for each probe, the same list on every rank. Collective.

    A probe that a rank did not have, since another attention or no liger-kernel is installed there, disagrees.
    """
    everyone = [{(o.name, o.option, o.dtype): o for o in found} for found in gathered_objects(outcomes)]
    merged = []
    for key in dict.fromkeys(key for found in everyone for key in found):
        there = [(at, found.get(key)) for at, found in enumerate(everyone)]
        present = [o for _, o in there if o is not None]
        wrong = [f"rank {at}: {o.message}" for at, o in there if o is not None and not o.agrees]
        wrong += [f"rank {at} has other packages and does not use it" for at, o in there if o is None]
        merged.append(
            dataclasses.replace(
                present[0],
                agrees=not wrong,
                outputs=max((o.outputs for o in present if o.outputs is not None), default=None),
                gradients=max((o.gradients for o in present if o.gradients is not None), default=None),
                message=(wrong[0].partition(": ")[2] if len(everyone) == 1 else "; ".join(wrong[:3])) if wrong else "",
            )
        )
    return merged


def switched_off(config: RunConfig, outcomes: list[Outcome], device: str) -> dict[str, Any]:
    """Option -> the value that it gets, for each option whose part disagrees and which is `auto`.

    Raises:
        SelfTestError: see `start`.
    """
    changed = {}
    for outcome in outcomes:
        if outcome.agrees:
            continue
        asked, plain = _value(config, outcome.option), PLAIN[outcome.option]
        if asked == "auto" and outcome.chosen != plain:
            changed[outcome.option] = plain
            continue
        if outcome.chosen == plain:
            fix = "It is PyTorch itself: look at the GPU, its driver and the build of torch"
        else:
            fix = f"{outcome.option} is {yaml_of(asked)}: set it to auto or {yaml_of(plain)}, or install other versions"
        raise SelfTestError(
            f"on {device}, {outcome.name} ({outcome.dtype}) is not what plain PyTorch computes: {outcome.detail}",
            f"{fix} (preflight: false goes past this)",
        )
    return changed


def changed_config(config: RunConfig, changed: dict[str, Any]) -> RunConfig:
    """A copy of the config with these options."""
    for option, value in changed.items():
        section, _, name = option.rpartition(".")
        if section:
            value = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section or name: value})
    return config


def _value(config: RunConfig, option: str) -> Any:
    value = config
    for name in option.split("."):
        value = getattr(value, name)
    return value


def yaml_of(value: Any) -> str:
    """As a config has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
