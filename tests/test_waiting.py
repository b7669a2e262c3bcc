"""A long wait for another process, a compiler or a framework prints a message."""

from __future__ import annotations

import fcntl
import threading
import time
from pathlib import Path

import pytest
import torch

from muon_dist import waiting
from muon_dist.data.files import folder_lock
from muon_dist.numerics import compiled
from muon_dist.numerics.iteration import PLAIN
from muon_dist.numerics.schedules import get_schedule
from muon_dist.waiting import extensions_folder, starting, told


def test_a_long_wait_is_said_again_and_again(capsys: pytest.CaptureFixture[str]) -> None:
    with told("something is built", after=0.02, again=0.02):
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2 and all(line.startswith("note: something is built: ") for line in lines)


def test_a_short_one_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with told("something is built"):
        pass
    with pytest.raises(ValueError), told("something is built", after=5.0):
        raise ValueError
    assert capsys.readouterr().err == ""


def test_one_process_per_machine_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with told("something is built", after=0.01):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_folder_that_another_process_builds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    with (tmp_path / ".tokens.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        threading.Timer(1.5, fcntl.flock, (held, fcntl.LOCK_UN)).start()
        with folder_lock(out):
            pass
    assert f"note: {out}: another process builds it; this one waits" in capsys.readouterr().err
    with folder_lock(out):
        pass
    assert capsys.readouterr().err == ""


def test_a_build_lock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert starting("DeepSpeed") == "DeepSpeed prepares the model"
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert f"may wait for the build lock {lock} " in starting("DeepSpeed")


def test_extensions_folder() -> None:
    assert extensions_folder({"TORCH_EXTENSIONS_DIR": "/x"}) == Path("/x")
    assert extensions_folder({"HOME": "/h"}) == Path("/h/.cache/torch_extensions")


def test_the_compiler_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow function replaces the compiler, because compiled code that is cached takes no time."""

    def slow(x: torch.Tensor, *_: object) -> torch.Tensor:
        time.sleep(0.2)
        return x

    monkeypatch.setattr(waiting.told.__wrapped__, "__defaults__", (0.01, 0.01))  # type: ignore[attr-defined]
    monkeypatch.setattr(compiled, "_compiled", lambda: slow)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    schedule = get_schedule("keller")
    args = (torch.ones(1, 3, 29), schedule, schedule.coefficients(1), 1, torch.float32, PLAIN)
    compiled.compiled_iteration(*args)
    assert "note: torch.compile builds Newton-Schulz for a stack of shape (1, 3, 29)" in capsys.readouterr().err
    compiled.compiled_iteration(*args)
    assert capsys.readouterr().err == ""
