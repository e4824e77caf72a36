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
:root { color-scheme: light dark; --back: #f3f5f8; --card: #fff; }
@media (prefers-color-scheme: dark) { :root { --back: #0f1317; --card: #181e24; } }
body { font: 16px/1.4 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 80rem; background: var(--back); }
h1 { font-size: 1.5rem; line-height: 1.2; margin: .2rem 0 .8rem; overflow-wrap: anywhere; }
.asked { display: flex; flex-wrap: wrap; gap: .8rem 1.2rem; align-items: flex-start; }
.asked > p { flex: 1 1 16rem; min-width: 0; margin: 0; overflow-wrap: anywhere; }
.images { display: flex; flex-wrap: wrap; gap: .5rem; }
.images img { max-width: 100%; height: min(15rem, 50vh); object-fit: contain; object-position: left; }
.images img { border-radius: .4rem; }
.images img.small { image-rendering: pixelated; }
"""
_CARDS = """
.vlsi { --line: #8886; --dim: #5f6872; --good: #0b6e4f; --bad: #b3261e; --goodback: #0b6e4f1f; --badback: #b3261e17; }
@media (prefers-color-scheme: dark) {
  .vlsi { --dim: #a3adb6; --good: #6fd3a4; --bad: #ff9d94; --goodback: #6fd3a433; --badback: #ff9d9426; }
}
.dark .vlsi { --dim: #a3adb6; --good: #6fd3a4; --bad: #ff9d94; --goodback: #6fd3a433; --badback: #ff9d9426; }
.vlsi .models { display: grid; gap: 1rem; margin-top: 1rem; }
.vlsi .model { display: grid; gap: .3rem; border: 1px solid var(--line); border-radius: .75rem; padding: .75rem; }
.vlsi .model { background: var(--card, transparent); }
.vlsi .model h2 { font-size: 1.05rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
.vlsi .model h2 small, .vlsi .layer { color: var(--dim); font-weight: normal; font-size: .8rem; }
.vlsi .model h2 small { display: block; }
.vlsi .answer { border-left: .25rem solid var(--line); border-radius: .4rem; padding: .35rem .6rem; background: #8881; }
.vlsi .answer { display: grid; align-content: center; overflow-wrap: anywhere; min-width: 0; }
.vlsi .right { border-color: var(--good); background: var(--goodback); } .vlsi .right b { color: var(--good); }
.vlsi .wrong { border-color: var(--bad); background: var(--badback); } .vlsi .wrong b { color: var(--bad); }
.vlsi .answer p { margin: 0; font-size: .95rem; line-height: 1.35; max-height: 24rem; overflow-y: auto; }
.vlsi details { font-size: .8rem; } .vlsi summary { color: var(--dim); cursor: pointer; }
.vlsi table { border-collapse: collapse; } .vlsi td { padding: 0 .5rem 0 0; vertical-align: top; }
.vlsi code { white-space: pre-wrap; background: #8882; border-radius: .2rem; padding: 0 .2rem; }
.vlsi .bar { display: inline-block; height: .6rem; background: #3a7; width: calc(var(--p) * 4rem); }
@media (min-width: 44rem) {
  .vlsi .models { grid-template: repeat(var(--rows), auto) / repeat(var(--models), minmax(0, 1fr)); row-gap: .3rem; }
  .vlsi .model { grid-row: span var(--rows); grid-template-rows: subgrid; }
  .vlsi .answer { grid-row: span var(--span); }
}
"""


def render(
    columns: Sequence[Column],
    images: Sequence[Image.Image],
    question: str,
    run: str,
    decoding: str,
    answer: RightAnswer | None = None,
) -> str:
    """The page. Every answer has its tokens' mean probability; they are folded below it where there are alternatives.

    Args:
        columns: from `hear`.
        images: that were asked about; embedded, reduced to 640 pixels a side.
        question: that was asked.
        run: folder of the run; the page has its name alone, as it is made to be shown to others.
        decoding: how the answers were decoded, in words.
        answer: the right one, where known: layers that say it are green, others red.
    """
    pictures = "".join(_picture(image, i + 1) for i, image in enumerate(images))
    pictures = f'<div class="images">{pictures}</div>'
    known = "" if answer is None else f'<p><span class="layer">right answer</span><br>{_safe(answer.text)}</p>'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        f"<title>{_safe(question)} - what the layers say</title><style>{_STYLE}{_CARDS}</style></head>"
        f'<body class="vlsi"><h1>{_safe(question)}</h1><div class="asked">{pictures}{known}</div>'
        f"{_models(columns, answer)}"
        f'<p class="layer">Run {_safe(short(run))}; {_safe(decoding)}. Percentages: how probable the layer finds a '
        "token of its answer (geometric mean). Each layer answers through its verbalizer and the language head; the "
        "last one is the model itself.</p></body></html>\n"
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
    starts = [row for row, speech in enumerate(speeches) if speech is not None]
    if starts:
        starts[0] = 0  # a model that only answers itself fills its column
    ends = [*starts[1:], len(speeches)]
    answers = (_answer(s, end - start, answer) for s, start, end in zip(column.speeches, starts, ends))
    return f'<section class="model">{head}{"".join(answers)}</section>'


def _answer(speech: Speech, span: int, answer: RightAnswer | None) -> str:
    right = is_right(speech, answer)
    kind, mark = {True: (" right", "<b>✓</b> "), False: (" wrong", "<b>✗</b> "), None: ("", "")}[right]
    text = f"<p>{_safe(speech.text)}</p>" if speech.text else '<p class="layer">(nothing)</p>'
    head = f"{mark}{label(speech)} · {probability(speech):.0%} a token"
    return (
        f'<div class="answer{kind}" style="--span: {span}"><div class="layer">{head}</div>{text}{_tokens(speech)}</div>'
    )


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
