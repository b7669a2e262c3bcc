"""A plan as tables: rich ones on a terminal, plain ones elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from muon_dist.planner.devices import GIB, Device
from muon_dist.planner.mesh import describe
from muon_dist.planner.plan import Plan, step_seconds

Rows = list[tuple[str, ...]]


def show(plan: Plan, device: Device) -> None:
    """Print the plan."""
    print(heading(plan, device))
    for title, header, rows in sections(plan, device):
        if sys.stdout.isatty():
            table = Table(*header, title=title, title_justify="left")
            for row in rows:
                table.add_row(*row)
            Console().print(table)
        else:
            print(f"\n{title}\n{plain(header, rows)}")
    for line in plan.notes:
        print(f"note: {line}")
    for line in plan.advice:
        print(f"advice: {line}")


def heading(plan: Plan, device: Device) -> str:
    """Model, layout, device and mesh of a plan, as text."""
    muon, adamw = plan.elements
    stage = f" on the largest of {plan.mesh.pp} pipeline stages" if plan.mesh.pp > 1 else ""
    run = plan.run
    again = "recomputed" if run["recomputation"] else "kept"
    order = "; Muon's group ordered so that slices begin between matrices" if plan.ordered else ""
    return (
        f"{plan.model}: {plan.layout} on {plan.ranks} ranks, {plan.per_node} per node, "
        f"{device.name} ({device.source})\n"
        f"Muon {muon / 1e9:,.2f} B elements in {plan.matrices:,} matrices, AdamW {adamw / 1e9:,.2f} B{stage}{order}\n"
        f"mesh: {describe(plan.mesh)}; {plan.tokens:,} tokens per step: micro-batches of {run['micro_batch']} x "
        f"{run['sequence_length']:,}, accumulation {run['accumulation']}, activations {again}"
    )


def sections(plan: Plan, device: Device) -> list[tuple[str, tuple[str, ...], Rows]]:
    """(title, header, rows) of each table."""
    memory: Rows = [(name, f"{value / GIB:.2f}") for name, value in plan.memory.items() if value]
    memory.append(("in all", f"{sum(plan.memory.values()) / GIB:.2f}"))
    memory.append((f"usable of {device.memory / GIB:.2f}, 10% in reserve", f"{plan.usable / GIB:.2f}"))
    axes: Rows = [(f"axis {name}", _bytes(inside), _bytes(between)) for name, (inside, between) in plan.axes.items()]
    moved: Rows = [(name, _bytes(inside), _bytes(between)) for name, (inside, between) in plan.moved.items()]
    moved.append(("Muon, busiest rank", *map(_bytes, plan.busiest)))
    ns = plan.newton_schulz
    balance: Rows = [
        ("even share per rank", _seconds(ns["mean"]), "1.00"),
        ("largest matrix alone", _seconds(plan.largest), f"{plan.largest / ns['mean']:.2f}"),
        ("busiest rank", _seconds(ns["max"]), f"{ns['max'] / ns['mean']:.2f}"),
        ("busiest rank, round-robin", _seconds(ns["round robin"]), f"{ns['round robin'] / ns['mean']:.2f}"),
        (f"with waits, {_buckets(plan.buckets)}", _seconds(ns["in buckets"]), f"{ns['in buckets'] / ns['mean']:.2f}"),
    ]  # fmt: skip
    step: Rows = [(name, _seconds(value)) for name, value in plan.seconds.items()]
    step.append(("whole step", _seconds(step_seconds(plan))))
    step.append(("overhead over AdamW", f"{plan.overhead:.1%}"))
    return [
        ("memory per rank", ("part", "GiB"), memory),
        (f"received per rank per step ({plan.collectives} collectives for Muon)",
         ("for", "inside a node", "between nodes"), [*axes, *moved]),
        ("Newton-Schulz", ("", "time", "ratio to even share"), balance),
        ("predicted time of a step", ("part", "time"), step),
    ]  # fmt: skip


def plain(header: Sequence[str], rows: Rows) -> str:
    """Columns padded with spaces."""
    everything = [tuple(header), *rows]
    widths = [max(len(row[i]) for row in everything) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in everything
    )


def _buckets(count: int) -> str:
    return "1 bucket" if count == 1 else f"{count} buckets"


def _bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"
