"""A teacher that is not in the job (`teacher.mode: cached`): what its cache gives stage interact, as numbers.

Nothing of the teacher is on the GPU but, for hidden states, its head (none where they are in the student's language,
and of its width). In its place come with the rows, an answer token:

    targets  R (d_s + 1) numbers as stored, which are unpacked to float32, layer by layer, after the student's forward
    hidden   R d_l numbers as stored; the targets are then made of them as if the teacher had just spoken

    R  teacher layers that are read, the last one included        d_s, d_l  widths of student and teacher

Where a cache is on disk its manifest says form, numbers and layers. Else they are those of the `vlsi-fast teacher
build` that the run would need: targets in its default numbers, or hidden states where a loss reads those, of all target
layers. Of several teachers (`data.train.N.teacher`), the one that says most is that of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ConfigError, RunConfig
from ..loading import target_layers
from ..teacher_cache.forms import DEFAULT, bytes_a_token_and_layer
from ..teacher_cache.manifest import NAME, TEACHER, read_manifest
from ..teacher_cache.recalling import cache_folders
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
    """Of `teacher_cache.forms.NUMBERS`; of hidden states the run's dtype."""
    layers: int
    """Target layers that the stage reads."""
    has_last: bool
    """Whether it reads the last one."""
    kept: int
    """Layers that the cache has, the last one included."""
    width: int
    """Of its hidden states: the teacher's, or the student's where they are in its language."""
    rows: int
    """Of the head that reads them."""
    student_width: int
    head: int = 0
    """Numbers of all teachers' heads that are on the GPU, beside hidden states."""
    own_head: bool = True
    """Whether hidden states are read by a head of the teacher's own."""

    @property
    def read(self) -> int:
        """Layers that the stage reads, the last one included."""
        return self.layers + self.has_last

    @property
    def has_states(self) -> bool:
        """Whether the teacher's hidden states come with the rows."""
        return self.form == "hidden"

    def as_form(self, form: str, numbers: str) -> Recalled:
        """The same layers, kept otherwise."""
        head = self.rows * self.width * (form == "hidden" and self.own_head)
        return replace(self, form=form, numbers=numbers, head=head)

    def token_bytes(self, layers: int) -> int:
        """Stored of an answer token and so many layers."""
        width = self.width if self.has_states else self.student_width
        return layers * bytes_a_token_and_layer(self.form, self.numbers, width)


def can_be_cached(config: RunConfig) -> bool:
    """Whether stage interact of a run could read a cache."""
    settings = config.interact
    return "interact" in config.stages and "teacher" in settings.roles and not settings.headless


def caches_there(config: RunConfig) -> list[Path]:
    """Folders of the run's caches that are on disk, its own first."""
    return [folder for folder in cache_folders(config) if (folder / NAME).is_file()]


def teacher_beside(config: RunConfig) -> str | None:
    """Folder with the teacher's config and processor that a cache has; None: no cache is read, or none is there."""
    found = caches_there(config) if config.teacher.mode == "cached" else []
    return str(found[0] / TEACHER) if found and (found[0] / TEACHER / "config.json").is_file() else None


def recalled_of(models: Models) -> Recalled:
    """What stage interact of a run reads in place of a teacher.

    Raises:
        ConfigError: no cache can stand for the teacher, one is damaged, or neither the teacher's config nor a cache of
            it is at hand.
    """
    config, settings = models.config, models.config.interact
    if settings.headless:
        raise ConfigError(
            "interact.headless compares the teacher's verbalizers before its final norm, which no cache has: set "
            "teacher.mode to auto"
        )
    needs_states = settings.reads_teacher_layers or settings.reads_teacher_last
    there = {folder: read_manifest(folder)["identity"] for folder in caches_there(config)}
    usable = {folder: each for folder, each in there.items() if each["form"] == "hidden" or not needs_states}
    found = [_of_cache(models, folder, identity) for folder, identity in usable.items()]
    if found:
        head = sum(each.rows * each.width for each in found if each.has_states and each.own_head)
        return replace(max(found, key=lambda each: each.token_bytes(each.read)), head=head)
    teacher = models.configs.get("teacher") or read_config(config.teacher, "teacher")
    layers = models.layers.get("teacher") or target_layers(config.teacher, teacher, "teacher", config)
    count, has_last = len(layers) * settings.matches_layers, settings.needs_teacher_last
    found = Recalled("targets", DEFAULT, count, has_last, count + has_last, **_read_by(models, teacher))
    return found.as_form("hidden", config.dtype) if needs_states else found


def _of_cache(models: Models, folder: Path, identity: dict[str, Any]) -> Recalled:
    config, settings = models.config, models.config.interact
    teacher = read_config(config.teacher, "teacher", str(folder / TEACHER))
    layers = identity["layers"]
    if config.teacher.layers is not None and folder == config.cache_dir:
        layers = target_layers(config.teacher, teacher, "teacher", config)
    return Recalled(
        identity["form"],
        identity["numbers"],
        len(layers) * settings.matches_layers,
        settings.needs_teacher_last,
        len(identity["layers"]) + identity["has_last"],
        **_read_by(models, teacher),
    )


def _read_by(models: Models, teacher) -> dict[str, Any]:
    """Sizes of the hidden states and of the heads; `teacher`: its transformers config."""
    student, own = models.shapes["student"].width, not models.config.verbalizer.translates
    text = (teacher if own else models.configs["student"]).get_text_config()
    return {"width": text.hidden_size, "rows": text.vocab_size, "student_width": student, "own_head": own}


def hold_recalled(curve: Curve, step: Step) -> None:
    """What the batches of an optimizer step bring from the cache, as stored, and the teacher's head beside states."""
    found, setup = step.recalled, step.setup
    batches = setup.accumulation + (setup.device != "cuda")  # as for other inputs, see `memory.held`
    curve.hold("inputs", batches * step.batches["student"].answers * found.token_bytes(found.read))
    if found.has_states:
        curve.hold("teacher", setup.compute_bytes * found.head)


def recall(curve: Curve, step: Step) -> None:
    """A micro-batch's share, layers first: targets as float32, or hidden states as they are."""
    found, n = step.recalled, step.batches["student"].answers
    if found.has_states:
        curve.hold("activations", step.setup.compute_bytes * found.read * n * found.width)
        return
    size = 4 * found.read * n * found.student_width
    curve.hold("targets", size + 4 * found.read * n)
    converted = 0 if found.numbers == "float32" else size  # and then put in order
    curve.moment("targets unpacked", workspace=converted)
