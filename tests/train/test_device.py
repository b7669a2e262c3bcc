"""How a run uses GPUs (with fake GPUs): which one it takes, and that an unused one causes a message."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from muon_dist.adapters.hf.guarded import GuardedTrainer, Guards
from muon_dist.adapters.hf.private import PrivateTrainer
from muon_dist.adapters.hf.trainer import MuonTrainer, TrainingArguments
from muon_dist.config import load_config
from muon_dist.errors import ConfigError
from muon_dist.train import build, distributed
from muon_dist.train.device import refuse_unseen_gpus
from muon_dist.train.folder import RunFolder

# ---- a GPU that torch does not see


@pytest.fixture()
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with two GPUs, whose driver torch cannot use."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf 'GPU 0: A (UUID: x)\\nGPU 1: A (UUID: y)\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_a_gpu_that_torch_does_not_see_is_refused(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"has 2 NVIDIA GPUs, but torch .* sees none.*trainer.use_cpu=true"):
        refuse_unseen_gpus()
    (driver / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (driver / "nvidia0").touch()
    with pytest.raises(ConfigError, match="has 1 NVIDIA GPU,"):
        refuse_unseen_gpus(node=driver / "nvidia0")
    refuse_unseen_gpus(node=driver / "nothing")


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_somebody_hides_are_not_missed(driver: Path, hidden: str) -> None:
    refuse_unseen_gpus({"CUDA_VISIBLE_DEVICES": hidden})


def test_a_run_says_it_before_it_trains_on_the_cpu(driver: Path, workspace: Path, tmp_path: Path) -> None:
    config = load_config(workspace / "tiny.yaml")
    folder = RunFolder(tmp_path)
    assert build.training_arguments(config, folder, 100).device.type == "cpu", "the configuration asks for the CPU"
    del config.trainer["use_cpu"]
    with pytest.raises(ConfigError, match="2 NVIDIA GPUs"):
        build.training_arguments(config, folder, 100)


# ---- one process, one GPU


@pytest.fixture()
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A machine with one GPU and a launcher of two processes; the calls of `start` are recorded."""
    noted: list[Any] = []
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: noted.append(f"cuda:{index}"))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: noted.append(backend))
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MUON_DIST_STORE", raising=False)
    return noted


def test_a_process_takes_the_gpu_of_its_number(one_gpu: list[Any]) -> None:
    assert distributed.start(60) and one_gpu == ["cuda:0", "cpu:gloo,cuda:nccl"]


def test_a_process_without_a_gpu_is_told_how_many_there_are(
    one_gpu: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ConfigError, match=r"process 1 .* torch sees 1, .*CUDA_VISIBLE_DEVICES is '3'.*MIG.*use_cpu"):
        distributed.start(60)
    assert one_gpu == []


def test_on_the_cpu_any_number_of_processes_may_start(one_gpu: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickstart on a machine with one GPU."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.start(60, use_cpu=True) and one_gpu == ["gloo"]


# ---- several GPUs and one process, for which Trainer would use DataParallel


class TwoGpus(TrainingArguments):
    """Arguments of a process that sees two GPUs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._n_gpu = 2


def test_a_run_of_one_process_uses_one_gpu(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "TrainingArguments", TwoGpus)
    args = build.training_arguments(load_config(workspace / "tiny.yaml"), RunFolder(tmp_path), 100)
    assert args.n_gpu == 1 and args.train_batch_size == 4
    assert "one process uses one GPU, of 2 here" in capsys.readouterr().out


def test_muon_trainer_refuses_data_parallel(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sees 2 GPUs, .*DataParallel.*torchrun --nproc-per-node 2"):
        MuonTrainer(torch.nn.Linear(2, 2), TwoGpus(output_dir=str(tmp_path), use_cpu=True))


def test_a_loss_per_gpu_is_averaged_for_the_vote() -> None:
    class Loop(PrivateTrainer):
        model_accepts_loss_kwargs, compute_loss_func = False, None
        current_gradient_accumulation_steps = 2
        accelerator = SimpleNamespace(sync_gradients=True)

        def __init__(self) -> None:
            pass  # the loss needs only the lines above

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            return torch.tensor([1.0, 3.0])

    class Guarded(GuardedTrainer, Loop):
        guards = Guards()

    loop = Guarded()
    assert loop.compute_loss(torch.nn.Linear(1, 1), {}).tolist() == [1.0, 3.0]
    assert float(loop.guards.run._loss) == 1.0
