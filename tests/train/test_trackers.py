"""Real trackers, where they are installed (`bash .ci/extended trackers`): events under the run, which outlives one."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_cli import refused

REQUIRED = os.environ.get("MUON_DIST_TEST_TRACKERS") == "required"
TRACKERS = ("tensorboard", "wandb", "trackio")


def need(name: str) -> None:
    if importlib.util.find_spec(name) is None and not REQUIRED:
        pytest.skip(f"{name} is not installed")


def train(workspace: Path, folder: Path, *settings: str, **variables: str) -> tuple[int, str]:
    """Exit code and output of `muon-dist train`, in a separate folder and without a network."""
    folder.mkdir(exist_ok=True)
    words = ["train", str(workspace / "tiny.yaml"), "--run-dir", str(folder), "trainer.max_steps=4", *settings]
    offline = {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "HOME": str(folder), **variables}
    kept = {k: v for k, v in os.environ.items() if k not in ("TENSORBOARD_LOGGING_DIR", "WANDB_DIR", "TRACKIO_DIR")}
    done = subprocess.run(
        [sys.executable, "-m", "muon_dist.cli", *words], cwd=folder, env={**kept, **offline},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240,
    )  # fmt: skip
    return done.returncode, done.stdout


def losses(run: Path) -> list[float]:
    return [
        line["loss"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line
    ]


def test_events_of_all_lie_under_the_run(workspace: Path, tmp_path: Path) -> None:
    for name in TRACKERS:
        need(name)
    code, said = train(workspace, tmp_path, f"trainer.report_to=[{', '.join(TRACKERS)}]")
    assert code == 0, said
    run = tmp_path / "tiny"
    kept = run / "trackers"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((kept / "tensorboard").rglob("events.out.tfevents*")).parent)).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(run))
    assert list((kept / "wandb").glob("offline-run-*/*.wandb"))
    [database] = (kept / "trackio").glob("*.db")
    found = sqlite3.connect(database).execute("select metrics from metrics").fetchall()
    logged = [json.loads(one) for (one,) in found]
    assert [one["train/loss"] for one in logged if "train/loss" in one] == pytest.approx(losses(run))
    beside = {path.name for path in tmp_path.iterdir()} - {"tiny", ".cache", ".config", ".local", ".netrc"}
    assert not beside, f"written beside the run: {beside}"


BREAK = """
import {name} as tracker
def fails(*args, **kwargs):
    raise OSError("no space left on device")
"""
# the function that a tracker calls at each log
CALLS = {
    "tensorboard": "import torch.utils.tensorboard as t\nt.SummaryWriter.add_scalar = fails\n",
    "wandb": "tracker.sdk.wandb_run.Run.log = fails\n",
    "trackio": "tracker.log = fails\ntracker.Run.log = fails\n",
}


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_fails_later_fails_no_run(workspace: Path, tmp_path: Path, name: str) -> None:
    need(name)
    (tmp_path / "site").mkdir()
    # loaded by Python itself before muon-dist, in the process of the run alone
    (tmp_path / "site" / "sitecustomize.py").write_text(BREAK.format(name=name) + CALLS[name])
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    code, said = train(workspace, tmp_path / "out", f"trainer.report_to={name}", PYTHONPATH=path)
    assert code == 0 and "no space left on device" in said and "continues without it" in said, said
    assert len(losses(tmp_path / "out" / "tiny")) == 4


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_ends_the_start(
    capsys: pytest.CaptureFixture[str], workspace: Path, tmp_path: Path, name: str
) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    settings = (f"trainer.report_to={name}", f"data.dir={tmp_path}/data")
    refused(capsys, 2, "trainer.report_to", "train", workspace / "tiny.yaml", "--run-dir", tmp_path, *settings)
    assert not (tmp_path / "data").exists() and not (tmp_path / "tiny").exists()
