"""The summary that a run prints at its end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_FIGURES = (
    ("validation_loss", "validation loss", "{:.4f} nats per token"),
    ("validation_bits_per_byte", "bits per byte", "{:.4f}"),
    ("validation_perplexity", "perplexity", "{:.2f}"),
    ("steps", "steps", "{:,}"),
    ("weights_step", "weights", "of step {:,}"),
    ("tokens", "tokens", "{:,}"),
    ("train_seconds", "training", "{:.1f} s"),
    ("tokens_per_s", "tokens per second", "{:,.0f}"),
    ("mfu", "MFU", "{:.1%} of {peak}"),
    ("world_size", "processes", "{}"),
    ("run", "run folder", "{}"),
    ("checkpoint", "last checkpoint", "{}"),
    ("model", "model, tokenizer", "{}"),
    ("metrics", "metrics", "{}"),
)


def rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of every figure in the summary."""
    peak = f"{summary['peak_flops'] / 1e9:,.0f} GFLOP/s" if summary.get("peak_flops") else "peak"
    return [
        (label, form.format(summary[name], peak=peak))
        for name, label, form in _FIGURES
        if summary.get(name) is not None
    ]


def show(summary: Mapping[str, Any]) -> None:
    """Print the summary: a table on a terminal, plain lines elsewhere."""
    title = f"{summary['name']}: {summary['optimizer']}"
    sample = summary.get("sample")
    if not sys.stdout.isatty():
        print(f"== {title}")
        for label, text in rows(summary):
            print(f"{label}: {text}")
        if sample:
            print(f"sample:\n{sample}")
        sys.stdout.flush()
        return
    console = Console()
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, text in rows(summary):
        table.add_row(label, Text(text))
    console.print(table)
    if sample:
        console.print(Panel(Text(sample), title="sample", title_align="left"))
