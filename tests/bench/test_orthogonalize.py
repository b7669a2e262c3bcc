from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from muon_dist.bench import orthogonalize
from muon_dist.errors import ConfigError
from muon_dist.numerics import newton_schulz, newton_schulz_flops, segment_length


@pytest.mark.parametrize("segment", [1, 3])
@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 8, 20), (5, 20, 8)])
def test_the_bare_products_have_the_flops_of_the_iteration(shape: tuple[int, int, int], segment: int) -> None:
    """Also where the last chunk is shorter."""
    bare = orthogonalize.bare_products(torch.ones(shape), 5, segment, at_once=2)
    with FlopCounterMode(display=False) as counter:
        bare()
    assert counter.get_total_flops() == 5 * newton_schulz_flops(*shape[1:], 5, segment)


def test_newton_schulz_makes_the_products_that_it_is_compared_with() -> None:
    for rows, cols in ((8, 8), (8, 20), (20, 8)):
        with FlopCounterMode(display=False) as counter:
            newton_schulz(torch.ones(5, rows, cols), dtype=torch.float32)
        flops = newton_schulz_flops(rows, cols, 5, segment_length(rows, cols, torch.float32))
        assert counter.get_total_flops() == 5 * flops


def test_in_turn_calls_everything_in_every_round() -> None:
    order: list[str] = []
    timings = orthogonalize.in_turn(
        [lambda: order.append("a"), lambda: order.append("b")], 3, 0.0, torch.device("cpu")
    )
    assert "".join(order) == "aabb" + "ab" * 3  # twice each before the rounds
    assert [len(t.rounds) for t in timings] == [3, 3]


def test_rows_of_the_smallest_profile() -> None:
    rows = orthogonalize.run("ci", None, "", torch.device("cpu"))
    assert [(r["batch"], r["rows"], r["cols"]) for r in rows] == list(orthogonalize.SHAPES["ci"])
    for row in rows:
        assert row["flops_per_second"] * row["seconds"] == pytest.approx(row["flops"])
        assert row["ratio_lowest"] <= row["ratio_of_products"] <= row["ratio_highest"]
        assert 0 < row["ratio_of_products"] and math.isfinite(row["ratio_of_largest_square"])
        assert row["error_to_float64"] < 1e-4  # fp32; Keller's coefficients leave singular values between 0.7 and 1.2
        assert 0.05 < row["error_to_svd"] < 0.4
        assert row["error_to_svd"] == pytest.approx(row["float64_error_to_svd"], abs=1e-4)
    text = orthogonalize.table(rows)
    assert len(text.splitlines()) == 2 + len(rows)
    assert "4 x 32 x 32" in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("huge", None, ""), "huge"), (("ci", ["int8"], ""), "int8"), (("ci", None, "9x9"), "9x9")],
)
def test_what_selects_nothing_is_named(arguments: tuple, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        orthogonalize.run(*arguments, torch.device("cpu"))
