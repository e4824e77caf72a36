"""Several teachers in stage interact, each for rows of its own (`data.train.N.teacher`), all of them on disk.

    N, N_t  answer tokens of a micro-batch, of teacher t's rows        L_t  its target layers        S  student's

Each teacher's rows are matched by its own layers, and over its own tokens: KL means and draws are of N_t tokens. A part
of the loss is the mean over all N tokens, so the teachers' means are weighted by N_t / N.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..hidden_states import VerbalizedBackbone
from ..teacher_cache.store import CacheError
from .batches import to_device
from .module import StageModule

if TYPE_CHECKING:
    from .interact import InteractModule


class ManyTeachers(StageModule):
    """The student, and what it learns from each teacher.

    Under ZeRO-3 all ranks gather the same weights in the same order whatever rows they have: every teacher has its
    turn in every micro-batch, with no tokens where none are its own.

    Args:
        student: the backbone to train.
        lessons: a module for each teacher, with this very student.
        names: of the teachers, for logs.
    """

    roles = ("student",)

    def __init__(self, student: VerbalizedBackbone, lessons: list[InteractModule], names: list[str]):
        super().__init__()
        self.student = student
        self.lessons = lessons  # a plain list: no part of the module tree, where the student is already
        self.part_names, self.settings = lessons[0].part_names, lessons[0].settings
        self.schedule = lessons[0].schedule
        weight = student.head_weight  # in forward, ZeRO-3 would take a look at it for a use
        self._width = _width_of(weight)
        self.teacher_names = names
        if lessons[0].matrix_shape is not None:
            layers = [lesson.layer_names[1] for lesson in lessons]
            self.teacher_widths = [len(each) for each in layers]
            self.matrix_shape = (len(student.target_layers), sum(self.teacher_widths))
            self.layer_names = (student.target_layers, [k for each in layers for k in each])

    def forward(
        self,
        student: dict,
        taught: list[dict[str, Tensor]] | CacheError,
        generator=None,
        intermediate_weight: float | None = None,
    ) -> dict[str, Tensor]:
        """See `StageModule`; `kl` and `matches` have the teachers' layers side by side, and `teacher_tokens` [teachers]
        says how many tokens are of each. `kl` is weighted by N_t / N, as the losses are."""
        if isinstance(taught, CacheError):
            raise taught
        s_layers, s_last = self.student(student["inputs"], student["index"])
        tokens = max(student["index"].numel(), 1)
        loss, parts, record = 0.0, 0.0, {"kl": [], "matches": [], "teacher_tokens": []}
        for lesson, group in zip(self.lessons, taught):
            index = group["tokens"]
            share = index.numel() / tokens
            own = (None if s_layers is None else s_layers[:, index], None if s_last is None else s_last[index])
            said, labels = self._said(lesson, group), student["labels"][index]
            found = lesson.learn(*own, said, labels, generator, intermediate_weight)
            loss, parts = loss + share * found["loss"], parts + share * found["parts"]
            record["teacher_tokens"].append(index.numel())
            if "kl" in found:
                record["kl"].append(share * found["kl"])
                record["matches"].append(found["matches"] * (index.numel() > 0))
        if not record["kl"]:
            return {"loss": loss, "parts": parts}
        record = {name: torch.cat(record[name], 1) for name in ("kl", "matches")} | {
            "teacher_tokens": to_device(torch.tensor(record["teacher_tokens"], dtype=torch.float64), loss.device)
        }
        return {"loss": loss, "parts": parts, **record}

    def _said(self, lesson: InteractModule, group: dict[str, Tensor]):
        """A teacher's share of the micro-batch, of no tokens where no row is its own."""
        stored = {name: value for name, value in group.items() if name != "tokens"}
        if not stored:
            teacher, device = lesson.teacher, group["tokens"].device
            layers = len(teacher.target_layers) + teacher.has_last
            head = teacher.head_weight
            if head is not None:
                stored = {"hidden": torch.zeros(0, layers, _width_of(head), dtype=head.dtype, device=device)}
            else:
                stored = {
                    "neg_entropy": torch.zeros(0, layers, device=device),
                    "expectation": torch.zeros(0, layers, self._width, device=device),
                }
        return lesson.recall(stored)


def _width_of(head: Tensor) -> int:
    """Of a head [V, width], whole or a shard."""
    return getattr(head, "ds_shape", head.shape)[1]
