"""Our Muon against every other Muon: runs the cases and writes their rows."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from muon_dist.bench import machine, measure
from muon_dist.bench.cases import MODELS, PROFILES, Case, Profile, select
from muon_dist.bench.exact import Exact, make_exact
from muon_dist.bench.ranks import RankFailure, run_ranks
from muon_dist.bench.rows import Row, figures, merge, row_of, table
from muon_dist.errors import ConfigError, PeerError
from muon_dist.json_files import read_object

TIMEOUT = 600.0  # seconds per case; then hanging ranks are ended


def run(
    cases: Sequence[Case],
    profile: Profile,
    *,
    ranks: int | None,
    link: str,
    report: Callable[[Row], None],
) -> list[Row]:
    """One row per case, also for skipped ones; `report` is called with each finished row.

    Each case runs on `ranks` new processes of this machine. None: on the process group that this process has joined;
    then all ranks return the same rows. Raises PeerError if a rank dies or hangs, or if our Muon or AdamW fails.
    """
    exact = make_exact(profile.model, profile.exact_layers, cases[0].device if cases else "cpu")
    rows = []
    timed: set[str] = set()
    for case in cases:
        micro_batch = bool(profile.tokens_per_step) and case.sharding not in timed and not case.offload
        row = _run(case, profile, exact, ranks, micro_batch) | {"link": link}
        if row["micro_batch_seconds"] is not None:
            timed.add(case.sharding)
        rows.append(row)
        report(row)
    return rows


def _run(case: Case, profile: Profile, exact: Exact, ranks: int | None, micro_batch: bool) -> Row:
    arguments = (case, profile.model, exact, profile.rounds, micro_batch)
    world = ranks or dist.get_world_size()
    try:
        measure.import_for(case)
    except ImportError as error:
        return row_of(case, world, profile, f"{type(error).__name__}: {error}")
    try:
        if ranks is None:
            outcomes: list[Any] = [None] * world
            dist.all_gather_object(outcomes, measure.run_case(*arguments))
        else:
            outcomes = run_ranks(measure.run_case, ranks, *arguments, timeout=TIMEOUT)
    except RankFailure as error:
        raise PeerError(f"{case.name} against {case.peer}: {error}") from error
    reasons = [o.skipped for o in outcomes if o.skipped]
    return row_of(case, world, profile, reasons[0] if reasons else None) | figures(case, outcomes, profile)


def command(
    profile: str,
    output: Path,
    *,
    ranks: int,
    peers: Sequence[str],
    only: Sequence[str],
    device: str,
    model: str | None,
    rounds: int | None,
    link: str,
    append: bool,
    echo: Callable[[str], None],
) -> None:
    """`muon-dist bench step`. Under a launcher (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment) this
    process is one of the ranks, and rank 0 writes.

    `device`: "cpu", or "cuda" for one GPU per rank, under a launcher.

    Raises ConfigError for an option that selects nothing, PeerError as `run` does.
    """
    launched = "RANK" in os.environ
    cases = tuple(dataclasses.replace(case, device=_usable(device, launched)) for case in select(profile, only, peers))
    chosen = PROFILES[profile]
    if model is not None and model not in MODELS:
        raise ConfigError(f"--model {model!r} is unknown: use {', '.join(MODELS)}")
    chosen = dataclasses.replace(chosen, model=model or chosen.model, rounds=rounds or chosen.rounds)
    before = _existing(output / "step.json") if append else []
    torch.set_num_threads(1)
    if launched:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    writes = not launched or dist.get_rank() == 0

    environment = machine.describe()
    done: list[Row] = []

    def report(row: Row) -> None:
        """Write the results after every case, so that a failing case does not lose earlier ones."""
        done.append(row)
        if not writes:
            return
        outcome = row["skipped"] or f"{row['peer']} / ours {row['ratio_peer_over_ours']:.2f}"
        echo(f"{row['case']}: {outcome}")
        rows = merge(done, before)
        record = {"environment": environment, "profile": profile, "rows": rows}
        machine.write(output, "step", record, table(rows, environment))

    run(cases, chosen, ranks=None if launched else ranks, link=link, report=report)
    if launched:
        dist.destroy_process_group()
    if writes:
        echo("\n" + (output / "step.md").read_text(encoding="utf-8"))
        echo(f"-> {output / 'step.json'}, {output / 'step.md'}")


def _usable(device: str, launched: bool) -> str:
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device!r} is unknown: use cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; `muon-dist doctor` says why")
    if device == "cuda" and not launched:
        raise ConfigError(
            "--device cuda: start one process per GPU, for example with `torchrun --nproc-per-node 8 -m muon_dist.cli "
            "bench step --profile gpu --device cuda`"
        )
    return device


def _existing(path: Path) -> list[Row]:
    return read_object(path)["rows"] if path.exists() else []
