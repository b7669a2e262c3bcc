"""`muon-dist launch`: what is written runs as meant, whatever the words in it; and it is what the launchers take."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kubeflow_trainer_api.models as kubeflow  # type: ignore[import-untyped]
import pytest
import yaml

from muon_dist.cli import main
from muon_dist.launcher.kubernetes import literal, resource_name
from tests.train.conftest import CONFIG

# Everything that a shell, YAML or Kubernetes could take for its own.
HOSTILE = (
    "run_dir=it's $(touch pwned) `touch pwned` ${HOME} $$(x) \"; touch pwned; #\\",
    "evaluation.generate_prompt=' * ? [a] {a,b} ~ !! & | <(x) > pwned\t%x é'",
)
KINDS: dict[str, tuple[str, ...]] = {
    "one machine": ("torchrun", "--processes-per-node", "2"),
    "static": ("torchrun", "--nodes", "2", "--static", "--master-addr", "10.0.0.1"),
    "c10d": ("torchrun", "--nodes", "3", "--master-addr", "node0", "--interface", "eth0"),
    "elastic": ("torchrun", "--nodes", "2:4", "--master-addr", "fd00::1"),
    "slurm": ("slurm", "--nodes", "2", "--gpus-per-node", "8", "--partition", "a100", "--memory", "200G"),
    "slurm on one machine": ("slurm", "--exclusive", "--cpus-per-task", "4"),
    "trainjob": (
        "k8s",
        "--image",
        "example.org/muon:1",
        "--nodes",
        "2",
        "--gpus-per-node",
        "8",
        "--volume",
        "runs:/w",
    ),
    "pytorchjob": (
        "k8s",
        "--image",
        "muon",
        "--kind",
        "pytorchjob",
        "--nodes",
        "2:4",
        "--cpu",
        "8",
        "--memory",
        "9Gi",
    ),
    "one pod": ("k8s", "--image", "muon", "--namespace", "ml"),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration in a folder whose name needs quoting."""
    path = tmp_path_factory.mktemp("it's a $folder") / "tiny.yaml"
    path.write_text(CONFIG.format(folder="data"))
    return path


def render(capsys: pytest.CaptureFixture[str], config: Path, arguments: Sequence[str]) -> tuple[str, str]:
    """(what the command wrote, its warnings)."""
    with pytest.raises(SystemExit) as ended:
        main(["launch", *arguments, "--config", str(config)])
    written, warnings = capsys.readouterr()
    assert ended.value.code == 0, warnings
    return written, warnings


def refused(capsys: pytest.CaptureFixture[str], config: Path, message: str, *arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["launch", *arguments, "--config", str(config)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def expected(config: Path, overrides: Sequence[str] = HOSTILE) -> list[str]:
    return ["-m", "muon_dist.cli", "train", str(config), *overrides, "--resume", "if-any"]


@pytest.fixture()
def stand_ins(tmp_path: Path) -> Path:
    """A folder for PATH in which `python` writes its arguments and variables to python.json, a line a call."""
    folder = tmp_path / "bin"
    folder.mkdir()
    python = folder / "python"
    python.write_text(
        f"#!{sys.executable} -S\n"
        "import json, os, sys\n"
        "with open(os.environ['CALLS'], 'a') as calls:\n"
        "    calls.write(json.dumps([sys.argv[1:], dict(os.environ)]) + chr(10))\n"
        "if os.environ.get('WAIT'):\n"
        "    import signal, time\n"
        "    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))\n"
        "    open(os.environ['WAIT'], 'w').close()\n"
        "    time.sleep(30)\n"
    )
    python.chmod(0o755)
    return folder


def environment(stand_ins: Path, **more: str) -> dict[str, str]:
    return {
        "PATH": f"{stand_ins}:{os.environ['PATH']}",
        "HOME": "/nowhere",
        "CALLS": str(stand_ins / "python.json"),
        "TMPDIR": str(stand_ins),
        **more,
    }


def called(stand_ins: Path) -> list[tuple[list[str], dict[str, str]]]:
    lines = (stand_ins / "python.json").read_text().splitlines()
    return [(arguments, variables) for arguments, variables in map(json.loads, lines)]


def bash(script: str, *arguments: str, stand_ins: Path, **more: str) -> subprocess.CompletedProcess[str]:
    path = stand_ins / "script"
    path.write_text(script)
    return subprocess.run(
        ["bash", str(path), *arguments],
        env=environment(stand_ins, **more), cwd=stand_ins, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind, arguments in KINDS.items() if arguments[0] != "k8s"])
def test_scripts_are_clean(capsys: pytest.CaptureFixture[str], config: Path, kind: str) -> None:
    """shellcheck finds nothing, which includes that bash can read them."""
    text, _ = render(capsys, config, [*KINDS[kind], "--folder", "/a b", "--venv", "/v'", *HOSTILE])
    hints = "SC1091,SC1003,SC2016"  # about files it cannot see, and that quotes hide an expansion, as they must
    done = subprocess.run(["shellcheck", f"--exclude={hints}", "-"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "kind, options",
    [
        ("one machine", ["--nnodes", "1", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"]),
        ("static", ["--nnodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.1", "--master-port", "29500"]),
        ("c10d", ["--nnodes", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", "node0:29500", "--max-restarts", "0"]),
        ("elastic", ["--nnodes", "2:4", "--rdzv-endpoint", "[fd00::1]:29500", "--max-restarts", "3"]),
    ],
)
def test_torchrun_gets_the_words(
    capsys: pytest.CaptureFixture[str], config: Path, stand_ins: Path, kind: str, options: list[str]
) -> None:
    text, _ = render(capsys, config, [*KINDS[kind], *HOSTILE])
    done = bash(text, *(["1"] if kind == "static" else []), stand_ins=stand_ins)
    assert done.returncode == 0, done.stderr
    ((arguments, variables),) = called(stand_ins)
    assert arguments[:2] == ["-m", "torch.distributed.run"]
    assert arguments[-len(expected(config)) :] == expected(config)
    for option, value in zip(options[::2], options[1::2], strict=True):
        assert arguments[arguments.index(option) + 1] == value
    assert not (stand_ins / "pwned").exists()
    if kind == "one machine":
        endpoint = arguments[arguments.index("--rdzv-endpoint") + 1]
        assert endpoint.startswith(str(stand_ins)) and not Path(endpoint).parent.exists(), "removed at the end"
        assert variables["GLOO_SOCKET_IFNAME"] == "lo"
    assert (variables.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1") is (kind != "static")
    if kind == "c10d":
        assert variables["NCCL_SOCKET_IFNAME"] == "eth0"


def test_static_wants_a_number(capsys: pytest.CaptureFixture[str], config: Path, stand_ins: Path) -> None:
    text, _ = render(capsys, config, KINDS["static"])
    done = bash(text, stand_ins=stand_ins)
    assert done.returncode == 2 and "NODE_RANK" in done.stderr


def slurm_stand_ins(folder: Path) -> None:
    """scontrol, scancel and srun: the last runs its command here as the second machine would."""
    programs = {
        "scontrol": 'echo "scontrol $*" >> "$CALLS.slurm"; case "$1" in show) printf "first\\nsecond\\n" ;; esac',
        "scancel": 'echo "scancel $*" >> "$CALLS.slurm"; kill -USR1 "$(cat "$CALLS.srun")"',
        "srun": 'shift; echo $$ > "$CALLS.srun"; SLURM_NODEID=1 exec "$@"',
    }
    for name, program in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{program}\n")
        (folder / name).chmod(0o755)


JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[0-1]"}


@pytest.mark.parametrize("kind", ["slurm", "slurm on one machine"])
def test_slurm_gets_the_words(capsys: pytest.CaptureFixture[str], config: Path, stand_ins: Path, kind: str) -> None:
    slurm_stand_ins(stand_ins)
    text, _ = render(capsys, config, [*KINDS[kind], *HOSTILE])
    done = bash(text, stand_ins=stand_ins, **JOB)
    assert done.returncode == 0, done.stderr
    ((arguments, _),) = called(stand_ins)
    assert arguments[-len(expected(config)) :] == expected(config)
    assert not (stand_ins / "pwned").exists()
    log = (stand_ins / "python.json.slurm").read_text() if kind == "slurm" else ""
    assert "requeue" not in log, "a run that ended by itself is over"
    if kind == "slurm":
        assert arguments[arguments.index("--master-addr") + 1] == "first"
        assert arguments[arguments.index("--master-port") + 1] == "20077"
        assert arguments[arguments.index("--node-rank") + 1] == "1"
        directives = dict(line[8:].partition("=")[::2] for line in text.splitlines() if line.startswith("#SBATCH "))
        assert directives["--nodes"] == "2" and directives["--gpus-per-node"] == "8" and directives["--mem"] == "200G"
        assert directives["--ntasks-per-node"] == "1" and directives["--signal"] == "B:USR1@180"


@pytest.mark.parametrize("restarts, requeued", [(0, True), (2, False)])
def test_slurm_warning_saves_and_requeues(
    capsys: pytest.CaptureFixture[str], config: Path, stand_ins: Path, restarts: int, requeued: bool
) -> None:
    """SIGUSR1, which SLURM sends before the time limit, goes on to the run; the job goes back to the queue."""
    slurm_stand_ins(stand_ins)
    text, _ = render(capsys, config, [*KINDS["slurm"], "--requeues", "2"])
    (stand_ins / "script").write_text(text)
    waiting = stand_ins / "waiting"
    process = subprocess.Popen(
        ["bash", str(stand_ins / "script")],
        env=environment(stand_ins, **JOB, WAIT=str(waiting), SLURM_RESTART_COUNT=str(restarts)),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not waiting.exists():
        assert process.poll() is None
    process.send_signal(10)  # SIGUSR1
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    log = (stand_ins / "python.json.slurm").read_text().splitlines()
    assert "scancel --signal=USR1 77" in log
    assert ("scontrol requeue 77" in log) is requeued


def kubernetes_expands(text: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of a command's word: $(NAME) is replaced if NAME is set, $$ is a $.

    https://kubernetes.io/docs/tasks/inject-data-application/define-command-argument-container/
    """

    def replaced(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replaced, text)


@pytest.mark.parametrize("text", ["", "$", "$$", "$$$", "$(x)", "$$(x)", "$$$(x)", "${x}", "a$(x)$b$$c$", *HOSTILE])
def test_kubernetes_leaves_words_as_they_are(text: str) -> None:
    assert kubernetes_expands(literal(text), {"x": "pwned", "touch pwned": "pwned"}) == text


def pods(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    spec = documents[0]["spec"]
    if documents[0]["kind"] == "PyTorchJob":
        return [spec["pytorchReplicaSpecs"]["Worker"]["template"]]
    return [job["template"]["spec"]["template"] for job in spec["template"]["spec"]["replicatedJobs"]]


@pytest.mark.parametrize("kind", ["trainjob", "pytorchjob", "one pod"])
def test_manifests(capsys: pytest.CaptureFixture[str], config: Path, stand_ins: Path, kind: str) -> None:
    """They are what the schemas say, nothing unknown in them, and the container runs the words."""
    text, _ = render(capsys, config, [*KINDS[kind], *HOSTILE])
    documents = list(yaml.safe_load_all(text))
    if kind == "pytorchjob":
        check_pytorchjob(documents[0])
    else:
        models = [kubeflow.TrainerV1alpha1TrainingRuntime, kubeflow.TrainerV1alpha1TrainJob]
        for model, document in zip(models, documents, strict=True):
            assert same(model.from_dict(document), document)
        assert documents[1]["spec"]["runtimeRef"]["name"] == documents[0]["metadata"]["name"]
    (pod,) = pods(documents)
    assert same(kubeflow.IoK8sApiCoreV1PodTemplateSpec.from_dict(pod), pod)
    (container,) = pod["spec"]["containers"]
    variables = {"touch pwned": "pwned", "x": "pwned"}
    words = [kubernetes_expands(word, variables) for word in [*container["command"], *container["args"]]]
    done = subprocess.run(words, env=environment(stand_ins), cwd=stand_ins, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    ((arguments, _),) = called(stand_ins)
    assert arguments[-len(expected(config)) :] == expected(config)
    assert not (stand_ins / "pwned").exists()


def same(model: Any, document: dict[str, Any]) -> bool:
    """Whether nothing is lost through the model, which drops what it does not know."""
    found = json.loads(json.dumps(model.to_dict()))
    assert found == document
    return True


def check_pytorchjob(document: dict[str, Any]) -> None:
    """Against the fields of the resource definition (Training Operator v1, kubeflow.org_pytorchjobs.yaml)."""
    assert document["apiVersion"] == "kubeflow.org/v1" and document["kind"] == "PyTorchJob"
    spec = document["spec"]
    assert spec.keys() <= {"elasticPolicy", "nprocPerNode", "pytorchReplicaSpecs", "runPolicy"}
    assert isinstance(spec["nprocPerNode"], str)
    whole = {"minReplicas": 2, "maxReplicas": 4, "maxRestarts": 10, "rdzvPort": 29400}
    assert spec["elasticPolicy"] == {**whole, "rdzvBackend": "c10d", "rdzvId": document["metadata"]["name"]}
    assert spec["runPolicy"]["cleanPodPolicy"] in ("All", "Running", "None")
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert worker.keys() == {"replicas", "restartPolicy", "template"} and worker["replicas"] == 4
    assert worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    (container,) = worker["template"]["spec"]["containers"]
    # the operator finds the container and the port of the rendezvous by these names
    port = {"name": "pytorchjob-port", "containerPort": 29400, "protocol": "TCP"}
    assert container["name"] == "pytorch" and container["ports"] == [port]


def test_names_in_kubernetes() -> None:
    assert resource_name("Llama_60M.v2") == "llama-60m-v2"
    assert resource_name("60m") == "run-60m"
    assert len(resource_name("a" * 200)) == 50


def test_deepspeed_takes_the_hostfile(capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path) -> None:
    from deepspeed.launcher import runner

    hostfile = tmp_path / "host file"
    arguments = ["deepspeed", "--host", "node0", "--host", "node1", "--gpus-per-node", "8", "-o", str(hostfile)]
    text, _ = render(capsys, config, [*arguments, *HOSTILE])
    assert dict(runner.fetch_hostfile(str(hostfile))) == {"node0": 8, "node1": 8}
    words = shlex.split(text.splitlines()[-1])
    assert words[0] == "deepspeed"
    parsed = runner.parse_args(words[1:])
    assert parsed.hostfile == str(hostfile) and parsed.module and parsed.no_local_rank
    assert parsed.master_addr == "node0" and parsed.user_script == "muon_dist.cli"
    assert parsed.user_args == expected(config)[2:]


def test_accelerate_takes_its_file(capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    path = tmp_path / "accelerate file.yaml"
    arguments = ["accelerate", "--nodes", "2", "--gpus-per-node", "4", "--master-addr", "10.0.0.1", "-o", str(path)]
    text, _ = render(capsys, config, [*arguments, *HOSTILE])
    loaded = load_config_from_file(str(path))
    assert (loaded.num_machines, loaded.num_processes, loaded.main_process_ip) == (2, 8, "10.0.0.1")
    words = shlex.split(text.splitlines()[-1].replace("NODE_RANK", "1"))
    parsed = launch_command_parser().parse_args(words[2:])
    assert parsed.config_file == str(path) and parsed.machine_rank == 1
    assert parsed.module and [parsed.training_script, *parsed.training_script_args] == expected(config)[1:]


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("--nodes: '0'", ["torchrun", "--nodes", "0"]),
        ("--nodes: '4:2' begins above its end", ["torchrun", "--nodes", "4:2"]),
        (
            "127.0.0.1 is this machine only; 2 machines need an address that all reach",
            ["torchrun", "--nodes", "2"],
        ),
        ("--master-addr: 'a;b' is not a host name", ["torchrun", "--nodes", "2", "--master-addr", "a;b"]),
        ("--master-port: 80", ["torchrun", "--master-port", "80"]),
        ("--static: an elastic job", ["torchrun", "--nodes", "2:3", "--static", "--master-addr", "a"]),
        ("--interface: 'eth0;x'", ["torchrun", "--interface", "eth0;x"]),
        ("contains a line break", ["torchrun", "evaluation.generate_prompt=a\nb"]),
        ("contains a line break", ["torchrun", "--folder", "a\nb"]),
        ("--name: 'a b'", ["torchrun", "--name", "a b"]),
        ("SLURM gives a job a fixed number of machines", ["slurm", "--nodes", "2:3"]),
        ("--time: '1 day'", ["slurm", "--time", "1 day"]),
        ("--partition: 'a b'", ["slurm", "--partition", "a b"]),
        ("--output: 'x\\n#SBATCH", ["slurm", "--log", "x\n#SBATCH --uid=0"]),
        ("a TrainJob has a fixed number of machines", ["k8s", "--image", "i", "--nodes", "2:3"]),
        ("--image: 'a b'", ["k8s", "--image", "a b"]),
        ("--volume: '/data'", ["k8s", "--image", "a", "--volume", "/data"]),
        ("--memory: 'much'", ["k8s", "--image", "a", "--memory", "much"]),
        ("--kind: 'job'", ["k8s", "--image", "a", "--kind", "job"]),
        ("only through mpirun", ["accelerate", "-o", "x", "--processes-per-node", "2"]),
        ("2 different hosts for --nodes 3", ["deepspeed", "-o", "x", "--host", "a", "--host", "b", "--host", "a"]),
        ("--output: cannot write", ["torchrun", "-o", "/nowhere/at/all"]),
        ("optimizer.muon.lrr", ["torchrun", "optimizer.muon.lrr=3"]),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], config: Path, message: str, arguments: list[str]) -> None:
    refused(capsys, config, message, *arguments)


def test_warnings(capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path) -> None:
    two = ["torchrun", "--nodes", "2", "--master-addr"]
    assert "8.8.8.8 is a public address" in render(capsys, config, [*two, "8.8.8.8"])[1]
    assert "no interface of it may be public" in render(capsys, config, [*two, "10.0.0.1"])[1]
    assert render(capsys, config, ["torchrun"])[1] == ""
    elastic = ["torchrun", "--nodes", "2:3", "--master-addr", "10.0.0.1"]
    _, warnings = render(capsys, config, elastic)
    assert "data.global_batch_size is not set" in warnings and "trainer.ddp_timeout is 1800 s" in warnings
    _, warnings = render(capsys, config, [*elastic, "data.global_batch_size=8", "trainer.ddp_timeout=60"])
    assert "8 samples cannot be shared by the 1 processes of each of 3 machines" in warnings
    assert "ddp_timeout" not in warnings
    _, warnings = render(capsys, config, ["slurm", "trainer.save_strategy=no"])
    assert "trainer.save_strategy is no: after SLURM's requeue the run begins again" in warnings
    assert "no --volume" in render(capsys, config, KINDS["one pod"])[1]
    output = tmp_path / "job"
    _, warnings = render(capsys, config, ["torchrun", "trainer.hub_token=hf_secret", "-o", str(output)])
    assert "trainer.hub_token: the value is written into the file" in warnings
    assert os.access(output, os.X_OK)


@pytest.mark.parametrize(
    "variables, options",
    [
        # what Kubeflow Trainer v2 sets
        (
            {"PET_NNODES": "3", "PET_NPROC_PER_NODE": "4", "PET_NODE_RANK": "2", "PET_MASTER_ADDR": "job-node-0-0.job",
             "PET_MASTER_PORT": "29400"},
            {"--nnodes": "3", "--nproc-per-node": "4", "--node-rank": "2", "--master-addr": "job-node-0-0.job",
             "--master-port": "29400", "--max-restarts": "0"},
        ),
        # what the Training Operator sets for an elastic PyTorchJob
        (
            {"PET_NNODES": "2:4", "PET_NPROC_PER_NODE": "auto", "PET_RDZV_ENDPOINT": "job-worker-0:29400",
             "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ID": "job", "PET_MAX_RESTARTS": "10",
             "PET_RDZV_CONF": "last_call_timeout=5"},
            {"--nnodes": "2:4", "--nproc-per-node": "1", "--rdzv-endpoint": "job-worker-0:29400", "--rdzv-id": "job",
             "--max-restarts": "10", "--rdzv-conf": "last_call_timeout=5"},
        ),
        # ours come first
        (
            {"PET_NNODES": "3", "NNODES": "2", "MASTER_ADDR": "a", "PET_MASTER_ADDR": "b"},
            {"--nnodes": "2", "--master-addr": "a"},
        ),
    ],
)  # fmt: skip
def test_torchrun_script_reads_kubeflows_variables(
    root: Path, stand_ins: Path, variables: dict[str, str], options: dict[str, str]
) -> None:
    venv = stand_ins / "venv"
    venv.mkdir()
    (venv / "bin").symlink_to(stand_ins)
    done = subprocess.run(
        ["bash", root / "launch" / "torchrun.sh", "train", "x y.yaml"],
        env=environment(stand_ins, VIRTUAL_ENV=str(venv), **variables), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    arguments, seen = called(stand_ins)[-1]
    assert arguments[-4:] == ["-m", "muon_dist.cli", "train", "x y.yaml"]
    for option, value in options.items():
        assert arguments[arguments.index(option) + 1] == value
    assert not [name for name in seen if name.startswith("PET_")], "each became an option"
    assert (seen.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1") is ("--rdzv-endpoint" in options)


@pytest.mark.parametrize(
    ("kind", "start"), [("c10d", "bash"), ("slurm", "sbatch"), ("trainjob", "kubectl apply -f"), ("static", None)]
)
def test_a_written_file_is_named_with_the_command_that_starts_it(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path, kind: str, start: str | None
) -> None:
    file = tmp_path / "a job"
    _, said = render(capsys, config, [*KINDS[kind], "-o", str(file)])
    assert file.is_file() and said.splitlines()[-1] == (f"start the run: {start} '{file}'" if start else str(file))
