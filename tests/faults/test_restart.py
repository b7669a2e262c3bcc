"""torchrun starts a run again after a kill and after a signal, and the run goes on by itself where it was."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from muon_dist.config import load_config
from muon_dist.train import run
from tests.train.conftest import workspace  # noqa: F401  (a fixture)
from tests.train.test_launch import environment

pytestmark = [pytest.mark.torchrun, pytest.mark.slow]

STEPS = 60
SETTINGS = [
    f"trainer.max_steps={STEPS}",
    "trainer.save_steps=10",
    "trainer.per_device_train_batch_size=4",
    "data.global_batch_size=4",
    "evaluation.generate_tokens=0",
]


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def worker(parent: int, rank: int) -> int:
    """Process id of a rank below the launcher."""
    for _ in range(400):
        for entry in Path("/proc").iterdir():
            try:
                settings = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
                status = (entry / "stat").read_text() if settings else ""
            except OSError:
                continue
            if f"RANK={rank}".encode() in settings and int(status.rpartition(")")[2].split()[1]) == parent:
                return int(entry.name)
        time.sleep(0.1)
    raise AssertionError(f"rank {rank} was not found below process {parent}")


def child(pid: int) -> int:
    """The only child of a process (torchrun below its shell), or itself when it has replaced the shell."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    names = {int(c): Path(f"/proc/{c}/cmdline").read_bytes() for c in children}
    return next((c for c, line in names.items() if b"torchrun" in line or b"torch.distributed.run" in line), pid)


def wait_for(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    began = time.monotonic()
    while not path.exists():
        assert process.poll() is None and time.monotonic() - began < 150, log.read_text()[-3000:]
        time.sleep(0.02)


def test_killed_then_asked_to_stop_then_finished(root: Path, workspace: Path, tmp_path: Path) -> None:  # noqa: F811
    """Two processes, bit-identical to two that were not disturbed."""
    config, alone, log = workspace / "tiny.yaml", tmp_path / "alone", tmp_path / "log"
    run.train(load_config(config, SETTINGS), run_dir=str(alone))
    folder = tmp_path / "runs" / "tiny"
    command = ["bash", "launch/torchrun.sh", "--nproc-per-node", "2", "--max-restarts", "3"]
    command += ["train", str(config), "--run-dir", str(tmp_path / "runs"), *SETTINGS]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=root, stdout=out, stderr=out, env=environment())
    try:
        wait_for(folder / "checkpoints" / "checkpoint-10", process, log)
        os.kill(worker(child(process.pid), 1), signal.SIGKILL)
        wait_for(folder / "checkpoints" / "checkpoint-30", process, log)
        os.kill(worker(child(process.pid), 0), signal.SIGTERM)
        assert process.wait(timeout=150) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
    text = log.read_text()
    assert re.search(
        r"SIGTERM on rank 0: all ranks stopped after step (\d+); the newest commit is checkpoint-\1\.", text
    )
    rest = ["train", str(config), "--run-dir", str(tmp_path / "runs"), *SETTINGS, "--resume", "auto"]
    assert f"To continue: {shlex.join([*command[:6], *rest])}\n" in text
    assert losses(folder).keys() == set(range(1, STEPS + 1))
    found, expected = losses(folder), losses(alone / "tiny")
    assert max(abs(found[s] - expected[s]) for s in expected) < 1e-4
