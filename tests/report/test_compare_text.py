"""`muon-dist compare RUN RUN ...`: runs that differ in more than their settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from muon_dist.errors import ConfigError, DataError
from muon_dist.report.compare_text import WIDEST, compare_runs
from muon_dist.train.compare import compare

METRICS = '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0, "eval_loss": 2.5}\n'


def a_run(folder: Path, config: str | None, metrics: str = METRICS) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(metrics)
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


def rows(text: str) -> dict[str, list[str]]:
    return {line.split("  ")[0]: line.split()[1:] for line in text.splitlines()}


def test_a_run_without_its_settings_is_no_difference_in_all_of_them(tmp_path: Path) -> None:
    one = a_run(tmp_path / "one", "name: one\nseed: 1\nmodel: {a: 1}\n")
    two = a_run(tmp_path / "two", "name: two\nseed: 2\nmodel: {a: 1}\n")
    bare = a_run(tmp_path / "bare", None)
    text = compare_runs([one, bare, f"{two}/"])
    assert rows(text)["seed"] == ["1", "?", "2"] and "model.a" not in text
    assert text.splitlines()[-1] == f"{bare}: config.yaml is missing: settings are not shown."
    text = compare_runs([one, bare])
    assert "differ" not in text and "seed" not in text and "all at step 2" in text


def test_long_values_do_not_push_columns_off_the_screen(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / n, f"name: {n}\ndata: [{', '.join([n] * 99)}]\n") for n in "ab"]
    assert max(map(len, compare_runs(runs).splitlines())) < 2 * WIDEST + 40


def test_what_is_no_second_run(tmp_path: Path) -> None:
    one = a_run(tmp_path / "one", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="two or more run folders, each once"):
        compare_runs([one, f"{one}/../one/"])
    with pytest.raises(DataError, match="empty: not a run folder"):
        compare_runs([one, tmp_path / "empty"])
    with pytest.raises(ConfigError, match="seed=3: settings belong to a configuration"):
        compare(one, ["seed=3"], lrs=None, seeds=1, jobs=1, output=tmp_path)
