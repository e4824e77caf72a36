"""`vlsi-fast app`: a local page to upload an image, ask, and see every layer's answer of two models side by side.

Gradio serves it (optional extra `app`). It listens on this machine only unless told otherwise, makes no public link and
sends nothing anywhere: no analytics, no version check. Files above `--max-upload-mib` are refused while they arrive,
images above `--max-megapixels` by their header, before they are decoded.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from pathlib import Path

from ..cli import report
from ..config_data import PILLOW_MAX_IMAGE_PIXELS
from ..data.images import ImageRef, load_image
from ..runs import Run
from .columns import Column, Source, open_source, sources_of
from .command import find_run
from .page import cards

INSTALL = 'pip install "vlsi-fast[app]"   (in a checkout: pip install -e ".[app]")'


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Load two models and serve the page until interrupted. Returns the exit code."""
    try:
        gradio = import_gradio()
        run = find_run(arguments.run)
        sources = sources_of(run, [arguments.compare])
        answer = Answerer(run, sources, arguments)
    except (ImportError, ValueError) as error:
        return report(error, 2)
    page = build(gradio, answer, f"vlsi-fast: what the layers of {arguments.run} say")
    print(f"vlsi-fast app: http://{arguments.host}:{arguments.port} (ctrl-c ends it)", file=sys.stderr, flush=True)
    page.launch(
        server_name=arguments.host,
        server_port=arguments.port,
        share=False,
        max_file_size=arguments.max_upload_mib * 2**20,
        quiet=True,
    )
    return 0


def import_gradio():
    """Gradio, told to send nothing. Raises ImportError with the pip line."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f"the app needs gradio ({error}): {INSTALL}") from error
    return gradio


class Answerer:
    """Both models, loaded; called with what the page's form holds."""

    def __init__(self, run: Run, sources: list[Source], arguments: argparse.Namespace):
        self.speakers = [(source, open_source(run, source, arguments.device)) for source in sources]
        self.max_new_tokens = arguments.max_new_tokens
        self.max_pixels = min(arguments.max_megapixels * 10**6, PILLOW_MAX_IMAGE_PIXELS)
        self._one_at_a_time = threading.Lock()  # a request thread each; decoder verbalizers put hooks on shared layers

    def __call__(self, image: str | None, question: str, beams: float, probabilities: bool) -> str:
        """The answers of every layer of both models as HTML.

        Args:
            image: path of the uploaded file; None where there is none.
            question: what to ask.
            beams: 1 is greedy.
            probabilities: whether to show tokens' probabilities.

        Raises:
            ValueError: an empty question, an image that cannot be used.
        """
        if not question.strip():
            raise ValueError("ask something")
        images = []
        if image is not None:
            path = Path(image).resolve()
            images = [load_image(ImageRef(path=path.name, root=str(path.parent)), self.max_pixels)]
        options = {"num_beams": int(beams), "max_new_tokens": self.max_new_tokens, "top": 3 if probabilities else 0}
        with self._one_at_a_time:
            return cards([Column(source, s.speak(images, question, **options)) for source, s in self.speakers])


def build(gradio, answer: Answerer, title: str):
    """The page (`gradio.Blocks`). Errors that tell the user what to do are shown there."""

    def respond(image, question, beams, probabilities):
        try:
            return answer(image, question, beams, probabilities)
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    # uploads are deleted from Gradio's folder of temporary files within two hours, and when the app ends
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(f"### {title}")
        with gradio.Row():
            image = gradio.Image(type="filepath", sources=["upload", "clipboard"], label="image")
            with gradio.Column():
                question = gradio.Textbox(label="question", max_length=2000)
                beams = gradio.Slider(1, 5, value=1, step=1, label="beams (1: greedy)")
                probabilities = gradio.Checkbox(label="token probabilities")
                button = gradio.Button("Ask", variant="primary")
        answers = gradio.HTML()
        inputs = [image, question, beams, probabilities]
        gradio.on([button.click, question.submit], respond, inputs, answers, api_name="ask", show_progress="minimal")
    return page
