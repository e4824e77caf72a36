"""A teacher that is not in the job (`teacher.mode: cached`): what its cache gives stage interact, as numbers.

Nothing of the teacher is on the GPU but, for hidden states, its head. In its place come with the rows, an answer token:

    targets  R (d_s + 1) numbers as stored, which are unpacked to float32, layer by layer, after the student's forward
    hidden   R d_l numbers as stored; the targets are then made of them as if the teacher had just spoken

    R  teacher layers that are read, the last one included        d_s, d_l  widths of student and teacher

Where a cache is on disk its manifest says form, numbers and layers. Else they are those of the `vlsi-fast teacher build`
that the run would need: targets in bfloat16, or hidden states where a loss reads those, of all target layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ConfigError, RunConfig
from ..loading import target_layers
from ..teacher_cache.forms import bytes_a_token_and_layer
from ..teacher_cache.manifest import NAME, TEACHER, read_manifest
from .memory import Curve
from .shapes import read_config

if TYPE_CHECKING:
    from .build import Models
    from .walk import Step


@dataclass(frozen=True)
class Recalled:
    """A cache, as the planner sees it."""

    form: str
    """targets or hidden."""
    numbers: str
    """float32, bfloat16 or int8; of hidden states the run's dtype."""
    layers: int
    """Target layers that the stage reads."""
    has_last: bool
    """Whether it reads the last one."""
    kept: int
    """Layers that the cache has, the last one included."""
    width: int
    """Of the teacher."""
    rows: int
    """Of its head."""
    student_width: int

    @property
    def read(self) -> int:
        """Layers that the stage reads, the last one included."""
        return self.layers + self.has_last

    @property
    def has_states(self) -> bool:
        """Whether the teacher's hidden states come with the rows."""
        return self.form == "hidden"

    def token_bytes(self, layers: int) -> int:
        """Stored of an answer token and so many layers."""
        width = self.width if self.has_states else self.student_width
        return layers * bytes_a_token_and_layer(self.form, self.numbers, width)


def can_be_cached(config: RunConfig) -> bool:
    """Whether stage interact of a run could read a cache."""
    settings = config.interact
    return "interact" in config.stages and "teacher" in settings.roles and not settings.headless


def cache_identity(config: RunConfig) -> dict[str, Any] | None:
    """What the run's cache is of (`teacher_cache.manifest`); None where none is on disk.

    Raises:
        ConfigError: it is damaged, or of another version.
    """
    return read_manifest(config.cache_dir)["identity"] if (config.cache_dir / NAME).is_file() else None


def teacher_beside(config: RunConfig) -> str | None:
    """Folder with the teacher's config and processor that its cache has; None: no cache is read, or none is there."""
    folder = Path(config.cache_dir) / TEACHER
    return str(folder) if config.teacher.mode == "cached" and (folder / "config.json").is_file() else None


def recalled_of(models: Models) -> Recalled:
    """What stage interact of a run reads in place of a teacher.

    Raises:
        ConfigError: no cache can stand for the teacher, or neither its config nor a cache of it is at hand.
    """
    config, settings = models.config, models.config.interact
    if settings.headless:
        raise ConfigError(
            "interact.headless compares the teacher's verbalizers before its final norm, which no cache has: set "
            "teacher.mode to auto"
        )
    teacher = models.configs.get("teacher") or read_config(config.teacher, "teacher", teacher_beside(config))
    needs_states = settings.reads_teacher_layers or settings.reads_teacher_last
    there = cache_identity(config)
    if there is not None and there["form"] == "targets" and needs_states:
        there = None  # of no use to this run
    if there is not None and config.teacher.layers is None:
        layers = there["layers"]
    else:
        layers = models.layers.get("teacher") or target_layers(config.teacher, teacher, "teacher", config)
    count, has_last = len(layers) * settings.matches_layers, settings.needs_teacher_last
    text = teacher.get_text_config()
    form = there["form"] if there is not None else "hidden" if needs_states else "targets"
    numbers = there["numbers"] if there is not None else config.dtype if needs_states else "bfloat16"
    kept = count + has_last if there is None else len(there["layers"]) + there["has_last"]
    width = models.shapes["student"].width
    return Recalled(form, numbers, count, has_last, kept, text.hidden_size, text.vocab_size, width)


def hold_recalled(curve: Curve, step: Step) -> None:
    """What the batches of an optimizer step bring from the cache, as stored, and the teacher's head beside states."""
    found, setup = step.recalled, step.setup
    batches = setup.accumulation + (setup.device != "cuda")  # as for other inputs, see `memory.held`
    curve.hold("inputs", batches * step.batches["student"].answers * found.token_bytes(found.read))
    if found.has_states:
        curve.hold("teacher", setup.compute_bytes * found.rows * found.width)


def recall(curve: Curve, step: Step) -> None:
    """A micro-batch's share, layers first: targets as float32, or hidden states as they are."""
    found, n = step.recalled, step.batches["student"].answers
    if found.has_states:
        curve.hold("activations", step.setup.compute_bytes * found.read * n * found.width)
        return
    size = 4 * found.read * n * found.student_width
    curve.hold("targets", size + 4 * found.read * n)
    curve.moment("targets unpacked", workspace=0 if found.numbers == "float32" else size)  # converted, then put in order
