"""Guards inside the Trainer: all ranks decide the same, whatever each of them saw."""

from __future__ import annotations

import os
import re
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from muon_dist import MuonTrainer
from muon_dist.adapters.hf.guarded import Guards, stop_text
from muon_dist.errors import ConfigError, NonFiniteError, ReplicaError
from muon_dist.train.signals import StopSignals
from tests.adapters.hf.test_trainer import Words, arguments, make_model
from tests.distributed import run_ranks
from tests.faults.processes import launch


class At(TrainerCallback):
    """Calls something at an event of one step."""

    def __init__(self, event: str, step: int, action: Any) -> None:
        setattr(self, event, lambda args, state, control, **kw: action() if state.global_step == step else None)


class Committing(MuonTrainer):
    """A trainer whose commits are counted instead of written: what a commit holds is tested elsewhere."""

    committed: tuple[int, ...] = ()

    def commit(self) -> Path:
        self.committed += (self.state.global_step,)
        return Path(f"checkpoint-{self.state.global_step}")


def make_trainer(folder: Path, guards: Guards, *callbacks: TrainerCallback, **changes: Any) -> Committing:
    return Committing(
        make_model(),
        arguments(folder, **{"max_steps": 8, **changes}),
        train_dataset=Words(),
        guards=guards,
        callbacks=list(callbacks),
    )


def signalled(folder: str) -> tuple:
    """Rank 1 gets SIGTERM while step 4 is under way."""
    said: list[str] = []
    with StopSignals() as signals:
        guards = Guards(stop_requested=lambda: signals.requested, say=said.append, watchdog_seconds=60.0)
        kill = At("on_step_begin", 3, lambda: os.kill(os.getpid(), signal.SIGTERM) if dist.get_rank() == 1 else None)
        trainer = make_trainer(Path(folder), guards, kill)
        trainer.train()
    assert guards.committed == "checkpoint-4"
    return trainer.state.global_step, trainer.committed, guards.stopped, signals.requested, said


def test_a_signal_to_one_rank_stops_all_at_one_step(tmp_path: Path) -> None:
    results = run_ranks(signalled, 2, str(tmp_path), timeout=120)
    assert [r[:3] for r in results] == [(4, (4,), {1: int(signal.SIGTERM)})] * 2
    assert [r[3] for r in results] == [0, int(signal.SIGTERM)]
    assert stop_text(results[0][2]) == "SIGTERM on rank 1"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def guarded(folder: str) -> tuple:
    """One run: a spike at step 6 on rank 0 alone, a slow rank 1 throughout."""
    warnings.simplefilter("ignore", RuntimeWarning)
    said: list[str] = []
    guards = Guards(spike="skip", spike_window=8, spike_sigmas=6.0, straggler_seconds=0.05, say=said.append)
    changes: list[bool] = []

    class Unwell(Committing):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training and self.state.global_step == 12 and dist.get_rank() == 0:
                kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"] / 10  # ten times the loss
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Watch(TrainerCallback):
        own: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any) -> None:
            self.before = [p.detach().clone() for p in model.parameters()]
            if dist.get_rank() == 1 and self.own is None:  # this rank's work takes a second longer in each step
                work = guards.stragglers.work
                self.own = work.seconds
                work.seconds = lambda: self.own() + 1.0

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any) -> None:
            same = all(torch.equal(p, b) for p, b in zip(model.parameters(), self.before, strict=True))
            changes.append(not same)

    trainer = Unwell(
        make_model(),
        arguments(Path(folder), max_steps=20, learning_rate=0.002, lr_scheduler_type="constant"),
        train_dataset=Words(),
        guards=guards,
        callbacks=[Watch()],
    )
    trainer.train()
    trained = trainer.optimizer
    while not hasattr(trained, "guard"):
        trained = trained.optimizer
    return changes, guards.spikes, guards.state_dict()["detector"], trained.guard.vetoed, said


def test_a_spike_on_one_rank_is_left_out_by_all_and_a_slow_rank_is_named(tmp_path: Path) -> None:
    first, second = run_ranks(guarded, 2, str(tmp_path), timeout=120)
    assert first[:4] == second[:4]
    changes, spikes, detector, vetoed, said = first
    assert changes == [step != 12 for step in range(20)]
    assert (spikes, vetoed, len(detector["losses"])) == (1, 1, 8)
    assert any(text.startswith("step 13 skipped: its loss ") for text in said)
    assert any(text.startswith("rank 1 is slow: ") for text in said), said
    assert second[4] == []


def rolled_back(folder: str) -> tuple:
    """A spike at step 7 with a commit at 5; then from the commit at 10 on, a second life."""
    said: list[str] = []

    class Unwell(MuonTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training and self.state.global_step == 7 and dist.get_rank() == 1:
                kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"] / 10
            return super().compute_loss(model, inputs, *args, **kwargs)

    def digest(model: Any) -> list[torch.Tensor]:
        return [p.detach().clone() for p in model.parameters()]

    kept: dict[int, list[torch.Tensor]] = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any) -> None:
            kept[state.global_step] = digest(model)

    def trainer() -> tuple[MuonTrainer, Guards]:
        guards = Guards(spike="rollback", spike_window=8, hash_every=2, say=said.append)
        settings = arguments(Path(folder), max_steps=12, save_steps=5, save_strategy="steps", learning_rate=0.002)
        # the guards' event comes before that of Keep
        made = Unwell(make_model(), settings, train_dataset=Words(), guards=guards)
        made.add_callback(Keep())
        return made, guards

    first, guards = trainer()
    first.train()
    back = all(torch.equal(a, b) for a, b in zip(kept[8], kept[5], strict=True))
    went_on = not all(torch.equal(a, b) for a, b in zip(kept[9], kept[5], strict=True))
    state, last = guards.state_dict(), kept[12]
    second, again = trainer()
    second.train(resume_from_checkpoint=str(Path(folder) / "checkpoint-10"))
    exact = again.state_dict() == state and all(torch.equal(a, b) for a, b in zip(kept[12], last, strict=True))
    return back, went_on, guards.rollbacks, exact, [text for text in said if "loaded from" in text]


def test_rollback_and_the_window_after_resume(tmp_path: Path) -> None:
    first, second = run_ranks(rolled_back, 2, str(tmp_path), timeout=120)
    assert first[:4] == second[:4] == (True, True, 1, True)
    assert first[4] == ["weights and optimizer state were loaded from checkpoint-5; data and schedule continue"]
    assert second[4] == []


def flipped(folder: str) -> str:
    trainer: Any = None

    def flip() -> None:
        if dist.get_rank() == 1:
            raw = dict(trainer.model.named_parameters())["model.layers.1.mlp.up_proj.weight"].untyped_storage()
            raw[11] = raw[11] ^ 64

    trainer = make_trainer(Path(folder), Guards(hash_every=3), At("on_step_begin", 4, flip))
    with pytest.raises(ReplicaError) as caught:
        trainer.train()
    assert trainer.state.global_step == 6
    return str(caught.value)


def test_a_flipped_bit_is_found_within_an_interval(tmp_path: Path) -> None:
    for message in run_ranks(flipped, 3, str(tmp_path), timeout=120):
        assert "model.layers.1.mlp.up_proj.weight: rank 1 differs from the others" in message or "more" in message


def left_alone(folder: str) -> None:
    def die() -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    make_trainer(Path(folder), Guards(), At("on_step_begin", 3, die)).train()


def test_a_peer_that_is_killed_is_an_error_with_operation_and_step(tmp_path: Path) -> None:
    began = time.time()
    survivor, killed = launch(left_alone, 2, str(tmp_path))
    assert killed.code == -signal.SIGKILL and survivor.code == 10
    assert survivor.ended - killed.ended < 60 and survivor.ended - began < 120, "before any time-out"
    assert re.search(r"error: PeerError: rank 0: [a-z/ ]+ in step 4 failed: ", survivor.error)


def test_bad_steps_that_deepspeed_leaves_out_are_counted(tmp_path: Path) -> None:
    class Wrapper:
        overflow = True

    class Engine:
        optimizer = Wrapper()

    guards = Guards(max_nonfinite=3)
    trainer = make_trainer(tmp_path, guards)
    trainer.deepspeed = Engine()

    def end_step() -> None:
        guards.nonfinite.on_step_end(trainer.args, trainer.state, trainer.control)

    for _ in range(2):
        end_step()
    with pytest.raises(NonFiniteError, match="3 optimizer steps in a row"):
        end_step()


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"guards.spike is 'often': use one of off, skip, rollback"):
        Guards(spike="often")
    model = make_model()
    trainer = MuonTrainer(
        model,
        arguments(tmp_path),
        train_dataset=Words(),
        guards=Guards(spike="skip"),
        optimizers=(torch.optim.AdamW(model.parameters()), None),
    )
    with pytest.raises(ConfigError, match=r"guards.spike=skip needs Muon"):
        trainer.train()


def test_a_second_signal_ends_the_process() -> None:
    pid = os.fork()
    if pid == 0:
        with StopSignals():
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
