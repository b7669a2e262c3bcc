"""Several runs in one table for a terminal: results, and the settings that differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

from muon_dist.errors import ConfigError
from muon_dist.report.compare_page import differences, figures_of, labels
from muon_dist.report.run_page import status
from muon_dist.report.run_record import RunRecord, read_run

Row = tuple[str, list[str]]
WIDEST = 60
"""Characters of a setting's value; longer ones, such as lists of sources, would push the columns off the screen."""


def compare_runs(runs: Sequence[str | Path]) -> str:
    """A table with one column per run; the runs may have any settings, and need not have finished.

    Raises:
        ConfigError: fewer than two runs, or a run is named twice. DataError: a folder is not a run.
    """
    folders = [Path(run).resolve() for run in runs]
    if len(folders) < 2 or len(set(folders)) < len(folders):
        raise ConfigError("compare takes two or more run folders, each once, or one configuration")
    records = [read_run(run) for run in runs]
    rows = [("", labels(records)), ("status", [status(r) for r in records]), *_at_one_step(records)]
    rows += figures_of(records)
    found = differences(records)
    if sum(record.config is not None for record in records) > 1:
        rows += [("settings that differ:" if found else "no setting differs", [""] * len(records))]
    rows += [(name, [shorten(value, WIDEST, placeholder=" ...") for value in values]) for name, values in found]
    missing = [f"{r.root}: {problem}" for r in records for problem in r.problems if problem.startswith("config.yaml")]
    return "\n".join([_aligned(rows), *missing])


def _at_one_step(records: Sequence[RunRecord]) -> list[Row]:
    """The validation losses at the last step at which all runs have one, to compare runs of different lengths."""
    losses = [{line["step"]: line["eval_loss"] for line in r.evaluations if line.get("eval_loss")} for r in records]
    common = set.intersection(*(set(of_run) for of_run in losses))
    if not common:
        return []
    step = max(common)
    return [(f"validation loss, all at step {step:,}", [f"{of_run[step]:.4f}" for of_run in losses])]


def _aligned(rows: Sequence[Row]) -> str:
    cells = [[name, *values] for name, values in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )
