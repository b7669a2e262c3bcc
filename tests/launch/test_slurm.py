"""A real SLURM on two hosts of this machine: what `muon-dist launch slurm` writes is warned, requeued, resumed.

Needs slurmctld, slurmd and munged (Debian: apt-get install slurmctld slurmd slurm-client munge); skipped without.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from muon_dist.cli import main
from tests.namespaces import Host, hosts
from tests.train.conftest import workspace  # noqa: F401  (a fixture)

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.namespaces,
    pytest.mark.torchrun,
    pytest.mark.skipif(
        any(shutil.which(program, path="/usr/sbin:/usr/bin") is None for program in PROGRAMS) or os.geteuid() != 0,
        reason="SLURM: slurmctld, slurmd, sbatch and munged are needed, and root",
    ),
]

SETTINGS = """
ClusterName=test
SlurmctldHost=node0
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1
NodeName=node[0-1] CPUs={cores} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture()
def cluster(tmp_path: Path) -> Iterator[tuple[Host, ...]]:
    """Two hosts with SLURM running on them; SLURM_CONF is set for this process."""
    folder = tmp_path / "slurm"
    for name in ("state", "node0", "node1"):
        (folder / name).mkdir(parents=True)
    for parent in (folder, *folder.parents):
        parent.chmod(parent.stat().st_mode | 0o055)  # munged checks that its socket can be reached
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    conf = folder / "slurm.conf"
    conf.write_text(SETTINGS.format(folder=folder, cores=os.cpu_count()))
    with hosts(2) as both, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(conf))
        patch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/usr/bin")
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.sock", *files]
        daemons = [both[0].popen(munge, stderr=subprocess.DEVNULL)]
        until(lambda: (folder / "munge.sock").exists(), 10, lambda: read(folder / "munge.log"))
        daemons.append(both[0].popen(["slurmctld", "-D"], stderr=subprocess.DEVNULL))
        daemons += [host.popen(["slurmd", "-D", "-N", host.name], stderr=subprocess.DEVNULL) for host in both]
        until(
            lambda: slurm(both[0], "sinfo", "-h", "-o", "%D %t").split() == ["2", "idle"], 30,
            lambda: "\n".join(read(path) for path in folder.glob("*.log")),
        )  # fmt: skip
        yield both
        for daemon in daemons:
            daemon.kill()


def slurm(host: Host, *command: str) -> str:
    with host.popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ) as process:
        assert process.stdout is not None
        return str(process.stdout.read())


def read(path: Path) -> str:
    return path.read_text(errors="replace")[-6000:] if path.exists() else f"{path} is not there"


def until(condition: Callable[[], bool], patience: float, explain: Callable[[], str]) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(explain())
        time.sleep(0.2)


def events(run: Path) -> list[tuple[str, int]]:
    path = run / "events.jsonl"
    if not path.exists():
        return []
    return [(line["event"], line["step"]) for line in map(json.loads, path.read_text().splitlines())]


def test_warned_requeued_and_resumed(cluster: tuple[Host, ...], workspace: Path, tmp_path: Path) -> None:  # noqa: F811
    steps = 400
    settings = [
        f"trainer.max_steps={steps}", "trainer.save_steps=100", "trainer.per_device_train_batch_size=2",
        "trainer.ddp_timeout=60", "evaluation.generate_tokens=0",
    ]  # fmt: skip
    job, log, run = tmp_path / "job.sbatch", tmp_path / "log", tmp_path / "runs" / "tiny"
    arguments = ["launch", "slurm", "--config", str(workspace / "tiny.yaml"), "--nodes", "2", "--time", "10",
                 "--venv", sys.prefix, "--folder", str(tmp_path), "--run-dir", str(run.parent), "--log", str(log),
                 "--interface", "eth0", "-o", str(job), *settings]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    number = slurm(cluster[0], "sbatch", "--parsable", str(job)).strip()
    assert number.isdigit(), number

    def state() -> dict[str, Any]:
        words = slurm(cluster[0], "scontrol", "-o", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def explain() -> str:
        return f"{state()}\n{events(run)}\n{read(log)}"

    until(lambda: len(events(run)) > 0 and (run / "metrics.jsonl").exists(), 90, explain)
    time.sleep(1)
    # what SLURM does --signal seconds before the time limit, without the wait for whole minutes
    slurm(cluster[0], "scancel", "--batch", f"--signal={signal.SIGUSR1.name}", number)
    until(lambda: state()["Restarts"] == "1", 60, explain)
    assert "requeued: the run continues from its newest checkpoint" in read(log)
    saved = events(run)
    slurm(cluster[0], "scontrol", "update", f"JobId={number}", "StartTime=now")  # SLURM lets a requeued job wait
    until(lambda: state()["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL"), 180, explain)
    assert state()["JobState"] == "COMPLETED", explain()
    after = events(run)[len(saved) :]
    print(f"\nbefore the requeue {saved}, after it {after}")
    (step,) = [step for kind, step in after if kind == "resumed"]
    assert step == saved[-1][1] and 0 < step < steps and step % 100, "it went on from the step at which it was warned"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["steps"] == steps
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(line["step"] for line in lines if "loss" in line) == list(range(1, steps + 1)), "none twice"
