"""Newton-Schulz against its own matrix products, timed in turn on the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muon_dist.bench.machine import markdown
from muon_dist.errors import ConfigError
from muon_dist.numerics import newton_schulz, newton_schulz_flops, polar_factor, segment_length
from muon_dist.numerics.iteration import matrices_at_once
from muon_dist.numerics.newton_schulz import newton_schulz_
from muon_dist.numerics.schedules import DEFAULT_STEPS

Shape = tuple[int, int, int]
"""(batch, rows, columns)"""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# Matrices of Llamas of 24M, 60M and 160M parameters, of DeepSeek's experts cut down, and batches of small ones (heads,
# experts), where calls and elementwise work take the largest share.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "ci": ((1, 48, 96), (4, 32, 32)),
    "quick": ((1, 384, 384), (12, 384, 384), (1, 1024, 384), (4, 1024, 384), (1, 768, 2048), (64, 64, 384),
              (128, 64, 64), (64, 128, 128)),
    "full": ((1, 384, 384), (24, 384, 384), (1, 1024, 384), (12, 1024, 384), (1, 384, 1024), (1, 512, 512),
             (1, 1376, 512), (8, 1376, 512), (1, 768, 768), (1, 768, 2048), (1, 2048, 768), (1, 1024, 4096),
             (1, 1024, 1024), (1, 2048, 2048), (16, 64, 384), (64, 64, 384), (128, 64, 64), (64, 128, 128),
             (32, 128, 512), (16, 256, 256), (16, 256, 768), (256, 32, 32)),
    "gpu": ((1, 1024, 1024), (24, 1024, 1024), (1, 2048, 2048), (8, 2048, 2048), (8, 2048, 5632), (8, 5632, 2048),
            (1, 4096, 4096), (4, 4096, 4096), (2, 4096, 11008), (64, 128, 128), (256, 128, 512)),
}  # fmt: skip
_ALL = ("float32", "bfloat16", "float16")
PROFILE_DTYPES = {"ci": ("float32",), "quick": ("float32", "bfloat16"), "full": _ALL, "gpu": _ALL}
# Side of the square product whose speed is taken as the peak of the machine.
_LARGEST = {
    "ci": 256,
    "quick": 2048,
    "full": 2048,
    "gpu": 8192,
}
_SVD_LIMIT = 1024  # if the shorter side is larger than this, the exact factor takes minutes


@dataclass(frozen=True)
class Timing:
    """Seconds per call, over rounds."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def bare_products(x: Tensor, steps: int, segment: int, at_once: int) -> Callable[[], None]:
    """A function that computes only the matrix products of `newton_schulz` for the stack `x` of norm 1.

    They have the same order, memory layout (for a tall X: X^T X and X Q) and batch size, and write into outputs that
    are allocated here. A segment of k steps is X X^T, k times A^2, three products of that size for each step after the
    first, and Q X; their FLOPs are `newton_schulz_flops`. The outputs are not read: powers of powers would soon be
    subnormal numbers, which take longer.
    """
    count, m, n = x.shape
    tall = m > n
    square = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
    product, other = torch.empty_like(square[:at_once]), torch.empty_like(x[:at_once])
    lengths = [min(segment, steps - first) for first in range(0, steps, segment)]

    def call() -> None:
        for first in range(0, count, at_once):
            part, a = x[first : first + at_once], square[first : first + at_once]
            of_side, of_x = product[: len(part)], other[: len(part)]
            for length in lengths:
                torch.bmm(*((part.mT, part) if tall else (part, part.mT)), out=of_side)
                for _ in range(4 * length - 3):
                    torch.bmm(a, a, out=of_side)
                torch.bmm(*((part, a) if tall else (a, part)), out=of_x)

    return call


def _square_product(side: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    left, right, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    return lambda: torch.mm(left, right, out=out)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(calls: Sequence[Callable[[], object]], rounds: int, seconds: float, device: torch.device) -> list[Timing]:
    """Time `calls` one after another, `rounds` times, so that other load on the machine affects all of them.

    In a round each call is repeated until it has taken about `seconds`, at least once; the first round warms up and is
    not timed. With one CPU thread, the thread's CPU time is measured, so that other processes do not count.
    """
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def timed(call: Callable[[], object], repeats: int) -> float:
        _synchronize(device)
        started = clock()
        for _ in range(repeats):
            call()
        _synchronize(device)
        return (clock() - started) / repeats

    repeats = []
    for call in calls:
        timed(call, 1)
        repeats.append(max(1, min(1000, round(seconds / max(timed(call, 1), 1e-7)))))
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for i, call in enumerate(calls):
            found[i].append(timed(call, repeats[i]))
    return [Timing(tuple(f)) for f in found]


def _relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def measure(
    shape: Shape, dtype: torch.dtype, largest: Callable[[], object], largest_flops: int, device: torch.device,
    *, rounds: int, seconds: float, steps: int = DEFAULT_STEPS, schedule: str = "keller",
) -> dict[str, Any]:  # fmt: skip
    """One row: time, FLOP/s, the products' FLOP/s, their ratio, and errors, for a random stack of `shape`.

    `ratio_of_products` is the median over rounds of (seconds of `bare_products`) / (seconds of Newton-Schulz): the
    reached share of the machine's matmul throughput on the same shapes.
    """
    batch, rows, cols = shape
    segment = segment_length(rows, cols, dtype)
    flops = batch * newton_schulz_flops(rows, cols, steps, segment)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(rows * cols)).to(device)
    result = newton_schulz(x, steps, schedule, dtype)
    exact = newton_schulz(x.double(), steps, schedule, torch.float64)
    polar = polar_factor(x.cpu()) if min(rows, cols) <= _SVD_LIMIT else None
    x = x.to(dtype)
    at_once = matrices_at_once(batch, rows, cols, segment, dtype, device)
    stack = x.clone()  # orthogonalized again and again, in place as in a step: that takes as long as the first time
    bare = bare_products(x / torch.linalg.matrix_norm(x, keepdim=True), steps, segment, at_once)
    ours, square, matmul = in_turn(
        [lambda: newton_schulz_(stack, steps, schedule, dtype), largest, bare], rounds, seconds, device
    )
    ratios = [m / o for m, o in zip(matmul.rounds, ours.rounds, strict=True)]
    return {
        "batch": batch,
        "rows": rows,
        "cols": cols,
        "dtype": str(dtype).removeprefix("torch."),
        "form": "gram" if segment > 1 else "standard",
        "seconds": ours.median,
        "seconds_lowest": min(ours.rounds),
        "seconds_highest": max(ours.rounds),
        "flops": flops,
        "flops_per_second": flops / ours.median,
        "matmul_flops_per_second": flops / matmul.median,
        "largest_square_flops_per_second": largest_flops / square.median,
        "ratio_of_products": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "ratio_of_largest_square": flops / ours.median / (largest_flops / square.median),
        "error_to_float64": _relative(result.cpu(), exact.cpu()),
        "error_to_svd": None if polar is None else _relative(result.cpu(), polar),
        "float64_error_to_svd": None if polar is None else _relative(exact.cpu(), polar),
    }


def run(profile: str, dtypes: Sequence[str] | None, only: str, device: torch.device) -> list[dict[str, Any]]:
    """Rows of all shapes of `profile` whose name (`4x1024x384`) contains `only`.

    Raises ConfigError for an unknown profile or dtype, or if no shape is left.
    """
    if profile not in SHAPES:
        raise ConfigError(f"--profile {profile!r} is unknown: use {', '.join(SHAPES)}")
    names = tuple(dtypes or PROFILE_DTYPES[profile])
    if unknown := sorted(set(names) - set(DTYPES)):
        raise ConfigError(f"--dtype {unknown[0]!r} is unknown: use {', '.join(DTYPES)}")
    shapes = [s for s in SHAPES[profile] if only in "x".join(map(str, s))]
    if not shapes:
        raise ConfigError(f"--only {only!r}: no shape of profile {profile} has that in its name")
    rounds, seconds = {"ci": (3, 0.002), "quick": (5, 0.03), "full": (7, 0.1), "gpu": (5, 0.05)}[profile]
    side = _LARGEST[profile]
    rows = []
    for name in names:
        dtype = DTYPES[name]
        largest = _square_product(side, dtype, device)
        rows += [measure(s, dtype, largest, 2 * side**3, device, rounds=rounds, seconds=seconds) for s in shapes]
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown of the rows."""
    header = (
        "shape (batch x rows x columns)", "dtype", "form", "ms", "GFLOP/s", "the same products, GFLOP/s", "ratio",
        "lowest to highest ratio", "of the largest square product", "error to fp64", "error to SVD (fp64 itself)",
    )  # fmt: skip
    lines = [
        (
            f"{r['batch']} x {r['rows']} x {r['cols']}",
            r["dtype"],
            r["form"],
            f"{1e3 * r['seconds']:.2f}",
            f"{r['flops_per_second'] / 1e9:.1f}",
            f"{r['matmul_flops_per_second'] / 1e9:.1f}",
            f"{r['ratio_of_products']:.2f}",
            f"{r['ratio_lowest']:.2f} to {r['ratio_highest']:.2f}",
            f"{r['ratio_of_largest_square']:.2f}",
            f"{r['error_to_float64']:.1e}",
            "-" if r["error_to_svd"] is None else f"{r['error_to_svd']:.3f} ({r['float64_error_to_svd']:.3f})",
        )
        for r in rows
    ]
    return markdown(header, lines)
