"""The fault tests in their two short profiles; `python -m tests.faults --profile full` runs all cases."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.__main__ import main
from tests.faults.bar import BAR
from tests.faults.points_rest import ROOT
from tests.faults.table import Count, as_json, render


def run_profile(profile: str, folder: Path) -> dict[int, dict[str, Any]]:
    """All points, run by the command, because its process is smaller than this one and forks hundreds of times."""
    path = folder / f"{profile}.json"
    command = [sys.executable, "-m", "tests.faults", "--profile", profile, "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert path.exists(), done.stderr[-3000:]
    return {row["number"]: row for row in json.loads(path.read_text())["points"]}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """A few cases of each point."""
    return run_profile("ci", tmp_path_factory.mktemp("faults"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [point.number for point in BAR])
def test_point(rows: dict[int, dict[str, Any]], number: int) -> None:
    assert rows[number]["passed"], rows[number]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_more_cases_of_each_point(tmp_path: Path) -> None:
    rows = run_profile("slow", tmp_path)
    assert [row["number"] for row in rows.values() if row["passed"]] == [point.number for point in BAR], rows


def test_there_are_eighteen() -> None:
    assert [point.number for point in BAR] == list(range(1, 19))


def test_the_command_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "faults.json"
    assert main(["--points", "18", "--json", str(path)]) == 0
    assert main(["--points", "4", "--json", str(path), "--update"]) == 0
    found = json.loads(path.read_text())
    assert [(p["number"], p["passed"]) for p in found["points"]] == [(4, True), (18, True)]
    assert "| 4 | flipped bytes" in capsys.readouterr().out


def test_a_point_that_tried_too_little_has_not_passed() -> None:
    count = Count()
    count.add(True, "")
    assert as_json(1, "x", count, 1, 0.0)["passed"] and not as_json(1, "x", count, 2, 0.0)["passed"]
    count.fail("because")
    row = as_json(1, "x", count, 1, 0.0)
    assert not row["passed"] and row["failures"] == ["because"]
    assert "| 1 | x | 1 / 2 | 0.0 | **no** |" in render([row])
