"""The numerics study: exact cases, its files, and its paragraph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from muon_dist.errors import DataError
from muon_dist.experiments import newton_schulz_study as study
from muon_dist.experiments.quadratics import with_spectrum
from muon_dist.numerics import SCHEDULES

TINY = replace(
    study.PROFILES["quick"], shape=(8, 16), steps=(1, 5), dtypes=("float32", "bfloat16"), conditions=(1e2, 1e4)
)


@pytest.fixture
def momentum(tmp_path):
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "momentum.pt"
    study.save_momentum({"a": torch.randn(8, 12, generator=generator), "b": torch.randn(12, 8)}, path)
    return path


def test_every_combination_exists_once():
    found = study.combinations((5, 6), ("float32", "bfloat16"))
    assert len(found) == len(set(found)) and {name for name, _, _ in found} == set(SCHEDULES)
    assert [c for c in found if c[0] == "strict"] == [("strict", 6, "float32")]


def test_an_orthogonal_matrix_is_left_alone():
    g = with_spectrum(torch.ones(1, 6, dtype=torch.float64), 9, torch.Generator().manual_seed(0))[0]
    found = study.measure(study.Spectrum.of(g), "cubic", 12, "float32")
    assert (found["low"], found["high"]) == pytest.approx((1.0, 1.0), abs=1e-4)
    assert found["cosine"] == pytest.approx(1.0) and found["polar_error"] < 1e-4


def test_stable_ratio_is_its_formula():
    g = torch.randn(6, 10, generator=torch.Generator().manual_seed(1)).double()
    spectrum = study.Spectrum.of(g)
    found = study.measure(spectrum, "keller", 5, "float32")
    x = spectrum.values / spectrum.values.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    expected = float((spectrum.values * x).sum() / x.square().sum() / spectrum.values.mean())
    assert found["stable_ratio"] == pytest.approx(expected, rel=1e-4)
    assert (found["low"], found["high"]) == pytest.approx((float(x.min()), float(x.max())), rel=1e-3)


def test_overflow_is_reported_not_averaged():
    assert study._aggregate([{"finite": False}, {"finite": False}]) == {"overflowed": 2}


def test_keller_band():
    low, high = study.keller_band(points=20_001)
    assert (low, high) == pytest.approx((0.680, 1.2024), abs=1e-3)


def test_study_runs_on_a_momentum_file(momentum):
    record = study.run(replace(TINY, momentum=str(momentum)))
    assert record["experiment"] == "NS" and set(record["data"]["momentum"]) == {"a", "b"}
    strict = [c for c in record["criteria"] if c["name"].startswith("strict (")]
    assert strict[0]["passed"] and strict[0]["measured"] < 0.01
    paragraph = record["notes"][0]
    assert "2 momentum matrices" in paragraph and "within 0.01 of 1 in" in paragraph


@pytest.mark.parametrize("content", [{}, [1], {"a": torch.zeros(2, 2)}, {"a": torch.ones(3)}, {"a": 5}])
def test_bad_momentum_is_named(tmp_path, content: Any):
    path = tmp_path / "bad.pt"
    torch.save(content, path)
    with pytest.raises(DataError, match=r"bad\.pt"):
        study.load_momentum(path)


def test_momentum_file_that_is_no_file_of_tensors(tmp_path):
    path = tmp_path / "text.pt"
    path.write_text("not a pickle")
    with pytest.raises(DataError, match=r"text\.pt"):
        study.load_momentum(path)
