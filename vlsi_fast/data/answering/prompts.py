"""What is asked: pictures of a folder, or rows of a file, each with its questions, numbered from 0.

The numbers follow from the input alone; random numbers, batches and the order of the output follow from them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import ConfigError
from ..images import ImageRef
from ..jsonfile import JsonFile
from ..messages import PLACEHOLDER, Sample, as_images, from_llava, from_messages, from_question, placed
from ..skipped import UnusableRow

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Files of a folder that are taken for pictures; capitals do not count."""
QUESTION_COLUMNS = ("question", "instruction")
"""Columns of a row's question, where it has no conversation."""


@dataclass(frozen=True)
class Question:
    """One conversation to be answered."""

    id: str
    """The picture's path, or the row's own id, or its number."""
    question: int | None
    """Number of the question in the list of questions; None for a row's own."""
    turns: list[list[dict]]
    """Chat messages (system, user) up to each answer; a conversation of several questions has several."""
    images: list[ImageRef]
    """One for each image part of the turns, in order."""


class Pictures:
    """Pictures of a folder, in the order of their paths; hidden files and folders are left out.

    Raises:
        FileNotFoundError: there are none.
    """

    def __init__(self, folder: Path):
        self.root = os.path.realpath(folder)
        self.paths = sorted(
            os.path.relpath(os.path.join(where, name), self.root).replace(os.sep, "/")
            for where, folders, names in os.walk(self.root)
            if not _hidden(os.path.relpath(where, self.root))
            for name in names
            if name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(".")
        )
        if not self.paths:
            raise FileNotFoundError(f"--images {folder} holds no pictures ({', '.join(IMAGE_ENDINGS)})")

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, number: int) -> str:
        return self.paths[number]

    def row(self, number: int) -> dict[str, Any]:
        return {"images": [self.paths[number]]}

    def digest(self) -> str:
        return hashlib.sha256(b"\0".join(map(os.fsencode, self.paths))).hexdigest()


class Rows:
    """Rows of a JSON or JSONL file."""

    def __init__(self, path: Path, image_root: str | None):
        self.path = path
        root = Path(image_root) if image_root else path.parent
        if not root.is_dir():
            raise FileNotFoundError(f"--image-root {root} does not exist or is not a folder")
        self.root = os.path.realpath(root)
        self.file = JsonFile(path)
        if not len(self.file):
            raise ConfigError(f"--images {path} has no rows")

    def __len__(self) -> int:
        return len(self.file)

    def name(self, number: int) -> str:
        return str(number)

    def row(self, number: int) -> Any:
        try:
            return self.file.read(number)
        except ValueError as error:
            raise UnusableRow("bad_row", f"the line is not JSON: {error}") from error

    def digest(self) -> str:
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


class Questions:
    """All conversations to be answered, each made when it is asked for.

    Args:
        images: a folder of pictures, or a JSON or JSONL file of rows.
        questions: a file with a question a line, a question, or several; None: the rows' own.
        image_root: folder that the rows' image paths start from; None: the file's own.
        per_image: so many of the questions for each picture, drawn by `seed`; None: all.
        limit: so many pictures or rows, the first ones; None: all.
        seed: of the drawing.

    Raises:
        FileNotFoundError, ConfigError: nothing there, or nothing to ask.
    """

    def __init__(
        self,
        images: str | Path,
        questions: str | Path | list[str] | None,
        *,
        image_root: str | None = None,
        per_image: int | None = None,
        limit: int | None = None,
        seed: int = 0,
    ):
        path = Path(images)
        self.texts = None if questions is None else read_questions(questions)
        if path.is_dir():
            if self.texts is None:
                raise ConfigError(f"--images {path} is a folder, which says nothing to ask: give --questions")
            if image_root is not None:
                raise ConfigError("--image-root is for rows of a file; a folder of pictures is its own root: remove it")
            self.rows: Pictures | Rows = Pictures(path)
        elif not path.is_file():
            raise FileNotFoundError(f"--images {path} does not exist: give a folder, or rows (.json, .jsonl)")
        elif path.suffix.lower() not in (".json", ".jsonl"):
            raise ConfigError(f"--images {path}: give a folder of pictures, or rows in a .json or .jsonl file")
        else:
            self.rows = Rows(path, image_root)
        if per_image is not None and not 1 <= per_image <= len(self.texts or ()):
            there = f"there are {len(self.texts)}" if self.texts else "the rows' own questions are asked"
            raise ConfigError(f"--questions-per-image is {per_image}, but {there}; lower it, or remove it")
        if limit is not None and limit < 1:
            raise ConfigError(f"--limit is {limit}; use 1 or more")
        self.root, self.per_image, self.seed = self.rows.root, per_image, seed
        self.row_count = len(self.rows) if limit is None else min(limit, len(self.rows))
        self.each = 1 if self.texts is None else per_image or len(self.texts)

    def __len__(self) -> int:
        return self.row_count * self.each

    def describe(self) -> dict[str, Any]:
        """What the answers follow from: paths, counts, digests."""
        texts = self.texts and hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()
        return {
            "rows": self.row_count,
            "rows_sha256": self.rows.digest(),
            "questions": len(self.texts) if self.texts else "the rows' own",
            "questions_sha256": texts,
            "questions_per_image": self.per_image,
        }

    def name(self, number: int) -> tuple[str, int | None]:
        """What is known of question `number` without reading its row: an id, and which of the questions it is."""
        row, k = divmod(number, self.each)
        name = self.rows.name(row)
        if self.texts is None:
            return name, None
        if self.per_image is not None:
            draw = random.Random(f"{self.seed}/questions/{row}")
            k = sorted(draw.sample(range(len(self.texts)), self.each))[k]
        return name, k

    def __getitem__(self, number: int) -> Question:
        """Question `number`.

        Raises:
            UnusableRow: the row is malformed, or holds no question.
        """
        name, which = self.name(number)
        row = self.rows.row(number // self.each)
        if not isinstance(row, dict):
            raise UnusableRow("bad_row", f"the row is {type(row).__name__}, not an object")
        name = str(row.get("id", name))
        sample = self._own(row, name) if which is None else self._given(row, name, self.texts[which])
        return Question(name, which, turns_of(sample.messages), sample.images)

    def _own(self, row: dict, name: str) -> Sample:
        """The row's conversation, in any of the readers' formats."""
        if "messages" in row:
            return from_messages(row, name, self.root, images=row.get("images") or row.get("image"))
        if "conversations" in row:
            return from_llava(row | {"image": row.get("image") or row.get("images")}, name, self.root)
        column = next((column for column in QUESTION_COLUMNS if column in row), None)
        if column is None:
            known = ", ".join(("messages", "conversations", *QUESTION_COLUMNS))
            raise UnusableRow("bad_row", f"none of the columns {known}; there are {', '.join(row)}")
        images = row.get("images") or row.get("image")
        return from_question(row | {"": None}, name, self.root, column, "", images=images)

    def _given(self, row: dict, name: str, question: str) -> Sample:
        images = as_images(row.get("images") or row.get("image"), self.root)
        if not images and ("messages" in row or "conversations" in row):
            images = self._own(row, name).images
        if not images:
            raise UnusableRow("bad_row", "the row has no picture to ask about")
        turn = {"role": "user", "content": [{"type": "text", "text": question}]}
        return placed(Sample(name, [turn], images), PLACEHOLDER)


def read_questions(questions: str | Path | list[str]) -> list[str]:
    """Questions as given: a list, lines of a file, or a text that is one itself. Blank ones are left out.

    Raises:
        FileNotFoundError: what is given looks like a file and is none.
        ConfigError: no question.
    """
    if isinstance(questions, list):
        lines = questions
    elif _is_file(questions):
        lines = Path(questions).read_text(encoding="utf-8-sig").splitlines()
    elif isinstance(questions, Path) or (" " not in questions.strip() and Path(questions).suffix):
        raise FileNotFoundError(f"--questions {questions} does not exist; give a file, or a question with its words")
    else:
        lines = [questions]
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ConfigError(f"--questions {questions!r} holds no question; write one a line")
    return texts


def turns_of(messages: list[dict]) -> list[list[dict]]:
    """Messages up to each answer; the row's own answers are left out.

    Raises:
        UnusableRow: there is no user turn.
    """
    groups, waiting = [], []
    for turn in [*messages, {"role": "assistant"}]:
        if turn["role"] != "assistant":
            waiting.append(turn)
        elif any(each["role"] == "user" for each in waiting):
            groups.append(waiting)
            waiting = []
    if not groups:
        raise UnusableRow("bad_row", "there is no user turn, so nothing to answer")
    return groups


def as_written(image: ImageRef) -> str:
    """An image as a row of JSON holds it: its path, or its bytes as a data: address."""
    if image.path is not None:
        return image.path
    return "data:image;base64," + base64.b64encode(image.data).decode()


def _hidden(folder: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in folder.split(os.sep))


def _is_file(text: str | Path) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # a question may be longer than any path
        return False
