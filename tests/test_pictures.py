"""The demo's task: pictures against their descriptions, and what a description is found to mean."""

import json
import random
import re

import numpy as np
import pytest
from PIL import Image

from vlsi_fast.demo import pictures

SPLITS = {"teacher_train": 20, "train": 12, "validation": 6, "test": 6}


def seen(image: Image.Image, cell: int) -> tuple[str, str, bool] | None:
    """Colour, shape and dot of a cell, from its pixels alone; None where it is empty."""
    x, y = 32 * (cell % 2), 32 * (cell // 2)
    pixels = np.asarray(image.convert("RGB"))[y : y + 32, x : x + 32].astype(int)
    ink = (pixels < 250).any(2)
    if not ink.any():
        return None
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    top, bottom, left, right = rows[0], rows[-1], columns[0], columns[-1]
    box = ink[top : bottom + 1, left : right + 1]
    color = min(pictures.RGB, key=lambda name: abs(pixels[ink] - pictures.RGB[name]).sum())
    height, width = box.shape
    corners = [bool(box[r, c]) for r in (0, -1) for c in (0, -1)]
    middle = box[height // 2 - 1 : height // 2 + 2, width // 2 - 1 : width // 2 + 2]
    fill = box.mean() + (25 / box.size if not middle.any() else 0)
    if all(corners):
        shape = "square"
    elif corners[2] and corners[3]:
        shape = "triangle"
    elif fill > 0.7:
        shape = "circle"
    else:  # a cross is the same upside down
        shape = "cross" if (box == box[::-1]).mean() > 0.97 else "star"
    center = pixels[box.shape[0] // 2 + top, box.shape[1] // 2 + left] if shape != "triangle" else None
    if shape in ("triangle", "star"):  # their box is not centred on the dot
        inside = pixels[top + 6 : bottom - 4, left + 8 : right - 7]
        holes = (inside >= 250).all(2)
        dot = any(holes[i : i + 5, j : j + 5].all() for i in range(len(holes) - 4) for j in range(holes.shape[1] - 4))
    else:
        dot = bool((center >= 250).all())
    return color, shape, dot


@pytest.fixture(scope="module")
def drawn():
    return list(pictures.scenes({"train": 150, "test": 50}, seed=3))


def test_descriptions_state_what_the_picture_shows(drawn):
    """Cells are read from the pixels, by other code than the generator's."""
    rng = random.Random(0)
    for _, _, cells, image in drawn:
        looked = [seen(image, place) for place in range(4)]
        assert looked == [(c.color, c.shape, c.dot) if c else None for c in cells]
        true = {(place, *cell) for place, cell in enumerate(looked) if cell}
        for wordings in (1, 2, None):
            assert pictures.facts(pictures.describe(cells, rng, wordings)) == true


def test_wordings_are_many_or_one(drawn):
    cells = next(cells for _, _, cells, _ in drawn if all(cells) and any(c.dot for c in cells))
    rng = random.Random(0)
    assert len({pictures.describe(cells, rng, 1) for _ in range(50)}) == 1
    assert 40 < len({pictures.describe(cells, rng) for _ in range(50)})
    clauses = {c for _ in range(4000) for c in re.split(r"\. |; | \| ", pictures.describe(cells, rng))}
    assert len(clauses) / 4 > 60  # so many wordings of one cell


@pytest.mark.parametrize(
    "text, expected",
    [
        ("top left: a red disc", {(0, "red", "circle", False)}),
        ("i see a plus that is golden and dotted at the lower right.", {(3, "yellow", "cross", True)}),
        ("upper right: nothing; nothing sits bottom left", set()),
        ("top left: a red", {("unclear", 0)}),
        ("a red disc", {("unclear", 0)}),
        ("top left: a red blue disc", {("unclear", 0)}),
        ("bottom left: a red disc top right", {("unclear", 0)}),
        ("", {("unclear", 0)}),
        ("top left: a red disc; top left: a red disc", {(0, "red", "circle", False)}),
    ],
)
def test_facts(text, expected):
    assert pictures.facts(text) == expected


def test_scores_by_hand():
    true = "top left: a red disc; top right: a blue box; bottom left: nothing; bottom right: a gray star"
    other = "there is a crimson circle in the upper left. the top right shows an azure square. lower left: nothing. "
    assert pictures.exact_facts(true, other + "bottom right: a silver star") == 1
    wrong = other + "bottom right: a black star"
    assert pictures.exact_facts(wrong, true) == 0 and pictures.facts_f1(wrong, true) == pytest.approx(4 / 6)
    missing = other + "bottom right: nothing"
    assert pictures.facts_f1(missing, true) == pytest.approx(4 / 5)
    assert pictures.facts_f1("", true) == 0 and pictures.facts_f1(true, true) == 1


def test_same_seed_same_bytes_and_no_scene_in_two_splits(tmp_path, drawn):
    for name, seed in (("one", 5), ("other", 5), ("third", 6)):
        pictures.write(tmp_path / name, SPLITS, seed)
    one, other, third = (tmp_path / name for name in ("one", "other", "third"))
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert all((one / f).read_bytes() == (other / f).read_bytes() for f in files)
    assert (third / "train.jsonl").read_text() != (one / "train.jsonl").read_text()
    scenes = [cells for _, _, cells, _ in drawn]
    assert len(set(scenes)) == len(scenes) == 200
    rows = [json.loads(line) for line in (one / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and Image.open(one / rows[0]["images"][0]).size == (64, 64)
    plain, listed = ((one / f"test{kind}.jsonl").read_text().splitlines() for kind in ("_plain", "_list"))
    for row, other_row, short in zip(rows, map(json.loads, plain), map(json.loads, listed)):
        said, same = row["messages"][1]["content"], other_row["messages"][1]["content"]
        assert pictures.exact_facts(said, same) == 1 and row["images"] == other_row["images"] == short["images"]
