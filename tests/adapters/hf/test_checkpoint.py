"""MuonTrainer's checkpoints: exact resume, another stage under DeepSpeed, best model, roll-back, changed settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback

pytest.importorskip("deepspeed")

import deepspeed  # before the ranks are forked: seconds for each of them
from accelerate import PartialState

from muon_dist import MuonTrainer
from muon_dist.adapters.hf.trainer import CheckpointOptions
from muon_dist.checkpoint import Checkpoint, commits
from muon_dist.errors import CheckpointError, ConfigError
from tests.adapters.hf.test_trainer import Order, Words, arguments, digest, losses, make_model
from tests.distributed import run_ranks

BATCH = 12  # of all ranks


def trainer_for(folder: str, layout: str, *callbacks: TrainerCallback, **changes: Any) -> MuonTrainer:
    """Six steps, saved every two, under DDP or a ZeRO stage ("zero2")."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    settings: dict[str, Any] = {
        "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": BATCH // world, **changes,
    }  # fmt: skip
    if layout.startswith("zero"):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29577", ACCELERATE_USE_DEEPSPEED="true")
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", verbose=False)
        PartialState(backend="gloo")
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",  # without it accelerate clips at 1
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": int(layout[4])},
        }
        settings.update(
            use_cpu=False,
            accelerator_config={"use_configured_state": True},
            deepspeed=config,
            max_grad_norm=0.0,
        )
    args = arguments(Path(folder), **settings)
    return MuonTrainer(
        make_model(),
        args,
        muon={"adamw_lr": args.learning_rate / 4, "print_routing": False, "ns_dtype": torch.float32},
        clip_adamw=None,
        train_dataset=Words(),
        eval_dataset=Words(16) if "eval_strategy" in changes else None,
        train_sampler=Order,
        checkpoint=CheckpointOptions(background=layout in ("ddp", "zero2"), say=lambda text: None),
        callbacks=list(callbacks),
    )


def session(folder: str, layout: str, resume: Any, gently: bool = False) -> list[float]:
    trainer = trainer_for(folder, layout, **({"learning_rate": 1e-3} if gently else {}))
    trainer.train(resume_from_checkpoint=resume)
    return losses(trainer)


def weights(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.look(path)
    return {name: checkpoint.tensor(kind, name) for kind, name in checkpoint.manifest.tensors if kind == "weight"}


def same(first: Path, second: dict[str, torch.Tensor]) -> bool:
    a = weights(first)
    return a.keys() == second.keys() and all(torch.equal(a[n], second[n]) for n in a)


@pytest.mark.deepspeed
@pytest.mark.parametrize("layout", [*(pytest.param(z, marks=pytest.mark.slow) for z in ("zero0", "zero2")), "zero3"])
def test_resume_is_exact_under_deepspeed(tmp_path: Path, layout: str) -> None:
    whole = run_ranks(session, 2, str(tmp_path), layout, None, timeout=200)
    last = weights(tmp_path / "checkpoint-6")
    again = run_ranks(session, 2, str(tmp_path), layout, str(tmp_path / "checkpoint-2"), timeout=200)
    assert again == whole and same(tmp_path / "checkpoint-6", last)


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("before", "after"),
    [(("zero3", 2), ("ddp", 3)), pytest.param(("ddp", 1), ("zero2", 2), marks=pytest.mark.slow)],
)
def test_another_stage_and_number_of_ranks(tmp_path: Path, before: tuple[str, int], after: tuple[str, int]) -> None:
    whole = run_ranks(session, before[1], str(tmp_path), before[0], None, True, timeout=200)
    again = run_ranks(session, after[1], str(tmp_path), after[0], str(tmp_path / "checkpoint-2"), True, timeout=200)
    assert again[0][:3] == pytest.approx(whole[0][:3], abs=1e-6), "the same state"
    assert again[0] == pytest.approx(whole[0], abs=1e-5), "sums over ranks round differently"


class At(TrainerCallback):
    """Does something once, after a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action, self.trainer = step, action, None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action(self.trainer)


def rolled_back(folder: str) -> tuple[str, bool, bool]:
    out: list[Any] = []

    def roll(trainer: Any) -> None:
        before = digest(trainer.model)
        out.append(trainer.roll_back())
        out.append(digest(trainer.model) != before)

    watch = At(5, roll)
    trainer = trainer_for(folder, "ddp", watch)
    watch.trainer = trainer  # type: ignore[assignment]
    step_four: list[str] = []
    keep = At(4, lambda t: step_four.append(digest(trainer.model)))
    trainer.add_callback(keep)
    after: list[str] = []
    trainer.add_callback(At(5, lambda t: after.append(digest(trainer.model))))
    trainer.train()
    return (*out, after == step_four)


def test_roll_back_gives_weights_and_state_back(tmp_path: Path) -> None:
    for found in run_ranks(rolled_back, 2, str(tmp_path), timeout=120):
        assert found == ("checkpoint-4", True, True)


def test_roll_back_without_a_checkpoint(tmp_path: Path) -> None:
    watch = At(1, lambda trainer: trainer.roll_back())
    trainer = trainer_for(str(tmp_path), "ddp", watch)
    watch.trainer = trainer  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match="no checkpoint to roll back to"):
        trainer.train()


def test_a_commit_between_saves(tmp_path: Path) -> None:
    watch = At(3, lambda trainer: trainer.commit())
    trainer = trainer_for(str(tmp_path), "ddp", watch)
    watch.trainer = trainer  # type: ignore[assignment]
    trainer.train()
    assert [p.name for p in commits(tmp_path)] == [f"checkpoint-{n}" for n in (2, 3, 4, 6)]
    whole = weights(tmp_path / "checkpoint-6")
    again = trainer_for(str(tmp_path), "ddp")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(tmp_path / "checkpoint-6", whole)
    names = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert sum(n.startswith("set-aside-checkpoint-") for n in names) == 2, "later steps of the old course"


def test_the_newest_good_one_is_taken_and_others_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer_for(str(tmp_path), "ddp").train()
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text("{}")
    (tmp_path / ".checkpoint-7.tmp-00").mkdir()
    again = trainer_for(str(tmp_path), "ddp")
    again.train(resume_from_checkpoint=True)
    assert "checkpoint-6/trainer_state.json has 2 bytes" in capsys.readouterr().err
    assert not list(tmp_path.glob(".checkpoint-*")) and len(list(tmp_path.glob("set-aside-checkpoint-6-*"))) == 1
    assert again.state.global_step == 6


def test_the_best_model_at_the_end(tmp_path: Path) -> None:
    trainer = trainer_for(
        str(tmp_path), "ddp", eval_strategy="steps", eval_steps=2, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint or "").name == "checkpoint-2", "the loss falls, greater is better"
    assert {p.name for p in commits(tmp_path)} == {"checkpoint-2", "checkpoint-6"}, "the best one is protected"
    best = weights(tmp_path / "checkpoint-2")
    assert all(torch.equal(p, best[n]) for n, p in trainer.model.named_parameters() if n in best)


def test_weights_alone_begin_a_run(tmp_path: Path) -> None:
    trainer_for(str(tmp_path / "a"), "ddp", save_only_model=True, max_steps=2).train()
    checkpoint = Checkpoint.look(tmp_path / "a" / "checkpoint-2")
    assert checkpoint.weights_only
    trainer = trainer_for(str(tmp_path / "b"), "ddp", max_steps=1, learning_rate=0.0)
    trainer.train(resume_from_checkpoint=str(checkpoint.path))
    assert trainer.state.global_step == 1
    name, p = next((n, p) for n, p in trainer.model.named_parameters() if "q_proj" in n)
    assert torch.equal(p, checkpoint.tensor("weight", name)), "Muon's rate is 0"


def test_a_changed_rate_is_taken_over(tmp_path: Path) -> None:
    trainer_for(str(tmp_path), "ddp").train()
    again = trainer_for(str(tmp_path), "ddp", learning_rate=0.01)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    rates = [entry["lr/muon"] for entry in again.state.log_history if "lr/muon" in entry]
    assert rates == pytest.approx([0.02, 0.02 * 5 / 6, *(0.01 * (6 - n) / 6 for n in (2, 3, 4, 5))])


def test_pushing_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hub_strategy"):
        trainer_for(str(tmp_path), "ddp", push_to_hub=True, hub_strategy="every_save")
