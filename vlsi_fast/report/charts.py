"""Curves as SVG, by matplotlib, embedded as images so that a page stays one file and identifiers never clash."""

from __future__ import annotations

import base64
import io

INK, GRID = "#1f2933", "#d8dee6"


def lines(
    series: dict[str, tuple[list[float], list[float]]], title: str, ylabel: str, *, log: bool = False,
    xlabel: str = "optimizer step",
) -> str:  # fmt: skip
    """A line chart as the `src` of an `<img>`.

    Args:
        series: label -> (x, y); drawn in order, coloured from shallow to deep where there are more than three.
        title: above the axes.
        ylabel: of the axis, with its unit.
        log: logarithmic y axis (values that are not positive are left out).
        xlabel: of the other axis.
    """
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "vlsi-fast"  # the same run gives the same page
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    palette = matplotlib.colormaps["viridis"]
    for i, (label, (x, y)) in enumerate(series.items()):
        color = palette(0.9 * i / (len(series) - 1)) if len(series) > 3 else f"C{i}"
        axes.plot(x, y, label=label, color=color, linewidth=1.6, marker="o" if len(x) == 1 else None)
    if log and any(v > 0 for _, y in series.values() for v in y):
        axes.set_yscale("log")
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    axes.set_xlabel(xlabel, fontsize=9, color=INK)
    axes.set_ylabel(ylabel, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False, ncols=1 + len(series) // 20)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
