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


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Hear every model, then print. Returns the exit code."""
    run = find_run(arguments.run)
    pictures, question = _what_to_ask(arguments)
    with contextlib.redirect_stdout(sys.stderr):  # libraries speak up on stdout while they load
        from .columns import hear, sources_of

        try:
            images = [_load(name) if image is None else image for name, image in pictures]
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
                top=3 if arguments.probabilities else 0,
            )
        except ValueError as error:  # images, layers, models that do not fit: all say what to do
            return report(error, 2)
    from .terminal import print_table

    if arguments.json:
        tree = _tree(arguments, run, [name for name, _ in pictures], question, columns)
        print(json.dumps(tree, indent=2, ensure_ascii=False))
    else:
        print_table(columns, question, arguments.probabilities)
    if arguments.html:
        from .page import render

        decoding = f"{arguments.num_beams} beams" if arguments.num_beams > 1 else "greedy decoding"
        page = render(columns, images, question, arguments.run, decoding)
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


def _what_to_ask(arguments: argparse.Namespace) -> tuple[list[tuple[str, Any]], str]:
    """Images ((path, None) or (name, image)) and question; for the shipped example its own, unless some are given."""
    if arguments.question is None and not arguments.image and arguments.run == NAME:
        image, name, question = example_question()
        return [(name, image)], question
    if arguments.question is None:
        raise ConfigError("--question is missing: say what to ask, e.g. --question 'what color is the circle?'")
    return [(str(Path(image).resolve()), None) for image in arguments.image], arguments.question


def _load(path: str) -> Any:
    from ..data.images import ImageRef, load_image

    return load_image(ImageRef(path=Path(path).name, root=str(Path(path).parent)))


def _tree(arguments: argparse.Namespace, run: Run, images: list[str], question: str, columns) -> dict:
    """The JSON that `--json` prints; alternatives are empty without `--probabilities`."""
    models = []
    for column in columns:
        source = {name: str(value) for name, value in asdict(column.source).items()}
        models.append(source | {"layers": [asdict(speech) for speech in column.speeches]})
    return {
        "run": str(run.folder),
        "images": images,
        "question": question,
        "num_beams": arguments.num_beams,
        "max_new_tokens": arguments.max_new_tokens,
        "models": models,
    }
