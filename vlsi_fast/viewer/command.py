"""`vlsi-fast verbalize`: what each target layer of a run's models answers."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from ..cli import report
from ..config import ConfigError
from ..demo.example import NAME, example_question, example_run
from ..runs import Run, open_run
from .right import is_right


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Hear every model, then print. Returns the exit code."""
    run = find_run(arguments.run)
    files, question, answer = _what_to_ask(arguments)
    images = [_open(file, name) for file, name in zip(files, arguments.image or map(str, files))]
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
        print(json.dumps(_tree(arguments, run, files, question, answer, columns), indent=2, ensure_ascii=False))
    else:
        print_table(columns, question, arguments.probabilities, answer)
    if arguments.html:
        from .page import render

        decoding = f"{arguments.num_beams} beams" if arguments.num_beams > 1 else "greedy decoding"
        page = render(columns, images, question, arguments.run, decoding, answer)
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


def _what_to_ask(arguments: argparse.Namespace) -> tuple[list[Path], str, str | None]:
    """Images, question and, where known, the right answer; for the shipped example its own, unless others are given."""
    if arguments.question is None and not arguments.image and arguments.run == NAME:
        image, question = example_question()
        return [image], question, arguments.answer or _example_answer()
    if arguments.question is None:
        raise ConfigError("--question is missing: say what to ask, e.g. --question 'what color is the circle?'")
    return [Path(image).resolve() for image in arguments.image], arguments.question, arguments.answer


def _example_answer() -> str:
    from easy_vqa import get_test_questions

    from ..demo.example import TEST_QUESTION

    return get_test_questions()[1][TEST_QUESTION]


def _open(file: Path, name: str):
    """An image that was given, before any model is loaded. Raises ConfigError where it cannot be used."""
    from ..data.images import ImageRef, load_image
    from ..data.skipped import UnusableRow

    try:
        return load_image(ImageRef(path=file.name, root=str(file.parent)))
    except UnusableRow as error:
        raise ConfigError(f"--image {name}: {error.detail} ({error.cause}); give an image file") from None


def _tree(
    arguments: argparse.Namespace, run: Run, files: list[Path], question: str, answer: str | None, columns
) -> dict:
    """What `--json` prints: alternatives are empty without `--probabilities`, `right` is null without an answer."""
    models = []
    for column in columns:
        source = {name: str(value) for name, value in asdict(column.source).items()}
        layers = [asdict(speech) | {"right": is_right(speech, answer)} for speech in column.speeches]
        for layer in layers if not arguments.probabilities else ():
            layer["alternatives"] = []
        models.append(source | {"layers": layers})
    return {
        "run": str(run.folder),
        "images": [str(file) for file in files],
        "question": question,
        "answer": answer,
        "num_beams": arguments.num_beams,
        "max_new_tokens": arguments.max_new_tokens,
        "models": models,
    }
