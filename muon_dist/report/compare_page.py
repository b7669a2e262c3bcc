"""Several runs on one self-contained HTML page: curves in shared plots, results and settings in tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from muon_dist.errors import ConfigError
from muon_dist.report import figures
from muon_dist.report.page import save, template
from muon_dist.report.run_page import status, tiles
from muon_dist.report.run_record import RunRecord, read_run

# (caption, key in the log, figure's options); the validation loss comes first, because runs are compared by it
CURVES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Validation loss, nats per token", "eval_loss", {}),
    ("Validation, bits per byte", "eval_bits_per_byte", {}),
    ("Training loss, nats per token", "loss", {}),
    ("Norm of the raw gradient", "grad_norm", {"log": True}),
    ("Learning rate of Muon", "lr/muon", {"zero": True}),
    ("Learning rate of AdamW", "lr/adamw", {"zero": True}),
    ("Tokens per second, all ranks", "tokens_per_s", {"zero": True}),
)
MOST = len(figures.PALETTE)


def write_compare_page(runs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the page of these run folders (default: `compare.html` in the current folder) and return its path.

    Raises:
        ConfigError: more runs than colours, or a run is named twice. DataError: a folder is not a run, or the page
            cannot be written.
    """
    folders = [Path(run).resolve() for run in runs]
    if len(folders) > MOST:
        raise ConfigError(f"{len(folders)} runs: a page compares at most {MOST}, so that their colours differ")
    if len(set(folders)) < len(folders):
        raise ConfigError("a run is named twice: name each once")
    page = render([read_run(run) for run in runs])
    target = Path(output) if output is not None else Path("compare.html")
    return save(page, target)


def labels(records: Sequence[RunRecord]) -> list[str]:
    """A name for each run: its own, with as much of its path as is needed to make the names different."""
    names = [record.name for record in records]
    if len(set(names)) == len(names):
        return names
    return [f"{record.name} ({record.root})" for record in records]


def render(records: Sequence[RunRecord]) -> str:
    """The page as text. Everything from the files is escaped; the figures are drawn here from their numbers."""
    names = labels(records)
    return template("compare").render(
        legend=list(zip(names, figures.PALETTE, records, strict=False)),
        status=status,
        curves=curves(records, names),
        figures=figures_of(records),
        settings=differences(records),
    )


def figures_of(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """(name, one value per run) of the main results."""
    return _table([dict(_plain(tiles(record))) for record in records])


def curves(records: Sequence[RunRecord], names: Sequence[str]) -> list[tuple[str, Markup]]:
    """(caption, figure) of every curve that any run has logged; each run has one colour, and one legend is above all
    figures."""
    found = []
    for caption, key, options in CURVES:
        series = {name: figures.curve(record.metrics, key) for name, record in zip(names, records, strict=True)}
        figure = figures.lines(
            f"c-{key.replace('/', '-')}",
            series,
            ylabel=key,
            description=f"{caption} of {len(names)} runs over steps",
            legend=False,
            dots=names if key.startswith("eval") else (),
            **options,
        )
        if figure is not None:
            found.append((caption, figure))
    return found


def _plain(found: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The step is moved from the label to the value, so that runs that end at different steps share a row."""
    return [
        (
            label.partition(" at step ")[0],
            value + (f" ({label[label.index('step ') :]})" if " at step " in label else ""),
        )
        for label, value in found
    ]


def _table(rows: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """(name, one value per run) for every name that any run has."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [(name, [row.get(name, "-") for row in rows]) for name in names]


def differences(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """(dotted key, one value per run) of the settings that differ; "?" for a run without config.yaml."""
    known = [record.config is not None for record in records]
    rows = _table([dict(_leaves(record.config)) for record in records if record.config is not None])
    different = [(name, iter(values)) for name, values in rows if len(set(values)) > 1]
    return [(name, [next(values) if there else "?" for there in known]) for name, values in different]


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [leaf for key, one in value.items() for leaf in _leaves(one, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, str(value))]
