"""A cost model from stacks timed on this device; the times are cached in a file for later runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from muon_dist.json_files import read_object, write_json
from muon_dist.numerics import ScheduleLike, newton_schulz
from muon_dist.numerics.products import products_for
from muon_dist.ownership.cost import CostModel

_SECONDS = 0.05  # each stack is timed for this long, and at least three times
_MOST_BYTES = 2**30  # largest stack that is timed: of a larger one only a part is timed

Stack = tuple[int, int, int]
"""(short side, long side, matrices) of a stack: its time depends on these."""


@dataclass(frozen=True)
class MeasuredCost(CostModel):
    """Measured seconds per stack: interpolated between measured stack lengths, and proportional beyond them.

    A shape that was not measured gets the time of the analytic model, with the FLOP/s of the measured shape that is
    nearest in size.

    Attributes:
        seconds: ((short side, long side, matrices), seconds), sorted.
    """

    seconds: tuple[tuple[Stack, float], ...] = ()
    _by_shape: dict[tuple[int, int], list[tuple[int, float]]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        for (short, long, count), seconds in sorted(self.seconds):
            self._by_shape.setdefault((short, long), []).append((count, seconds))

    def orthogonalize(
        self, rows: int, cols: int, steps: int, dtype: torch.dtype = torch.float32, count: int = 1
    ) -> float:
        """Seconds of Newton-Schulz on `count` matrices (rows, cols) in one stack. steps: as in the measurement."""
        shape = min(rows, cols), max(rows, cols)
        if shape in self._by_shape:
            return _between(self._by_shape[shape], count)
        analytic = super().orthogonalize(rows, cols, steps, dtype, count)
        if not self._by_shape:
            return analytic
        near = min(self._by_shape, key=lambda s: (abs(s[0] * s[1] - shape[0] * shape[1]), s))
        rate = super().orthogonalize(*near, steps, dtype) / _between(self._by_shape[near], 1)
        return analytic / rate

    def fields(self) -> Iterable[tuple[str, object]]:
        yield from super().fields()
        for stack, seconds in self.seconds:
            yield f"measured seconds of stack {stack}", seconds


def _between(measured: Sequence[tuple[int, float]], count: int) -> float:
    """Seconds of `count` matrices, from measured (matrices, seconds) in rising order."""
    low = max((m for m in measured if m[0] <= count), default=None)
    high = min((m for m in measured if m[0] >= count), default=None)
    if low is None or high is None:
        edge = low or high
        assert edge is not None
        return edge[1] * count / edge[0]
    if low == high:
        return low[1]
    return low[1] + (high[1] - low[1]) * (count - low[0]) / (high[0] - low[0])


def measure(
    stacks: Iterable[Stack],
    *,
    steps: int,
    schedule: ScheduleLike,
    dtype: torch.dtype,
    device: torch.device,
    flops_per_second: float = CostModel.flops_per_second,
    bytes_per_second: float = CostModel.bytes_per_second,
) -> MeasuredCost:
    """The measured cost of `stacks`. Each is timed once per device, dtype, schedule and torch version, then cached.

    The cache is `cache_file(...)`. If it cannot be written, the times are still used.
    """
    path = cache_file(device)
    known = _read(path)
    suffix = f"{str(dtype).removeprefix('torch.')} {schedule} {steps} threads {torch.get_num_threads()}"
    suffix += f" torch {torch.__version__}"
    found: dict[Stack, float] = {}
    changed = False
    for stack in sorted(set(stacks)):
        kernel = products_for(stack[0], stack[1], dtype, device).name
        key = f"{stack[0]}x{stack[1]}x{stack[2]} {kernel} {suffix}"
        if key not in known:
            known[key] = _time(stack, steps, schedule, dtype, device)
            changed = True
        found[stack] = known[key]
    if changed:
        _write(path, known)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # free memory that only the timing needed
    return MeasuredCost(flops_per_second, bytes_per_second, tuple(sorted(found.items())))


def cache_file(device: torch.device) -> Path:
    """The cache file of `device`, in the folder MUON_DIST_CACHE, or by default in the user's cache folder."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    safe = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "muon_dist"
    return Path(os.environ.get("MUON_DIST_CACHE") or default) / f"newton-schulz-{safe}.json"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "cpu"
    lines = [line for line in text.splitlines() if line.startswith(("model name", "flags", "Features"))]
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")
    return f"{model} {hashlib.sha256(''.join(sorted(set(lines))).encode()).hexdigest()[:8]}"


def _read(path: Path) -> dict[str, float]:
    try:
        found = read_object(path)
    except (OSError, ValueError):
        return {}
    return {k: float(v) for k, v in found.items() if isinstance(v, (int, float)) and v > 0}


def _write(path: Path, seconds: Mapping[str, float]) -> None:
    """Write the cache. If two processes write at once, one file wins. If writing fails, each run measures again."""
    with contextlib.suppress(OSError):
        write_json(path, dict(seconds), sort_keys=True)


def _time(stack: Stack, steps: int, schedule: ScheduleLike, dtype: torch.dtype, device: torch.device) -> float:
    """Median seconds of one call."""
    short, long, count = stack
    timed = max(1, min(count, _MOST_BYTES // (4 * short * long)))
    x = torch.randn(timed, short, long, device=device)
    runs: list[float] = []
    newton_schulz(x, steps, schedule, dtype)
    while len(runs) < 3 or sum(runs) < _SECONDS:
        _wait(device)
        start = time.perf_counter()
        newton_schulz(x, steps, schedule, dtype)
        _wait(device)
        runs.append(time.perf_counter() - start)
    return sorted(runs)[len(runs) // 2] * count / timed


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
