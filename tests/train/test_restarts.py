"""A restarted launch continues from its newest checkpoint; a second start by hand does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from muon_dist.errors import CheckpointError, ConfigError
from muon_dist.train.folder import RunFolder
from muon_dist.train.restarts import launch_names
from tests.train.test_parts import checkpoint

LAUNCHERS = ("MUON_DIST_LAUNCH_ID", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT")


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def opened(folder: RunFolder, *arguments: object) -> str | None:
    """Begin a run in the folder; returns the checkpoint from which it continues."""
    start = folder.decide(*arguments)  # type: ignore[arg-type]
    folder.begin(start)
    return start.resume


def begun(root: Path, *steps: int) -> RunFolder:
    folder = RunFolder(root)
    (root / "metrics.jsonl").write_text("{}\n")
    for step in steps:
        checkpoint(root, step, True)
    return folder


@pytest.mark.parametrize("first", [(None, False), (None, True), ("if-any", False)])
@pytest.mark.parametrize("names", [{"TORCHELASTIC_RUN_ID": "abc"}, {"TORCHELASTIC_RUN_ID": "none"},
                                   {"MUON_DIST_LAUNCH_ID": "x"}])  # fmt: skip
def test_a_restart_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: tuple, names: dict) -> None:
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    folder = RunFolder(tmp_path)
    assert opened(folder, *first) is None
    begun(tmp_path)  # killed before the first save: the same command begins again by itself
    assert opened(folder, *first) is None and not folder.metrics.exists()
    begun(tmp_path, 5)
    assert opened(folder, *first) == "auto"
    with pytest.raises(ConfigError, match="holds a run already") if first == (None, False) else _nothing():
        assert opened(folder, *first, "never") in (None, "auto")


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


def test_a_restart_of_a_refused_start_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begun(tmp_path, 5)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    for count in "01":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        with pytest.raises(ConfigError, match="holds a run already"):
            opened(folder, None, False)


def test_a_slurm_job_goes_on_when_it_was_requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two starts by hand in one allocation are not a restart."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    folder = RunFolder(tmp_path)
    opened(folder, None, False)
    begun(tmp_path, 5)
    with pytest.raises(ConfigError, match="holds a run already"):
        opened(folder, None, False)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert opened(folder, None, False) == "auto"


def test_a_second_start_by_hand_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert opened(folder, None, False) is None and json.loads(folder.launch.read_text()) == {"names": []}
    begun(tmp_path, 5)
    with pytest.raises(ConfigError, match="holds a run already"):
        opened(folder, None, False)
    assert launch_names() == []


def test_always(tmp_path: Path) -> None:
    folder = begun(tmp_path, 5)
    assert opened(folder, None, False, "always") == "auto"
    assert opened(folder, None, True, "always") is None
    assert opened(folder, None, False, "always") is None, "nothing there any more"
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        opened(folder, "auto", False, "always")


def test_a_run_folder_is_no_checkpoint(tmp_path: Path) -> None:
    folder = begun(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"not a finished checkpoint .*name a checkpoint in it, such as .*-5$"):
        opened(folder, str(folder.root), False)


def test_a_start_from_elsewhere_goes_on_there_until_it_has_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    elsewhere = str(checkpoint(tmp_path / "other", 9, True))
    folder = RunFolder(tmp_path / "mine")
    assert opened(folder, elsewhere, False) == elsewhere
    begun(tmp_path / "mine")
    assert opened(folder, elsewhere, False) == elsewhere
    begun(tmp_path / "mine", 12)
    assert opened(folder, elsewhere, False) == "auto"
