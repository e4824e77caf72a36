"""Which models of a run speak, through which verbalizers, and what they say."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..attention import VARLEN
from ..config import ConfigError
from ..lineage import checkpoint_digest
from ..loading import load_model_config, resolve_folder
from ..runs import Run
from ..speech import Picture, Speaker, Speech, open_speaker
from ..verbalizer import read_spec


@dataclass(frozen=True)
class Source:
    """One model to be heard, not loaded yet."""

    name: str
    """Heading of its column."""
    role: str
    """student or teacher: whose settings and verbalizers it has."""
    checkpoint: str
    """Folder, or Hub name."""
    verbalizers: Path | None
    """Folder; None where only the model itself can be heard."""
    note: str = ""
    """What a reader should know about the two."""


@dataclass(frozen=True)
class Column:
    """A model and its layers' answers, shallow to deep, the model's own last."""

    source: Source
    speeches: list[Speech]


def sources_of(run: Run, compare: Sequence[str]) -> list[Source]:
    """The distilled student and what it is compared with: base student first, then it, then teacher and others.

    Args:
        run: from `open_run`.
        compare: base, teacher, or folders (Hub names) of checkpoints.

    Raises:
        FileNotFoundError: no trained student, no verbalizers, no such checkpoint.
        ConfigError: verbalizers that belong to another model.
    """
    distilled = Source(
        "distilled",
        "student",
        str(run.student),
        _of_the_distilled(run),
        "heard through " + ("its own verbalizers" if _trained_in_interact(run) else "the base student's verbalizers"),
    )
    before = [_original(run, "base", "student")] if "base" in compare else []
    after = []
    for name in dict.fromkeys(compare):
        if name == "teacher":
            after.append(_original(run, "teacher", "teacher"))
        elif name != "base":
            after.append(_other(run, name))
    return [*before, distilled, *after]


def open_source(run: Run, source: Source, device: str | None = None) -> Speaker:
    """Load a model with the run's own settings."""
    config = run.config
    role = getattr(config, source.role)
    attention = "sdpa" if role.attn_implementation in ("auto", VARLEN) else role.attn_implementation
    return open_speaker(
        source.checkpoint,
        source.verbalizers,
        dtype=config.dtype,
        device=device,
        attn_implementation=attention,
        min_pixels=role.min_pixels or config.data.min_pixels,
        max_pixels=role.max_pixels or config.data.max_pixels,
    )


def hear(
    run: Run,
    sources: Sequence[Source],
    images: Sequence[Picture],
    question: str,
    *,
    layers: dict[str, list[int | None] | None] | None = None,
    device: str | None = None,
    **options,
) -> list[Column]:
    """Every source's layers, one model in memory at a time.

    Args:
        run: that the sources are of.
        sources: from `sources_of`.
        images: PIL images or files.
        question: the user's turn.
        layers: role -> layers that speak; absent or None: all and the last.
        device: default: the GPU where there is one.
        options: of `Speaker.speak`.
    """
    columns = []
    for source in sources:
        speaker = open_source(run, source, device)
        chosen = (layers or {}).get(source.role)
        try:
            columns.append(Column(source, speaker.speak(images, question, layers=chosen, **options)))
        except ValueError as error:
            why = "" if source.verbalizers is not None else f" ({source.note})"
            raise ValueError(f"{source.name}: {error}{why}") from error
        del speaker
        gc.collect()
    return columns


def _original(run: Run, name: str, role: str) -> Source:
    """A model as the run found it, with the verbalizers trained on it."""
    try:
        folder = run.verbalizers(role)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}, or leave it out: --compare without {name}") from error
    checkpoint = run.base(role)
    spec, note = read_spec(folder), "heard through its own verbalizers"
    made_for = spec.made_for
    if spec.translates:
        note = "its layers speak the student's tokens (verbalizer.language student), which it cannot read back: heard "
        return Source(name, role, checkpoint, None, note + "by its own answer alone")
    trained_on = made_for.get("checkpoint")
    if trained_on is not None and trained_on != checkpoint_digest(resolve_folder(checkpoint, f"{role}.path")):
        raise ConfigError(
            f"{folder}: these verbalizers were trained on another checkpoint than {checkpoint} is now; "
            "restore that one, or run --stage verbalize again"
        )
    if made_for.get("quantization"):
        note += f", which were trained on it in {made_for['quantization']}; here it is not quantised"
    if made_for.get("objective", "answers") != "answers":
        note += ", which learnt what its own last layer says"
        note += " and the answers" if made_for["objective"] == "both" else ""
    return Source(name, role, checkpoint, folder, note)


def _other(run: Run, checkpoint: str) -> Source:
    """A checkpoint from elsewhere, heard through the verbalizers of whichever role it fits, the student's first."""
    resolve_folder(checkpoint, "--compare")
    settings = run.config.student.model_copy(update={"path": checkpoint})
    config = load_model_config(settings, "student")
    text = config.get_text_config()
    for role in ("student", "teacher"):
        with contextlib.suppress(FileNotFoundError):  # a run may have verbalizers of one role only
            folder = run.verbalizers(role)
            spec = read_spec(folder)
            fits = (spec.model_type, spec.hidden_size) == (config.model_type, text.hidden_size)
            if fits and not spec.translates:
                note = f"heard through the {role}'s verbalizers"
                return Source(Path(checkpoint).name or checkpoint, role, checkpoint, folder, note)
    raise ConfigError(
        f"--compare {checkpoint}: a {config.model_type} of width {text.hidden_size}, which no verbalizers of "
        f"{run.folder} fit; give a checkpoint that started from the run's student or teacher"
    )


def _trained_in_interact(run: Run) -> bool:
    return run.config.interact.train_student_verbalizers and (run.folder / "interact" / "verbalizers").is_dir()


def _of_the_distilled(run: Run) -> Path:
    """Section 4.4: the base student's verbalizers, which interact leaves alone unless it is told to train them."""
    return run.folder / "interact" / "verbalizers" if _trained_in_interact(run) else run.verbalizers("student")
