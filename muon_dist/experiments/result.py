"""The result of an experiment: criteria, the verdict that follows from them, and the file with every number."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from muon_dist.json_files import write_json

HOLDS = "holds"
HOLDS_IN_PART = "holds in part"
CONTRADICTED = "contradicted"


@dataclass(frozen=True)
class Criterion:
    """One statement that can fail.

    Attributes:
        name: the statement, in words.
        measured: the number (or numbers, as text) that was measured.
        threshold: what it is compared with, as text.
        passed: whether the statement holds.
        source: who makes it: ``theory`` (the project's theory sheet), ``paper`` (a claim of arXiv 2605.13079),
            ``reading`` (asked for by the referee or the reading of the paper) or ``falsifier`` (an attempt to
            break it).
        central: whether the experiment is contradicted when all statements of this kind fail.
    """

    name: str
    measured: float | str
    threshold: str
    passed: bool
    source: str = "theory"
    central: bool = True


def verdict(criteria: Sequence[Criterion]) -> str:
    """``holds`` | ``holds in part: all but <what failed>`` | ``contradicted: <what failed>``.

    Contradicted means that no central criterion passed. Raises ValueError without criteria: an experiment that
    tests nothing has no verdict.
    """
    if not criteria:
        raise ValueError("an experiment needs at least one criterion")
    failed = "; ".join(f'"{c.name}"' for c in criteria if not c.passed)
    if not failed:
        return HOLDS
    if not any(c.passed for c in criteria if c.central):
        return f"{CONTRADICTED}: {failed}"
    return f"{HOLDS_IN_PART}: all but {failed}"


def result(
    experiment: str,
    title: str,
    claim: str,
    config: Any,
    criteria: Sequence[Criterion],
    data: dict[str, Any],
    notes: Iterable[str] = (),
) -> dict[str, Any]:
    """The dictionary that every ``run(config)`` returns; the runner adds the profile, environment and seconds."""
    return {
        "experiment": experiment,
        "title": title,
        "claim": claim,
        "verdict": verdict(criteria),
        "criteria": [asdict(c) for c in criteria],
        "notes": list(notes),
        "config": asdict(config),
        "data": data,
    }


def summary(values: Iterable[float]) -> dict[str, Any]:
    """Mean, SD over seeds (n - 1), median, minimum, maximum and the values themselves."""
    array = numpy.asarray(list(values), dtype=float)
    sd = float(array.std(ddof=1)) if array.size > 1 and numpy.isfinite(array).all() else 0.0
    return {
        "mean": float(array.mean()),
        "sd": sd,
        "median": float(numpy.median(array)),
        "min": float(array.min()),
        "max": float(array.max()),
        "values": [float(v) for v in array],
    }


def show(stats: dict[str, Any], digits: int = 3) -> str:
    """``mean ± SD`` for a criterion's text."""
    return f"{stats['mean']:.{digits}g} ± {stats['sd']:.2g}"


def environment() -> dict[str, Any]:
    """Versions, machine, threads and commit under which a result was made."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip() or None,
    }


def plain(value: Any) -> Any:
    """The value as written to the file. JSON has no infinity: infinite and undefined numbers become "inf", "nan"."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, (numpy.generic, numpy.ndarray)):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_result(record: dict[str, Any], path: Path) -> None:
    """Write one result as strict JSON (no NaN, no Infinity)."""
    write_json(path, plain(record))
