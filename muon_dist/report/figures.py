"""Figures of a run as SVG text for inlining. They use the page's colours for text and grid, in light and in dark
mode."""

from __future__ import annotations

import io
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import matplotlib
import numpy
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

Record = dict[str, Any]
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Label -> (x, y)."""

# Placeholder colours that no figure uses otherwise; in the SVG the page's own colours replace them.
_INK, _GRID = "#010203", "#040506"
# Readable on white and on near black.
PALETTE = (
    "#3d85c6",
    "#e08a1e",
    "#2fa37c",
    "#d1495b",
    "#9a6bd1",
    "#8d8d8d",
    "#b59a00",
    "#49a9c4",
    "#c760a0",
    "#7d9440",
)
# 4.4 inches are 317 points, about the width of a phone, so that text keeps its size there.
WIDTH = 4.4
HEAT_WIDTH = 3.0
MAX_COLUMNS = 100
MAX_HOVER = 150  # points of a curve that have a hover text, so that the page of a long run stays small
_PIXELS = 100  # pixels of the page per inch of a figure
COLOURS = "viridis"

_STYLE = {
    "axes.edgecolor": _GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "image.composite_image": False,  # show the cells themselves, not a resampled image
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def _svg(
    figure: Figure, name: str, description: str, hover: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> Markup:
    """The figure as one <svg> element whose ids begin with `name`.

    hover: id of a group of markers -> the hover text of each marker, in order.
    """
    out = io.StringIO()
    # The whole canvas is kept, not cut to its content, so that all text has one size on the page.
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for gid, notes in hover.items():
        text = _with_notes(text, gid, notes)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    # The viewBox keeps the proportions. Every figure has the same scale, so all text has the same size.
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(width|height|version)="[^"]*"', "", head)
    width = f"{figure.get_figwidth() * _PIXELS:.0f}px"
    return Markup(f'{head} style="width: {width}" role="img" aria-label="{Markup.escape(description)}">{rest}')


def _with_notes(text: str, gid: str, notes: Sequence[str]) -> str:
    """`text` with a <title> in each marker of the group `gid`; browsers show it as hover text."""
    start = text.index(f'<g id="{gid}">')
    end = text.index("</g>", text.index("<use", start))
    parts = re.split(r"(<use [^>]*/>)", text[start:end])
    marked = iter(notes)
    shown = [
        f"<g><title>{Markup.escape(next(marked))}</title>{part}</g>" if part.startswith("<use") else part
        for part in parts
    ]
    return text[:start] + "".join(shown) + text[end:]


def _figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def lines(
    name: str,
    series: Series,
    *,
    ylabel: str,
    description: str,
    log: bool = False,
    zero: bool = False,
    marks: Sequence[float] = (),
    parts: Sequence[float] = (),
    dots: Iterable[str] = (),
    legend: bool = True,
) -> Markup | None:
    """Curves over steps; None if no series has a point. The hover text shows label, step and value.

    log: logarithmic y. zero: y begins at 0. marks: steps with a thin vertical line (checkpoints). parts: steps at
    which part 2, 3, ... of the run begins, shown as a line with its number. dots: labels whose points are few and
    therefore marked. legend: False if the page has one legend for several figures; colours follow the order of
    `series`, and a series without points uses one too.
    """
    colours = {label: PALETTE[index % len(PALETTE)] for index, label in enumerate(series)}
    shown = {label: _finite(*xy) for label, xy in series.items()}
    shown = {label: xy for label, xy in shown.items() if xy[0]}
    if not shown:
        return None
    hover = {}
    with matplotlib.rc_context(_STYLE):
        figure, ax = _figure(2.5)
        for index, (label, (x, y)) in enumerate(shown.items()):
            marker = "o" if label in dots or len(x) == 1 else None
            ax.plot(x, y, label=label, color=colours[label], marker=marker, markersize=3.5)
            points = _spread(len(x), MAX_HOVER)
            spots = [x[i] for i in points], [y[i] for i in points]
            ax.plot(*spots, "o", markersize=7, color=colours[label], alpha=0, clip_on=False, gid=f"hover{index}")
            hover[f"hover{index}"] = [f"{label}: {b:.5g} at step {a:,.0f}" for a, b in zip(*spots, strict=True)]
        _mark_steps(ax, marks, parts)
        if log and all(v > 0 for _, y in shown.values() for v in y):
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.yaxis.set_minor_locator(NullLocator())
        elif zero:
            ax.set_ylim(bottom=0)
        else:
            _show_no_rounding(ax, [v for _, y in shown.values() for v in y])
        ax.set_xlabel("step")
        ax.set_ylabel(ylabel)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if legend and len(shown) > 1:
            columns = 4 if len(shown) > 4 else 2
            ax.legend(
                loc="lower left",
                bbox_to_anchor=(0, 1.0),
                ncols=columns,
                frameon=False,
                borderaxespad=0.2,
                handlelength=1.2,
                columnspacing=1.0,
            )
        return _svg(figure, name, description, hover)


def _show_no_rounding(ax: Axes, values: Sequence[float]) -> None:
    """Let the y axis span at least a thousandth of the values, so that rounding does not look like a difference."""
    low, high = min(values), max(values)
    middle, least = (low + high) / 2, max(abs(low), abs(high)) / 2000
    if high - low < 2 * least:
        ax.set_ylim(middle - least, middle + least)
    ax.ticklabel_format(axis="y", useOffset=False)


def _mark_steps(ax: Axes, marks: Sequence[float], parts: Sequence[float]) -> None:
    for step in marks:
        ax.axvline(step, color=_INK, alpha=0.3, linewidth=0.8, linestyle=":")
    for number, step in enumerate(parts, start=2):
        ax.axvline(step, color=_INK, alpha=0.6, linewidth=0.8)
        place = ax.get_xaxis_transform()  # x in steps, y from the bottom (0) to the top (1) of the figure
        ax.text(step, 0.98, f" {number}", transform=place, va="top", fontsize=8.5, clip_on=True)


def _finite(x: Sequence[Any], y: Sequence[Any]) -> tuple[list[float], list[float]]:
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if _is_number(a) and _is_number(b)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def curve(records: Sequence[Record], key: str) -> tuple[list[Any], list[Any]]:
    """(steps, values) of the records that have `key`."""
    held = [r for r in records if r.get(key) is not None]
    return [r["step"] for r in held], [r[key] for r in held]


def bars(name: str, labels: Sequence[str], values: Sequence[float], *, xlabel: str, description: str) -> Markup:
    """One horizontal bar per label, the first on top."""
    with matplotlib.rc_context({**_STYLE, "axes.grid.axis": "x"}):
        figure, ax = _figure(0.7 + 0.26 * len(labels))
        ax.barh(range(len(labels)), values, color=[PALETTE[i % len(PALETTE)] for i in range(len(labels))], height=0.62)
        ax.set_yticks(range(len(labels)), labels)
        ax.invert_yaxis()
        ax.set_xlabel(xlabel)
        return _svg(figure, name, description)


def newest(spectra: Sequence[Record], measure: str) -> dict[int, dict[str, Record]]:
    """Round -> matrix -> its newest record up to that round: an older record if the matrix was not measured in this
    round."""
    held = [r for r in spectra if _is_number(r.get(measure))]
    rounds: dict[int, dict[str, Record]] = {}
    state: dict[str, Record] = {}
    for step in sorted({r["round"] for r in held}):
        state = {**state, **{r["matrix"]: r for r in held if r["round"] == step}}
        rounds[step] = state
    return rounds


def by_type(spectra: Sequence[Record], measure: str) -> dict[str, tuple[list[float], list[float]]]:
    """Type -> (rounds, mean of the measure over the matrices of that type)."""
    out: dict[str, tuple[list[float], list[float]]] = {}
    for step, records in newest(spectra, measure).items():
        values: dict[str, list[float]] = defaultdict(list)
        for r in records.values():
            values[r["type"]].append(r[measure])
        for kind, held in values.items():
            steps, means = out.setdefault(kind, ([], []))
            steps.append(step)
            means.append(sum(held) / len(held))
    return out


def heat_maps(
    name: str, spectra: Sequence[Record], measure: str, kinds: Sequence[str]
) -> tuple[dict[str, Markup], Markup | None]:
    """Type -> picture with one row per layer and one column per round; and the common scale.

    A cell is the mean over the matrices (heads, experts) of that layer and type; empty if none was measured yet.
    """
    rounds = newest(spectra, measure)
    if not rounds:
        return {}, None
    top = max(r[measure] for records in rounds.values() for r in records.values())
    steps = list(rounds)
    chosen = {steps[i]: rounds[steps[i]] for i in _spread(len(steps), MAX_COLUMNS)}
    maps = {}
    for index, kind in enumerate(kinds):
        cells = {s: [r for r in records.values() if r["type"] == kind] for s, records in chosen.items()}
        if any(cells.values()):
            maps[kind] = _heat_map(f"{name}{index}", cells, measure, top, f"{measure} of {kind} by layer and step")
    return maps, _scale(f"{name}-scale", top)


def _heat_map(
    name: str, columns: Mapping[int, Sequence[Record]], measure: str, top: float, description: str
) -> Markup:
    rounds = list(columns)
    found = {r["layer"] for records in columns.values() for r in records}
    layers = sorted(found, key=lambda layer: -1 if layer is None else layer)
    row = {layer: i for i, layer in enumerate(layers)}
    sums = numpy.zeros((len(layers), len(rounds)))
    counts = numpy.zeros_like(sums)
    for column, records in enumerate(columns.values()):
        for r in records:
            sums[row[r["layer"]], column] += r[measure]
            counts[row[r["layer"]], column] += 1
    cells = numpy.divide(sums, counts, out=numpy.full_like(sums, numpy.nan), where=counts > 0)
    with matplotlib.rc_context({**_STYLE, "axes.grid": False, "font.size": 9}):
        figure, ax = _figure(min(0.55 + 0.17 * max(len(layers), 3), 4.5), HEAT_WIDTH)
        ax.imshow(cells, aspect="auto", interpolation="none", cmap=COLOURS, vmin=0, vmax=top)
        ax.spines[:].set_visible(False)
        wanted = _spread(len(rounds), 5)
        ax.set_xticks(wanted, [str(rounds[i]) for i in wanted])
        wanted = _spread(len(layers), 8)
        ax.set_yticks(wanted, ["-" if layers[i] is None else str(layers[i]) for i in wanted])
        ax.set_xlabel("step")
        ax.set_ylabel("layer")
        return _svg(figure, name, description)


def _spread(count: int, most: int) -> list[int]:
    """At most `most` indices below `count`, evenly spread, including the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _scale(name: str, top: float) -> Markup:
    with matplotlib.rc_context({**_STYLE, "axes.grid": False, "font.size": 9}):
        figure = Figure(figsize=(HEAT_WIDTH, 0.42))
        ax = figure.add_axes((0.05, 0.55, 0.9, 0.35))
        mappable = matplotlib.cm.ScalarMappable(Normalize(0, top), COLOURS)
        gradient = numpy.linspace(0, top, 128)[None]
        ax.imshow(gradient, aspect="auto", cmap=mappable.cmap, extent=(0, top, 0, 1), interpolation="none")
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        return _svg(figure, name, f"colour scale from 0 to {top:.3g}")
