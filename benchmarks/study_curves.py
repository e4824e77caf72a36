"""One figure of four panels: what accuracy depends on, for every arm. Reads the studies' results."""

from __future__ import annotations

import json
import re
from pathlib import Path

NAME = "study_curves.png"
ARMS = {
    "vlsi": ("VLsI", "tab:blue", "o"),
    "last": ("last-layer KL", "tab:green", "s"),
    "sft": ("sft alone", "tab:gray", "^"),
}
PANELS = {
    "labels": ("labelled pictures", (30, 100, 300, 1000, 2500)),
    "operations": ("TFLOP of training", (0.2, 0.5, 1, 2, 5)),
    "wordings": ("wordings at each place", ()),
    "wrong": ("wrong labels, %", ()),
}
"""Table -> label of the axis, and the ticks of a logarithmic one."""
PLACES = {"one wording": 1, "two wordings": 2, "all wordings": 3}


def points(result: dict) -> dict[str, list[tuple[float, float, float]]]:
    """Arm -> (place on the axis, mean, half of the 95% interval) of exact sets in percent, in the order of the axis."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for entry in result["rows"]:
        if "exact" not in entry or entry["arm"] not in ARMS:
            continue
        condition = entry["name"].split(":")[0]
        if result["table"] == "operations":
            x = entry["tflop"]
        elif condition in PLACES:
            x = PLACES[condition]
        else:
            x = float(re.match(r"\d+", condition).group())
        value = entry["exact"]
        found.setdefault(entry["arm"], []).append((x, 100 * value["mean"], 100 * (value["half_width_95"] or 0)))
    return {arm: sorted(values) for arm, values in found.items()}


def plot(folder: Path) -> str:
    """Draw the panels whose results are in `folder`. Returns the file's name.

    Raises:
        FileNotFoundError: there are none.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = {name: folder / f"study_{name}.json" for name in PANELS}
    results = {name: json.loads(file.read_text()) for name, file in results.items() if file.is_file()}
    if not results:
        raise FileNotFoundError(f"{folder} has no results of {', '.join(PANELS)}; run study.py --table labels first")
    figure, axes = pyplot.subplots(1, len(results), figsize=(3.6 * len(results), 3.4), sharey=True, squeeze=False)
    for axis, (name, result) in zip(axes[0], results.items()):
        label, ticks = PANELS[name]
        for arm, values in points(result).items():
            title, color, marker = ARMS[arm]
            x, y, half = zip(*values)
            axis.errorbar(x, y, yerr=half, label=title, color=color, marker=marker, ms=4, capsize=2, lw=1.4)
        if ticks:
            axis.set_xscale("log")
            axis.set_xticks(ticks, map(str, ticks))
            axis.minorticks_off()
        if name == "wordings":
            axis.set_xticks(list(PLACES.values()), ["one", "two", "all"])
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("exact sets of facts, %")
    axes[0][0].set_ylim(0, 100)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / NAME, dpi=110)
    pyplot.close(figure)
    return NAME
