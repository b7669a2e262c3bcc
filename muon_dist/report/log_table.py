"""The log of a run as a table: rows, text, comma-separated values, a pandas DataFrame."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muon_dist.errors import DataError
from muon_dist.report.run_record import Record, read_lines

if TYPE_CHECKING:
    from pandas import DataFrame

_SHOWN = {
    "step": "{:,.0f}",
    "epoch": "{:.3f}",
    "loss": "{:.4f}",
    "eval_loss": "{:.4f}",
    "eval_bits_per_byte": "{:.4f}",
    "lr/muon": "{:.3g}",
    "lr/adamw": "{:.3g}",
    "grad_norm": "{:.3g}",
    "tokens": "{:,.0f}",
    "tokens_per_s": "{:,.0f}",
}


def read_log(run: str | Path) -> list[Record]:
    """One row per step, in order, with all logged figures of training and evaluation. Damaged lines are left out, and
    a message on standard error names them.

    run: a run folder, or the path of a metrics.jsonl. Raises DataError if there is no log, or no line in it.
    """
    path = Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a run folder, such as runs/quickstart")
    rows: dict[int, Record] = {}
    problems: list[str] = []
    for line in read_lines(path, problems, "", ("step",)):
        row = rows.setdefault(line["step"], {})
        row.update({name: value for name, value in line.items() if name != "time" or "time" not in row})
    for problem in problems:
        print(f"note: {problem}", file=sys.stderr)
    if not rows:
        raise DataError(f"{path}: no step was logged")
    return [rows[step] for step in sorted(rows)]


def columns(rows: Sequence[Record]) -> list[str]:
    """The names in the rows, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def as_csv(rows: Sequence[Record]) -> str:
    """Comma-separated values with a header; a cell is empty if the row has no value, or one that is not finite."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_text(rows: Sequence[Record]) -> str:
    """The main columns for people."""
    shown = [name for name in _SHOWN if any(row.get(name) is not None for row in rows)]
    cells = [shown, *([_cell(row.get(name), _SHOWN[name]) for name in shown] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(shown))]
    return "".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)).rstrip() + "\n" for line in cells)


def _cell(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, (int, float)) else "-"


def metrics(run: str | Path) -> DataFrame:
    """The log of a run as a pandas DataFrame: one row per step (the index), one column per figure of metrics.jsonl.

    run: a run folder, also of a run that has not finished. Figures that were not logged at a step are NaN. Raises
    DataError if there is no log.
    """
    import pandas  # imported here because the import takes a second

    rows = read_log(run)
    return pandas.DataFrame(rows, columns=columns(rows)).set_index("step")
