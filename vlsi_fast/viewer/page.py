"""What the layers say, as one HTML file: no network, no script, readable on a phone.

Wide windows show the models side by side, layers in rows; narrow ones a model under the other. All text comes from
models, users and file names, so all of it is escaped, and a content policy forbids scripts and requests.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from ..speech import Speech
from .columns import Column
from .right import RightAnswer, is_right, probability
from .terminal import aligned, label, rivals, visible

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.4 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 80rem; }
h1 { font-size: 1.2rem; overflow-wrap: anywhere; }
.images { display: flex; flex-wrap: wrap; gap: .5rem; }
.images img { max-width: 100%; height: min(18rem, 60vh); object-fit: contain; object-position: left; }
.images img.small { image-rendering: pixelated; }
"""
_CARDS = """
.vlsi { --line: #8886; --dim: #6b6b6b; --good: #0b6e4f; --bad: #b3261e; --goodback: #0b6e4f14; --badback: #b3261e10; }
@media (prefers-color-scheme: dark) {
  .vlsi { --dim: #a0a0a0; --good: #6fd3a4; --bad: #ff9d94; --goodback: #6fd3a41f; --badback: #ff9d941a; }
}
.dark .vlsi { --dim: #a0a0a0; --good: #6fd3a4; --bad: #ff9d94; --goodback: #6fd3a41f; --badback: #ff9d941a; }
.vlsi .models { display: grid; gap: 1rem; margin-top: 1rem; }
.vlsi .model { display: grid; border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .75rem; }
.vlsi .model h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
.vlsi .model h2 small, .vlsi .layer { color: var(--dim); font-weight: normal; font-size: .8rem; }
.vlsi .model h2 small { display: block; }
.vlsi .answer { border-top: 1px solid var(--line); padding: .4rem .5rem; overflow-wrap: anywhere; }
.vlsi .right { background: var(--goodback); } .vlsi .right > p { color: var(--good); font-weight: 600; }
.vlsi .wrong { background: var(--badback); } .vlsi .wrong > p { color: var(--bad); }
.vlsi .answer p { margin: 0; }
.vlsi .none { display: none; }
.vlsi details { font-size: .85rem; }
.vlsi table { border-collapse: collapse; } .vlsi td { padding: 0 .5rem 0 0; vertical-align: top; }
.vlsi code { white-space: pre-wrap; background: #8882; border-radius: .2rem; padding: 0 .2rem; }
.vlsi .bar { display: inline-block; height: .6rem; background: #3a7; width: calc(var(--p) * 4rem); }
@media (min-width: 44rem) {
  .vlsi .models { grid-template: repeat(var(--rows), auto) / repeat(var(--models), minmax(0, 1fr)); row-gap: 0; }
  .vlsi .model { grid-row: span var(--rows); grid-template-rows: subgrid; }
  .vlsi .none { display: block; border-top: 1px solid var(--line); }
}
"""


def render(
    columns: Sequence[Column], images: Sequence[Image.Image], question: str, run: str, decoding: str,
    answer: RightAnswer | None = None,
) -> str:  # fmt: skip
    """The page. Every answer has its probability; its tokens' are folded below it where there are alternatives.

    Args:
        columns: from `hear`.
        images: that were asked about; embedded, reduced to 640 pixels a side.
        question: that was asked.
        run: folder of the run; the page has its name alone, as it is made to be shown to others.
        decoding: how the answers were decoded, in words.
        answer: the right one, where known: layers that say it are green, others red.
    """
    pictures = "".join(_picture(image, i + 1) for i, image in enumerate(images))
    known = "" if answer is None else f'<p class="layer">right answer: {_safe(answer.text)}</p>'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        f"<title>{_safe(question)} - what the layers say</title><style>{_STYLE}{_CARDS}</style></head>"
        f'<body class="vlsi"><h1>{_safe(question)}</h1><div class="images">{pictures}</div>'
        f"{known}{_models(columns, answer)}"
        f'<p class="layer">Run {_safe(short(run))}; {_safe(decoding)}. Percentages: probability of the whole answer '
        "under the layer that gives it. Each layer answers through its verbalizer and the language head; the last "
        "one is the model itself.</p></body></html>\n"
    )


def cards(columns: Sequence[Column]) -> str:
    """The answers alone, with their style, to stand in another page."""
    return f'<style>{_CARDS}</style><div class="vlsi">{_models(columns)}</div>'


def short(path: str) -> str:
    """The end of a folder's path, which tells models apart and no machine; a Hub name as it is."""
    return path if path.count("/") < 2 and not path.startswith(("/", ".")) else "/".join(path.split("/")[-2:])


def _models(columns: Sequence[Column], answer: RightAnswer | None = None) -> str:
    rows = aligned(columns)
    models = "".join(_model(column, [row[j] for row in rows], answer) for j, column in enumerate(columns))
    return f'<div class="models" style="--models: {len(columns)}; --rows: {len(rows) + 1}">{models}</div>'


def _model(column: Column, speeches: Sequence[Speech | None], answer: RightAnswer | None) -> str:
    source = column.source
    where = _safe(short(source.checkpoint))
    head = f"<h2>{_safe(source.name)}<small>{where}</small><small>{_safe(source.note)}</small></h2>"
    return f'<section class="model">{head}{"".join(_answer(speech, answer) for speech in speeches)}</section>'


def _answer(speech: Speech | None, answer: RightAnswer | None) -> str:
    if speech is None:
        return '<div class="none"></div>'
    mark = {True: " right", False: " wrong", None: ""}[is_right(speech, answer)]
    text = f"<p>{_safe(speech.text)}</p>" if speech.text else '<p class="layer">(nothing)</p>'
    head = f"{label(speech)} · {probability(speech):.0%} a token"
    return f'<div class="answer{mark}"><div class="layer">{head}</div>{text}{_tokens(speech)}</div>'


def _tokens(speech: Speech) -> str:
    if not speech.alternatives:
        return ""
    rows = []
    for token, p, alternatives in zip(speech.tokens, speech.token_probabilities, speech.alternatives):
        others = ", ".join(f"<code>{_safe(other)}</code> {q:.2f}" for other, q in rivals(token, alternatives))
        bar = f'<span class="bar" style="--p: {p:.3f}"></span>'
        rows.append(f"<tr><td><code>{_safe(token)}</code></td><td>{p:.2f}</td><td>{bar}</td><td>{others}</td></tr>")
    return f"<details><summary>token probabilities</summary><table>{''.join(rows)}</table></details>"


def _safe(text: str) -> str:
    return html.escape(visible(str(text)))


def _picture(image: Image.Image, number: int) -> str:
    kind = ' class="small"' if max(image.size) < 256 else ""
    return f'<img{kind} alt="image {number}" src="{_data_uri(image)}">'


def _data_uri(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((640, 640))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
