"""Checks of both models, their tokenizers and their processors, from configs alone."""

from __future__ import annotations

from pathlib import Path

from ...backbones import family_of, require_dense
from ...config import ConfigError
from ...data.alignment import common_tokens
from ...data.collate import blank_image
from ...data.encoding import image_token_ids
from ...data.messages import Sample
from ...loading import require_same_tokens, target_layers
from ...sizes import format_count
from .data import aligned
from .subject import Failed, Notice, Subject, Unchecked


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
    if "sft" in subject.stages and subject.config.sft.method == "full":
        try:
            require_dense(family_of(subject.model_config("student")), "sft.method")
        except ConfigError as error:
            raise Failed(str(error), "set sft.method to lora") from error
    return "; ".join(said)


def check_sizes(subject: Subject) -> str:
    """The teacher is not the smaller of the two, as it is where their paths are swapped."""
    if set(subject.roles) != {"student", "teacher"}:
        raise Unchecked("the stage has one model")
    sizes = {role: sum(shape.parameters) for role, shape in subject.planned_models().shapes.items()}
    said = ", ".join(f"{role} {format_count(size)} parameters" for role, size in sizes.items())
    if sizes["student"] > sizes["teacher"]:
        raise Notice(f"{said}: the student is the larger one; are student.path and teacher.path swapped?")
    return said


def check_tokens(subject: Subject) -> str:
    """Every token has the same id in both tokenizers, but for special tokens that no answer holds; a teacher that
    speaks the student's language needs some tokens in common."""
    student, teacher = (subject.processor(role).tokenizer for role in ("student", "teacher"))
    if subject.config.verbalizer.translates:
        return _common(student, teacher)
    try:
        found = require_same_tokens(student, teacher, subject.config.student.path, subject.config.teacher.path)
    except ConfigError as error:
        fix = "choose a teacher and a student of one family, or set verbalizer.language to student"
        raise Failed(str(error), fix) from error
    if found.limit is not None:
        raise Notice(f"{len(found.differing)} special tokens differ: heads are compared below row {found.limit}")
    return f"{len(student.get_vocab())} tokens"


def _common(student, teacher) -> str:
    """What the translation starts from."""
    try:
        count = common_tokens(student, teacher).shape[1]
    except ValueError as error:
        raise Failed(str(error), "see the message") from error
    said = f"{count} of the student's {len(student.get_vocab())} tokens are also tokens of the teacher"
    if count < 2:
        raise Failed(said, "choose models whose tokenizers share tokens: the translation starts from those")
    return f"{said}: the translation starts from them"


def check_heads(subject: Subject) -> str:
    """Heads have a row for each token; further rows are padding and are cut."""
    rows = {}
    for role in subject.roles:
        rows[role] = subject.model_config(role).get_text_config().vocab_size
        processor = subject.processor(role)
        never = {getattr(processor, f"{kind}_token", None) for kind in ("video", "audio")}  # no row has one
        tokens = max(i for token, i in processor.tokenizer.get_vocab().items() if token not in never) + 1
        if tokens > rows[role]:
            raise Failed(
                f"the {role}'s tokenizer has ids up to {tokens - 1}, its head only {rows[role]} rows",
                "resize its embeddings, or use the tokenizer that belongs to it",
            )
    if subject.config.verbalizer.translates and "student" in rows:
        return f"{rows['student']} rows of the student's, through which both speak"
    if len(set(rows.values())) > 1:
        raise Notice(f"student {rows['student']} rows, teacher {rows['teacher']}: both are cut to {min(rows.values())}")
    return f"{min(rows.values())} rows"


def check_templates(subject: Subject) -> str:
    """Both chat templates give the same answer tokens, on two turns; those of a translating teacher read them."""
    turns = [("user", "What is it?"), ("assistant", "A red circle."), ("user", "Sure?"), ("assistant", "Yes, sure.")]
    messages = [{"role": who, "content": [{"type": "text", "text": text}]} for who, text in turns]
    sample = Sample(id="preflight conversation", messages=messages, images=[])
    _, answers, taught = aligned(subject, sample)
    told = f"{answers} answer tokens in two turns"
    return told if taught == answers else f"{told}, {taught} of them with a state of the teacher's"


def check_images(subject: Subject) -> str:
    """Processor and model agree on the image token and on how many an image becomes."""
    said = []
    for role in subject.roles:
        processor, config = subject.processor(role), subject.model_config(role)
        expected = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
        found = next(iter(image_token_ids(processor)), None)
        if found is None:
            found = processor.tokenizer.convert_tokens_to_ids(getattr(processor, "image_token", None))
        if expected is not None and found != expected:
            raise Failed(
                f"{role}: the processor's image token has id {found}, the model expects {expected}",
                f"use the processor that belongs to {getattr(subject.config, role).path}",
            )
        count = int((blank_image(processor)["input_ids"] == found).sum())
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
