"""Muon against AdamW, each at its best learning rate of one grid, over several seeds; or finished runs."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from muon_dist.config import load_config
from muon_dist.errors import ConfigError, MuonDistError
from muon_dist.json_files import read_object, write_json
from muon_dist.report.compare_text import compare_runs

OPTIMIZERS = ("muon", "adamw")
LRS = (0.003, 0.01, 0.03)


@dataclass(frozen=True)
class Result:
    """One finished run: validation loss in nats per token, and bits per byte."""

    optimizer: str
    lr: float
    seed: int
    loss: float
    bits_per_byte: float


def compare(
    what: Path,
    more: Sequence[str],
    *,
    lrs: Sequence[float] | None,
    seeds: int,
    jobs: int,
    output: Path,
) -> str:
    """The table of `compare_runs` where `what` is a run folder and `more` are others, else of `compare_optimizers`.

    Raises:
        ConfigError: learning rates with finished runs; see also both.
    """
    if not what.is_dir():
        given = lrs if lrs is not None else LRS
        return str(compare_optimizers(what, more, lrs=given, seeds=seeds, jobs=jobs, output=output)["table"])
    if lrs is not None:
        raise ConfigError("--lr belongs to a configuration; run folders are compared as they are")
    settings = [name for name in more if "=" in name and not Path(name).exists()]
    if settings:
        raise ConfigError(f"{settings[0]}: settings belong to a configuration; run folders are compared as they are")
    return compare_runs([what, *more])


def compare_optimizers(
    config_path: Path,
    overrides: Sequence[str],
    *,
    lrs: Sequence[float],
    seeds: int,
    jobs: int,
    output: Path,
) -> dict[str, object]:
    """Run the grid at seed 0, then the other seeds at each optimizer's best learning rate, and write the table.

    Every run is one process of `muon-dist train` with both learning rates (of Muon and of AdamW groups) set to the
    grid's value; finished runs in `output` are not run again.

    Args:
        lrs: the grid, the same for both optimizers.
        seeds: number of seeds at the best learning rate, the grid's own included.
        jobs: runs at a time, each on one thread.

    Returns:
        The contents of `output/compare.json`: `results`, `best` (by optimizer) and `table` (Markdown).

    Raises:
        ConfigError: an empty grid or no seed.
        MuonDistError: a run failed; its log is named.
    """
    if not lrs or seeds < 1 or jobs < 1:
        raise ConfigError("compare needs at least one --lr, one seed and one job")
    from muon_dist.train import corpus  # seconds, which finished runs do not need

    corpus.prepare(load_config(config_path, list(overrides)))  # once, before runs that would race for it

    def run(job: tuple[str, float, int]) -> Result:
        return _run(config_path, overrides, output, *job)

    with ThreadPoolExecutor(jobs) as pool:
        grid = list(pool.map(run, [(name, lr, 0) for lr in lrs for name in OPTIMIZERS]))
        best = {name: min((r for r in grid if r.optimizer == name), key=lambda r: r.loss).lr for name in OPTIMIZERS}
        more = list(pool.map(run, [(name, best[name], s) for s in range(1, seeds) for name in OPTIMIZERS]))
    report: dict[str, object] = {
        "config": str(config_path),
        "overrides": list(overrides),
        "results": [asdict(r) for r in grid + more],
        "best": best,
        "table": table(grid + more, best, seeds),
    }
    write_json(output / "compare.json", report)
    (output / "compare.md").write_text(str(report["table"]) + "\n", encoding="utf-8")
    return report


def _run(config_path: Path, overrides: Sequence[str], output: Path, optimizer: str, lr: float, seed: int) -> Result:
    name = f"{optimizer}-lr{lr:g}-seed{seed}"
    summary = output / "runs" / name / "summary.json"
    if not summary.exists():
        settings = [
            f"name={name}",
            f"seed={seed}",
            f"optimizer.name={optimizer}",
            f"optimizer.muon.lr={lr}",
            f"optimizer.adamw.lr={lr}",
            *overrides,
        ]
        command = [sys.executable, "-m", "muon_dist.cli", "train", str(config_path), *settings]
        command += ["--run-dir", str(output / "runs"), "--overwrite"]
        output.mkdir(parents=True, exist_ok=True)
        log = output / f"{name}.log"
        with log.open("w", encoding="utf-8") as stream:
            environment = {"OMP_NUM_THREADS": "1", **os.environ}
            code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment).returncode
        if code:
            raise MuonDistError(f"the run {name} ended with exit code {code}: see {log}")
    figures = read_object(summary)
    return Result(optimizer, lr, seed, figures["validation_loss"], figures["validation_bits_per_byte"])


def table(results: Sequence[Result], best: dict[str, float], seeds: int) -> str:
    """Markdown: mean and standard deviation over seeds at the best rate, and the grid at seed 0."""
    lrs = sorted({r.lr for r in results})
    grid = {(r.optimizer, r.lr): r.loss for r in results if r.seed == 0}
    lines = [
        f"| optimizer | best lr | validation loss, {seeds} seeds | bits per byte | "
        + " | ".join(f"loss at lr {lr:g}" for lr in lrs)
        + " |",
        "|---|---|---|---|" + "---|" * len(lrs),
    ]
    for name in OPTIMIZERS:
        chosen = [r for r in results if r.optimizer == name and r.lr == best[name]]
        losses = _spread([r.loss for r in chosen])
        bits = _spread([r.bits_per_byte for r in chosen])
        cells = " | ".join(f"{grid[name, lr]:.4f}" for lr in lrs)
        lines.append(f"| {name} | {best[name]:g} | {losses} | {bits} | {cells} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"
