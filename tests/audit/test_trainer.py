"""The audit of a `MuonTrainer`: its head in checkpoints, a chain that goes on after a resume, stale momentum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from muon_dist import MuonTrainer
from muon_dist.adapters.hf.trainer import CheckpointOptions
from muon_dist.audit.verify import STATE, verify
from muon_dist.checkpoint import Checkpoint
from muon_dist.errors import ConfigError
from muon_dist.optim.unwrap import find_muon
from tests.adapters.hf.test_trainer import Order, Words, arguments, losses, make_model


def trainer_for(
    folder: Path, audit: dict[str, Any] | None, *callbacks: TrainerCallback, qk_clip: dict[str, float] | None = None
) -> MuonTrainer:
    args = arguments(folder, save_strategy="steps", save_steps=2, per_device_train_batch_size=4)
    muon = {"adamw_lr": 1e-3, "print_routing": False, "ns_dtype": torch.float32, "audit": audit}
    options = CheckpointOptions(say=lambda text: None)
    return MuonTrainer(
        make_model(), args, muon=muon, train_dataset=Words(), train_sampler=Order, checkpoint=options,
        callbacks=list(callbacks), qk_clip=qk_clip,
    )  # fmt: skip


class Zero(TrainerCallback):
    """Loses the momentum that was loaded."""

    trainer: MuonTrainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            for momentum in find_muon(self.trainer.optimizer).runtime.momentum.values():
                momentum.zero_()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("audited")
    trainer = trainer_for(folder, {"every": 1})
    trainer.train()
    return folder, losses(trainer)


def test_a_run_is_audited_and_unchanged(run: tuple[Path, list[float]], tmp_path: Path):
    folder, figures = run
    off = trainer_for(tmp_path, None)
    off.train()
    assert losses(off) == figures, "bit for bit"
    found = verify(folder)
    assert found.good and {r["step"] for r in found.audits} == set(range(1, 7))
    assert found.heads == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_resumed_run_goes_on_with_the_chain(run: tuple[Path, list[float]]):
    folder, figures = run
    state = Checkpoint.look(folder / "checkpoint-2").state()[STATE]
    trainer = trainer_for(folder, {"every": 1})
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert losses(trainer) == figures
    found = verify(folder)
    assert found.good and found.starts == 2 and found.abandoned > 0 and state["step"] == 2
    assert sorted({r["step"] for r in found.audits}) == list(range(1, 7))


def test_momentum_that_was_lost_in_a_resume_is_named(run: tuple[Path, list[float]]):
    folder, _ = run
    zero = Zero()
    zero.trainer = trainer = trainer_for(folder, {"every": 1}, zero)
    with pytest.warns(RuntimeWarning, match="momentum is not what the saved run had: stale after a load"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    found = verify(folder)
    assert not found.good and found.alarms[0]["step"] == 3
    assert found.alarms[0]["alarms"][0]["causes"] == ["stale_momentum"]


def test_weights_that_qk_clip_scales_raise_no_alarm(tmp_path: Path):
    trainer = trainer_for(tmp_path, {"every": 1, "matrices": 4}, qk_clip={"threshold": 1e-3})
    trainer.train()
    assert trainer.qk_clip is not None and trainer.qk_clip.clipped > 0
    assert verify(tmp_path).good


class HeadLess(TrainerCallback):
    """From the third step on, checkpoints do not name the chain."""

    trainer: MuonTrainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            del self.trainer.providers[STATE]


def test_checkpoints_must_name_a_line_of_the_chain(tmp_path: Path):
    callback = HeadLess()
    callback.trainer = trainer = trainer_for(tmp_path, {"every": 1}, callback)
    trainer.train()
    said = [f"checkpoint-{n}: it names no line of the chain, though its step was audited" for n in (4, 6)]
    assert verify(tmp_path).problems == said
    chain = next(tmp_path.rglob("audit.jsonl"))
    chain.write_text("".join(chain.read_text().splitlines(keepends=True)[:3]))
    assert verify(tmp_path).problems == ["checkpoint-2: line 5, which it names, is not in the chain"]


def test_wrong_settings_are_refused_when_the_trainer_is_made(tmp_path: Path):
    with pytest.raises(ConfigError, match="audit: every is 0"):
        trainer_for(tmp_path, {"every": 0})
