"""Shared by the panels of the figures: colours, the theory's line style, error bars over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes

COLOURS = {
    "sgd": "#b3502d",
    "nsgd": "#c9962b",
    "spectral": "#7a7a7a",
    "muon": "#1f5fa8",
    "random": "#3d9a8b",
    "adam": "#8457a5",
    "flat_adam": "#c45a96",
}
THEORY: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.2}

Panel = Callable[[Axes, dict[str, Any]], None]


def number(value: Any) -> float:
    """A number of a result file, in which infinity is a string."""
    return float(value)


def stats(rows: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Means and SDs of summaries."""
    return [number(row["mean"]) for row in rows], [number(row["sd"]) for row in rows]


def over_seeds(values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean and SD over seeds of per-seed rows, as keyword arguments of ``errorbar``."""
    count = len(values)
    means = [sum(column) / count for column in zip(*values, strict=True)]
    if count < 2:
        return {"y": means, "yerr": [0.0] * len(means)}
    sds = [
        (sum((v - m) ** 2 for v in column) / (count - 1)) ** 0.5
        for column, m in zip(zip(*values, strict=True), means, strict=True)
    ]
    return {"y": means, "yerr": sds}


def horizontal_bars(
    ax: Axes, labels: Sequence[str], rows: Sequence[dict[str, Any]], colour: str, **kwargs: Any
) -> None:
    """One bar per row with its SD; a mean that is not finite is written as text."""
    means, sds = stats(rows)
    shown = [m if m < float("inf") else 0.0 for m in means]
    places = range(len(labels))
    ax.barh(list(places), shown, xerr=sds, color=colour, height=0.65, capsize=2, **kwargs)
    for place, mean in zip(places, means, strict=True):
        text = f" {mean:.3g}" if mean < float("inf") else " not within the limit"
        ax.annotate(text, (shown[place], place - 0.36), va="bottom", fontsize=7)
    ax.set_yticks(list(places), labels)
    ax.invert_yaxis()
