"""`vlsi-fast teacher check`: a cache against the teacher itself, and what its rounding costs this very student."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlsi_kernels import TeacherTargets, head_statistics

from ..config import ConfigError, RunConfig
from ..data.collate import Collator
from ..data.dataset import VlsiDataset
from ..data.packing import Packer
from ..data.sources import build_source
from ..hidden_states import VerbalizedBackbone
from ..lineage import rows_used
from ..losses import PairwiseKL
from ..ranks.sharding import world_size
from ..stages.arguments import launched
from ..stages.batches import StageCollator, restore_shared, to_device
from ..stages.sampling import data_order
from .forms import unpack_targets
from .recalling import CachedTeacher, Routed
from .speaking import TeacherStage
from .store import CacheError

BOUNDS = {"float32": (1e-4, 1e-3), "float16": (5e-3, 1e-2), "bfloat16": (4e-2, 5e-2), "int8": (2e-1, 2e-1)}
"""Of `kl` and `gradient`, by what is kept; hidden states have those of their dtype. A cache of another teacher is off
by nats; a teacher that runs in other batches, or on another device, by far less than these."""


def check(config: RunConfig, rows: int, folder: Path | None = None) -> dict[str, Any]:
    """Run teacher and student on some rows, and compare what the losses get from the cache and from the teacher.

    Args:
        config: of a run that learns from the cache.
        rows: to compare, the first of stage interact's order that the cache has.
        folder: of the cache; None: the config's.

    Returns:
        `rows`, `tokens`, `kl` (largest difference of any layer pair's mean KL over a row's tokens, in nats; where a KL
        is above 1, relative to it), `gradient` (relative error of d KL / d student states, over all tokens and pairs),
        `self_kl` (largest KL of a teacher layer with itself out of the cache, in nats; None unless student and teacher
        speak through one head), `passed`.

    Raises:
        ConfigError: the cache is none for this run.
        CacheError: none of the rows that were tried is in it.
    """
    if launched() and world_size() > 1:
        raise ConfigError("teacher check runs in one process; start it without a launcher")
    named = {"mode": "cached"} | ({} if folder is None else {"cache": str(folder)})
    config = config.model_copy(update={"teacher": config.teacher.model_copy(update=named)})
    cached = CachedTeacher(config)
    stage = TeacherStage(config)
    stage.prepare(None)
    student = stage.roles["student"]
    cached.require_student(student.folder, student.config, stage.head_options.vocab_size)
    return _Comparison(stage, cached).of(rows)


class _Comparison:
    """Both models on the device, and the cache."""

    def __init__(self, stage: TeacherStage, cached: CachedTeacher):
        self.stage, self.cached, self.device = stage, cached, stage.args.device
        self.options = stage.head_options
        settings = stage.settings
        spoken = "student" in settings.speakers
        verbalizers = stage.roles["student"].trained_verbalizers() if spoken else None
        model = stage.load_model("student")
        self.student = (
            VerbalizedBackbone(model, stage.roles["student"].layers, verbalizers, False).to(self.device).eval()
        )
        self.teacher = stage.load_speaking_teacher(self.student.head_weight).to(self.device).eval()
        self.pairwise = PairwiseKL(self.student.head_weight, self.teacher.head_weight, self.options)
        self.cached_pairwise = None
        if cached.form == "hidden":
            translates = stage.config.verbalizer.translates
            head = self.student.head_weight if translates else nn.Parameter(cached.head(self.device), False)
            self.cached_pairwise = PairwiseKL(self.student.head_weight, head, self.options)
        layers = stage.roles["teacher"].layers
        self.columns = [layers.index(k) for k in cached.layers]

    def of(self, count: int) -> dict[str, Any]:
        stage, config = self.stage, self.stage.config
        processors = {name: role.processor for name, role in stage.roles.items()}
        recall = Routed([self.cached.rows()], [0] * len(config.data.train))
        translates = config.verbalizer.translates
        dataset = VlsiDataset(build_source(config.data.train), processors, config.data, recall, translates)
        packers = {name: Packer(role.config) for name, role in stage.roles.items() if stage.packed(name)}
        collate = StageCollator(Collator(processors, packers=packers), ("student", "teacher"))
        found: dict[str, Any] = {"rows": 0, "tokens": 0, "kl": 0.0, "gradient": 0.0, "self_kl": None}
        errors = sizes = 0.0
        order = data_order(config, dataset.sources, rows_used(config.stage_dir("verbalize")))
        for number in order.order.rows(order.start, len(dataset)):
            row = dataset[number]
            if isinstance(row["taught"].values, CacheError):
                continue
            batch = collate([row])
            kl, wrong, size, own = self._row(batch)
            found["rows"] += 1
            found["tokens"] += batch["facts"]["answer_tokens"]
            found["kl"], errors, sizes = max(found["kl"], kl), errors + wrong, sizes + size
            if own is not None:
                found["self_kl"] = max(found["self_kl"] or 0.0, own)
            if found["rows"] == count:
                break
        if not found["rows"]:
            raise CacheError(
                f"{self.cached.folder} has none of the rows of data.train that were tried: was it built of others?"
            )
        found["gradient"] = (errors / sizes) ** 0.5 if sizes else 0.0
        identity = self.cached.identity
        bounds = BOUNDS["float32" if config.dtype == "float32" else "bfloat16"]
        if self.cached.form == "targets" and config.dtype == "float32":
            bounds = BOUNDS[identity["numbers"]]
        elif self.cached.form == "targets":
            bounds = tuple(map(max, bounds, BOUNDS[identity["numbers"]]))
        found["passed"] = found["kl"] <= bounds[0] and found["gradient"] <= bounds[1]
        found["bounds"] = {"kl": bounds[0], "gradient": bounds[1]}
        return found

    @torch.no_grad()
    def _row(self, batch: dict[str, Any]) -> tuple[float, float, float, float | None]:
        """Largest error of a KL, squares of the gradient's error and of the gradient, KL with itself."""
        temperature, settings = self.stage.settings.temperature, self.stage.settings
        parts, facts = to_device(batch["batch"], self.device), batch["facts"]
        restore_shared({name: parts[name] for name in ("student", "teacher")}, facts)
        mixed = self.stage.args.bf16
        with torch.autocast(self.device.type, torch.bfloat16) if mixed else contextlib.nullcontext():
            layers, last = self.teacher(parts["teacher"]["inputs"], parts["teacher"]["index"])
            own = [] if layers is None else [layers[self.columns]]
            own += [last[None]] if settings.needs_teacher_last else []
            states = torch.cat(own)
            (live,) = self.pairwise.targets([states], temperature)
            cached = self._cached(parts["taught"], temperature)
            layers, last = self.student(parts["student"]["inputs"], parts["student"]["index"])
            spoken = torch.cat(([] if layers is None else [layers]) + [last[None]])
            one, other = (self.pairwise(spoken, targets, temperature) for targets in (live, cached))
            said = self._said(spoken, temperature)
        kl = float(((one - other).abs() / one.abs().clamp_min(1)).max())
        wrong = (live.expectation - cached.expectation).double().square().sum() * len(said)
        size = sum((e - live.expectation).double().square().sum() for e in said)
        return kl, float(wrong), float(size), self._self_kl(states, cached, temperature)

    def _cached(self, stored: dict[str, Tensor], temperature: float) -> TeacherTargets:
        if "hidden" not in stored:
            return unpack_targets(stored, self.options.vocab_size, temperature)
        states = stored["hidden"].transpose(0, 1).contiguous()
        (targets,) = self.cached_pairwise.targets([states], temperature)
        return targets

    def _said(self, spoken: Tensor, temperature: float) -> Tensor:
        """[S, N, d_s] expectations of the student's layers."""
        layers, tokens, width = spoken.shape
        weight = self.student.head_weight
        options = {"vocab_size": self.options.vocab_size, "temperature": temperature, "impl": self.options.impl}
        found = head_statistics(spoken.reshape(-1, width).to(weight.dtype), weight, weight, **options)
        return found.expectation.float().view(layers, tokens, width)

    def _self_kl(self, states: Tensor, cached: TeacherTargets, temperature: float) -> float | None:
        """The teacher as its own student, where that is one head or it speaks through the student's: 0, but for
        rounding."""
        one, other = self.student.head_weight, self.teacher.head_weight
        if one.shape != other.shape or not torch.equal(one, other):
            return None
        return float(self.pairwise(states, cached, temperature).diagonal().abs().max())
