"""Reads a run folder, even an unfinished, incomplete or damaged one. Every problem is reported."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from muon_dist.audit.chain import FILE as AUDIT_FILE
from muon_dist.audit.verify import Verified, verify
from muon_dist.checkpoint.manifest import is_checkpoint
from muon_dist.checkpoint.weights import Weights, newest_weights
from muon_dist.config import redact
from muon_dist.errors import DataError
from muon_dist.json_files import read_lines as lines_of
from muon_dist.json_files import read_object

Record = dict[str, Any]

_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


@dataclass
class RunRecord:
    """The contents of a run folder.

    Attributes:
        metrics, events, spectra, sharpness: the lines of the files, in order; spectra of all ranks, by step.
        weights: the newest weights in the folder. chosen: other weights, if their figures were requested. audit: the
            result of `muon-dist verify`; None without an audit.
        problems: one sentence per missing file and per damaged line.
    """

    root: Path
    config: Record | None = None
    environment: Record | None = None
    routing: Record | None = None
    ownership: Record | None = None
    summary: Record | None = None
    metrics: list[Record] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
    spectra: list[Record] = field(default_factory=list)
    sharpness: list[Record] = field(default_factory=list)
    checkpoints: list[Record] = field(default_factory=list)
    weights: Weights | None = None
    audit: Verified | None = None
    chosen: Weights | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def final(self) -> Record | None:
        """The summary, unless the run continued after the summary was written."""
        newest = max((line["step"] for line in self.metrics), default=0)
        if self.weights is not None and self.weights.step is not None:
            newest = max(newest, self.weights.step)
        return self.summary if self.summary is not None and self.summary.get("steps", newest) >= newest else None

    @property
    def name(self) -> str:
        """The run's name, or that of its folder."""
        return str((self.config or {}).get("name") or self.root.resolve().name)

    @property
    def training(self) -> list[Record]:
        """The lines of the log that have a training loss."""
        return [line for line in self.metrics if "loss" in line]

    @property
    def evaluations(self) -> list[Record]:
        """The lines of the log that have a validation loss."""
        return [line for line in self.metrics if "eval_loss" in line]

    def setting(self, *keys: str) -> Any:
        """A value of the configuration by its path; None if it is not set."""
        value: Any = self.config
        for key in keys:
            if not isinstance(value, Mapping):
                return None
            value = value.get(key)
        return value


def read_run(folder: str | Path) -> RunRecord:
    """Read a run folder.

    Raises:
        DataError: the folder does not exist, or has no file of a run.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give a run folder, such as runs/quickstart")
    record = RunRecord(root)
    problems = record.problems
    config = _whole(root / "config.yaml", _yaml, problems, "settings are not shown")
    record.config = redact(config) if config is not None else None
    record.environment = _whole(root / "environment.json", read_object, problems, "versions are not shown")
    record.routing = _whole(root / "routing.json", read_object, problems, "routing is not shown", ("routes", "totals"))
    record.metrics = read_lines(root / "metrics.jsonl", problems, "no curves can be drawn", ("step",))
    record.events = read_lines(
        root / "events.jsonl", problems, "starts and ends are not known", ("time", "event", "step")
    )
    record.checkpoints = _checkpoints(root / "checkpoints")
    record.weights = newest_weights(root)
    if not (record.config or record.metrics or record.routing or record.checkpoints):
        raise DataError(f"{root}: not a run folder (no config.yaml, metrics.jsonl, routing.json or checkpoints)")
    wanted = record.setting("diagnostics", "every")
    if record.setting("optimizer", "name") != "adamw":
        record.ownership = _whole(
            root / "ownership.json",
            read_object,
            problems,
            "it is written after the first step; owners are not shown",
            ("layout", "policy", "world_size", "matrices", "loads"),
        )
        record.spectra = _spectra(root / "spectra", problems, record.ownership, bool(wanted))
    if (root / "spectra" / "sharpness.jsonl").exists():
        record.sharpness = read_lines(root / "spectra" / "sharpness.jsonl", problems, "", ("step", "matrices"))
    if (root / AUDIT_FILE).is_file():
        record.audit = verify(root)
        problems += [f"{AUDIT_FILE}: {problem}." for problem in record.audit.problems]
    record.summary = _whole(root / "summary.json", read_object, problems, "the run has not finished")
    return record


def _whole(
    path: Path, read: Callable[[Path], Any], problems: list[str], consequence: str, needed: tuple[str, ...] = ()
) -> Record | None:
    try:
        value = read(path)
    except FileNotFoundError:
        problems.append(f"{path.name} is missing: {consequence}.")
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{path.name} cannot be read ({_first_line(error)}): {consequence}.")
        return None
    if not isinstance(value, dict):
        problems.append(f"{path.name} holds {type(value).__name__} instead of a mapping: {consequence}.")
        return None
    absent = [name for name in needed if name not in value]
    if absent:
        problems.append(f"{path.name} lacks {', '.join(absent)}: {consequence}.")
        return None
    return value


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_lines(path: Path, problems: list[str], consequence: str, needed: tuple[str, ...]) -> list[Record]:
    """The objects of a JSON-lines file. A line that is not an object, or lacks a field, is left out and reported."""
    try:
        lines = list(lines_of(path))
    except FileNotFoundError:
        problems.append(f"{path.name} is missing: {consequence}.")
        return []
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({_first_line(error)}): {consequence}.")
        return []
    found: list[Record] = []
    damaged: list[int] = []
    for number, value in lines:
        if value is None or any(name not in value for name in needed) or not isinstance(value.get("step", 0), int):
            damaged.append(number)
        else:
            found.append(value)
    if damaged:
        shown = ", ".join(map(str, damaged[:8])) + (" and more" if len(damaged) > 8 else "")
        problems.append(
            f"{path.parent.name + '/' if path.parent.name == 'spectra' else ''}{path.name}: {len(damaged)} damaged "
            f"line{'s' if len(damaged) > 1 else ''} left out ({'lines' if len(damaged) > 1 else 'line'} {shown})."
        )
    return found


def _spectra(folder: Path, problems: list[str], plan: Record | None, wanted: bool) -> list[Record]:
    """The measures of all ranks, by step. Ranks that own matrices but wrote no measures are reported."""
    files = sorted(folder.glob("rank-*.jsonl"))
    needed = ("step", "round", "matrix", "layer", "type")
    found = [line for path in files for line in read_lines(path, problems, "", needed)]
    if not wanted and not files:
        problems.append("No spectral measures: set diagnostics.every in the configuration to take them.")
    elif plan is not None:
        have = {path.stem for path in files}
        absent = [r["rank"] for r in plan["loads"] if r["matrices"] and f"rank-{r['rank']}" not in have]
        if absent:
            problems.append(
                f"spectra/: no file from rank {', '.join(map(str, absent))}; where nodes do not share the run folder, "
                "copy the files together."
            )
    return sorted(found, key=lambda line: line["step"])


def _checkpoints(folder: Path) -> list[Record]:
    """Per checkpoint folder, oldest step first: step, whether the save was finished, bytes and time."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = _CHECKPOINT.match(path.name)
        if match is None or not path.is_dir():
            continue
        files = [p for p in path.rglob("*") if p.is_file()]
        found.append(
            {
                "step": int(match.group(1)),
                "finished": is_checkpoint(path),
                "bytes": sum(p.stat().st_size for p in files),
                "time": max((p.stat().st_mtime for p in files), default=None),
            }
        )
    return sorted(found, key=lambda c: c["step"])
