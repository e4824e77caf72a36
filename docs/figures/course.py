"""Draws course.svg, the way of a batch through stage interact. After a change: python docs/figures/course.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "vlsi-fast", "font.size": 9}
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402

INK, SOFT = "#1f2933", "#5b6773"
TEACHER, STUDENT, OWN, PLAIN = "#f3dfb4", "#bcd7ee", "#c9e4d2", "#f4f6f8"
WIDTH, HEIGHT = 2.0, 0.86
COLUMNS = (0.1, 2.75, 5.4, 8.05)
ROWS = (4.2, 2.85, 1.5, 0.15)

STEPS = {
    "config": ((0, 0), "config", "config.py", PLAIN),
    "stage": ((1, 0), "stage", "stages/", PLAIN),
    "batch": ((2, 0), "batch", "data/", PLAIN),
    "student": ((1, 1), "student backbone,\ntarget layers", "hidden_states.py", STUDENT),
    "teacher": ((3, 1), "teacher backbone,\ntarget layers", "teacher.py", TEACHER),
    "student_positions": ((1, 2), "answer positions\n$\\to$ verbalizer", "verbalizer.py", STUDENT),
    "teacher_positions": ((3, 2), "answer positions\n$\\to$ verbalizer", "verbalizer.py", TEACHER),
    "matrix": ((2, 2), "head statistics\n$\\to$ KL matrix [S, L]", "vlsi_kernels", OWN),
    "matching": ((2, 3), "matching", "matching.py", OWN),
    "loss": ((1, 3), "loss of the pairs\nand the last layer", "losses.py", OWN),
    "update": ((0, 3), "gradient, step,\nrecords", "stages/", PLAIN),
}
ARROWS = (
    ("config", "stage"),
    ("stage", "batch"),
    ("batch", "student"),
    ("batch", "teacher"),
    ("student", "student_positions"),
    ("teacher", "teacher_positions"),
    ("student_positions", "matrix"),
    ("teacher_positions", "matrix"),
    ("matrix", "matching"),
    ("matching", "loss"),
    ("loss", "update"),
)


def corner(name: str) -> tuple[float, float]:
    """Lower left corner of a step's box."""
    column, row = STEPS[name][0]
    return COLUMNS[column], ROWS[row]


def ends(start: str, end: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where the arrow between two boxes begins and ends: on the sides that face each other."""
    (x, y), (u, v) = corner(start), corner(end)
    if y == v:
        right = u > x
        return (x + WIDTH * right, y + HEIGHT / 2), (u + WIDTH * (not right), v + HEIGHT / 2)
    return (x + WIDTH / 2, y), (u + WIDTH / 2, v + HEIGHT)


def main() -> None:
    """Draw boxes, arrows and what each step hands on."""
    figure = Figure(figsize=(10.2, 5.2), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 10.15)
    axes.set_ylim(0, 5.2)
    axes.set_axis_off()
    for name, (_, text, file, color) in STEPS.items():
        x, y = corner(name)
        style = "round,pad=0,rounding_size=0.08"
        axes.add_patch(FancyBboxPatch((x, y), WIDTH, HEIGHT, boxstyle=style, fc=color, ec=INK, lw=0.8))
        axes.text(x + WIDTH / 2, y + 0.55, text, ha="center", va="center", color=INK, fontsize=9.5)
        axes.text(x + WIDTH / 2, y + 0.13, file, ha="center", va="center", color=INK, fontsize=7.5, family="monospace")
    for start, end in ARROWS:
        arrow = FancyArrowPatch(*ends(start, end), arrowstyle="-|>", mutation_scale=11, color=INK, lw=1.2, shrinkB=1)
        axes.add_patch(arrow)
    for x, y, text in (
        (1.1, 3.3, "one micro-batch\nof stage interact"),
        (6.4, 3.3, "no logits\nare stored"),
    ):
        axes.text(x, y, text, ha="center", va="center", color=SOFT, fontsize=8.5, style="italic")
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
