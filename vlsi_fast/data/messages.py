"""Rows of every accepted format -> one chat format.

A `Sample` holds Hugging Face chat messages whose content is always a list of parts, `{"type": "image"}` or
`{"type": "text", "text": ...}`, and the images in the order in which the image parts appear.

Placeholders: an `<image>` (or what a source's `placeholder` says) in a user's text becomes an image part, and the line
break that data sets put between it and the text is dropped. Images without any placeholder go first in the first user
turn.
"""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass, field
from typing import Any

from vlsi_fast.data.images import ImageRef
from vlsi_fast.data.skipped import UnusableRow

PLACEHOLDER = "<image>"
_LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_ROLES = ("system", "user", "assistant")


@dataclass
class Sample:
    """One conversation.

    Attributes:
        id: names the row, unique in its dataset, the same in every run.
        messages: chat messages, each `{"role": .., "content": [part, ..]}`.
        images: one reference for each image part, in order.
        type: what the source's `type_column` says, None without one.
        answered_by: what the row says of the model that wrote its answers (`vlsi-fast data answer`); None where people
            did, or nothing is said.
        source: number of the source that the row is of, where it is read from several.
    """

    id: str
    messages: list[dict]
    images: list[ImageRef] = field(default_factory=list)
    type: str | None = None
    answered_by: Any = None
    source: int = 0


def from_llava(row: dict, sample_id: str, image_root: str, placeholder: str = PLACEHOLDER) -> Sample:
    """Reads a LLaVA-style row: `conversations` with from / value, and an optional `image` (a path or a list).

    Args:
        row: the row.
        sample_id: the sample's id.
        image_root: folder that image paths start from and must stay under.
        placeholder: what stands for an image in the text.

    Raises:
        UnusableRow: cause bad_row, where the row is malformed or placeholders and images differ in number.
    """
    turns = _list_of_dicts(row, "conversations")
    images = as_images(row.get("image"), image_root)
    messages = []
    for turn in turns:
        name, value = turn.get("from"), turn.get("value")
        role = _LLAVA_ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise UnusableRow("bad_row", f"from is {_shown(name)}; use one of {', '.join(_LLAVA_ROLES)}")
        if not isinstance(value, str):
            raise UnusableRow("bad_row", f"the value of a {turn['from']!r} turn is {type(value).__name__}, not text")
        messages.append({"role": role, "content": [_text(value)]})
    return placed(Sample(sample_id, messages, images), placeholder)


def from_messages(
    row: dict,
    sample_id: str,
    image_root: str,
    messages_key: str = "messages",
    images: Any = None,
    placeholder: str = PLACEHOLDER,
) -> Sample:
    """Reads a chat row: `messages` with role / content, content being text or a list of text and image parts.

    An image part may carry its own path (`image`, `url`, `path`, or OpenAI's `image_url`); the parts that do not are
    filled from `images` in order.

    Args:
        row: the row.
        sample_id: the sample's id.
        image_root: folder that image paths start from and must stay under.
        messages_key: column of the messages.
        images: the row's separate images: None, a path, bytes, `{"bytes", "path"}`, or a list of those.
        placeholder: what stands for an image in text.

    Raises:
        UnusableRow: cause bad_row.
    """
    turns = _list_of_dicts(row, messages_key)
    loose = as_images(images, image_root)
    messages, found, own = [], [], 0
    for turn in turns:
        role = turn.get("role")
        if role not in _ROLES:
            raise UnusableRow("bad_row", f"role is {_shown(role)}; use one of {', '.join(_ROLES)}")
        parts, refs = _parts(turn.get("content"), role, image_root)
        messages.append({"role": role, "content": parts})
        found += refs
        own += sum(ref is not None for ref in refs)
    if not found:
        return placed(Sample(sample_id, messages, loose), placeholder)
    if len(found) - own != len(loose):
        raise UnusableRow("bad_row", f"{len(found) - own} image parts without a path, but {len(loose)} images")
    rest = iter(loose)
    return Sample(sample_id, messages, [ref if ref is not None else next(rest) for ref in found])


def from_question(
    row: dict,
    sample_id: str,
    image_root: str,
    question: str,
    answer: str,
    options: str | None = None,
    images: Any = None,
) -> Sample:
    """Reads a row with a question and its answer in columns of their own.

    Args:
        row: the row.
        sample_id: the sample's id.
        image_root: folder that image paths start from and must stay under.
        question: column of the question. In it `<image>`, and `<image1>`, `<image2>`, .. as MathVision has them, stand
            for images; where one image goes by several of these names, the first place counts.
        answer: column of the answer.
        options: column of the choices, a list that may be empty; they are lettered (A), (B), .. behind the question,
            save where they are no more than their letters.
        images: the row's images.

    Raises:
        UnusableRow: cause bad_row.
    """
    if not isinstance(row, dict):
        raise UnusableRow("bad_row", f"the row is {type(row).__name__}, not an object")
    missing = [name for name in (question, answer) if name not in row]
    if missing or not isinstance(row[question], str):
        what = f"no column {missing[0]!r}" if missing else f"{question!r} is {type(row[question]).__name__}, not text"
        raise UnusableRow("bad_row", f"{what}; columns: {', '.join(row)}")
    refs = as_images(images, image_root)
    text = re.sub(r"<image\d+>", PLACEHOLDER, row[question])
    if len(refs) == 1 and PLACEHOLDER in text:
        first, rest = text.split(PLACEHOLDER, 1)
        text = first + PLACEHOLDER + rest.replace(PLACEHOLDER, "")
    choices = (row.get(options) or []) if options is not None else []
    if not isinstance(choices, list | tuple):
        raise UnusableRow("bad_row", f"{options!r} is {type(choices).__name__}, not a list of choices")
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    if [str(choice).strip() for choice in choices] != letters:
        text += "".join(f"\n({letter}) {choice}" for letter, choice in zip(letters, choices, strict=True))
    reply = "" if row[answer] is None else str(row[answer])
    turns = [{"role": "user", "content": [_text(text)]}, {"role": "assistant", "content": [_text(reply)]}]
    return placed(Sample(sample_id, turns, refs), PLACEHOLDER)


def as_images(value: Any, image_root: str) -> list[ImageRef]:
    """References to the images in a column: nothing, one, or a list of paths, bytes or `{"bytes", "path"}`."""
    if value is None or (isinstance(value, str | bytes | list | tuple) and len(value) == 0):
        return []
    if isinstance(value, list | tuple):
        return [_as_image(item, image_root) for item in value]
    return [_as_image(value, image_root)]


def _as_image(value: Any, image_root: str) -> ImageRef:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, bytes) and value:
        return ImageRef(data=value)
    if isinstance(value, str) and value.startswith("data:"):
        head, _, body = value.partition(",")
        try:
            return ImageRef(data=base64.b64decode(body, validate=True) if head.endswith(";base64") else body.encode())
        except ValueError as error:  # not base64, not ASCII, a lone surrogate
            raise UnusableRow("bad_row", f"an image's data: address holds no bytes: {error}") from error
    if isinstance(value, str | os.PathLike) and str(value):
        return ImageRef(path=str(value).removeprefix("file://"), root=image_root)
    raise UnusableRow("bad_row", f"an image is {type(value).__name__}; use a path or the bytes of an image file")


def _parts(content: Any, role: str, image_root: str) -> tuple[list[dict], list[ImageRef | None]]:
    """Content in list form, and for each image part its own reference or None."""
    if isinstance(content, str):
        return [_text(content)], []
    if content is None and role == "assistant":
        return [], []  # judged later, as an empty answer
    if not isinstance(content, list | tuple):
        raise UnusableRow("bad_row", f"the content of a {role} turn is {type(content).__name__}, not text or a list")
    parts, refs = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(_text(part["text"]))
        elif kind in ("image", "image_url"):
            if role != "user":
                raise UnusableRow("bad_row", f"an image in a {role} turn; images belong to user turns")
            given = next((part[k] for k in ("image", "url", "path", "image_url") if part.get(k) is not None), None)
            parts.append({"type": "image"})
            refs.append(None if given is None else _as_image(given, image_root))
        else:
            raise UnusableRow("bad_row", f"a part of type {_shown(kind)} in a {role} turn; use text or image")
    return parts, refs


def placed(sample: Sample, placeholder: str) -> Sample:
    """Turns placeholders in user text into image parts, or puts the images first where there are none."""
    users = [message for message in sample.messages if message["role"] == "user"]
    count = sum(part["text"].count(placeholder) for message in users for part in message["content"])
    if count == 0 and sample.images:
        if not users:
            raise UnusableRow("bad_row", f"{len(sample.images)} images, but no user turn to put them in")
        users[0]["content"] = [{"type": "image"} for _ in sample.images] + users[0]["content"]
        return sample
    if count != len(sample.images):
        raise UnusableRow("bad_row", f"{count} {placeholder} placeholders, but {len(sample.images)} images")
    for message in users if count else ():
        message["content"] = [new for part in message["content"] for new in _split(part["text"], placeholder)]
    return sample


def _split(text: str, placeholder: str) -> list[dict]:
    pieces = re.split(f"({re.escape(placeholder)})", text)
    parts = []
    for i, piece in enumerate(pieces):
        if piece == placeholder:
            parts.append({"type": "image"})
            continue
        piece = piece.removeprefix("\n") if i > 0 else piece
        piece = piece.removesuffix("\n") if i < len(pieces) - 1 else piece
        if piece:
            parts.append(_text(piece))
    return parts


def _shown(value: Any) -> str:
    """For a message; what is no text by its type alone, since its own words may be endless."""
    return repr(value) if isinstance(value, str | None) else f"{type(value).__name__}, not text"


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


def _list_of_dicts(row: Any, key: str) -> list[dict]:
    if not isinstance(row, dict):
        raise UnusableRow("bad_row", f"the row is {type(row).__name__}, not an object")
    value = row.get(key)
    if not isinstance(value, list | tuple) or not value or not all(isinstance(item, dict) for item in value):
        raise UnusableRow("bad_row", f"{key!r} is missing, empty or not a list of objects; columns: {', '.join(row)}")
    return list(value)
