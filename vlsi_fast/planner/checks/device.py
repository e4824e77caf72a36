"""`vlsi-fast check --device`: the parts that the run will use against plain PyTorch, on this machine's device."""

from __future__ import annotations

import torch

from ...acceleration import attention_name, use_liger
from ...config import QUANTIZED, ConfigError
from ...self_test import of_run
from ...self_test import start as self_test
from ...self_test.probe import Outcome, Probe, compare
from .subject import FAILURE, NOTICE, PASS, UNCHECKED, Result, Subject, Unchecked

NAME = "device"


def look_at_device(subject: Subject) -> list[Result]:
    """A line that names the device, and one for each comparison; what a stage would switch off is a notice."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        probes = probes_of(subject, device)
    except Unchecked as error:
        return [Result(NAME, UNCHECKED, str(error))]
    except ConfigError as error:
        return [Result(NAME, FAILURE, str(error), "see the message")]
    outcomes = compare(probes, device)
    said = f"{self_test.name_of(device)}, torch {torch.__version__}: {len(outcomes)} comparisons"
    if device.type != "cuda":
        said += "; a training on CUDA uses other parts, which this does not tell of"
    return [Result(NAME, PASS, said), *(_result(subject, outcome, self_test.name_of(device)) for outcome in outcomes)]


def probes_of(subject: Subject, device: torch.device) -> list[Probe]:
    """Those of all stages of the run, none twice."""
    config, found = subject.config, {}
    held = config.teacher.mode in (*QUANTIZED, "offload")  # liger-kernel's modules are not put into such a teacher
    for stage in subject.stages:
        heard = ["student"] if subject.reads_cache else config.interact.roles
        names = {"verbalize": config.read_by_verbalize, "interact": heard}.get(stage, ["student"])
        models = {name: subject.model_config(name) for name in names}
        attention = {
            name: attention_name(
                getattr(config, name).attn_implementation, config.dtype, device, config.data.padding_free, model
            )
            for name, model in models.items()
        }
        liger = use_liger(config.liger, device)
        for probe in of_run.probes_of(
            config,
            stage,
            models,
            device=device,
            attention=attention,
            liger=[name for name in names if liger and not (name == "teacher" and held)],
            widened=config.stage_training(stage).deepspeed is None,
        ):
            found.setdefault((probe.name, probe.option, probe.dtype), probe)
    return list(found.values())


def _result(subject: Subject, outcome: Outcome, device: str) -> Result:
    name = f"{NAME}: {outcome.name}"
    said = f"{outcome.chosen}, {outcome.dtype}: {outcome.detail}"
    if outcome.agrees:
        return Result(name, PASS, said)
    try:
        changed = self_test.switched_off(subject.config, [outcome], device)
    except self_test.SelfTestError as error:
        return Result(name, FAILURE, said, error.fix)
    ((option, value),) = changed.items()
    return Result(name, NOTICE, f"{said}; a stage would set {option} to {self_test.yaml_of(value)}")
