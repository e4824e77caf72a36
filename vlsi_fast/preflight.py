"""What a run needs, looked at before it starts: a table of named checks, each failure with its fix.

`vlsi-fast check` runs all of them, without weights; each stage runs `AT_START` on what it has opened anyway. Checks
are independent: one that fails, or cannot be made, hides no other. Those that exist elsewhere are called, not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import hub
from .config import STAGES, ConfigError, RunConfig, load_config
from .data.dataset import AnswerMismatchError, check_same_answers
from .data.encoding import IGNORED, configure_image_bounds, encode
from .data.images import check_pixels, load_image
from .data.messages import Sample
from .data.processors import load_processor
from .data.skipped import UnusableRow
from .data.sources import ConcatSource, SourceConfig, open_part
from .loading import require_same_tokens, resolve_folder, target_layers
from .ranks.sharding import rank
from .sizes import format_count, format_size
from .terminal import say

PASS, NOTICE, FAILURE, UNCHECKED = "pass", "notice", "FAILURE", "not checked"
SURPRISE = 0.01
"""Unusable rows in a sample fail where `data.max_skipped_share` would give as many with less than this probability."""
SELF_CHECK_ELEMENTS = 2**25
"""Size of the random head of the self-check: the teacher's width, and as much of its vocabulary as this allows."""


class PreflightError(ConfigError):
    """A run that cannot go well; the message is the table."""


@dataclass(frozen=True)
class Result:
    """What one check found."""

    name: str
    status: str
    detail: str
    fix: str = ""


class Failed(Exception):
    """Raised by a check: what was found, and what to do."""

    def __init__(self, detail: str, fix: str):
        super().__init__(detail)
        self.detail, self.fix = detail, fix


class Unchecked(Exception):
    """Raised by a check that cannot be made here; says why."""


class Notice(Exception):
    """Raised by a check that passes, but has something to say."""


@dataclass
class Subject:
    """The run to look at. Models are read on first use, so that one that fails leaves the other's checks."""

    config: RunConfig
    stages: tuple[str, ...] = STAGES
    rows: int = 16
    ranks: int = 1
    roles: tuple[str, ...] = ("student", "teacher")
    found: dict[Any, Any] = field(default_factory=dict)  # (role or source, kind) -> what was read, or why it was not

    def processor(self, role: str):
        def read():
            folder = self._folder(role)
            try:
                return load_processor(folder)
            except OSError as error:
                raise error if Path(folder).is_dir() else FileNotFoundError(hub.explain(folder, error)) from error

        return self._once(role, "processor", read)

    def model_config(self, role: str):
        def read():
            from .planner.shapes import read_config

            return read_config(getattr(self.config, role), role)

        return self._once(role, "config", read)

    def sources(self, part: str = "train") -> dict[str, Callable[[], ConcatSource]]:
        """Name -> opener of each source of data.train, or of data.eval."""
        found = {f"data.{part}[{i}]": source for i, source in enumerate(getattr(self.config.data, part))}
        return {name: partial(self._source, name, source) for name, source in found.items()}

    def _source(self, name: str, source: SourceConfig) -> ConcatSource:
        return self._once(name, "source", lambda: ConcatSource([open_part(source, name)]))

    def _once(self, name: str, kind: str, make: Callable[[], Any]) -> Any:
        if (name, kind) not in self.found:
            try:
                self.found[name, kind] = make()
            except Exception as error:
                self.found[name, kind] = error
        value = self.found[name, kind]
        if isinstance(value, Exception):
            raise Unchecked(f"needs {name}: {kind}, which cannot be read") from value
        return value

    def _folder(self, role: str) -> str:
        """A checkpoint's folder, or the Hub name: processors are read from there without the weights."""
        path = getattr(self.config, role).path
        return str(resolve_folder(path, f"{role}.path")) if Path(path).is_dir() or path.count("/") != 1 else path


# ---- models ----


def check_models(subject: Subject) -> str:
    """Both models and their processors can be read, and the target layers exist."""
    said = []
    for role in ("student", "teacher"):
        for kind, read in (("config", subject.model_config), ("processor", subject.processor)):
            try:
                read(role)
            except Unchecked as error:
                cause = error.__cause__
                raise Failed(f"{role} {kind}: {cause}", f"correct {role}.path, or fetch the model first") from cause
        try:
            settings = getattr(subject.config, role)
            folder = Path(settings.path) if list(Path(settings.path).glob("*.safetensors")) else None
            layers = target_layers(settings, subject.model_config(role), role, subject.config, folder)
        except ConfigError as error:
            raise Failed(str(error), f"change {role}.layers") from error
        said.append(f"{role}: {subject.model_config(role).model_type}, {len(layers)} target layers")
    return "; ".join(said)


def check_sizes(subject: Subject) -> str:
    """The teacher is not the smaller of the two, as it is where their paths are swapped."""
    if set(subject.roles) != {"student", "teacher"}:
        raise Unchecked("the stage has one model")
    sizes = {role: sum(shape.parameters) for role, shape in _models(subject).shapes.items()}
    said = ", ".join(f"{role} {format_count(size)} parameters" for role, size in sizes.items())
    if sizes["student"] > sizes["teacher"]:
        raise Notice(f"{said}: the student is the larger one; are student.path and teacher.path swapped?")
    return said


def check_tokens(subject: Subject) -> str:
    """Every token has the same id in both tokenizers, but for special tokens that no answer holds."""
    student, teacher = (subject.processor(role).tokenizer for role in ("student", "teacher"))
    try:
        found = require_same_tokens(student, teacher, subject.config.student.path, subject.config.teacher.path)
    except ConfigError as error:
        raise Failed(str(error), "choose a teacher and a student of one family") from error
    if found.limit is not None:
        raise Notice(f"{len(found.differing)} special tokens differ: heads are compared below row {found.limit}")
    return f"{len(student.get_vocab())} tokens"


def check_heads(subject: Subject) -> str:
    """Heads have a row for each token; further rows are padding and are cut."""
    rows = {}
    for role in subject.roles:
        rows[role] = subject.model_config(role).get_text_config().vocab_size
        tokens = max(subject.processor(role).tokenizer.get_vocab().values()) + 1
        if tokens > rows[role]:
            raise Failed(
                f"the {role}'s tokenizer has ids up to {tokens - 1}, its head only {rows[role]} rows",
                "resize its embeddings, or use the tokenizer that belongs to it",
            )
    if len(set(rows.values())) > 1:
        raise Notice(f"student {rows['student']} rows, teacher {rows['teacher']}: both are cut to {min(rows.values())}")
    return f"{min(rows.values())} rows"


def check_templates(subject: Subject) -> str:
    """Both chat templates give the same answer tokens, on a conversation of two turns."""
    turns = [("user", "What is it?"), ("assistant", "A red circle."), ("user", "Sure?"), ("assistant", "Yes, sure.")]
    messages = [{"role": who, "content": [{"type": "text", "text": text}]} for who, text in turns]
    sample = Sample(id="preflight conversation", messages=messages, images=[])
    return f"{_aligned(subject, sample)[1]} answer tokens in two turns"


def check_images(subject: Subject) -> str:
    """Processor and model agree on the image token and on how many an image becomes."""
    from .data.collate import _blank_image

    said = []
    for role in subject.roles:
        processor, config = subject.processor(role), subject.model_config(role)
        expected = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
        found = getattr(processor, "image_token_id", None)
        if found is None:
            found = processor.tokenizer.convert_tokens_to_ids(getattr(processor, "image_token", None))
        if expected is not None and found != expected:
            raise Failed(
                f"{role}: the processor's image token has id {found}, the model expects {expected}",
                f"use the processor that belongs to {getattr(subject.config, role).path}",
            )
        count = int((_blank_image(processor)["input_ids"] == found).sum())
        if count < 1:
            raise Failed(f"{role}: an image became no image token", "set the chat template of the model's own release")
        theirs = getattr(config.vision_config, "patch_size", None)
        ours = getattr(processor.image_processor, "patch_size", theirs)
        if ours != theirs:
            raise Failed(
                f"{role}: the processor cuts patches of {ours} pixels, the model takes {theirs}",
                f"use the processor that belongs to {getattr(subject.config, role).path}",
            )
        said.append(f"{role}: id {found}")
    return "; ".join(said)


# ---- data ----


def check_data(subject: Subject) -> str:
    """Every source opens, and sampled rows decode and encode."""
    said, bad, read = [], [], 0
    for name, opened in subject.sources().items():
        try:
            source = opened()
        except Unchecked as error:
            raise Failed(_named(name, error), f"correct {name} or remove it") from error
        found, count = _sample(subject, source)
        said.append(f"{name}: {len(source)} rows")
        bad, read = bad + found, read + count
        if found and _surprising(len(found), count, subject.config.data.max_skipped_share):
            causes = ", ".join(f"{cause} {n}" for cause, n in Counter(e.cause for _, e in found).most_common())
            at, error = found[0]
            raise Failed(
                f"{name}: {len(found)} of {count} sampled rows cannot be used ({causes}); first: {at}: {error}",
                "repair them, correct image_root, or raise data.max_skipped_share if they may be left out",
            )
    for name, opened in subject.sources("eval").items():
        try:
            said.append(f"{name}: {len(opened())} rows")
        except Unchecked as error:
            raise Failed(_named(name, error), f"correct {name}, or remove it: training does not read it") from error
    detail = f"{'; '.join(said)}; {read - len(bad)} of {read} sampled rows of data.train can be used"
    if bad:
        raise Notice(f"{detail}; first unusable: {bad[0][0]}: {bad[0][1]}")
    return detail


def check_alignment(subject: Subject) -> str:
    """Teacher and student have the same answer tokens on sampled rows."""
    lengths = []
    for opened in subject.sources().values():
        source = opened()
        for index in _spread(len(source), subject.rows):
            try:
                lengths.append(_aligned(subject, source[index]))
            except UnusableRow:
                continue  # `data` counts them
    if not lengths:
        raise Unchecked("no sampled row can be used")
    tokens, answers = (sum(column) / len(lengths) for column in zip(*lengths))
    return f"{len(lengths)} rows; mean {tokens:.0f} tokens, {answers:.0f} of them answers (for plan's --mean-tokens)"


def _named(name: str, error: Unchecked) -> str:
    """What was wrong with a source, its name once."""
    cause = str(error.__cause__)
    return cause if cause.startswith(name) else f"{name}: {cause}"


def _spread(rows: int, count: int) -> list[int]:
    """`count` row numbers evenly over the source."""
    return sorted({i * rows // count for i in range(min(count, rows))} if rows > count else range(rows))


def _surprising(bad: int, read: int, share: float) -> bool:
    """Whether `bad` or more of `read` rows would be rare if `share` of all were unusable."""
    below = sum(math.comb(read, k) * share**k * (1 - share) ** (read - k) for k in range(bad))
    return 1 - below < SURPRISE


def _sample(subject: Subject, source: ConcatSource) -> tuple[list[tuple[str, UnusableRow]], int]:
    bad, indices = [], _spread(len(source), subject.rows)
    for index in indices:
        try:
            _encoded(subject, source[index], "student")
        except UnusableRow as error:
            bad.append((source.row_id(index), error))
    return bad, len(indices)


def _encoded(subject: Subject, sample: Sample, role: str) -> dict[str, torch.Tensor]:
    data, processor = subject.config.data, subject.processor(role)
    configure_image_bounds(processor, data.min_pixels, data.max_pixels)
    check_pixels(sample.images, data.max_image_pixels, data.max_row_pixels)
    return encode(sample, processor, data, partial(load_image, max_image_pixels=data.max_image_pixels))


def _aligned(subject: Subject, sample: Sample) -> tuple[int, int]:
    """Tokens and answer tokens of a row; Failed where the roles differ."""
    roles = ("student", "teacher")
    rows = {role: _encoded(subject, sample, role) for role in roles}
    try:
        check_same_answers(sample.id, rows, {role: subject.processor(role) for role in roles})
    except AnswerMismatchError as error:
        raise Failed(str(error), "set the same chat template on both processors") from error
    return rows["student"]["input_ids"].shape[1], int((rows["student"]["labels"] != IGNORED).sum())


# ---- machine ----


def check_disk(subject: Subject) -> str:
    """Room for the checkpoints and results of the stages to come."""
    need = checkpoint_bytes(subject)
    folder = Path(subject.config.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    said = f"{format_size(free)} free at {folder}, checkpoints and results need {format_size(need)}"
    if free < need:
        raise Failed(said, "make room, choose another output_dir, or lower training.save_total_limit")
    return said


def checkpoint_bytes(subject: Subject) -> int:
    """Bytes that the stages write: kept checkpoints and one in the making (master weights and two moments of what is
    trained), and the results."""
    from .planner.memory import compute_bytes

    total, e = 0, compute_bytes(subject.config)
    for stage, step in _steps(subject).items():
        trained = sum(n for spoken in step.roles.values() for n in spoken.split()[0])
        training = subject.config.stage_training(stage)
        kept = training.save_total_limit
        if kept is None:  # all: one every save_steps, where the number of steps is known
            kept = max(1, training.max_steps // training.save_steps) if training.max_steps > 0 else 10
        total += 12 * trained * (kept + 1)
        total += 4 * trained if stage == "verbalize" else e * sum(step.roles["student"].shape.parameters)
    return total


def check_memory(subject: Subject) -> str:
    """The planner's need of the longest row against the GPU at hand."""
    if not torch.cuda.is_available():
        raise Unchecked("no GPU here; `vlsi-fast plan` tells what one must have")
    from .planner.memory import RESERVE_BYTES
    from .planner.walk import walk

    have = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    said = []
    for stage, step in _steps(subject).items():
        peak = walk(step).peak
        said.append(f"{stage} {format_size(peak.total)}")
        if peak.total + RESERVE_BYTES > have:
            raise Failed(
                f"stage {stage} needs {format_size(peak.total)} and {format_size(RESERVE_BYTES)} of reserve on each "
                f"of {subject.ranks} GPUs of {format_size(have)} (at its peak, {peak.moment})",
                "see `vlsi-fast plan`: fewer rows a micro-batch, a lower data.max_length, gradient_checkpointing, or "
                "more GPUs",
            )
    return f"of {format_size(have)}: {', '.join(said)} (predicted, longest row)"


def _models(subject: Subject) -> Any:
    from .planner.build import Models

    def make() -> Models:
        return Models(subject.config, configs={role: subject.model_config(role) for role in subject.roles})

    return subject._once("planner", "models", make)


def _steps(subject: Subject) -> dict[str, Any]:
    from .planner.build import setup_of, step_of
    from .planner.report import rows_of

    def make() -> dict[str, Any]:
        config, models = subject.config, _models(subject)
        rows = rows_of(config, models)
        return {
            stage: step_of(
                models, stage, setup_of(config, stage, subject.ranks),
                rows.batch(config.stage_training(stage).per_device_train_batch_size),
            )
            for stage in subject.stages
        }  # fmt: skip

    return subject._once("planner", "shapes", make)


def check_self_kl(subject: Subject) -> str:
    """KL(teacher || teacher) = 0 by the operators that train, on random hidden states and a random head.

    No weights are read: the head has the teacher's width and as much of its vocabulary as `SELF_CHECK_ELEMENTS` holds.
    """
    from vlsi_kernels import layer_kl_matrix, teacher_targets

    text = subject.model_config("teacher").get_text_config()
    rows = min(text.vocab_size, max(256, SELF_CHECK_ELEMENTS // text.hidden_size))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    head = (torch.randn(rows, text.hidden_size, generator=generator) * text.hidden_size**-0.5).to(device)
    hidden = torch.randn(2, 8, text.hidden_size, generator=generator).to(device) * 3
    options = {"impl": subject.config.impl}
    kl = layer_kl_matrix(hidden, head, teacher_targets(hidden, head, head, **options), **options).cpu()
    same, other = float(kl.diagonal().abs().max()), float((kl + torch.eye(2) * 1e9).min())
    if not (same < 1e-4 < other):
        raise Failed(
            f"KL of a layer with itself is {same:.1e}, of two layers {other:.1e}",
            "set impl: torch, and report it with the versions of torch and triton",
        )
    return f"{same:.0e} against itself, {other:.2f} between two layers ({rows} x {text.hidden_size} random head)"


# ---- the whole ----

CHECKS: dict[str, Callable[[Subject], str]] = {
    "models": check_models,
    "model sizes": check_sizes,
    "tokenizers": check_tokens,
    "head rows": check_heads,
    "chat templates": check_templates,
    "image tokens": check_images,
    "data": check_data,
    "answer alignment": check_alignment,
    "disk space": check_disk,
    "GPU memory": check_memory,
    "KL self-check": check_self_kl,
}
AT_START = ("model sizes", "head rows", "image tokens", "disk space", "GPU memory")
"""What a stage looks at beyond what it checks itself (models, tokenizers, sources; each row as it is read)."""


def look(subject: Subject, names: tuple[str, ...] = tuple(CHECKS)) -> list[Result]:
    """Run checks, each whatever became of the others."""
    results = []
    for name in names:
        try:
            results.append(Result(name, PASS, CHECKS[name](subject)))
        except Failed as error:
            results.append(Result(name, FAILURE, error.detail, error.fix))
        except Notice as error:
            results.append(Result(name, NOTICE, str(error)))
        except Unchecked as error:
            results.append(Result(name, UNCHECKED, str(error)))
        except Exception as error:  # what a check did not foresee is a failure of its own, not of the others
            fix = "see the message; if it is unclear, report it"
            results.append(Result(name, FAILURE, f"{type(error).__name__}: {error}", fix))
    return results


def failed(results: list[Result]) -> bool:
    """Whether any check failed."""
    return any(result.status == FAILURE for result in results)


def as_text(results: list[Result]) -> str:
    """The table as plain text, as wide as the terminal."""
    from rich.table import Table
    from rich.text import Text

    from .tabular import text_of

    table = Table("check", "result", "found; fix")
    for result in results:
        found = result.detail + (f"\nfix: {result.fix}" if result.fix else "")
        table.add_row(result.name, result.status, Text(found))
    return text_of(table)


def require_ready(config: RunConfig, stage: str, roles: dict[str, Any], ranks: int) -> None:
    """The cheap checks at the start of a stage, on the configs and processors that it has read (student alone: the
    teacher's are not looked for).

    Raises:
        PreflightError: some check failed; the message is the table.
    """
    subject = Subject(config, (stage,), ranks=ranks, roles=tuple(roles))
    for name, role in roles.items():
        subject.found[name, "config"], subject.found[name, "processor"] = role.config, role.processor
    results = look(subject, AT_START)
    for result in results:
        if (result.name, result.status) == ("model sizes", NOTICE) and rank() == 0:
            say(result.detail)
    if failed(results):
        raise PreflightError(f"stage {stage} cannot start (preflight: false goes past this):\n{as_text(results)}")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """`vlsi-fast check`. Returns the exit code: 1 where a check failed."""
    config = load_config(arguments.config, overrides)
    if arguments.rows < 1:
        raise ConfigError("--rows must be at least 1")
    ranks = max(1, torch.cuda.device_count()) if torch.cuda.is_available() else 1
    results = look(Subject(config, tuple(config.stages), rows=arguments.rows, ranks=ranks))
    print(json.dumps([asdict(r) for r in results], indent=2) if arguments.json else as_text(results))
    return 1 if failed(results) else 0
