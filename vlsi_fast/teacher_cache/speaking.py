"""The teacher of a build: run on micro-batches, and what is kept of what it says."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlsi_kernels import TeacherTargets, head_statistics

from ..config import ConfigError
from ..loading import read_head
from ..losses import PairwiseKL
from ..matching import draw_generator
from ..ranks.sharding import barrier, gathered_objects, rank
from ..stages.arguments import training_arguments
from ..stages.batches import to_device
from ..stages.interact import InteractStage
from ..translation import final_norm_of, gain_of
from .forms import pack_targets, unpack_targets
from .manifest import HEAD

if TYPE_CHECKING:
    from .build import Chosen

PROBES = 256
"""Answer tokens on which the error of rounded targets is measured."""


class TeacherStage(InteractStage):
    """Stage interact as far as it concerns the teacher; it trains nothing."""

    def role_names(self) -> list[str]:
        return ["student", "teacher"]

    def open_caches(self) -> list:
        return []

    @property
    def _speakers(self) -> list[str]:
        return ["teacher"] if "teacher" in self.config.speakers else []

    def prepare(self, layers: list[int] | None) -> None:
        """Read configs and processors, and check that the teacher can be asked.

        Raises:
            ConfigError, LineageError, FileNotFoundError: it cannot; the message names the fix.
        """
        if "teacher" not in self.settings.roles or self.settings.headless:
            what = "interact.headless" if self.settings.headless else "interact.intermediate and interact.last"
            raise ConfigError(f"{what} leaves nothing of the teacher to keep: no cache is of use to this config")
        self.args = training_arguments(self.config, self.name)
        try:
            self.read_models()
        except (ValueError, ImportError) as error:  # of tokenizers and processors: all say what to do
            raise ConfigError(str(error)) from error
        if self.config.preflight:
            self.self_test()
        self.chosen_layers = self.roles["teacher"].layers if self.settings.matches_layers else []
        absent = sorted(set(layers or ()) - set(self.chosen_layers))
        if absent:
            raise ConfigError(
                f"--layers {absent}: the teacher speaks at layers {self.chosen_layers}; name some of those"
            )
        if layers is not None:
            self.chosen_layers = sorted(layers)


class Teacher:
    """Runs the teacher on a micro-batch and says what a run with a teacher in the job would compare. Collective."""

    def __init__(self, stage: TeacherStage, folder: Path, chosen: Chosen, student_head: Tensor | None):
        self.stage, self.chosen, self.device = stage, chosen, stage.args.device
        head = None
        if student_head is not None:
            head = nn.Parameter(student_head.to(self.device), requires_grad=False)
        teacher = stage.load_speaking_teacher(head)
        if stage.args.deepspeed is None:
            teacher.to(self.device)
        self._call = stage.apart(teacher) or teacher
        self.columns = [stage.roles["teacher"].layers.index(k) for k in stage.chosen_layers]
        self.errors: dict[str, float] = {}
        """What rounding costs, by the first micro-batch."""
        self.pairwise = None
        if chosen.form == "targets":
            self.pairwise = PairwiseKL(head, teacher.head_weight, stage.head_options)
            self.student_head = head
        elif not stage.config.verbalizer.translates:  # the student has the head of translated states
            _write_head(stage, folder / HEAD)

    @torch.no_grad()
    def __call__(self, inputs: dict, index: Tensor) -> Tensor | TeacherTargets:
        """Processor tensors and [N] answer positions -> targets, or [R, N, d_l] hidden states."""
        mixed = self.stage.args.bf16 and self.stage.args.deepspeed is None
        with torch.autocast(self.device.type, torch.bfloat16) if mixed else contextlib.nullcontext():
            layers, last = self._call(inputs, index, True)
            found = [] if layers is None else [layers[self.columns] if len(self.columns) < len(layers) else layers]
            found += [] if last is None else [last[None]]
            states = torch.cat(found) if len(found) > 1 else found[0]
            if self.pairwise is None:
                return states
            (targets,) = self.pairwise.targets([states], self.stage.settings.temperature)
            return targets

    def stored(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What is kept of a micro-batch of `Reading`, all its rows' answer tokens: [N, ..] each, in CPU memory."""
        inputs = to_device(batch["batch"]["teacher"], self.device)
        said = self(inputs["inputs"], inputs["index"])
        if self.chosen.form == "hidden":
            dtype = getattr(torch, self.stage.config.dtype)
            return {"hidden": said.transpose(0, 1).to(dtype).contiguous().cpu()}
        stored = pack_targets(said, self.chosen.numbers)
        if self.chosen.numbers != "float32" and not self.errors:
            self.errors = measured_errors(said, stored, self.student_head, self.stage)
        return {name: value.cpu() for name, value in stored.items()}

    def told_errors(self) -> dict[str, Any]:
        """For the manifest. Collective."""
        errors = gathered_objects(self.errors)[0]
        return {"errors": errors} if errors else {}


def _write_head(stage: TeacherStage, path: Path) -> None:
    """The teacher's head, beside hidden states."""
    if rank() == 0 and not path.is_file():
        from safetensors.torch import save_file

        role = stage.roles["teacher"]
        partial = path.with_suffix(".partial")
        save_file({"head": read_head(role.folder, role.config, stage.config.dtype).contiguous()}, partial)
        partial.replace(path)
    barrier()


def measured_errors(
    targets: TeacherTargets, stored: dict[str, Tensor], weight: Tensor, stage: TeacherStage
) -> dict[str, float]:
    """Errors of KL and gradient by rounded targets, on the first answer tokens.

    The student's states are not known here. In their place stand states of the size that its final norm gives, drawn
    at random, which is what a student far from the teacher looks like.

    Returns:
        `kl_mean`, `kl_max` (nats, absolute), `gradient` (relative, of all tokens' gradients), `tokens`.
    """
    count = min(PROBES, targets.neg_entropy.shape[1])
    rounded = unpack_targets({n: v[:count] for n, v in stored.items()}, targets.vocab_size, targets.temperature)
    exact = targets._replace(neg_entropy=targets.neg_entropy[:, :count], expectation=targets.expectation[:, :count])
    student = stage.roles["student"]
    gain = gain_of(final_norm_of(student.folder, student.config, torch.float32), weight.shape[1])
    probe = (torch.randn(count, weight.shape[1], generator=draw_generator(0, 0, 0)) * gain).to(weight)
    options = {"vocab_size": targets.vocab_size, "temperature": targets.temperature, "impl": stage.config.impl}
    found = head_statistics(probe, weight, weight, **options)
    difference = rounded.expectation - exact.expectation
    kl = torch.einsum("nd,rnd->rn", probe.float(), difference).abs() / targets.temperature
    gradient = found.expectation.float() - exact.expectation
    relative = difference.norm() / gradient.norm()
    return {
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "gradient": float(relative),
        "tokens": count,
    }
