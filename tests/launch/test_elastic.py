"""A run on three hosts that loses one of them for good: the others fail in time, start again as two and continue."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from muon_dist.config import load_config
from muon_dist.train import run
from tests.launch.test_hosts import torchrun, wait_for
from tests.namespaces import hosts
from tests.train.conftest import workspace  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.namespaces, pytest.mark.torchrun, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, SAVE, TIMEOUT = 60, 10, 20
SETTINGS = [
    f"trainer.max_steps={STEPS}",
    f"trainer.save_steps={SAVE}",
    f"trainer.ddp_timeout={TIMEOUT}",
    "trainer.per_device_train_batch_size=12",
    "data.global_batch_size=12",
    "evaluation.generate_tokens=0",
]


def losses(run_folder: Path) -> dict[int, float]:
    """Training loss by step; of a step that was made twice, the last."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_host_is_lost(root: Path, tmp_path: Path, workspace: Path) -> None:  # noqa: F811
    """The loss curve is that of one process that was never interrupted."""
    config = workspace / "tiny.yaml"
    alone = tmp_path / "alone"
    run.train(load_config(config, SETTINGS), run_dir=str(alone))
    together = tmp_path / "together"
    with hosts(3, delay="10ms") as three:
        logs = [tmp_path / f"{host.name}.log" for host in three]
        conf = "last_call_timeout=10,keep_alive_interval=1"
        processes: list[subprocess.Popen[Any]] = [
            torchrun(host, root, log, "--nnodes", "2:3", "--rdzv-conf", conf, "--",
                     "train", config, "--run-dir", together, "--resume", "if-any", *SETTINGS)
            for host, log in zip(three, logs, strict=True)
        ]  # fmt: skip
        wait_for([together / "tiny" / "checkpoints" / f"checkpoint-{2 * SAVE}"], processes, logs, 200)
        cut = time.monotonic()
        three[2].cut()
        wait_for([together / "tiny" / "summary.json"], processes[:2], logs, 200)
        assert [process.wait(timeout=60) for process in processes[:2]] == [0, 0]
        took = time.monotonic() - cut
    events = [json.loads(line) for line in (together / "tiny" / "events.jsonl").read_text().splitlines()]
    print(f"\nlost after checkpoint {2 * SAVE}; {took:.0f} s later the others had ended; events {events}")
    summary = json.loads((together / "tiny" / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["steps"] == STEPS
    expected, found = losses(alone / "tiny"), losses(together / "tiny")
    assert expected.keys() == found.keys() == set(range(1, STEPS + 1))
    apart = {step: abs(found[step] - expected[step]) for step in expected}
    print(f"largest difference of the loss from the run in one process: {max(apart.values()):.2e}")
    assert max(apart.values()) < 1e-4
    for log in logs[:2]:
        assert re.search(r"rank \d is absent: last seen in .* \(host node2\)", log.read_text(errors="replace")), log
