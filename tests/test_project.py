"""`muon-dist init` and the data files of the package."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from muon_dist.config import load_config
from muon_dist.errors import FileError
from muon_dist.project import init, packaged
from tests.train.test_launch import free_port

ROOT = Path(__file__).parents[1]


def test_a_project_holds_every_configuration_and_can_be_read(tmp_path: Path) -> None:
    written = init(tmp_path / "new" / "project")
    assert written == sorted(written) and all(path.is_file() for path in written)
    ours = {p.relative_to(ROOT) for kind in ("*.yaml", "*.json") for p in (ROOT / "configs").rglob(kind)}
    found = {p.relative_to(tmp_path / "new" / "project") for p in written}
    assert ours <= found
    for path in sorted((tmp_path / "new" / "project" / "configs").glob("*.yaml")):
        if not path.name.startswith("_"):
            load_config(path)


def test_launch_files_of_a_project_start_without_the_checkout(tmp_path: Path) -> None:
    init(tmp_path)
    command = ["bash", "launch/torchrun.sh", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--nproc-per-node" in done.stdout, done.stderr


def test_a_project_without_an_environment_says_what_to_activate(tmp_path: Path) -> None:
    """launch/quickstart.sh, which makes one, is not part of a project."""
    init(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "python3").chmod(0o755)
    variables = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    command = ["bash", "launch/torchrun.sh", "train", "configs/quickstart.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "activate the environment in which muon-dist is installed\n" in done.stderr


def failed_launch(folder: Path, *arguments: str) -> list[str]:
    """What a launch that fails says."""
    command = ["bash", str(ROOT / "launch/torchrun.sh"), *arguments, "train", "nowhere.yaml"]
    variables = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    return done.stderr.splitlines()


def test_the_reason_is_the_last_line_of_a_launch(tmp_path: Path) -> None:
    """Not torchrun's table of exit codes, and not its traceback where the port is taken."""
    assert "the first error: nowhere.yaml: no such file" in failed_launch(tmp_path, "--nproc-per-node", "2")[-1]
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = failed_launch(tmp_path, "--nnodes", "2", "--master-port", port)
        assert f"port {port} of this machine is in use" in said[-1]


@pytest.mark.slow
def test_a_node_that_never_comes(tmp_path: Path) -> None:
    """torchrun waits for it for minutes, and says nothing."""
    port = str(free_port())
    rendezvous = ("--rdzv", "c10d", "--rdzv-conf", "join_timeout=1", "--master-port", port)
    said = failed_launch(tmp_path, "--nnodes", "2", *rendezvous)
    assert said[0] == f"[muon-dist] the run begins when 2 nodes have met at 127.0.0.1:{port} (c10d rendezvous)"
    assert said[-1].endswith(f"start this command on all 2 nodes. Each must reach port {port} of 127.0.0.1.")


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(FileError, match=r"README\.md exists already"):
        init(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"


def test_packaged_files_are_found() -> None:
    assert packaged("configs/quickstart.yaml").is_file()
    assert packaged("launch/torchrun.sh").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "no.yaml"], "no.yaml: no such file"),
        (["plan", "no.yaml"], "no.yaml: no such file"),
        (["prepare", "no.yaml"], "no.yaml: no such file"),
        (["eval", "nowhere"], "nowhere: no such folder"),
        (["export", "nowhere", "out"], "nowhere: no such folder"),
        (["checkpoint", "list", "nowhere"], "nowhere: no such folder"),
        (["generate", "nowhere", "--tokens", "0"], "--tokens"),
        (["verify", "nowhere"], "nowhere: no such folder"),
        (["compare", "nowhere"], "nowhere: no such file or folder: name a configuration"),
        (["train", "no.yaml", "--resume", "nowhere"], "--resume nowhere: no such folder; name a checkpoint"),
        (["train", "no.yaml", "--optimizer.muon.lr=0.1"], "written without --"),
        (["plan", "no.yaml", "--gpus", "8"], "--gpus: no such option; settings of the configuration"),
        (["launch", "slurm", "no.yaml", "--lr", "8"], "--lr: no such option; settings of the configuration"),
        (["train", "no.yaml", "--resum", "auto"], "--resum: no such option; did you mean --resume?"),
    ],
)
def test_a_mistyped_path_does_not_wait_for_torch(tmp_path: Path, arguments: list[str], message: str) -> None:
    script = (
        "import sys\nfrom muon_dist.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
        "    print('imported:', [n for n in ('torch', 'transformers', 'deepspeed') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and message in done.stderr, done.stderr
    assert "imported: []" in done.stdout


def test_help_version_and_completion(tmp_path: Path) -> None:
    def printed(*arguments: str) -> str:
        script = "import sys; from muon_dist.cli import main; main(sys.argv[1:])"
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert printed("--version").startswith("muon_dist ")
    for command in (["-h"], ["train", "-h"], ["bench", "step", "--help"]):
        shown = printed(*command)
        assert "Usage" in shown and "<bool>" not in shown
    assert "--install-completion" in printed("--help")
