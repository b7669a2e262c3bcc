"""One configuration, trained on two ranks under DDP and under every ZeRO stage: the losses are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.train.test_launch import finish, start

pytestmark = [pytest.mark.deepspeed, pytest.mark.torchrun, pytest.mark.timeout(1800)]

STAGES = ("ddp", "zero0", "zero1", "zero2", "zero3")


def losses(root: Path, folder: Path, config: Path, name: str, *settings: str) -> list[float]:
    """The logged losses of one run of `muon-dist train` on two processes."""
    deepspeed = [] if name == "ddp" else [f"deepspeed=configs/deepspeed/{name}.json"]
    arguments = ["train", config, f"name={name}", "trainer.logging_steps=1", "trainer.save_strategy=no", *settings]
    command = ["--nproc-per-node", 2, *arguments, *deepspeed, "--run-dir", folder, "--overwrite"]
    code, out, err = finish(start(root, *command), timeout=900)
    assert code == 0, f"{out}\n{err}"
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def assert_coincide(curves: dict[str, list[float]], steps: int) -> None:
    for name, curve in curves.items():
        assert len(curve) == steps
        worst = max(abs(a - b) for a, b in zip(curve, curves["ddp"], strict=True))
        print(f"{name}: last loss {curve[-1]:.6f}, largest difference from DDP {worst:.1e}")
        assert worst <= 1e-4, name


def test_zero_0_and_3_train_as_ddp_does(root: Path, workspace: Path, tmp_path: Path) -> None:
    """Clipping binds (the bound is far below the norm), so that an unequal clip would show."""
    config = workspace / "tiny.yaml"
    clip = "optimizer.clip.adamw=0.1"
    curves = {name: losses(root, tmp_path, config, name, clip) for name in ("ddp", "zero0", "zero3")}
    assert_coincide(curves, 8)


@pytest.mark.slow
def test_quickstart_at_every_stage(root: Path, tmp_path: Path) -> None:
    """The default corpus and model, 50 steps. `bash launch/test.sh -m slow -s tests/train/test_zero_stages.py`"""
    settings = ("trainer.max_steps=50", "trainer.eval_strategy=no", f"data.dir={tmp_path / 'data'}")
    config = root / "configs" / "quickstart.yaml"
    assert_coincide({name: losses(root, tmp_path, config, name, *settings) for name in STAGES}, 50)
