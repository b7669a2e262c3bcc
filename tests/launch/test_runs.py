"""What `muon-dist launch` writes for one machine, run for real by each launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from muon_dist.cli import main
from tests.train.conftest import workspace  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.slow, pytest.mark.torchrun]


@pytest.mark.parametrize(
    "kind, options, processes",
    [
        ("torchrun", ["--processes-per-node", "2"], 2),
        ("deepspeed", ["--host", "localhost", "--processes-per-node", "2"], 2),
        ("accelerate", [], 1),
    ],
)
def test_a_run(
    capsys: pytest.CaptureFixture[str], workspace: Path, tmp_path: Path, kind: str, options: list[str], processes: int  # noqa: F811
) -> None:  # fmt: skip
    file = tmp_path / "the file"
    arguments = ["launch", kind, "--config", str(workspace / "tiny.yaml"), "--run-dir", str(tmp_path), "-o", str(file)]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *options, "trainer.per_device_train_batch_size=2", "evaluation.generate_prompt=it's a $cat"])
    assert ended.value.code == 0
    command = f"bash '{file}'" if kind == "torchrun" else capsys.readouterr().out.splitlines()[-1]
    variables = {
        **os.environ, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", command], env=variables, cwd=Path.cwd(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert summary["world_size"] == processes and summary["steps"] == 8
    assert "it's a $cat" in done.stdout
