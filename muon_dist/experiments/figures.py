"""Figures of the experiments: one small SVG per panel, with the theory's curve, the measurement, and the verdict
below.

Panels are separate files so that a page can put them in one row on a desk and below each other on a phone.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from muon_dist.experiments.figure_panels import PANELS
from muon_dist.experiments.result import plain

STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
}


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``<experiment>-<n>.svg`` for every panel of a result into ``folder``; returns the files."""
    record = plain(record)
    written = []
    for index, (title, panel) in enumerate(PANELS[record["experiment"]], start=1):
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": f"{record['experiment']}-{index}"}):
            # a Figure of its own, without pyplot: no display and no global state
            figure = Figure(figsize=(4.6, 4.0), layout="constrained")
            ax = figure.subplots()
            panel(ax, record)
            ax.set_title(title, loc="left")
            verdict = f"{record['experiment']}: {record['verdict']}"
            shown = textwrap.shorten(verdict, 150, placeholder=" ...")
            figure.supxlabel(textwrap.fill(shown, 82), fontsize=7, x=0.01, ha="left", color="#444444")
            path = folder / f"{record['experiment']}-{index}.svg"
            figure.savefig(path, metadata={"Date": None, "Title": title, "Description": verdict})
        written.append(path)
    return written
