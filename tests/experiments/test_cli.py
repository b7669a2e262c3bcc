"""`muon-dist spectra`: the files it writes, and its errors."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from muon_dist.errors import ConfigError, DataError
from muon_dist.experiments import newton_schulz_study
from muon_dist.experiments.cli import app
from muon_dist.experiments.registry import EXPERIMENTS, MODULES, profile_config, select

runner = CliRunner()


def test_run_writes_the_contract_and_report_shows_it(tmp_path):
    done = runner.invoke(app, ["run", "e5", "--profile", "quick", "--output", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0 and "E5" in done.stdout
    record = json.loads((tmp_path / "E5.json").read_text())
    assert record["experiment"] == "E5" and record["verdict"].startswith(("holds", "contradicted"))
    assert {"name", "measured", "threshold", "passed", "source"} <= set(record["criteria"][0])
    assert record["profile"] == "quick" and record["seconds"] > 0
    assert {"python", "torch", "threads", "commit"} <= set(record["environment"])
    assert len(list(tmp_path.glob("E5-*.svg"))) == 3

    done = runner.invoke(app, ["report", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0
    page = (tmp_path / "experiments.html").read_text()
    assert page.count("<svg") == 3 and "E5. The efficiency formula" in page


def test_newton_schulz_with_a_momentum_file(tmp_path, monkeypatch):
    tiny = replace(profile_config("NS", "quick"), shape=(8, 16), steps=(1, 5), dtypes=("float32",))
    monkeypatch.setitem(newton_schulz_study.PROFILES, "quick", tiny)
    torch.save({"a": torch.randn(4, 6)}, tmp_path / "m.pt")
    arguments = ["newton-schulz", "--output", str(tmp_path), "--momentum", str(tmp_path / "m.pt")]
    done = runner.invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and "1 momentum matrices" in done.stdout
    assert json.loads((tmp_path / "NS.json").read_text())["config"]["momentum"] == str(tmp_path / "m.pt")


def test_selection():
    assert select(["all"]) == list(EXPERIMENTS) == [f"E{i}" for i in range(1, 9)]
    assert select(["e4", "E2", "E4"]) == ["E4", "E2"]
    with pytest.raises(ConfigError, match="E9"):
        select(["E9"])


@pytest.mark.parametrize("name", list(MODULES))
@pytest.mark.parametrize("profile", ["quick", "full"])
def test_profiles_exist_and_full_is_the_default(name, profile):
    config = profile_config(name, profile)
    if profile == "full":
        assert config == type(config)()
    with pytest.raises(ConfigError, match="ful"):
        profile_config(name, "ful")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["run", "E9"], ConfigError),
        (["run", "E5", "--profile", "slow"], ConfigError),
        (["report", "nowhere"], DataError),
        (["newton-schulz", "--momentum", "a", "--save-momentum", "b"], ConfigError),
        (["newton-schulz", "--momentum", "missing.pt"], DataError),
    ],
)
def test_errors_are_typed(arguments, error, tmp_path, monkeypatch):
    tiny = replace(profile_config("NS", "quick"), shape=(4, 8), steps=(5,), dtypes=("float32",), conditions=(1e2,))
    monkeypatch.setitem(newton_schulz_study.PROFILES, "quick", tiny)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error):
        runner.invoke(app, arguments, catch_exceptions=False)
