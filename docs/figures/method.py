"""Draws method.svg, the three stages of VLsI. Run it again after a change: python docs/figures/method.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "vlsi-fast", "font.size": 9}
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402

INK, SOFT, TEACHER, STUDENT, VERBALIZER, WORDS = "#1f2933", "#7b8794", "#d9a441", "#3b82c4", "#5fa777", "#f4f6f8"
HEIGHT, GAP = 0.42, 0.12


class Panel:
    """One stage, in a coordinate system of its own."""

    def __init__(self, axes, title: str, text: str, width: float):
        self.axes = axes
        axes.set_xlim(0, width)
        axes.set_ylim(-1.75, 5.5)
        axes.set_axis_off()
        axes.text(width / 2, 5.25, title, ha="center", fontsize=12, fontweight="bold", color=INK)
        axes.text(width / 2, -0.72, text, ha="center", va="top", fontsize=8.5, color=INK, linespacing=1.5)

    def box(self, x: float, y: float, width: float, color: str, text: str = "", height: float = HEIGHT, ink: str = INK):
        """A rounded box with its text in the middle."""
        style = "round,pad=0,rounding_size=0.08"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, fc=color, ec=INK, lw=0.7))
        self.axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8, color=ink)

    def stack(self, x: float, name: str, color: str, depth: int, targets: set[int], frozen: bool) -> dict[int, float]:
        """A model: its layers from the bottom up. Returns the height of each target layer's middle."""
        middles = {}
        for layer in range(1, depth + 1):
            y = (layer - 1) * (HEIGHT + GAP)
            self.box(x, y, 1.1, color if layer in targets else "white", f"layer {layer}" if layer in targets else "")
            if layer in targets:
                middles[layer] = y + HEIGHT / 2
        top = depth * (HEIGHT + GAP)
        self.axes.text(x + 0.55, top + 0.08, name, ha="center", fontsize=9.5, color=INK, fontweight="bold")
        self.axes.text(x + 0.55, -0.28, "frozen" if frozen else "learns", ha="center", fontsize=8, color=SOFT)
        return middles

    def arrow(self, start, end, color: str = INK, style: str = "-|>", bend: float = 0.0, dash: bool = False):
        """From one point to another."""
        self.axes.add_patch(
            FancyArrowPatch(
                start,
                end,
                arrowstyle=style,
                mutation_scale=9,
                color=color,
                lw=1.3,
                shrinkA=2,
                shrinkB=2,
                connectionstyle=f"arc3,rad={bend}",
                linestyle="--" if dash else "-",
            )
        )


def verbalize(axes) -> None:
    """Stage 1: a verbalizer on each target layer."""
    text = "Each target layer of both models gets a\nverbalizer: a small network before the model's own\n"
    panel = Panel(axes, "1  verbalize", text + "language head. It learns to say the answer.", 5.6)
    middles = panel.stack(0.55, "either model", TEACHER, 6, {2, 4}, frozen=True)
    for layer, words in ((2, '"a red star"'), (4, '"a crimson disc"')):
        y = middles[layer]
        panel.arrow((1.65, y), (2.05, y))
        panel.box(2.05, y - 0.3, 1.15, VERBALIZER, "verbalizer", 0.6, "white")
        panel.arrow((3.2, y), (3.5, y))
        panel.box(3.5, y - 0.3, 0.7, WORDS, "head", 0.6)
        panel.arrow((4.2, y), (4.45, y))
        panel.axes.text(4.47, y, words, va="center", fontsize=8.5, style="italic", color=INK)


def interact(axes) -> None:
    """Stage 2: match layers, distil between what they say."""
    text = "Each student layer is matched to a teacher layer.\nThe KL divergence between what the two say\n"
    panel = Panel(axes, "2  interact", text + "trains a LoRA on the student.", 5.6)
    students = panel.stack(0.35, "student", STUDENT, 4, {1, 2, 3}, frozen=False)
    teachers = panel.stack(4.1, "teacher", TEACHER, 8, {1, 2, 3, 4, 5, 6, 7}, frozen=True)
    for layer, match in ((1, 2), (2, 4), (3, 7)):
        panel.arrow((4.1, teachers[match]), (1.45, students[layer]), VERBALIZER)
    top = 0.5 * HEIGHT
    panel.arrow((4.1, 7 * (HEIGHT + GAP) + top), (1.45, 3 * (HEIGHT + GAP) + top), SOFT, dash=True)
    panel.axes.text(2.55, 3.32, "KL of the last layers", ha="center", fontsize=8, color=SOFT, rotation=37)
    panel.axes.text(2.75, 0.66, "KL of matched layers", ha="center", fontsize=8, color="#3f7f58", rotation=9)


def sft(axes) -> None:
    """Stage 3: the student alone."""
    text = "Optional: the student alone learns from the\nlabelled answers. The result is a stock\ncheckpoint: "
    panel = Panel(axes, "3  sft", text + "no verbalizer, no teacher.", 4.6)
    panel.stack(0.6, "student", STUDENT, 4, {1, 2, 3, 4}, frozen=False)
    y = 3 * (HEIGHT + GAP) + HEIGHT / 2
    panel.arrow((1.7, y), (2.0, y))
    panel.box(2.0, y - 0.3, 0.7, WORDS, "head", 0.6)
    panel.arrow((2.7, y), (2.95, y))
    panel.axes.text(2.97, y, '"a crimson disc"', va="center", fontsize=8.5, style="italic", color=INK)


def main() -> None:
    """Draw the three panels side by side."""
    figure = Figure(figsize=(10.4, 4.2), facecolor="white")
    widths = (5.6, 5.6, 4.6)
    grid = figure.add_gridspec(1, 3, width_ratios=widths, left=0.01, right=0.99, top=0.99, bottom=0.01, wspace=0.06)
    for i, draw in enumerate((verbalize, interact, sft)):
        draw(figure.add_subplot(grid[i]))
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
