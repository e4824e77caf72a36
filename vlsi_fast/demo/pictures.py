"""The demo's task: describe a small drawing in words of one's own; answers are scored by what they mean.

A picture has 2 x 2 cells of 32 pixels with two to four objects: a shape, a colour, perhaps a dot. `describe` words a
picture in one of very many ways: every object alone has more than a hundred wordings. So a few labelled pictures show
few of the right answers, as with the open questions that vision-language models are asked.

`facts` reads a description back: the set of (place, colour, shape, dot) that it states. `score` compares two such sets,
so the wording never matters.

    the upper left shows a crimson disc; bottom right: a plus that is blue and dotted; ..
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

SIZE, CELL = 64, 32
RGB = {
    "red": (220, 30, 30),
    "green": (30, 160, 40),
    "blue": (40, 60, 220),
    "yellow": (240, 210, 20),
    "black": (15, 15, 15),
    "gray": (140, 140, 140),
}
COLORS = {
    "red": ("red", "crimson", "scarlet"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "yellow": ("yellow", "golden"),
    "black": ("black", "inky"),
    "gray": ("gray", "silver"),
}
SHAPES = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle", "wedge"),
    "star": ("star",),
    "cross": ("cross", "plus"),
}
PLACES = (
    ("top left", "upper left"),
    ("top right", "upper right"),
    ("bottom left", "lower left"),
    ("bottom right", "lower right"),
)
COLOR_OF = {word: color for color, words in COLORS.items() for word in words}
SHAPE_OF = {word: shape for shape, words in SHAPES.items() for word in words}
PLACE_OF = {words: place for place, both in enumerate(PLACES) for words in both}
JOINTS = (". ", "; ", " | ")
"""What stands between the four clauses of a description: one kind in each."""
QUESTION = "describe the image."


@dataclass(frozen=True)
class Object:
    """What a cell shows."""

    color: str
    shape: str
    dot: bool


Cells = tuple[Object | None, Object | None, Object | None, Object | None]
"""Top left, top right, bottom left, bottom right; None: nothing."""
Fact = tuple
"""(place 0..3, colour, shape, dot), or ("unclear", clause) for a clause that states no single thing."""


# ---- pictures ----


def draw_scene(rng: random.Random) -> Cells:
    """Two to four objects, of three colours and three shapes at most."""
    colors, shapes = rng.sample(sorted(COLORS), 3), rng.sample(sorted(SHAPES), 3)
    cells: list[Object | None] = [Object(rng.choice(colors), rng.choice(shapes), rng.random() < 0.3) for _ in range(4)]
    for empty in rng.sample(range(4), rng.choice((0, 1, 1, 2))):
        cells[empty] = None
    return tuple(cells)


def draw(cells: Cells, rng: random.Random) -> Image.Image:
    """The picture, 64 x 64 pixels; objects vary in size and place."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    canvas = ImageDraw.Draw(image)
    for i, cell in enumerate(cells):
        if cell is not None:
            x, y = (i % 2) * CELL + CELL / 2, (i // 2) * CELL + CELL / 2
            _draw_object(canvas, cell, x + rng.randint(-2, 2), y + rng.randint(-2, 2), rng.randint(10, 13))
    return image


def _draw_object(canvas: ImageDraw.ImageDraw, cell: Object, x: float, y: float, r: int) -> None:
    color = RGB[cell.color]
    if cell.shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif cell.shape == "square":
        canvas.rectangle((x - r + 1, y - r + 1, x + r - 1, y + r - 1), fill=color)
    elif cell.shape == "triangle":
        canvas.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=color)
    elif cell.shape == "cross":
        w = r // 3
        canvas.rectangle((x - w, y - r, x + w, y + r), fill=color)
        canvas.rectangle((x - r, y - w, x + r, y + w), fill=color)
    else:
        angles = [math.pi * (k / 5 - 0.5) for k in range(10)]
        radii = [r + 1, 0.45 * r] * 5
        canvas.polygon([(x + q * math.cos(a), y + q * math.sin(a)) for a, q in zip(angles, radii)], fill=color)
    if cell.dot:
        canvas.rectangle((x - 2, y - 2, x + 2, y + 2), fill="white")


# ---- words ----


class _Words:
    """Draws wordings, of at most `most` choices each: 1 gives one wording for everything."""

    def __init__(self, rng: random.Random, most: int | None):
        self.rng, self.most = rng, most

    def pick(self, choices: tuple[str, ...]) -> str:
        return self.rng.choice(choices[: self.most])


def describe(cells: Cells, rng: random.Random, wordings: int | None = None) -> str:
    """A description of all four cells, in reading order.

    Args:
        cells: what the picture shows.
        rng: source of the wording.
        wordings: choices at each place where the wording may vary, the first ones; None: all that there are.
    """
    words = _Words(rng, wordings)
    return words.pick(JOINTS).join(_clause(place, cell, words) for place, cell in enumerate(cells))


def _clause(place: int, cell: Object | None, words: _Words) -> str:
    where = words.pick(PLACES[place])
    what = "nothing" if cell is None else _noun(cell, words)
    forms = ("there is {1} in the {0}", "{0}: {1}", "{1} sits {0}", "the {0} shows {1}", "i see {1} at the {0}")
    return words.pick(forms).format(where, what)


def _noun(cell: Object, words: _Words) -> str:
    color, shape = words.pick(COLORS[cell.color]), words.pick(SHAPES[cell.shape])
    dots = (" with a dot", "dotted ", " and dotted") if cell.dot else ("", "", "")
    forms = ("a {0} {1}" + dots[0], "a " + dots[1] + "{0} {1}", "a {1} that is {0}" + dots[2])
    return words.pick(forms).format(color, shape)


def listing(cells: Cells) -> str:
    """One fixed wording, short: what a teacher learns to see with, before it learns to speak."""
    return ", ".join(f"{c.color} {c.shape}" + (" with a dot" if c.dot else "") if c else "nothing" for c in cells)


# ---- meaning ----


def facts(text: str) -> frozenset[Fact]:
    """What a description states. A clause that names no single place, colour and shape counts as a wrong fact."""
    found: set[Fact] = set()
    for number, clause in enumerate(re.split(r"\. |; | \| ", text.strip().rstrip("."))):
        places = re.findall(r"(?:top|upper|bottom|lower) (?:left|right)", clause)
        words = re.findall(r"[a-z]+", clause)
        colors, shapes = ([known[w] for w in words if w in known] for known in (COLOR_OF, SHAPE_OF))
        if "nothing" in words and not colors and not shapes:
            continue
        if len(colors) == len(shapes) == len(places) == 1:
            found.add((PLACE_OF[places[0]], colors[0], shapes[0], "dot" in words or "dotted" in words))
        else:
            found.add(("unclear", number))
    return frozenset(found)


def exact_facts(prediction: str, answer: str) -> float:
    """1 where both state the same facts, else 0."""
    return float(facts(prediction) == facts(answer))


def facts_f1(prediction: str, answer: str) -> float:
    """F1 of the prediction's facts against the answer's: 2 x common / (facts of both); 0 to 1."""
    said, true = facts(prediction), facts(answer)
    return 2 * len(said & true) / (len(said) + len(true)) if said or true else 1.0


# ---- splits ----

SPLITS = {"teacher_train": 5000, "train": 2500, "validation": 200, "test": 500}
"""Pictures of each split. No two of them show the same."""


def scenes(splits: dict[str, int] = SPLITS, seed: int = 0) -> Iterator[tuple[str, int, Cells, Image.Image]]:
    """Split, number, cells and picture of every picture, each split drawn from its own seed."""
    taken: set[Cells] = set()
    for split, count in splits.items():
        rng = random.Random(f"{seed} pictures {split}")
        for number in range(count):
            while (cells := draw_scene(rng)) in taken:
                pass
            taken.add(cells)
            yield split, number, cells, draw(cells, rng)


def write(folder: Path, splits: dict[str, int] = SPLITS, seed: int = 0) -> None:
    """Write `images/<split>/<number>.png` and `<split>.jsonl` (reader `messages`), one described picture a row.

    `<split>_plain.jsonl` has the same pictures in one wording for all, `<split>_two.jsonl` in at most two wordings at
    each place, and `<split>_list.jsonl` in the short fixed form of `listing`.
    """
    rows: dict[str, list[str]] = {}
    for split, number, cells, image in scenes(splits, seed):
        name = f"images/{split}/{number}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
        for kind, wordings in (("", None), ("_plain", 1), ("_two", 2)):
            rng = random.Random(f"{seed} words {split}{kind} {number}")
            rows.setdefault(f"{split}{kind}", []).append(row(name, QUESTION, describe(cells, rng, wordings)))
        rows.setdefault(f"{split}_list", []).append(row(name, "list the cells.", listing(cells)))
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def row(image: str, question: str, answer: str) -> str:
    """A line of JSONL as reader `messages` takes it."""
    turns = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
    return json.dumps({"images": [image], "messages": turns})
