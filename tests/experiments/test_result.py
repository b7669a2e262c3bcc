"""Verdicts follow from criteria; result files are strict JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from muon_dist.experiments.result import Criterion, result, summary, verdict, write_result
from muon_dist.json_files import read_object


def criterion(name: str, passed: bool, central: bool = True) -> Criterion:
    return Criterion(name, 1.0, "> 0", passed, central=central)


@dataclass(frozen=True)
class Config:
    size: int = 3


def test_verdicts():
    assert verdict([criterion("a", True), criterion("b", True, central=False)]) == "holds"
    assert verdict([criterion("a", True), criterion("b", False)]) == 'holds in part: all but "b"'
    assert verdict([criterion("a", True), criterion("b", False, central=False)]) == 'holds in part: all but "b"'
    assert verdict([criterion("a", False), criterion("b", True, central=False)]).startswith("contradicted")
    assert verdict([criterion("a", False)]) == 'contradicted: "a"'
    with pytest.raises(ValueError, match="criterion"):
        verdict([])


def test_summary():
    stats = summary([1.0, 2.0, 6.0])
    assert (stats["mean"], stats["median"], stats["min"], stats["max"]) == (3.0, 2.0, 1.0, 6.0)
    assert stats["sd"] == pytest.approx(7**0.5)
    assert summary([4.0])["sd"] == 0.0
    assert summary([1.0, float("inf")])["mean"] == float("inf")


def test_file_is_strict_json_and_read_back(tmp_path):
    record = result("E0", "t", "c", Config(), [criterion("a", True)], {"x": float("inf"), "y": [float("nan"), 1.5]})
    write_result(record, tmp_path / "deep" / "E0.json")
    text = (tmp_path / "deep" / "E0.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    loaded = json.loads(text, parse_constant=refuse)
    assert loaded["data"] == {"x": "inf", "y": ["nan", 1.5]}
    assert loaded["config"] == {"size": 3}
    assert read_object(tmp_path / "deep" / "E0.json") == loaded
