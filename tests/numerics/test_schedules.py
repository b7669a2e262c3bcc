"""Coefficient tables: lengths, errors, and how each acts on singular values."""

from __future__ import annotations

import pytest
import torch

from muon_dist.errors import ConfigError
from muon_dist.numerics import SCHEDULES, coefficients

FIXED = {"aol": 4, "deepseek_v4": 10, "strict": 6}
OPEN = sorted(set(SCHEDULES) - set(FIXED))
PADE = (1.875, -1.25, 0.375)


def apply(rows: tuple[tuple[float, float, float], ...], x: torch.Tensor) -> torch.Tensor:
    for a, b, c in rows:
        x = a * x + b * x**3 + c * x**5
    return x


def test_every_schedule_of_the_design_is_there() -> None:
    assert set(SCHEDULES) == {
        "keller", "polar_express", "cans", "you", "aol", "cubic", "pade", "deepseek_v4", "strict"
    }  # fmt: skip
    assert all(schedule.source for schedule in SCHEDULES.values())


@pytest.mark.parametrize("name", OPEN)
@pytest.mark.parametrize("steps", [1, 3, 5, 8, 12])
def test_open_schedules_run_the_steps_asked_for(name: str, steps: int) -> None:
    rows = coefficients(name, steps)
    assert len(rows) == steps
    assert rows == coefficients(name, 20)[:steps]


@pytest.mark.parametrize("name", ["cans", "you", "polar_express", "pade"])
def test_the_tail_is_the_pade_quintic(name: str) -> None:
    assert coefficients(name, 9)[-1] == PADE


@pytest.mark.parametrize(("name", "length"), FIXED.items())
def test_fixed_schedules_run_whole_or_refuse(name: str, length: int) -> None:
    assert len(coefficients(name, 5)) == length
    assert len(coefficients(name, length)) == length
    with pytest.raises(ConfigError, match=rf"ns_steps={length + 3} .*'{name}'.* its {length} steps.*keller"):
        coefficients(name, length + 3)


@pytest.mark.parametrize("steps", [0, -1, True, 2.0, None])
def test_steps_must_be_a_positive_integer(steps: int) -> None:
    with pytest.raises(ConfigError, match="ns_steps must be a positive integer"):
        coefficients("keller", steps)


@pytest.mark.parametrize(
    ("wrong", "closest"), [("keler", "keller"), ("Polar-Express", "polar_express"), ("strikt", "strict")]
)
def test_an_unknown_name_gets_the_closest(wrong: str, closest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown ns_schedule '{wrong}'; did you mean '{closest}'"):
        coefficients(wrong, 5)


def test_polar_express_is_algorithm_1_divided_by_the_safety_factor() -> None:
    rows = coefficients("polar_express", 8)
    assert rows[0] == (8.28721201814563 / 1.01, -23.595886519098837 / 1.01**3, 17.300387312530933 / 1.01**5)
    assert rows[6] == (1.8750014808534479 / 1.01, -1.2500016453999487 / 1.01**3, 0.3750001645474248 / 1.01**5)
    assert rows[7] == PADE
    assert coefficients("strict", 6) == rows[:6]


# Copied from the sources a second time, as printed there: a slip of one digit in either place shows.
PRINTED = {
    "keller": "3.4445 -4.7750 2.0315",
    "cans": "8.4703 -25.1081 18.6293 4.1828 -3.1087 0.5806 3.9619 -2.9541 0.5630 3.2866 -2.4647 0.5074 "
    "2.2737 -1.6447 0.4162",
    "you": "4.0848 -6.8946 2.9270 3.9505 -6.3029 2.6377 3.7418 -5.5913 2.3037 2.8769 -3.1427 1.2046 "
    "2.8366 -3.0525 1.2012",
    "aol": "4.0098 -7.0585 2.4635 3.4585 -5.5479 2.5959 2.7573 -3.2939 1.4254 2.7215 -3.0494 1.3169",
    "deepseek_v4": "3.4445 -4.7750 2.0315 " * 8 + "2.0 -1.5 0.5 " * 2,
    "cubic": "1.5 -0.5 0",
    "pade": "1.875 -1.25 0.375",
}


@pytest.mark.parametrize("name", PRINTED)
def test_the_rows_are_those_of_the_source(name: str) -> None:
    numbers = [float(number) for number in PRINTED[name].split()]
    rows = list(SCHEDULES[name].rows)
    if name == "cans":  # all rows but the last are widened by the safety factor
        s = SCHEDULES[name].safety
        rows[:-1] = [(a * s, b * s**3, c * s**5) for a, b, c in rows[:-1]]
    assert [number for row in rows for number in row] == pytest.approx(numbers, rel=1e-12)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_normalised_singular_values_stay_positive_and_bounded(name: str) -> None:
    """Rounding in bf16 adds up to 2^-8 to a normalised singular value: each stays positive and below 1.3 after it."""
    x = torch.linspace(0, (1 + 2**-8) / SCHEDULES[name].safety, 200_001, dtype=torch.float64)
    y = apply(coefficients(name, 5), x)
    assert y[1:].min() > 0
    assert y.max() < 1.3
    assert y[0] == 0


def test_why_aol_and_cans_need_their_safety_factors() -> None:
    """AOL's published rows turn a singular value of 1 into -1 (uphill); those of CANS diverge 0.2% above 1."""
    one = torch.ones(1, dtype=torch.float64)
    assert apply(coefficients("aol", 4), one) < -0.9
    s = SCHEDULES["cans"].safety
    fitted = tuple((a * s, b * s**3, c * s**5) for a, b, c in coefficients("cans", 4)) + coefficients("cans", 5)[4:]
    assert apply(fitted, 1.002 * one).abs() > 1e6
    assert apply(coefficients("cans", 5), 1.002 * one).abs() < 1.3


@pytest.mark.parametrize("name", ["polar_express", "cans", "you"])
def test_the_tail_converges_to_one_past_the_table(name: str) -> None:
    x = torch.linspace(0.02, 1, 10_001, dtype=torch.float64) / SCHEDULES[name].safety
    worst = [float((apply(coefficients(name, steps), x) - 1).abs().max()) for steps in (5, 6, 8, 9, 10)]
    assert worst == sorted(worst, reverse=True)
    assert worst[-1] < 1e-6
