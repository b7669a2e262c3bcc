"""The launch scripts: real torchrun processes, one node and two."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from muon_dist.checkpoint import Checkpoint

pytestmark = pytest.mark.torchrun


def environment(**more: str) -> dict[str, str]:
    """The environment variables of a user who has activated this interpreter's environment."""
    of_a_launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in of_a_launcher}
    return {**kept, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", **more}


def start(root: Path, *arguments: object, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", "launch/torchrun.sh", *map(str, arguments)],
        cwd=root,
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        out, err = process.communicate()
        pytest.fail(f"no end within {timeout} s\n{out}\n{err}")
    return process.returncode, out, err


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


MEET = """
import json, sys, time
import torch, torch.distributed as dist
from pathlib import Path
from muon_dist.train import distributed
distributed.start(60)
total = torch.ones(1) * (dist.get_rank() + 1)
dist.all_reduce(total)
out = Path(sys.argv[1])
(out / f"rank{dist.get_rank()}.json").write_text(json.dumps([dist.get_world_size(), total.item(), sys.argv[2]]))
dist.barrier()
while (out / "wait").exists():
    time.sleep(0.1)
distributed.stop()
"""


@pytest.fixture()
def meet(tmp_path: Path) -> Path:
    script = tmp_path / "meet me.py"
    script.write_text(MEET)
    return script


def met(folder: Path) -> list[Any]:
    return [json.loads(p.read_text()) for p in sorted(folder.glob("rank*.json"))]


def listening_beyond_loopback(pids: set[int]) -> list[str]:
    """Listening TCP sockets of these processes on addresses other than 127.0.0.1 and ::1."""
    inodes = {
        os.readlink(link)
        for pid in pids
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if os.path.islink(link) and os.readlink(link).startswith("socket:")
    }
    found = []
    for table, loopback in (("tcp", "0100007F"), ("tcp6", "00000000000000000000000001000000")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes and fields[1].split(":")[0] != loopback:
                found.append(f"{table} {fields[1]}")
    return found


def descendants(pid: int) -> set[int]:
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, todo = set(), [pid]
    while todo:
        todo += (children := parents.get(todo.pop(), []))
        found.update(children)
    return found | {pid}


@pytest.mark.slow
def test_one_node_meets_in_a_file_and_listens_on_loopback_alone(root: Path, tmp_path: Path, meet: Path) -> None:
    (tmp_path / "wait").touch()
    process = start(root, "--nproc-per-node", 2, meet, tmp_path, "an argument; with 'signs'")
    for _ in range(600):
        if len(met(tmp_path)) == 2 or process.poll() is not None:
            break
        time.sleep(0.2)
    open_ports = listening_beyond_loopback(descendants(process.pid)) if process.poll() is None else []
    (tmp_path / "wait").unlink()
    code, out, err = finish(process)
    assert code == 0, out + err
    assert met(tmp_path) == [[2, 3.0, "an argument; with 'signs'"]] * 2
    assert open_ports == []


@pytest.mark.parametrize("rendezvous", ["static", pytest.param("c10d", marks=pytest.mark.slow)])  # and test_hosts
def test_two_nodes(root: Path, tmp_path: Path, meet: Path, rendezvous: str) -> None:
    """Two agents on the loopback interface, one set by arguments, one by environment variables."""
    port = str(free_port())
    first = start(root, "--nnodes", 2, "--node-rank", 0, "--nproc-per-node", 1, "--master-port", port,
                  "--rdzv", rendezvous, meet, tmp_path, "x")  # fmt: skip
    second = start(root, meet, tmp_path, "x", NNODES="2", NODE_RANK="1", NPROC_PER_NODE="1", MASTER_PORT=port,
                   MASTER_ADDR="127.0.0.1", RDZV_BACKEND=rendezvous)  # fmt: skip
    for process in (first, second):
        code, out, err = finish(process)
        assert code == 0, out + err
    assert met(tmp_path) == [[2, 3.0, "x"]] * 2


def test_train_on_two_processes(root: Path, workspace: Path, tmp_path: Path) -> None:
    """Like the quickstart; both ranks end with the weights that rank 0 saves, and the processes end cleanly."""
    batch = "trainer.per_device_train_batch_size=2"
    code, out, err = finish(
        start(root, "--nproc-per-node", 2, "train", workspace / "tiny.yaml", "--run-dir", tmp_path, batch)
    )
    assert code == 0, out + err
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["tokens"] == 8 * 4 * 16
    assert out.count("validation loss: ") == 1, "the summary is printed by one rank"
    assert "sample:\nthe cat" in out
    checkpoint = Checkpoint.look(tmp_path / "tiny" / "checkpoints" / "checkpoint-8")
    assert sum(kind == "momentum" for kind, _ in checkpoint.manifest.tensors) == 14, "the momentum of all owners"


@pytest.mark.slow  # two ranks import everything; tests/test_cli.py has the same without torchrun
def test_an_error_is_said_once(root: Path, workspace: Path) -> None:
    code, _, err = finish(
        start(root, "--nproc-per-node", 2, "train", workspace / "tiny.yaml", "--overwrite", "model.hiden_size=33")
    )
    assert code != 0
    assert err.count("error: ") == 1 and "error: model.hiden_size: llama has no such setting" in err, err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--nnodes", "two", "train"], "--nnodes (NNODES) must be a positive number or MIN:MAX, not 'two'"),
        (["--nnodes", "3:2", "train"], "--nnodes (NNODES): MIN is above MAX in '3:2'"),
        (["--nnodes", "2:3", "--rdzv", "static", "train"], "--nnodes 2:3 is elastic, which needs --rdzv c10d"),
        (["--nnodes", "2", "--node-rank", "2", "train"], "--node-rank 2 must be below --nnodes 2"),
        (["--nnodes", "2", "--rdzv", "etcd", "train"], "--rdzv (RDZV_BACKEND) must be static or c10d"),
        (["--nprocs", "2", "train"], "unknown option --nprocs"),
        (["--nnodes"], "--nnodes needs a value"),
        ([], "usage: bash launch/torchrun.sh"),
    ],
)
def test_bad_arguments(root: Path, arguments: list[str], message: str) -> None:
    code, _, err = finish(start(root, *arguments))
    assert code != 0 and message in err


@pytest.mark.parametrize(("seen", "processes"), [(0, "1"), (3, "3")])
def test_one_process_for_each_gpu_that_torch_sees(root: Path, tmp_path: Path, seen: int, processes: str) -> None:
    """The driver lists eight GPUs. The number of processes is the number of GPUs that torch sees
    (CUDA_VISIBLE_DEVICES, MIG)."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    (stand_ins / "nvidia-smi").write_text('#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do echo "GPU $i: A"; done\n')
    (stand_ins / "python").write_text(
        f'#!/bin/sh\ncase "$*" in *device_count*) echo {seen};; *torch.distributed.run*) echo "torchrun $*";; esac\n'
    )
    for path in stand_ins.iterdir():
        path.chmod(0o755)
    process = start(root, "train", "x.yaml", VIRTUAL_ENV=str(tmp_path), PATH=f"{stand_ins}:{os.environ['PATH']}")
    code, out, err = finish(process)
    assert code == 0 and f"--nproc-per-node {processes} " in out, out + err


@pytest.mark.slow  # test_two_nodes is the same without SLURM's variables
def test_slurm_starts_torchrun_on_every_node(root: Path, tmp_path: Path) -> None:
    """With substitutes for srun and scontrol that act like SLURM on two nodes."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    (stand_ins / "scontrol").write_text("#!/bin/sh\nprintf '127.0.0.1\\n127.0.0.1\\n'\n")
    (stand_ins / "srun").write_text(
        '#!/bin/sh\nshift\nSLURM_NODEID=0 "$@" & first=$!\nSLURM_NODEID=1 "$@" & second=$!\n'
        "wait $first && wait $second\n"
    )
    for path in stand_ins.iterdir():
        path.chmod(0o755)
    script = tmp_path / "meet.py"
    script.write_text(MEET)
    slurm = {"SLURM_SUBMIT_DIR": str(root), "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_JOB_NUM_NODES": "2"}
    done = subprocess.run(
        ["bash", root / "launch" / "slurm.sbatch", script, tmp_path, "x y"],
        cwd=tmp_path,
        env=environment(
            **slurm,
            SLURM_JOB_ID=str(free_port()),
            MASTER_PORT=str(free_port()),
            NPROC_PER_NODE="1",
            PATH=f"{stand_ins}:{os.environ['PATH']}",
        ),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert met(tmp_path) == [[2, 3.0, "x y"]] * 2
