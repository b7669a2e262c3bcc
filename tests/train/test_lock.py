"""A run folder takes one run at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from muon_dist.config import load_config
from muon_dist.errors import ConfigError
from muon_dist.train import lock, run
from muon_dist.train.folder import RunFolder
from muon_dist.train.lock import RunLock


def keep(folder: Path, seconds: float) -> None:
    held = RunLock(folder)
    held.take()
    time.sleep(seconds)
    held.release()


def keep_in_parent_only(folder: Path, seconds: float) -> None:
    """A forked worker outlives the process that has the lock."""
    RunLock(folder).take()
    if os.fork() == 0:
        time.sleep(seconds)
        os._exit(0)
    os._exit(0)


@contextmanager
def another(folder: Path, target: Callable[[Path, float], None] = keep, seconds: float = 60.0) -> Iterator[int]:
    """Another process, which has taken the lock. Yields its number."""
    process = multiprocessing.get_context("fork").Process(target=target, args=(folder, seconds))
    process.start()
    while not ((folder / lock.NAME).exists() and (folder / lock.NAME).read_text()):
        time.sleep(0.01)
    try:
        yield process.pid or 0
    finally:
        process.kill()
        process.join()


def test_a_second_run_is_refused_and_changes_nothing(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    config = load_config(workspace / "tiny.yaml", [f"run_dir={tmp_path}"])
    folder = tmp_path / config.name
    with (
        another(folder) as pid,
        pytest.raises(ConfigError, match=rf"another run trains in this folder \(process {pid} on .*choose another"),
    ):
        run.train(config)
    assert [p.name for p in folder.iterdir()] == [lock.NAME]


def test_the_lock_ends_with_the_process(tmp_path: Path) -> None:
    with another(tmp_path) as pid:
        os.kill(pid, signal.SIGKILL)
    again = RunLock(tmp_path)
    again.take()
    assert str(os.getpid()) in (tmp_path / lock.NAME).read_text()
    again.release()
    assert list(tmp_path.iterdir()) == []


def test_a_worker_of_a_run_that_ended_does_not_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with another(tmp_path, keep_in_parent_only, 3.0):
        monkeypatch.setattr(lock, "PATIENCE", 2.0)
        RunLock(tmp_path).take()


def test_a_restart_waits_for_the_run_that_ends(tmp_path: Path) -> None:
    with another(tmp_path, seconds=0.5):
        RunLock(tmp_path).take()


def test_a_folder_that_is_freed_is_removed_if_empty(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    held = RunLock(folder)
    held.take()
    held.release()
    RunFolder(folder).remove_if_empty()
    assert not folder.exists()
