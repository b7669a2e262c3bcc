"""Each check of `muon-dist doctor`, with real faults if a test can cause them."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from muon_dist.cli import main
from muon_dist.doctor import cluster, machine, network, software
from muon_dist.doctor.verdict import Verdict, attempt, worst
from tests.distributed import run_ranks


def one(found: list[Verdict]) -> Verdict:
    (verdict,) = found
    assert (verdict.fix is None) == (verdict.level == "ok"), "a fix for everything that is not right"
    return verdict


def test_versions_here_are_right() -> None:
    assert one(software.check_versions()).level == "ok"


def test_ranges_are_those_of_the_package(root: Path) -> None:
    declared = (root / "pyproject.toml").read_text()
    for name, (lowest, above) in software.RANGES.items():
        wanted = f"{name}>={'.'.join(map(str, lowest))}" + (f",<{'.'.join(map(str, above))}" if above else "")
        assert f'"{wanted}"' in declared


@pytest.mark.parametrize(
    "change, text",
    [
        ({"torch": "2.8.1+cu128"}, "torch 2.8.1+cu128 is outside the supported range (torch>=2.12)"),
        ({"transformers": "6.0.0.dev0"}, "transformers 6.0.0.dev0 is outside"),
        ({"transformers": "4.57.1"}, "transformers 4.57.1 is outside"),
        ({"deepspeed": "0.19.7"}, "deepspeed 0.19.7 is outside"),
        ({"deepspeed": None}, "deepspeed is not installed"),
    ],
)
def test_versions_out_of_range(change: dict[str, str | None], text: str) -> None:
    verdict = one(software.check_versions({**software.installed(), **change}))
    assert verdict.level == "problem" and text in verdict.text and "pip install" in str(verdict.fix)


def test_versions_newer_than_ours_are_right() -> None:
    assert one(software.check_versions({**software.installed(), "torch": "2.100.0", "deepspeed": "1.0"})).level == "ok"


def test_old_python() -> None:
    assert "Python 3.9.7" in one(software.check_versions(python=(3, 9, 7))).text


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_gpus_that_torch_cannot_use() -> None:
    assert one(software.check_devices(driver=0)).level == "ok"
    verdict = one(software.check_devices(driver=2))
    assert verdict.level == "problem" and verdict.text.startswith("2 GPUs, but torch")


def test_combinations() -> None:
    assert one(software.check_combinations({"DS_ACCELERATOR": "cuda"}, gpu=False)).level == "problem"
    assert one(software.check_combinations({"DS_ACCELERATOR": "cpu"}, gpu=True)).level == "problem"
    assert one(software.check_combinations({"CUDA_LAUNCH_BLOCKING": "1"}, gpu=True)).level == "warning"
    assert one(software.check_combinations({}, gpu=True)).level == "ok"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    verdict = one(software.check_combinations({}, gpu=False))
    assert verdict.level == "warning" and "ninja, g++ is not there" in verdict.text


def in_a_child(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_few_open_files() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))\n"
        "from muon_dist.doctor.machine import check_limits\n"
        "(v,) = check_limits(); print(v.level, v.text, v.fix)"
    )
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = in_a_child(code.format(hard=hard))
    assert said.startswith("warning a process may open 256 files") and said.endswith("ulimit -n 4096")
    assert "after raising the hard limit of 512" in in_a_child(code.format(hard=512))


def test_locked_memory_for_infiniband(tmp_path: Path) -> None:
    (tmp_path / "mlx5_0").mkdir()
    code = (
        "import resource, pathlib; resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))\n"
        "from muon_dist.doctor.machine import check_limits\n"
        f"(v,) = check_limits(files=1, infiniband=pathlib.Path({str(tmp_path)!r})); print(v.level, v.text)"
    )
    assert in_a_child(code).startswith("problem InfiniBand needs locked memory")


def test_shared_memory(tmp_path: Path) -> None:
    assert one(machine.check_shared_memory(tmp_path, wanted=1e-6)).level == "ok"
    assert one(machine.check_shared_memory(tmp_path / "none")).level == "problem"
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize / machine.GIB
    assert one(machine.check_shared_memory(tmp_path, wanted=2 * free)).level == "warning"
    assert one(machine.check_shared_memory(tmp_path, wanted=100 * free)).level == "problem"


def test_stale_lock_and_one_in_use(tmp_path: Path) -> None:
    """torch's own lock, held by a living process and then left by a killed one."""
    assert one(machine.check_locks(tmp_path)).level == "ok"
    assert one(machine.check_locks(tmp_path / "none")).level == "ok"
    lock = tmp_path / "py311_cpu" / "fused adam" / "lock"
    lock.parent.mkdir(parents=True)
    code = (
        "import sys, time\nfrom torch.utils.file_baton import FileBaton\n"
        f"assert FileBaton({str(lock)!r}).try_acquire()\nprint('has it', flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout is not None and builder.stdout.readline() == "has it\n"
        verdict = one(machine.check_locks(tmp_path))
        assert verdict.level == "warning" and f"process {builder.pid} compiles there" in verdict.text
        builder.kill()
    verdict = one(machine.check_locks(tmp_path))
    assert verdict.level == "problem" and verdict.fix == f"rm '{lock}'"
    subprocess.run(str(verdict.fix), shell=True, check=True)
    assert one(machine.check_locks(tmp_path)).level == "ok"


def test_disk(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize / machine.GIB
    assert one(machine.check_disk(tmp_path, wanted=1e-6)).level == "ok"
    assert one(machine.check_disk(tmp_path / "not" / "yet", wanted=1e-6)).level == "ok"
    assert one(machine.check_disk(tmp_path, wanted=2 * free)).level == "warning"
    assert one(machine.check_disk(tmp_path, wanted=100 * free)).level == "problem"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_disk_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert one(machine.check_disk(tmp_path, wanted=1e-6)).level == "problem"


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        verdict = one(network.check_port(port))
        assert verdict.level == "problem" and f"{port} is taken by process {os.getpid()} (" in verdict.text
    assert one(network.check_port(port)).level == "ok"


def test_interfaces_here() -> None:
    assert "127.0.0.1" in network.addresses()["lo"]
    assert "lo 127.0.0.1" in str(network.check_interfaces({"GLOO_SOCKET_IFNAME": "lo"})[0].text)


@pytest.mark.parametrize(
    "variables, level",
    [
        ({"GLOO_SOCKET_IFNAME": "eth7"}, "problem"),
        ({"GLOO_SOCKET_IFNAME": "eth"}, "problem"),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, "ok"),
        ({"NCCL_SOCKET_IFNAME": "eth"}, "ok"),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, "problem"),
        ({"NCCL_SOCKET_IFNAME": "^docker"}, "ok"),
    ],
)
def test_interfaces_that_were_asked_for(variables: dict[str, str], level: str) -> None:
    found = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.5", "fe80::1"]}
    assert one(network.check_interfaces(variables, found)).level == level


def test_public_address() -> None:
    verdict = one(network.check_interfaces({}, {"eth0": ["10.0.0.5"], "eth1": ["8.8.4.4"]}))
    assert verdict.level == "warning" and "eth1 has the public address 8.8.4.4" in verdict.text


def test_host_name() -> None:
    assert one(network.check_hostname("localhost")).level == "ok"
    assert one(network.check_hostname("localhost", several=True)).level == "problem"
    assert one(network.check_hostname("no such host.invalid", several=True)).level == "problem"


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_every_pair_meets_once_and_nobody_plays_twice_in_a_round(count: int) -> None:
    rounds = cluster.pairs(count)
    games = [frozenset(game) for games in rounds for game in games]
    assert len(games) == len(set(games)) == count * (count - 1) // 2
    assert all(len({player for game in games for player in game}) == 2 * len(games) for games in rounds)


def measured(ahead: float) -> tuple[dict, dict, list]:
    """The verdicts of three ranks that represent three machines; the clock of the last one is wrong."""
    rank = torch.distributed.get_rank()
    links = cluster.measure_links([0, 1, 2])
    clocks = cluster.measure_clocks([0, 1, 2], clock=lambda: time.time() + (ahead if rank == 2 else 0.0))
    return links, clocks, cluster.check_collective()


def test_links_and_clocks() -> None:
    results = run_ranks(measured, 3, 7.5)
    links, clocks, collective = results[0]
    assert all(result[:2] == (links, clocks) for result in results), "all ranks know all"
    assert links.keys() == {(0, 1), (0, 2), (1, 2)}
    assert all(values["bandwidth"] > 1e6 and 0 < values["round_trip"] < 1 for values in links.values())
    assert abs(clocks[1]) < 0.2 and abs(clocks[2] - 7.5) < 0.2
    assert one(collective).level == "ok"
    verdict = one(cluster.judge_clocks(clocks, ["a", "b", "c"]))
    assert verdict.level == "problem" and re.match(r"c's clock is 7\.\d s ahead of a's", verdict.text)
    assert one(cluster.judge_clocks({1: -2.0}, ["a", "b"])).level == "warning"
    assert one(cluster.judge_clocks({1: 0.01, 2: -0.02}, ["a", "b", "c"])).text == "within 20.0 ms"


def test_the_slow_link_is_named() -> None:
    fast, slow = {"bandwidth": 2e9, "round_trip": 1e-4}, {"bandwidth": 3e8, "round_trip": 1e-4}
    found = {(0, 1): fast, (0, 2): slow, (1, 2): fast}
    verdict = one(cluster.judge_links(found, ["a", "b", "c"]))
    assert verdict.level == "warning" and "a - c: 2.4 Gbit/s, the median is 16 Gbit/s" in verdict.text
    assert one(cluster.judge_links({(0, 1): fast}, ["a", "b"])).level == "ok"
    crawling = {"bandwidth": 1e7, "round_trip": 1e-4}
    assert "the slowest link has 0.08 Gbit/s" in one(cluster.judge_links({(0, 1): crawling}, ["a", "b"])).text
    assert one(cluster.judge_links({}, ["a"])).level == "ok"


def test_other_versions_on_another_machine() -> None:
    found = [{"torch": "2.13.0", "deepspeed": "0.19.8"}, {"torch": "2.12.1", "deepspeed": "0.19.8"}]
    verdict = one(cluster.judge_versions(found, ["a", "b"]))
    assert verdict.level == "problem" and verdict.text == "torch is 2.12.1 on b and 2.13.0 on a"
    assert one(cluster.judge_versions([found[0]] * 2, ["a", "b"])).level == "ok"


def test_a_check_that_fails_itself() -> None:
    def look() -> list[Verdict]:
        raise PermissionError("no /proc here")

    verdict = attempt("port", look)[0]
    assert verdict.level == "warning" and "no /proc here" in verdict.text
    assert worst([]) == "ok" and worst([verdict, Verdict("x", "ok", "")]) == "warning"


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().out


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "lock").touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        code, text = doctor(capsys, "--master-port", str(server.getsockname()[1]), "--run-dir", str(tmp_path))
    assert code == 1
    assert re.search(r"^problem  port: \d+ is taken.*\n +fix: ", text, re.MULTILINE)
    assert f"fix: rm {tmp_path}/lock" in text and "2 problems" in text.splitlines()[-1]
    (tmp_path / "lock").unlink()
    code, text = doctor(capsys, "--json", "--run-dir", str(tmp_path))
    found = json.loads(text)
    assert {"versions", "devices", "backends", "limits", "disk", "port"} <= {v["check"] for v in found["verdicts"]}
    assert code == (1 if found["level"] == "problem" else 0)
    strict, _ = doctor(capsys, "--json", "--strict", "--run-dir", str(tmp_path))
    assert strict == (0 if found["level"] == "ok" else 1)
