"""Real torchrun rendezvous and training across hosts with their own addresses, on links that are slow or bad."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from muon_dist.errors import PeerError
from tests.namespaces import Host, hosts

pytestmark = [pytest.mark.namespaces, pytest.mark.torchrun]


def torchrun(host: Host, root: Path, log: Path, *arguments: object, **variables: str) -> subprocess.Popen[Any]:
    """launch/torchrun.sh on a host with the first host as the meeting place; its output goes to `log`."""
    command = ["bash", "launch/torchrun.sh", "--rdzv", "c10d", "--master-addr", "node0", "--nproc-per-node", "1"]
    with log.open("wb") as out:
        return host.popen(
            [*command, *map(str, arguments)],
            env=host.environment(**variables),
            cwd=root,
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def wait_for(paths: list[Path], processes: list[subprocess.Popen[Any]], logs: list[Path], patience: float) -> None:
    """Until all of `paths` exist; fails with the logs when a process ends or the time is over."""
    deadline = time.monotonic() + patience
    while not all(path.exists() for path in paths):
        if time.monotonic() > deadline or any(process.poll() not in (None, 0) for process in processes):
            pytest.fail("\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}" for log in logs))
        time.sleep(0.05)


@pytest.mark.slow  # two hosts import everything; the others here are the same links, without training
@pytest.mark.deepspeed
def test_training_over_good_slow_and_lossy_links(root: Path, tmp_path: Path) -> None:
    """DDP, ZeRO-2 and ZeRO-3 on two hosts: a slow link, and one with delay and loss, change no bit of the result."""
    links: dict[str, dict[str, str]] = {
        "good": {},
        "slow": {"rate": "2mbit"},
        "lossy": {"delay": "2ms", "loss": "2%"},
    }
    results: dict[str, list[dict[str, Any]]] = {}
    with hosts(2) as both:
        logs = [tmp_path / f"{host.name}.log" for host in both]
        processes = [
            torchrun(host, root, log, "--nnodes", 2, "-m", "tests.launch.phases", tmp_path, *links)
            for host, log in zip(both, logs, strict=True)
        ]
        for phase, limits in links.items():
            both[1].limit(**limits)
            (tmp_path / f"{phase}.go").touch()
            written = [tmp_path / f"{phase}.{rank}.json" for rank in range(2)]
            wait_for(written, processes, logs, 120)
            results[phase] = [json.loads(path.read_text()) for path in written]
            if phase == "slow":
                sent = int(re.findall(r"Sent (\d+) bytes", both[1].run("tc", "-s", "qdisc", "show", "dev", "eth0"))[0])
        assert [process.wait(timeout=60) for process in processes] == [0, 0]
    for phase, ranks in results.items():
        assert {rank["host"] for rank in ranks} == {"node0", "node1"} and {rank["world"] for rank in ranks} == {2}
        for rank in ranks:
            assert rank["digests"] == results["good"][0]["digests"], phase
            assert max(rank["apart"].values()) < 1e-6
    bound = (sent - 128 * 1024) * 8 / 2e6
    assert results["slow"][0]["seconds"] > bound > 1, "the limit was felt"


def test_a_host_that_is_cut_off_is_named(root: Path, tmp_path: Path) -> None:
    """Within the time-out every other process has ended and said which rank is absent, on which host."""
    timeout = 5.0
    with hosts(3) as three:
        logs = [tmp_path / f"{host.name}.log" for host in three]
        processes = []
        for rank, (host, log) in enumerate(zip(three, logs, strict=True)):
            meeting = host.environment(MASTER_ADDR="node0", MASTER_PORT="29500", RANK=str(rank), WORLD_SIZE="3")
            with log.open("wb") as out:
                command = [sys.executable, "-m", "tests.launch.cut_off", str(tmp_path), str(timeout)]
                processes.append(host.popen(command, env=meeting, cwd=root, stdout=out, stderr=subprocess.STDOUT))
        wait_for([tmp_path / f"steps.{rank}" for rank in range(3)], processes, logs, 60)
        three[2].cut()
        cut = time.monotonic()
        codes = [process.wait(timeout=60) for process in processes[:2]]
        took = time.monotonic() - cut
    text = [log.read_text(errors="replace") for log in logs]
    assert codes == [PeerError.exit_code] * 2, text
    assert timeout - 1 < took < 60, took
    for said in text[:2]:
        assert re.search(r"rank 2 is absent: last seen in .* \(host node2\)", said), said


@pytest.mark.slow
def test_doctor_finds_the_slow_machine(root: Path, tmp_path: Path) -> None:
    """Three hosts, one on a slow link and with little shared memory; both are named, and the exit code says so."""
    with hosts(3) as three:
        three[2].limit(rate="30mbit")
        three[2].run("mount", "-t", "tmpfs", "-o", "size=1m", "none", "/dev/shm")
        logs = [tmp_path / f"{host.name}.log" for host in three]
        processes = [
            torchrun(host, root, log, "--nnodes", 3, "doctor", "--json", "--run-dir", tmp_path)
            for host, log in zip(three, logs, strict=True)
        ]
        codes = [process.wait(timeout=200) for process in processes]
    text = "".join(log.read_text(errors="replace") for log in logs)
    assert all(code != 0 for code in codes), text
    (start,) = [log for log in logs if '"verdicts"' in log.read_text()]
    said = start.read_text()
    found = json.JSONDecoder().raw_decode(said[said.index("{") :])[0]
    by_check = {(v["check"], v["host"]): v for v in found["verdicts"]}
    assert by_check["shared memory", "node2"]["level"] == "problem"
    assert by_check["shared memory", "node0"]["level"] == "ok"
    assert by_check["host name", "node1"]["text"] == "node1 resolves to 10.77.0.2"
    assert by_check["clocks", None]["level"] == "ok" and by_check["same versions", None]["level"] == "ok"
    (links,) = [v for v in found["verdicts"] if v["check"] == "links" and len(v["figures"]) == 3]
    rates = {name: values["bandwidth"] * 8 / 1e6 for name, values in links["figures"].items()}
    print(f"\nMbit/s by link: {rates}")
    assert links["level"] == "warning" and "the slowest link has 0.0" in links["text"]
    for name, rate in rates.items():
        if "node2" in name:
            assert 15 < rate < 32, "the limit of 30 Mbit/s, less the headers"
        else:
            assert rate > 300
