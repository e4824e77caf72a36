"""Curves as SVG by matplotlib, embedded as images so that identifiers never clash; and the shapes of a flow of layers.

S, L  target layers of student and teacher
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

INK, GRID = "#1f2933", "#d8dee6"
NIGHT = {INK: "#dfe4e9", GRID: "#3a434c"}
"""Colour by day -> by night; those of lines are seen on either ground."""
LEGEND = 4, 66
"""Below a chart: most labels side by side, and about how many characters there is room for, 5 of them for each line."""
SHALLOW_TO_DEEP = ("#3f6fd8", "#139a8b", "#5d9b1d", "#d08700", "#d4513c")


def colours(count: int) -> list[str]:
    """Hexadecimal colours from shallow to deep, of middling lightness: for white and for dark grounds."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    palette = LinearSegmentedColormap.from_list("depth", SHALLOW_TO_DEEP)
    return [to_hex(palette(i / max(1, count - 1))) for i in range(count)]


def lines(
    series: dict[str, tuple[list[float], list[float]]],
    title: str,
    ylabel: str,
    *,
    log: bool = False,
    xlabel: str = "optimizer step",
) -> str:
    """A line chart as the `src` of an `<img>`, transparent, and dark where the page is.

    Args:
        series: label -> (x, y); drawn in order, coloured from shallow to deep.
        title: above the axes.
        ylabel: of the axis, with its unit.
        log: logarithmic y axis (values that are not positive are left out).
        xlabel: of the other axis.
    """
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "vlsi-fast"  # the same run gives the same page
    from matplotlib.figure import Figure

    columns = max(1, min(LEGEND[0], LEGEND[1] // (5 + max(map(len, series)))))
    rows = math.ceil(len(series) / columns) if len(series) > 1 else 0
    figure = Figure(figsize=(5.0, 2.9 + 0.19 * rows), layout="constrained")  # small: text is read on phones, too
    axes = figure.add_subplot()
    for color, (label, (x, y)) in zip(colours(len(series)), series.items()):
        axes.plot(x, y, label=label, color=color, linewidth=1.8, marker="o" if len(x) == 1 else None)
    if log and any(v > 0 for _, y in series.values() for v in y):
        axes.set_yscale("log")
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    axes.set_xlabel(xlabel, fontsize=9, color=INK)
    axes.set_ylabel(ylabel, fontsize=9, color=INK)
    axes.tick_params(which="both", labelsize=8, color=GRID, labelcolor=INK)
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    if len(series) > 1:
        figure.legend(loc="outside lower left", fontsize=8, frameon=False, ncols=columns, labelcolor=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(_by_night(buffer.getvalue())).decode()


def _by_night(svg: bytes) -> bytes:
    """With a style sheet that changes `NIGHT`'s colours where the viewer prefers a dark page."""
    rules = "".join(
        f'[style*="{kind}: {day}"] {{ {kind}: {night} !important; }}'
        for day, night in NIGHT.items()
        for kind in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark) {{ {rules} }}</style>".encode()
    head, mark, rest = svg.partition(b"<defs>")
    return head + style + mark + rest


# ---- the flow of matches ----

WIDTH, NODE, LABEL = 360, 12, 34
"""Of a flow's drawing, of a layer's bar, and of the room for a layer's number beside it; pixels."""
GAP, LEAST, THINNEST = 9, 3, 0.005
"""Between bars; least height of a bar; smallest share that gets a ribbon."""


@dataclass(frozen=True)
class Bar:
    """A layer: its number, where it stands (pixels), and its colour ("" for a teacher's)."""

    layer: int
    x: float
    y: float
    height: float
    colour: str = ""


def flow(shares: Sequence[Sequence[float]], students: Sequence[int], teachers: Sequence[int]) -> dict[str, Any]:
    """Shapes of ribbons from student layers (left) to the teacher layers (right) that they were matched with.

    Args:
        shares: [S][L], of a student layer's matches; a ribbon is as wide as its share.
        students, teachers: the target layers' numbers.

    Returns:
        {"width", "height": pixels, "students", "teachers": list of `Bar`, "ribbons": list of {"path", "colour",
        "student", "teacher", "share"}}.
    """
    unit = min(44.0, max(12.0, 240 / len(students)))  # height of a whole student layer
    arriving = [sum(row[j] for row in shares) for j in range(len(teachers))]
    heights = [max(LEAST, unit * share) for share in arriving]
    leaving = [max(LEAST, unit * sum(row)) for row in shares]
    total = max(sum(column) + GAP * (len(column) - 1) for column in (heights, leaving))
    left, right = LABEL, WIDTH - LABEL - NODE
    own = [Bar(k, left, y, h, c) for k, (y, h), c in zip(students, _stack(leaving, total), colours(len(students)))]
    theirs = [Bar(k, right, y, h) for k, (y, h) in zip(teachers, _stack(heights, total))]
    starts, ends, ribbons = [bar.y for bar in own], [bar.y for bar in theirs], []
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            width = unit * share
            if share >= THINNEST:
                path = _ribbon(left + NODE, starts[i], right, ends[j], width)
                facts = {"student": students[i], "teacher": teachers[j], "share": share, "colour": own[i].colour}
                ribbons.append({"path": path} | facts)
            starts[i] += width
            ends[j] += width
    return {"width": WIDTH, "height": total, "students": own, "teachers": theirs, "ribbons": ribbons}


def _stack(heights: Sequence[float], total: float) -> list[tuple[float, float]]:
    """(y, height) of bars that fill `total` with equal gaps; one alone stands in the middle."""
    free = total - sum(heights)
    gap = free / (len(heights) - 1) if len(heights) > 1 else 0.0
    y, places = (0.0 if len(heights) > 1 else free / 2), []
    for height in heights:
        places.append((y, height))
        y += height + gap
    return places


def _ribbon(x: float, y: float, u: float, v: float, width: float) -> str:
    """An SVG path: from the edge (x, y .. y + width) to (u, v .. v + width)."""
    middle = (x + u) / 2
    there = f"M{x:.1f},{y:.1f} C{middle:.1f},{y:.1f} {middle:.1f},{v:.1f} {u:.1f},{v:.1f}"
    back = f"V{v + width:.1f} C{middle:.1f},{v + width:.1f} {middle:.1f},{y + width:.1f} {x:.1f},{y + width:.1f}Z"
    return f"{there} {back}"
