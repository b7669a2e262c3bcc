"""Coefficient schedules of the Newton-Schulz iteration X <- a X + b (X X^T) X + c (X X^T)^2 X.

Every step maps each singular value x to a x + b x^3 + c x^5. A schedule defines the (a, b, c) of each step, the
normalization to a spectral norm below 1, and the steps beyond the end of its table. Each table has its source.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from muon_dist.errors import ConfigError

Row = tuple[float, float, float]
ScheduleLike = str | Sequence[Sequence[float]]
"""The name of a schedule, or custom rows [[a, b, c], ...], one per step."""
Normalization = Literal["frobenius", "aol"]

DEFAULT_STEPS = 5


@dataclass(frozen=True)
class Schedule:
    """One coefficient schedule.

    `rows`: (a, b, c) of steps 1, 2, ... `tail`: the row of every later step, or None for a schedule of fixed length,
    which always runs whole. `normalization`: normalization of the input to a spectral norm of at most 1 (see
    `iteration.normalize`). `safety`: the input is also divided by this number. `fp32_only`: low precision is refused.
    `source`: source of the rows.
    """

    name: str
    rows: tuple[Row, ...]
    tail: Row | None
    source: str
    safety: float = 1.0
    normalization: Normalization = "frobenius"
    fp32_only: bool = False

    def __post_init__(self) -> None:
        assert self.rows and self.safety >= 1.0

    @property
    def fixed_length(self) -> int | None:
        """Number of steps of a schedule that always runs whole; None if `steps` determines the number."""
        return len(self.rows) if self.tail is None else None

    def coefficients(self, steps: int = DEFAULT_STEPS) -> tuple[Row, ...]:
        """The rows of a run of `steps` steps.

        Raises:
            ConfigError: `steps` is not a positive integer; or this schedule has a fixed length and `steps` is neither
                that length nor the default of 5, which means that the user set none.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ConfigError(f"ns_steps must be a positive integer, got {steps!r}")
        if self.tail is None:
            if steps not in (DEFAULT_STEPS, len(self.rows)):
                raise ConfigError(
                    f"ns_steps={steps} does not fit ns_schedule={self.name!r}, which always runs its {len(self.rows)} "
                    f"steps: leave ns_steps out, set it to {len(self.rows)}, or choose an open-ended schedule "
                    f"({', '.join(name for name, s in SCHEDULES.items() if s.tail is not None)})"
                )
            return self.rows
        return self.rows[:steps] + (self.tail,) * (steps - len(self.rows))


def _rescaled(rows: tuple[Row, ...], safety: float) -> tuple[Row, ...]:
    """The rows of the polynomials p(x / safety), which are bounded on an interval `safety` times as long."""
    return tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in rows)


# Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024), and torch.optim.Muon: the steepest
# slope at zero for which [0, 1] stays bounded. Its fixed points are 0.868 (repelling) and 1.264: it does not converge,
# but ends in the band [0.68, 1.21].
_KELLER: Row = (3.4445, -4.7750, 2.0315)

# Pade quintic: the Taylor coefficients of (1 - e)^(-1/2), e = 1 - x^2, to second order. Cubic convergence to 1 from
# everywhere in (0, sqrt(7/3)). Bjorck and Bowie (1971); Higham, "Functions of Matrices" (2008), chapter 8.
_PADE: Row = (15 / 8, -10 / 8, 3 / 8)

# The same to first order: the classical Newton-Schulz iteration.
_CUBIC: Row = (1.5, -0.5, 0.0)

# The last two steps of DeepSeek-V4 (technical report, 2026): slope 0 at x = 1, so quadratic convergence (curvature 1,
# from above), and slope 2 at zero.
_DEEPSEEK_CLOSING: Row = (2.0, -1.5, 0.5)

# Amsel, Persson, Musco, Gower, "The Polar Express" (arXiv 2505.16932), Algorithm 1, full precision, l = 1e-3. The
# limit row is the Pade quintic. "Safety": every row except the limit is p(x / 1.01) and X is normalised by
# 1.01 ||X||_F, so that rounding in bf16 stays inside the interval on which the next polynomial is bounded.
_POLAR_EXPRESS_SAFETY = 1.01
_POLAR_EXPRESS = _rescaled(
    (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    ),
    _POLAR_EXPRESS_SAFETY,
)

# Grishina, Smirnov, Rakhuba, "Accelerating Newton-Schulz Iteration for Orthogonalization via Chebyshev-type
# Polynomials" (arXiv 2506.10935). Equal-ripple: each polynomial reaches the end of the next one's interval, and 0.2%
# beyond it the next steps diverge (x = 1.002 ends at 1e36). So all except the last are widened by 1%, as in Polar
# Express.
_CANS_SAFETY = 1.01
_CANS_FITTED: tuple[Row, ...] = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)
_CANS = (*_rescaled(_CANS_FITTED[:-1], _CANS_SAFETY), _CANS_FITTED[-1])

# You Jiacheng's five rows, in Franz Cesista, "Squeezing 1-2% Efficiency Gains Out of Muon by Optimizing the
# Newton-Schulz Coefficients" (leloykun.github.io/ponder/muon-opt-coeffs, 2025); "quintic" in Emerging-Optimizers.
_YOU: tuple[Row, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

# Boissin, Massena, Mamalet, Serrurier, "Turbo-Muon" (arXiv 2512.04632; github.com/thib-s/flash-newton-schulz): four
# steps after AOL preconditioning. The first polynomial has a root at x = 0.8837 and is negative beyond it. AOL (or
# Frobenius) normalisation gives a nearly rank-1 matrix a singular value of 1, which would become -1: an update uphill.
# A further division by 1.2 keeps every singular value at or below 0.834, where the sign is right, with a margin of 6%.
_AOL_SAFETY = 1.2
_AOL: tuple[Row, ...] = (
    (4.0098, -7.0585, 2.4635),
    (3.4585, -5.5479, 2.5959),
    (2.7573, -3.2939, 1.4254),
    (2.7215, -3.0494, 1.3169),
)

_CLASSICAL_SOURCE = "Bjorck and Bowie (1971); Higham, Functions of Matrices (2008), chapter 8"
_POLAR_EXPRESS_SOURCE = "arXiv 2505.16932, Algorithm 1"

_SCHEDULES: dict[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        Schedule("keller", (_KELLER,), _KELLER, "Keller Jordan, Muon (2024)"),
        Schedule("polar_express", _POLAR_EXPRESS, _PADE, _POLAR_EXPRESS_SOURCE, safety=_POLAR_EXPRESS_SAFETY),
        # After their tables the singular values are in [0.88, 1.15], where the Pade quintic converges to 1; repeating
        # the last row would only keep them in this band.
        Schedule("cans", _CANS, _PADE, "arXiv 2506.10935", safety=_CANS_SAFETY),
        Schedule("you", _YOU, _PADE, "leloykun.github.io/ponder/muon-opt-coeffs"),
        Schedule("aol", _AOL, None, "arXiv 2512.04632", safety=_AOL_SAFETY, normalization="aol"),
        Schedule("cubic", (_CUBIC,), _CUBIC, _CLASSICAL_SOURCE),
        Schedule("pade", (_PADE,), _PADE, _CLASSICAL_SOURCE),
        Schedule("deepseek_v4", (_KELLER,) * 8 + (_DEEPSEEK_CLOSING,) * 2, None, "DeepSeek-V4 report (2026)"),
        Schedule(
            "strict",
            _POLAR_EXPRESS[:6],
            None,
            f"{_POLAR_EXPRESS_SOURCE}, 6 steps in fp32",
            safety=_POLAR_EXPRESS_SAFETY,
            fp32_only=True,
        ),
    )
}

SCHEDULES: Mapping[str, Schedule] = MappingProxyType(_SCHEDULES)
"""Schedules by name; `register_schedule` adds to them."""


def register_schedule(
    name: str, rows: Sequence[Sequence[float]], *, repeat_last: bool = False, source: str = ""
) -> Schedule:
    """Register a schedule, to be selected by `ns_schedule=name`.

    Args:
        rows: (a, b, c) of each step.
        repeat_last: True: `ns_steps` sets the number of steps, and steps beyond `rows` use the last row. False: the
            schedule always runs whole.
        source: source of the rows, for readers.

    Raises:
        ConfigError: another schedule has this name, or the rows are invalid; see `get_schedule`.
    """
    checked = checked_rows(rows)
    made = Schedule(name, checked, checked[-1] if repeat_last else None, source)
    if SCHEDULES.get(name, made) != made:
        raise ConfigError(f"ns_schedule {name!r} exists already, with other coefficients: choose another name")
    _SCHEDULES[name] = made
    return made


_GRID = tuple(10 ** (-3 * i / 64) for i in range(65))
"""Singular values after normalization, from 0.001 to 1."""
_WORST = 4.0
"""No published schedule leaves [0, 2]. Singular values outside [0, 4] diverge in the next step or point uphill."""


def checked_rows(rows: Sequence[Sequence[float]]) -> tuple[Row, ...]:
    """Checked coefficients of a user, as tuples.

    Raises:
        ConfigError: they are not rows of three finite numbers, or the polynomials do not keep singular values from
            (0, 1] positive and below 4.
    """
    made: list[Row] = []
    for i, row in enumerate(rows):
        numbers = isinstance(row, Sequence) and not isinstance(row, str) and len(row) == 3
        if not numbers or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in row):
            raise ConfigError(f"ns_schedule[{i}] is {row!r}: give three finite numbers a, b, c per step")
        made.append((float(row[0]), float(row[1]), float(row[2])))
    if not made:
        raise ConfigError("ns_schedule is an empty list: give [[a, b, c], ...], one row per step")
    values = _GRID
    for i, (a, b, c) in enumerate(made):
        values = tuple(x * (a + b * x * x + c * x**4) for x in values)
        worst = max(values, key=lambda x: abs(x) if x > 0 else math.inf)
        if not 0 < worst <= _WORST:
            raise ConfigError(
                f"ns_schedule[{i}] = {list(made[i])} changes a singular value in [.001, 1] to {worst:.3g}: every step "
                f"must keep them above 0 and below {_WORST:g}, else the update points uphill or grows without bound"
            )
    return tuple(made)


def get_schedule(name: ScheduleLike) -> Schedule:
    """The schedule with a name, or a schedule of custom rows [[a, b, c], ...], which always runs whole.

    Raises:
        ConfigError: the name is unknown (the message gives the closest name), or the rows are invalid
            (`checked_rows`).
    """
    if isinstance(name, str):
        if name in SCHEDULES:
            return SCHEDULES[name]
    elif isinstance(name, (list, tuple)):
        return _own(checked_rows(name))
    close = difflib.get_close_matches(str(name).lower(), SCHEDULES, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"unknown ns_schedule {name!r}{hint} (one of: {', '.join(SCHEDULES)}; or own rows [[a, b, c], ...])"
    )


@functools.lru_cache(maxsize=64)
def _own(rows: tuple[Row, ...]) -> Schedule:
    return Schedule(f"own ({len(rows)} steps)", rows, None, "given by the user")


def coefficients(schedule: ScheduleLike, steps: int = DEFAULT_STEPS) -> tuple[Row, ...]:
    """The (a, b, c) of every step of `schedule`, for `steps` steps.

    Open-ended schedules (keller, cubic, pade, polar_express, cans, you) run exactly `steps` steps: the first rows of
    their table, and the Pade quintic after its end (keller and cubic repeat their only row). Schedules of fixed length
    (aol 4, deepseek_v4 10, strict 6) and custom rows always run whole. `len()` of the result is the number of steps.

    Raises:
        ConfigError: the schedule is unknown, `steps` is not a positive integer, or does not fit a fixed length.
    """
    return get_schedule(schedule).coefficients(steps)
