"""Spectral measures of a live run, taken by the owner of each matrix while it holds the whole matrix."""

from __future__ import annotations

import inspect
import math
import re
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from muon_dist.defaults import DIAGNOSTICS_BUDGET
from muon_dist.errors import ConfigError
from muon_dist.json_files import append_line, keep_lines, strict
from muon_dist.layout import Matrix
from muon_dist.numerics.spectral_gram import gram_spectral_stats
from muon_dist.optim.rules.entries import refuse_unknown

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def place(name: str) -> tuple[int | None, str]:
    """Layer and type of a matrix: "model.layers.3.mlp.up_proj.weight" -> (3, "mlp.up_proj").

    The layer is the first integer among the parts of the name, None if there is none. The type is the rest of the name
    after the layer, or before it if nothing follows, without ".weight" and with "*" for the index of a head or expert
    ("mlp.experts.*.up_proj").
    """
    stem = name.partition("[")[0].removesuffix(".weight")
    found = _LAYER.search(stem)
    if found is None:
        return None, stem
    return int(found.group(1)), _NUMBER.sub("*", stem[found.end() :]) or stem[: found.start()] or "matrix"


class Diagnostics:
    """Measures every matrix that this rank owns once per `every` steps: one JSON line per matrix, no communication.

    The owner has just gathered the momentum and computed the update, so it holds both. Each rank writes its own file;
    readers merge the files. A round of measures starts at the first step and at every multiple of `every`. A costly
    round takes several steps: measuring pauses while it has taken more than `budget` of the time since the first step.

    Args:
        every: steps from one round to the next.
        folder: folder of `rank-R.jsonl`; created with the first line. None: the measures are kept only in `latest`.
        budget: largest share of the time that measuring may take, per rank; 1 for no bound.

    Attributes:
        latest: the newest record of each matrix that this rank owns, by name.
        seconds: time spent on measuring since the start.

    Raises:
        ConfigError: `every` or `budget` out of range.
    """

    def __init__(self, every: int, folder: str | Path | None = None, *, budget: float = DIAGNOSTICS_BUDGET) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"diagnostics: every is {every!r}; it must be a whole number of steps, 1 or more")
        if not 0 < budget <= 1:
            raise ConfigError(f"diagnostics: budget is {budget}; it is a share of the time, above 0 and up to 1")
        self.every = every
        self.budget = budget
        self.folder = Path(folder) if folder is not None else None
        self.latest: dict[str, dict[str, Any]] = {}
        self.seconds = 0.0
        self._owned: tuple[str, ...] = ()
        self._began = math.inf
        self._writable = True
        self._count_from(0)

    @classmethod
    def of(cls, given: Diagnostics | Mapping[str, Any] | None) -> Diagnostics | None:
        """The argument `diagnostics` of `Muon` as an object. Raises ConfigError for a setting that does not exist."""
        if given is None or isinstance(given, Diagnostics):
            return given
        if not isinstance(given, Mapping) or "every" not in given:
            raise ConfigError(f'diagnostics is {given!r}: give a dict such as {{"every": 100}}, or a Diagnostics')
        refuse_unknown(given, inspect.signature(cls).parameters, "diagnostics", {})
        return cls(**given)

    @property
    def path(self) -> Path | None:
        """The file of this rank."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return self.folder / f"rank-{rank}.jsonl" if self.folder is not None else None

    def start(self, step: int) -> None:
        """Count from `step` on: the next optimizer step is `step + 1`. Local.

        Deletes lines of later steps, which an earlier run wrote. Rank 0 also does so in files of ranks that this run
        does not have.
        """
        self._count_from(step)
        if self.path is None or not self.path.parent.is_dir():
            return
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        foreign = [p for p in self.path.parent.glob("rank-*.jsonl") if _rank_of(p) >= world]
        for path in [self.path, *(foreign if self.path.name == "rank-0.jsonl" else [])]:
            _keep_until(path, step)

    def _count_from(self, step: int) -> None:
        self._seen: set[str] = set()
        self._pending: set[str] = set()
        self._step = self._first = self._round = self._next = step + 1

    def begin(self, owned: Iterable[str]) -> None:
        """Set the names of the matrices that this rank owns: every step calls `observe` with each."""
        self._owned = tuple(owned)
        self._began = time.perf_counter()

    def observe(self, matrix: Matrix, momentum: torch.Tensor, update: torch.Tensor) -> None:
        """Note one orthogonalized matrix and measure it when it is due. momentum, update: (rows, cols)."""
        if matrix.name in self._seen:  # the same matrix again: a new step has begun
            # A matrix without a gradient is not stepped: do not wait for it.
            self._pending &= self._seen
            self._seen.clear()
            self._step += 1
        self._seen.add(matrix.name)
        if not self._pending and self._step >= self._next:
            self._pending = set(self._owned)
            # The same number on every rank, even if a rank starts the round later.
            self._round = max(self._step // self.every * self.every, self._first)
            self._next = (self._step // self.every + 1) * self.every
        if matrix.name not in self._pending:
            return
        now = time.perf_counter()
        if self.seconds >= self.budget * (now - self._began):
            return
        if momentum.device.type != "cpu":
            torch.accelerator.synchronize()  # do not count the time of work that was queued before
            now = time.perf_counter()
        self._pending.discard(matrix.name)
        self._write(self._record(matrix, momentum, update))
        self.seconds += time.perf_counter() - now

    def _record(self, matrix: Matrix, momentum: torch.Tensor, update: torch.Tensor) -> dict[str, Any]:
        layer, kind = place(matrix.name)
        measures = asdict(gram_spectral_stats(momentum, update))
        record = {
            "step": self._step,
            "round": self._round,
            "matrix": matrix.name,
            "layer": layer,
            "type": kind,
            "rows": matrix.rows,
            "cols": matrix.cols,
            **strict(measures),
        }
        self.latest[matrix.name] = record
        return record

    def _write(self, record: dict[str, Any]) -> None:
        path = self.path
        if path is None or not self._writable:
            return
        try:
            append_line(path, record)
        except OSError as error:
            # If only this rank raised, the others would wait forever in a collective.
            self._writable = False
            print(f"diagnostics: cannot write {path}: {error}; this rank goes on without the file", file=sys.stderr)

    def means(self, names: Iterable[str] = ("flatness", "nuclear_rank_ratio", "cosine")) -> dict[str, float]:
        """The mean of some measures over the newest records of this rank's matrices; {} without records."""
        out = {}
        for name in names:
            values = [r[name] for r in self.latest.values() if r[name] is not None]
            if values:
                out[name] = sum(values) / len(values)
        return out


def _rank_of(path: Path) -> int:
    text = path.stem.removeprefix("rank-")
    return int(text) if text.isdigit() else -1


def _keep_until(path: Path, step: int) -> None:
    """Delete the lines of later steps than `step`; delete the file if no line is left."""
    keep_lines(path, lambda line: isinstance(line.get("step"), int) and line["step"] <= step)
    if path.exists() and path.stat().st_size == 0:
        path.unlink()
