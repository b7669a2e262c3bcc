"""Deliberate differences between published Muons: coefficients, precision, factors of the update.

None of these is a fault. The witness finds out which of them an optimizer uses, and measures the distance from the
same rule in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from muon_dist.audit.cause import Cause, Kind
from muon_dist.numerics.schedules import SCHEDULES, Row

# Polar Express with another safety factor (1.02, five rows, no limit row): nanochat, modded-nanogpt, dion.
_POLAR_EXPRESS_102 = (
    (8.156555, -22.483293, 15.878770),
    (4.042930, -2.808917, 0.500018),
    (3.891668, -2.772484, 0.506065),
    (3.285754, -2.368129, 0.464490),
    (2.346541, -1.709783, 0.423236),
)
HALVES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Iteration:
    """A Newton-Schulz iteration.

    Attributes:
        name: name of its coefficients.
        rows: (a, b, c) of every step.
        safety: the input is divided by its Frobenius norm, and by this number.
        aol: first divide the rows by sums of the Gram matrix (arXiv 2512.04632).
        dtype: "fp64" stands for fp32 and better; or "bf16", "fp16".
        fused: True: a step's sums are rounded once, as `addmm` and compilers do. False: each operation is rounded, as
            in plain PyTorch code; the result is then two to four times as far from fp64.
        epsilon: added to the Frobenius norm.
    """

    name: str
    rows: tuple[Row, ...]
    safety: float = 1.0
    aol: bool = False
    dtype: str = "fp64"
    fused: bool = True
    epsilon: float = 0.0

    def in_dtype(self, dtype: str, fused: bool = True) -> Iteration:
        return replace(self, dtype=dtype, fused=fused)

    def __call__(self, x: Tensor) -> Tensor:
        """The orthogonalized (rows, columns) matrix, in fp64. 16-bit products are summed in fp32, as in hardware."""
        if x.size(0) > x.size(1):
            return self(x.mT).mT
        norm = float(x.norm())
        x = x.double() / (norm + self.epsilon) if norm > 0 else x.double()
        if self.aol:
            x = x / (x @ x.mT).abs().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-300)
        x = x / self.safety
        half = HALVES.get(self.dtype)

        def rounded(t: Tensor) -> Tensor:
            return t if half is None else t.to(half).float()

        def term(t: Tensor) -> Tensor:
            return t if self.fused else rounded(t)

        x = rounded(x)
        for a, b, c in self.rows:
            gram = rounded(x @ x.mT)
            inner = rounded(term(b * gram) + term(c * term(gram @ gram)))
            x = rounded(term(a * x) + term(inner @ x))
        return x.double()


def named(name: str, steps: int = 5) -> Iteration:
    """The iteration of a schedule in `numerics.SCHEDULES`, or of "polar_express_102". A fixed length runs whole."""
    if name == "polar_express_102":
        return Iteration(name, _POLAR_EXPRESS_102[:steps], safety=1.02)
    schedule = SCHEDULES[name]
    rows = schedule.rows if schedule.tail is None else schedule.coefficients(steps)
    return Iteration(name, rows, schedule.safety, schedule.normalization == "aol")


VARIANTS = (("fp64", True), ("fp16", True), ("bf16", True), ("bf16", False))
"""Pairs (dtype, fused) that are tried for an iteration."""
EPSILON, FAINT = 1e-7, 1e-4
"""The number that most implementations add to the Frobenius norm, and the norm below which it has an effect."""


def choices(iteration: Iteration, asked: Iteration | None, norm: float) -> list[Cause]:
    """The choices that an iteration shows, compared with `asked`, or with Keller Jordan's iteration if that is None.

    norm: norm of its smallest input matrix.
    """
    found = []
    expected = asked or named("keller")
    if iteration.rows != expected.rows:
        found.append(Cause("coefficients", f"coefficients: {iteration.name}", "choice"))
    if iteration.epsilon:
        kind: Kind = "fault" if norm < 20 * iteration.epsilon else "choice"
        what = f"a gradient of norm {norm:.1g} is shortened by the iteration's epsilon of {iteration.epsilon:.0e}"
        found.append(Cause("epsilon", what, kind))
    if iteration.dtype in HALVES:
        found.append(Cause("precision", f"Newton-Schulz runs in {iteration.dtype}", "choice"))
    return found


def known_iterations() -> tuple[Iteration, ...]:
    """All known sets of coefficients with five steps, then Keller Jordan's with other numbers of steps."""
    names = ("keller", "polar_express_102", *(n for n in SCHEDULES if n not in ("keller", "strict")))
    others = (6, 4, 8, 3, 10)
    return (*(named(n) for n in names), *(replace(named("keller", s), name=f"keller, {s} steps") for s in others))


SCALES: Mapping[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda out, fan_in: 0.2 * math.sqrt(max(out, fan_in)),
    "spectral": lambda out, fan_in: math.sqrt(max(1.0, out / fan_in)),
    "none": lambda out, fan_in: 1.0,
    "rms_to_rms": lambda out, fan_in: math.sqrt(out / fan_in),
    "max": lambda out, fan_in: math.sqrt(max(out, fan_in)),
}
"""Factors on an (out, in) update by name. match_rms_adamw: Moonlight (arXiv 2502.16982). spectral: Keller Jordan's.
rms_to_rms: modular norm theory, dion's "spectral_norm". max: Megatron's "spectral"."""
