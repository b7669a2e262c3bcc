"""One configuration, trained on two ranks under DDP and under every ZeRO stage: the losses are the same."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import tests.adapters.deepspeed_ranks  # sets the environment before DeepSpeed is imported  # isort: skip  # noqa: F401

from muon_dist.config import load_config
from muon_dist.train import run
from tests.distributed import run_ranks
from tests.train.test_launch import finish, start

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("ddp", "zero0", "zero1", "zero2", "zero3")


def losses(root: Path, folder: Path, config: Path, name: str, *settings: str) -> list[float]:
    """The logged losses of one run of `muon-dist train` on two processes."""
    deepspeed = [] if name == "ddp" else [f"deepspeed=configs/deepspeed/{name}.json"]
    arguments = ["train", config, f"name={name}", "trainer.logging_steps=1", "trainer.save_strategy=no", *settings]
    command = ["--nproc-per-node", 2, *arguments, *deepspeed, "--run-dir", folder, "--overwrite"]
    code, out, err = finish(start(root, *command), timeout=900)
    assert code == 0, f"{out}\n{err}"
    return logged(folder / name)


def logged(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def assert_coincide(curves: dict[str, list[float]], steps: int) -> None:
    for name, curve in curves.items():
        assert len(curve) == steps
        worst = max(abs(a - b) for a, b in zip(curve, curves["ddp"], strict=True))
        print(f"{name}: last loss {curve[-1]:.6f}, largest difference from DDP {worst:.1e}")
        assert worst <= 1e-4, name


def _forked(path: Path, folder: Path, name: str, *settings: str) -> list[float]:
    """`losses`, on a rank that is there already."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # accelerate asks; the process group is there already
    deepspeed = [] if name == "ddp" else [f"deepspeed={ROOT}/configs/deepspeed/{name}.json"]
    settings = (f"name={name}", "trainer.save_strategy=no", *settings, *deepspeed)
    run.train(load_config(path, settings), run_dir=str(folder))
    return logged(folder / name)


def test_zero_0_and_3_train_as_ddp_does(workspace: Path, tmp_path: Path) -> None:
    """Clipping binds (the bound is far below the norm), so that an unequal clip would show."""
    clip = "optimizer.clip.adamw=0.1"
    curves = {
        name: run_ranks(_forked, 2, workspace / "tiny.yaml", tmp_path, name, clip, timeout=200)[0]
        for name in ("ddp", "zero0", "zero3")
    }
    assert_coincide(curves, 8)


@pytest.mark.slow
@pytest.mark.torchrun
def test_quickstart_at_every_stage(root: Path, tmp_path: Path) -> None:
    """The default corpus and model, 50 steps. `bash launch/test.sh -m slow -s tests/train/test_zero_stages.py`"""
    settings = ("trainer.max_steps=50", "trainer.eval_strategy=no", f"data.dir={tmp_path / 'data'}")
    config = root / "configs" / "quickstart.yaml"
    assert_coincide({name: losses(root, tmp_path, config, name, *settings) for name in STAGES}, 50)
