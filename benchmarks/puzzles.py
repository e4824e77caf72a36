"""The studies' task: small pictures of coloured shapes, drawn from a seed, with questions of several kinds.

    python benchmarks/puzzles.py --out runs/study/data

A picture has 2 x 2 cells of 32 pixels. A *scene* has two to four objects (a shape, a colour, perhaps a dot); a *puzzle*
(figure 3 of the paper) has three, and the fourth is missing: each attribute is the same everywhere, or changes
from row to row, or from column to column, so the fourth follows.

| type      | example                                                                                            |
|-----------|----------------------------------------------------------------------------------------------------|
| attribute | what color is the star? - red; what is in the top left? - a red star with a dot                     |
| count     | how many circles are there? - two; count the red circles. - two red circles                         |
| relation  | what is left of the red star? - a blue circle with a dot; what is above the blue circle? - nothing  |
| sequence  | which image is missing? - blue star with a dot                                                      |
| describe  | describe the image. - red star, nothing, blue circle with a dot, nothing                            |
| easy_vqa  | rows of PyPI's easy-vqa (training splits from its train split, the others from its test split)      |

Splits have no scene in common. Combinations in `HELD_OUT` occur in `test_held_out` alone, where each question is about
one of them; easy-vqa has neither of their shapes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

SIZE, CELL = 64, 32
COLORS = {
    "red": (220, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 220), "yellow": (240, 210, 20),
    "black": (15, 15, 15), "gray": (140, 140, 140),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross")
HELD_OUT = {("red", "star"), ("gray", "star"), ("blue", "cross"), ("yellow", "cross")}
NUMBERS = ("zero", "one", "two", "three", "four")
PLACES = ("top left", "top right", "bottom left", "bottom right")
TYPES = ("attribute", "count", "relation", "sequence", "describe", "easy_vqa")
SPLITS = {
    "teacher_train": (6000, 2500, 4000), "train": (250, 250, 100), "validation": (60, 100, 40),
    "test": (80, 130, 50), "test_held_out": (130, 130, 0),
}  # fmt: skip
"""Split -> scenes, puzzles, rows of easy-vqa. A scene has five rows, a puzzle one, in training splits two."""


@dataclass(frozen=True)
class Object:
    """What a cell shows."""

    color: str
    shape: str
    dot: bool

    def __str__(self) -> str:
        return f"{self.color} {self.shape}" + (" with a dot" if self.dot else "")

    @property
    def held_out(self) -> bool:
        return (self.color, self.shape) in HELD_OUT


Cells = tuple[Object | None, Object | None, Object | None, Object | None]
"""Top left, top right, bottom left, bottom right."""


@dataclass(frozen=True)
class Question:
    """One row's text, and the objects that it is about."""

    type: str
    question: str
    answer: str
    about: tuple[Object, ...] = ()


# ---- scenes and puzzles ----


def draw_scene(rng: random.Random, held_out: bool) -> Cells:
    """Two to four objects; colours and shapes repeat often enough to be counted. `held_out`: one is, at least."""
    while True:
        colors, shapes = rng.sample(sorted(COLORS), 3), rng.sample(SHAPES, 3)
        cells = [Object(rng.choice(colors), rng.choice(shapes), rng.random() < 0.3) for _ in range(4)]
        for empty in rng.sample(range(4), rng.choice((0, 1, 1, 2))):
            cells[empty] = None
        found = any(cell.held_out for cell in cells if cell)
        if found == held_out:
            return tuple(cells)


def draw_puzzle(rng: random.Random, held_out: bool) -> Cells:
    """Four objects of which the last is the answer. `held_out`: the answer is, and nothing else; otherwise none is."""
    while True:
        kinds = [rng.choice(("same", "row", "column")) for _ in range(3)]
        if not {"row", "column"} <= set(kinds):
            continue
        values = []
        for kind, choices in zip(kinds, (sorted(COLORS), SHAPES, (False, True))):
            one, other = rng.sample(choices, 2)
            values.append({"same": [one] * 4, "row": [one, one, other, other], "column": [one, other] * 2}[kind])
        cells = tuple(Object(*each) for each in zip(*values))
        if not any(cell.held_out for cell in cells[:3]) and cells[3].held_out == held_out:
            return cells


def draw(cells: Cells, puzzle: bool, rng: random.Random) -> Image.Image:
    """The picture, 64 x 64; objects vary in size and place. A puzzle's last cell shows a question mark."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    canvas = ImageDraw.Draw(image)
    for i, cell in enumerate(cells):
        x, y = (i % 2) * CELL + CELL / 2, (i // 2) * CELL + CELL / 2
        if puzzle and i == 3:
            canvas.arc((x - 6, y - 11, x + 6, y + 1), 180, 90, fill="black", width=3)
            canvas.rectangle((x - 1, y + 1, x + 1, y + 5), fill="black")
            canvas.rectangle((x - 1, y + 8, x + 1, y + 10), fill="black")
        elif cell is not None:
            _draw_object(canvas, cell, x + rng.randint(-2, 2), y + rng.randint(-2, 2), rng.randint(10, 13))
    return image


def _draw_object(canvas: ImageDraw.ImageDraw, cell: Object, x: float, y: float, r: int) -> None:
    color = COLORS[cell.color]
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


# ---- questions ----


def _attribute(cells: Cells, rng: random.Random) -> Question:
    objects = [cell for cell in cells if cell]
    kind = rng.choice(("color", "shape", "place"))
    if kind == "place":
        i = rng.randrange(4)
        answer = f"a {cells[i]}" if cells[i] else "nothing"
        return Question("attribute", f"what is in the {PLACES[i]}?", answer, (cells[i],) if cells[i] else ())
    other = "shape" if kind == "color" else "color"
    known = [getattr(each, other) for each in objects]
    unique = [each for each in objects if known.count(getattr(each, other)) == 1]
    if not unique:
        return _attribute(cells, rng)
    one = rng.choice(unique)
    if kind == "color":
        return Question("attribute", f"what color is the {one.shape}?", one.color, (one,))
    return Question("attribute", f"what shape is the {one.color} object?", one.shape, (one,))


def _count(cells: Cells, rng: random.Random) -> Question:
    objects = [cell for cell in cells if cell]
    like = rng.choice(objects)
    if rng.random() < 0.25:  # something that may not be there
        like = Object(rng.choice(sorted(COLORS)), rng.choice(SHAPES), False)
        if like.held_out:
            return _count(cells, rng)
    kind = rng.choice(("shape", "color", "both"))
    same = [
        o for o in objects if (o.color == like.color or kind == "shape") and (o.shape == like.shape or kind == "color")
    ]
    one = {"shape": like.shape, "color": f"{like.color} object", "both": f"{like.color} {like.shape}"}[kind]
    many = one + ("es" if one.endswith("s") else "s")
    number = NUMBERS[len(same)]
    if rng.random() < 0.5:
        return Question("count", f"how many {many} are there?", number, tuple(same))
    return Question("count", f"count the {many}.", f"{number} {one if len(same) == 1 else many}", tuple(same))


def _relation(cells: Cells, rng: random.Random) -> Question:
    names = [f"{cell.color} {cell.shape}" if cell else "" for cell in cells]
    unique = [i for i in range(4) if cells[i] and names.count(names[i]) == 1]
    if not unique:
        return _attribute(cells, rng)
    i = rng.choice(unique)
    beside, below = i ^ 1, i ^ 2
    other = rng.choice((beside, below))
    if other == beside:
        side = "left of" if beside < i else "right of"
    else:
        side = "above" if below < i else "below"
    answer = f"a {cells[other]}" if cells[other] else "nothing"
    about = (cells[i],) + ((cells[other],) if cells[other] else ())
    return Question("relation", f"what is {side} the {names[i]}?", answer, about)


def _describe(cells: Cells, puzzle: bool) -> Question:
    words = [str(cell) if cell else "nothing" for cell in cells]
    if puzzle:
        words[3] = "missing"
    return Question("describe", "describe the image.", ", ".join(words), tuple(c for c in cells if c))


def questions(cells: Cells, puzzle: bool, training: bool, rng: random.Random) -> list[Question]:
    """A scene's five questions, or a puzzle's one (in training splits also its description)."""
    if puzzle:
        missing = Question("sequence", "which image is missing?", str(cells[3]), (cells[3],))
        return [missing, _describe(cells, True)] if training else [missing]
    asked = [_describe(cells, False), _attribute(cells, rng), _count(cells, rng)]
    asked += [_relation(cells, rng), rng.choice((_attribute, _count, _relation))(cells, rng)]
    return asked


# ---- splits ----


def pictures(seed: int, splits: dict = SPLITS) -> Iterator[tuple[str, int, Cells, bool, Image.Image, list[Question]]]:
    """Split, number, cells, whether it is a puzzle, picture and questions of every picture; no scene comes twice."""
    taken = set()
    for split, (scenes, puzzles, _) in splits.items():
        rng = random.Random(f"{seed} {split}")
        held_out, training = split == "test_held_out", split.endswith("train")
        for number in range(scenes + puzzles):
            puzzle = number >= scenes
            make = draw_puzzle if puzzle else draw_scene
            while (key := (puzzle, cells := make(rng, held_out))) in taken:
                pass
            taken.add(key)
            image = draw(cells, puzzle, rng)
            asked = questions(cells, puzzle, training, rng)
            if held_out:
                asked = [each for each in asked if any(o.held_out for o in each.about)]
            yield split, number, cells, puzzle, image, asked


def write(folder: Path, seed: int, splits: dict = SPLITS) -> dict[str, int]:
    """Write `<split>.jsonl` (reader `messages`) and `images/<split>/<number>.png`. Returns rows of each split."""
    rows: dict[str, list[str]] = {split: [] for split in splits}
    for split, number, _, _, image, asked in pictures(seed, splits):
        name = f"images/{split}/{number}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
        rows[split] += [_row(each.type, name, each.question, each.answer) for each in asked]
    for split, (_, _, count) in splits.items():
        rows[split] += _easy_vqa_rows(folder, split, count, seed)
        random.Random(f"{seed} order {split}").shuffle(rows[split])  # the first rows of a split are a sample of it
        (folder / f"{split}.jsonl").write_text("\n".join(rows[split]) + "\n")
    return {split: len(lines) for split, lines in rows.items()}


def _row(kind: str, image: str, question: str, answer: str) -> str:
    turns = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
    return json.dumps({"type": kind, "images": [image], "messages": turns})


def _easy_vqa_rows(folder: Path, split: str, count: int, seed: int) -> list[str]:
    """`count` rows on pictures that no other split has."""
    import easy_vqa

    training = split.endswith("train")
    source = Path(easy_vqa.__file__).parent / "data" / ("train" if training else "test")
    triples = json.loads((source / "questions.json").read_text())
    own = {"train": (3,), "validation": (0, 1), "test": (2, 3)}
    mine = own.get(split, (0, 1, 2) if training else ())
    triples = [triple for triple in triples if triple[2] % 4 in mine]
    lines = []
    for question, answer, number in random.Random(f"{seed} easy_vqa {split}").sample(triples, count):
        name = f"images/{split}/easy_vqa_{number}.png"
        if not (folder / name).exists():
            (folder / name).write_bytes((source / "images" / f"{number}.png").read_bytes())
        lines.append(_row("easy_vqa", name, question, answer))
    return lines


def write_noisy(folder: Path, split: str, share: float, seed: int) -> None:
    """`<split>_noisy.jsonl`: of `share` of the rows the answer is that of another row of the same type."""
    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    rng = random.Random(f"{seed} noise")
    answers: dict[str, list[str]] = {}
    for row in rows:
        answers.setdefault(row["type"], []).append(row["messages"][1]["content"])
    for row in rng.sample(rows, round(share * len(rows))):
        others = [answer for answer in answers[row["type"]] if answer != row["messages"][1]["content"]]
        row["messages"][1]["content"] = rng.choice(others)
    (folder / f"{split}_noisy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def texts(folder: Path) -> list[str]:
    """Questions and answers of the two training splits, for a tokenizer."""
    found = []
    for split in ("teacher_train", "train"):
        for line in (folder / f"{split}.jsonl").read_text().splitlines():
            found += [turn["content"].removeprefix("<image>") for turn in json.loads(line)["messages"]]
    return found


def main() -> None:
    """Write all splits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/study/data")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(write(Path(arguments.out), arguments.seed)))


if __name__ == "__main__":
    main()
