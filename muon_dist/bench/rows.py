"""Measurements of the ranks as rows with named columns, and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from muon_dist.bench.cases import MICRO_BATCH, SEQUENCE, Case, Profile
from muon_dist.bench.machine import markdown
from muon_dist.bench.measure import Measured, Outcome
from muon_dist.bench.sides import ADAMW, OURS

SIDE_NAMES = (("ours", OURS), ("peer", None), ("adamw", ADAMW))

Row = dict[str, Any]


def row_of(case: Case, ranks: int, profile: Profile, skipped: str | None) -> Row:
    """The columns of a row that do not depend on the measurement."""
    return {
        "case": case.name,
        "peer": case.peer,
        "sharding": case.sharding,
        "ns_dtype": case.ns_dtype,
        "dtype": case.dtype,
        "offload": case.offload,
        "model": profile.model,
        "ranks": ranks,
        "rounds": profile.rounds,
        "skipped": skipped,
        "ratio_peer_over_ours": None,
        "micro_batch_seconds": None,
    }


def _slowest(measured: Iterable[Sequence[float]]) -> list[float]:
    """Per round, the value of the slowest rank."""
    return [max(times) for times in zip(*measured, strict=True)]


def _optimizer(by_rank: Sequence[Measured], adamw: Sequence[Measured], suffix: str = "") -> list[float]:
    """Per round, seconds of the optimizer: backward and step, minus AdamW's backward in the same round, because some
    optimizers work in backward."""
    backward, step, plain = (
        _slowest(getattr(m, part + suffix) for m in side)
        for side, part in ((by_rank, "backward"), (by_rank, "step"), (adamw, "backward"))
    )
    return [b + s - p for b, s, p in zip(backward, step, plain, strict=True)]


def _whole(by_rank: Sequence[Measured]) -> list[float]:
    """Per round, seconds of a whole step."""
    parts = (_slowest(getattr(m, part) for m in by_rank) for part in ("forward", "backward", "step"))
    return [sum(times) for times in zip(*parts, strict=True)]


def figures(case: Case, outcomes: Sequence[Outcome], profile: Profile) -> Row:
    """The columns of all sides: `ours_`, `peer_` and `adamw_`."""
    row: Row = {"parameters": outcomes[0].parameters, "muon_parameters": outcomes[0].muon_parameters}
    times: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    whole: dict[str, list[float]] = {}
    adamw = [o.sides[ADAMW] for o in outcomes]
    for label, name in SIDE_NAMES:
        name = name or case.peer
        if not all(name in o.sides for o in outcomes):
            continue
        by_rank = [o.sides[name] for o in outcomes]
        times[label], whole[label] = _optimizer(by_rank, adamw), _whole(by_rank)
        cpu[label] = _optimizer(by_rank, adamw, "_cpu")
        row |= {f"{label}_{key}": value for key, value in _side(by_rank, times[label]).items()}
        row[f"{label}_optimizer_cpu_seconds"] = statistics.median(cpu[label])
        row[f"{label}_step_seconds"] = statistics.median(whole[label])
    if "peer" in times:
        ratios = _ratios(times)
        row |= {
            "ratio_peer_over_ours": statistics.median(ratios),
            "ratio_lowest": min(ratios),
            "ratio_highest": max(ratios),
            "ratio_cpu": statistics.median(_ratios(cpu)),
            "ratio_whole_step": statistics.median(_ratios(whole)),
        }
    if outcomes[0].micro_batch is not None:
        row |= _shares(row, max(o.micro_batch or 0.0 for o in outcomes), len(outcomes), profile)
    return row


def _ratios(times: dict[str, list[float]]) -> list[float]:
    return [p / o for p, o in zip(times["peer"], times["ours"], strict=True)]


def _side(by_rank: Sequence[Measured], optimizer: list[float]) -> Row:
    """Columns of one side: bytes and memory of the busiest rank; collectives of rank 0; calls of all ranks."""
    return {
        "optimizer_seconds": statistics.median(optimizer),
        "optimizer_seconds_lowest": min(optimizer),
        "optimizer_seconds_highest": max(optimizer),
        "bytes_received": max(m.received for m in by_rank),
        "bytes_sent": max(m.sent for m in by_rank),
        "collectives": by_rank[0].collectives,
        "newton_schulz_calls": sum(m.calls for m in by_rank),
        "momentum_bytes": max(m.momentum for m in by_rank),
        "temporary_bytes": max(m.temporary for m in by_rank),
        "peak_optimizer_bytes": max(m.momentum + m.temporary for m in by_rank),
        "error_to_exact": by_rank[0].error,
    }


def _shares(row: Row, seconds: float, ranks: int, profile: Profile) -> Row:
    """The time that our Muon adds to a step with AdamW, as a share of that step, for each step size of the profile.

    A step of T tokens is T / (ranks x micro-batch) forward and backward passes of the measured micro-batch and one
    step of the measured optimizer.
    """
    tokens = MICRO_BATCH[0] * MICRO_BATCH[1] * ranks
    shares = {}
    for size in profile.tokens_per_step:
        passes = size / tokens * seconds
        added = row["ours_optimizer_seconds"] - row["adamw_optimizer_seconds"]
        shares[str(size)] = added / (passes + row["adamw_optimizer_seconds"])
    return {"micro_batch_seconds": seconds, "micro_batch_tokens": tokens, "share_over_adamw": shares}


def merge(rows: Sequence[Row], before: Sequence[Row]) -> list[Row]:
    """`before` with its cases replaced by equal cases of `rows`; new cases of `rows` follow."""
    key = ("case", "model", "ranks", "link")
    fresh = {tuple(r[k] for k in key): r for r in rows}
    kept = [fresh.pop(tuple(r[k] for k in key), r) for r in before]
    return [*kept, *fresh.values()]


def _pair(row: Row, key: str, scale: float, digits: int = 1) -> str:
    """'peer, ours' of a column."""
    shown = [f"{row[f'{side}_{key}'] / scale:.{digits}f}" for side in ("peer", "ours")]
    return " → ".join(shown)


def _head(row: Row) -> tuple[str, str, str]:
    link = "" if row["link"] == "loopback" else f", {row['link']}"
    return row["case"] + link, row["peer"], row["ns_dtype"]


def _times_line(row: Row) -> tuple[str, ...]:
    if row["skipped"]:
        return (*_head(row), f"skipped: {row['skipped']}", "", "", "")
    return (
        *_head(row),
        f"**{row['ratio_peer_over_ours']:.2f}** ({row['ratio_lowest']:.2f} to {row['ratio_highest']:.2f})",
        f"{row['ratio_cpu']:.2f}",
        f"{_pair(row, 'optimizer_seconds', 1e-3, 0)} ({row['adamw_optimizer_seconds'] * 1e3:.0f})",
        f"{row['ratio_whole_step']:.2f}",
    )


def _counts_line(row: Row) -> tuple[str, ...]:
    return (
        *_head(row),
        f"{_pair(row, 'bytes_received', 1e6)} ({row['adamw_bytes_received'] / 1e6:.1f})",
        f"{_pair(row, 'bytes_sent', 1e6)} ({row['adamw_bytes_sent'] / 1e6:.1f})",
        f"{_pair(row, 'collectives', 1, 0)} ({row['adamw_collectives']})",
        _pair(row, "newton_schulz_calls", 1, 0),
        _pair(row, "momentum_bytes", 1e6),
        f"{_pair(row, 'peak_optimizer_bytes', 1e6)} ({row['adamw_peak_optimizer_bytes'] / 1e6:.1f})",
        f"{row['peer_error_to_exact']:.1e} → {row['ours_error_to_exact']:.1e}",
    )


TIMES_HEADER = (
    "case", "peer", "iteration in", "optimizer time, peer / ours (lowest to highest)",
    "its CPU time, peer / ours", "optimizer, ms: peer → ours (AdamW)", "whole step, peer / ours",
)  # fmt: skip
COUNTS_HEADER = (
    "case", "peer", "iteration in", "MB received by a rank: peer → ours (AdamW)", "MB sent: peer → ours (AdamW)",
    "collectives: peer → ours (AdamW)", "matrices orthogonalized: peer → ours", "momentum, MB per rank: peer → ours",
    "momentum and temporaries, MB: peer → ours (AdamW)", "error of the update: peer → ours",
)  # fmt: skip


def table(rows: Sequence[Row], environment: dict[str, Any]) -> str:
    """Markdown: times, counts, and the overhead of our Muon over AdamW as a share of a step."""
    size = next((f"{r['parameters'] / 1e6:.1f}M" for r in rows if "parameters" in r), "?")
    about = (
        f"Llama of {size} parameters, {rows[0]['ranks']} ranks with one thread each on {environment['cores']} cores, "
        f"gloo, torch {torch.__version__}, {rows[0]['rounds']} rounds in turn, steps of {SEQUENCE} tokens per rank."
    )
    parts = [about, markdown(TIMES_HEADER, [_times_line(r) for r in rows])]
    parts.append(markdown(COUNTS_HEADER, [_counts_line(r) for r in rows if not r["skipped"]]))
    shares = [r for r in rows if r.get("share_over_adamw")]
    if shares:
        sizes = list(shares[0]["share_over_adamw"])
        header = (
            "sharding",
            "iteration in",
            "forward and backward of a micro-batch, s (tokens of all ranks)",
            "optimizer, ms: ours (AdamW)",
            *(f"ours over AdamW, {int(size):,} tokens per step" for size in sizes),
        )
        lines = [
            (
                r["sharding"],
                r["ns_dtype"],
                f"{r['micro_batch_seconds']:.2f} ({r['micro_batch_tokens']})",
                f"{1e3 * r['ours_optimizer_seconds']:.0f} ({1e3 * r['adamw_optimizer_seconds']:.0f})",
                *(f"{100 * r['share_over_adamw'][s]:.1f}%" for s in sizes),
            )
            for r in shares
        ]
        parts.append(markdown(header, lines))
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"
