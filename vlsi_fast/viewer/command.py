"""`vlsi-fast verbalize`: what each target layer of a run's models answers."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..cli import report
from ..config import ConfigError
from ..demo.example import NAME, example_question, example_run
from ..runs import Run, open_run
from .right import RightAnswer, is_right


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Hear every model, then print. Returns the exit code."""
    run = find_run(arguments.run)
    pictures, question, answer = _what_to_ask(arguments)
    images = [_open(name) if image is None else image for name, image in pictures]
    right = None if answer is None else RightAnswer.of(run, answer)
    with contextlib.redirect_stdout(sys.stderr):  # libraries speak up on stdout while they load
        from .columns import hear, sources_of

        try:
            sources = sources_of(run, arguments.compare)
            if arguments.teacher_layers and "teacher" not in {source.role for source in sources}:
                raise ConfigError("--teacher-layers without a teacher: add it by --compare base teacher")
            columns = hear(
                run,
                sources,
                images,
                question,
                layers={"student": arguments.layers, "teacher": arguments.teacher_layers},
                device=arguments.device,
                num_beams=arguments.num_beams,
                max_new_tokens=arguments.max_new_tokens,
                top=3 if arguments.probabilities or arguments.html else 0,
            )
        except ValueError as error:  # images, layers, models that do not fit: all say what to do
            return report(error, 2)
    from .terminal import print_table

    if arguments.json:
        tree = _tree(arguments, run, [name for name, _ in pictures], question, right, columns)
        print(json.dumps(tree, indent=2, ensure_ascii=False))
    else:
        print_table(columns, question, arguments.probabilities, right)
    if arguments.html:
        from .page import render

        decoding = f"{arguments.num_beams} beams" if arguments.num_beams > 1 else "greedy decoding"
        page = render(columns, images, question, arguments.run, decoding, right)
        Path(arguments.html).write_text(page, encoding="utf-8")
        print(f"vlsi-fast verbalize: wrote {arguments.html}", file=sys.stderr)
    return 0


def find_run(name: str) -> Run:
    """A run's folder, or the shipped example where `demo` is no run's folder.

    Raises:
        FileNotFoundError: there is no run.
    """
    try:
        return open_run(name)
    except FileNotFoundError:
        if name != NAME:
            raise
        return example_run()


def _what_to_ask(arguments: argparse.Namespace) -> tuple[list[tuple[str, Any]], str, str | None]:
    """Images ((path, None) or (name, image)), question and, where known, the right answer.

    For the shipped example its own, unless others are given.
    """
    if arguments.question is None and not arguments.image and arguments.run == NAME:
        image, name, question, answer = example_question()
        return [(name, image)], question, arguments.answer or answer
    if arguments.question is None:
        raise ConfigError("--question is missing: say what to ask, e.g. --question 'what color is the circle?'")
    return [(str(Path(image).resolve()), None) for image in arguments.image], arguments.question, arguments.answer


def _open(path: str) -> Any:
    """An image that was given, before any model is loaded. Raises ConfigError where it cannot be used."""
    from ..data.images import ImageRef, load_image
    from ..data.skipped import UnusableRow

    try:
        return load_image(ImageRef(path=Path(path).name, root=str(Path(path).parent)))
    except UnusableRow as error:
        raise ConfigError(f"--image {path}: {error.detail} ({error.cause}); give an image file") from None


def _tree(
    arguments: argparse.Namespace, run: Run, images: list[str], question: str, answer: RightAnswer | None, columns
) -> dict:
    """What `--json` prints: alternatives are empty without `--probabilities`, `right` is null without an answer."""
    models = []
    for column in columns:
        source = {name: None if value is None else str(value) for name, value in asdict(column.source).items()}
        layers = [asdict(speech) | {"right": is_right(speech, answer)} for speech in column.speeches]
        for layer in layers if not arguments.probabilities else ():
            layer["alternatives"] = []
        models.append(source | {"layers": layers})
    return {
        "run": str(run.folder),
        "images": images,
        "question": question,
        "answer": None if answer is None else answer.text,
        "num_beams": arguments.num_beams,
        "max_new_tokens": arguments.max_new_tokens,
        "models": models,
    }
