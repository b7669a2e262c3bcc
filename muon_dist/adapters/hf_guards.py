"""What watches over a `MuonTrainer` run: loss spikes, copies that differ, hangs, slow ranks, signals to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from muon_dist.adapters.fsdp2.storage import is_sharded, local_part, replica_groups, reshard
from muon_dist.errors import ConfigError, NonFiniteError, PeerError
from muon_dist.exchange.progress import Progress, place
from muon_dist.exchange.transport import is_network_error
from muon_dist.exchange.vote import Ballot, StepVote, StragglerReport
from muon_dist.exchange.watchdog import IDLE, Watchdog, default_store
from muon_dist.optim.muon import Muon
from muon_dist.optim.replicas import ReplicaCheck, check_everywhere
from muon_dist.optim.spikes import SIGMAS, WINDOW, SpikeDetector

POLICIES = ("off", "skip", "rollback")
_WATCHDOG_SHARE = 0.9  # of the process group's timeout, so that ours, which names things, comes first
_MOST_ROLLBACKS = 3


class Guards(TrainerCallback):
    """Guards of one run; give it to `MuonTrainer(guards=...)`.

    spike: what happens to a step whose loss, averaged over all ranks, jumps (see `SpikeDetector`): "off" nothing;
        "skip" it is left out, with parameters and state unchanged; "rollback" it is left out, and parameters and
        optimizer state go back to the last commit, while step count, schedule and data go on.
    spike_window, spike_sigmas: of the detector.
    hash_every: steps between two comparisons of the copies of parameters; also before each save, and after a step
        that was left out for NaN or infinity; 0: never.
    watchdog_seconds: the run ends with a message when one operation takes longer; None: 0.9 of the process group's
        timeout; 0: never.
    straggler_seconds: a rank that takes so much longer for its own work, step after step, is named; 0: never.
    max_nonfinite: so many steps in a row that DeepSpeed leaves out for NaN or infinity end the run; `Muon` counts
        its own. Not in fp16 with a dynamic loss scale, where such steps are usual.
    stop_requested: the number of the signal that asked this rank to stop, or 0.
    say: for messages; called on the first rank.

    Attributes:
        stopped: rank -> signal of those that asked to stop, once all ranks have committed a checkpoint for it.
        committed: name of the newest checkpoint then; an older one where saves may fail (`on_error: continue`).
        spikes: steps left out for their loss.
    """

    def __init__(
        self,
        *,
        spike: str = "off",
        spike_window: int = WINDOW,
        spike_sigmas: float = SIGMAS,
        hash_every: int = 100,
        watchdog_seconds: float | None = None,
        straggler_seconds: float = 0.1,
        max_nonfinite: int = 5,
        stop_requested: Callable[[], int] = lambda: 0,
        say: Callable[[str], None] = print,
    ) -> None:
        if spike not in POLICIES:
            raise ConfigError(f"guards.spike is {spike!r}: use one of {', '.join(POLICIES)}")
        self.spike, self.hash_every = spike, hash_every
        self.watchdog_seconds, self.straggler_seconds = watchdog_seconds, straggler_seconds
        self.max_nonfinite = max_nonfinite
        self.detector = SpikeDetector(spike_window, spike_sigmas)
        self.stopped: dict[int, int] = {}
        self.committed: str | None = None
        self.spikes = self.rollbacks = 0
        self._bad_in_row = 0
        self._stop_requested, self._say = stop_requested, say
        self._trainer: Any = None
        self._progress = Progress()
        self._vote: StepVote | None = None
        self._watchdog: Watchdog | None = None
        self._stragglers: StragglerReport | None = None
        self._checks: list[ReplicaCheck] | None = None
        self._loss: torch.Tensor | float = 0.0
        self._ballot: Ballot | None = None
        self._spiked = False
        self._hook: Any = None

    # ---- state in checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know to decide as this one would."""
        muon = self._muon()
        return {
            "detector": self.detector.state_dict(),
            "spikes": self.spikes,
            "rollbacks": self.rollbacks,
            "bad_in_row": self._bad_in_row,
            "step_guard": muon.guard.state_dict() if muon is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint holds."""
        self.detector.load_state_dict(state["detector"])
        self.spikes, self.rollbacks = int(state["spikes"]), int(state["rollbacks"])
        self._bad_in_row = int(state["bad_in_row"])
        muon = self._muon()
        if muon is not None and state["step_guard"] is not None:
            muon.guard.load_state_dict(state["step_guard"])

    # ---- called by MuonTrainer

    def attach(self, trainer: Any) -> None:
        """Belong to `trainer`; before training."""
        self._trainer = trainer

    def begin_data(self) -> None:
        """This rank begins to work for the next step."""
        self._progress.enter("data")
        self._clock("start")
        self._loss, self._ballot, self._spiked = 0.0, None, False

    def _clock(self, action: str) -> None:
        if self._vote is not None:
            getattr(self._vote.work, action)()

    def pause(self) -> None:
        """From here on this rank may wait for others."""
        self._clock("pause")

    def resume(self) -> None:
        """This rank works for itself again."""
        self._clock("resume")

    def add_loss(self, loss: torch.Tensor, last: bool) -> None:
        """A micro-batch's part of this step's loss, before its backward pass; `last` begins the vote."""
        self.pause()
        self._loss = self._loss + loss.detach()
        if last and self._vote is not None:
            self._vote.cast(self._loss, self._stop_requested())

    def begin_save(self) -> None:
        """A checkpoint is being written."""
        self._progress.enter("save")

    def named(self, error: RuntimeError) -> PeerError | None:
        """A failed message between ranks as an error that says in what; None for any other error."""
        if not is_network_error(error):
            return None
        p, rank = self._progress, self._vote.rank if self._vote is not None else 0
        first_line = str(error).strip().partition("\n")[0]
        return PeerError(
            f"rank {rank}: {place(p.operation, p.bucket, p.step)} failed: {first_line}. Another rank has ended, or "
            "the network is down: look for the first error of the other ranks"
        )

    def close(self) -> None:
        """End what runs beside training; also after an error."""
        self._progress.enter(IDLE)
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        muon = self._muon()
        if muon is not None:
            muon.guard.veto = None

    # ---- Trainer's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self._vote = StepVote(dist.group.WORLD if distributed else None, args.device)
        rank, world = self._vote.rank, self._vote.world_size
        self._stragglers = StragglerReport(world, seconds=self.straggler_seconds) if self.straggler_seconds else None
        muon = self._muon()
        if muon is None and self.spike != "off":
            raise ConfigError(f"guards.spike={self.spike} needs Muon, which can leave a step out: set it to off")
        if muon is not None:
            self._progress = muon.progress
            muon.guard.veto = self._veto
        self._progress.step = state.global_step
        if not args.torch_compile:  # a hook would be compiled too; then the forward pass does not count as own work
            # DDP sends buffers before it calls the model itself.
            self._hook = self._trainer.model.register_forward_pre_hook(lambda module, given: self._forward(module))
        seconds = self.watchdog_seconds
        if seconds is None:
            seconds = _WATCHDOG_SHARE * args.ddp_timeout
        if seconds > 0:
            self._watchdog = Watchdog(
                self._progress, default_store(), rank, world, timeout=seconds, device=self._trainer.args.device
            )
            self._watchdog.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.enter("forward/backward")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.enter("evaluation")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.enter(IDLE)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.enter(IDLE)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._read()
        self._count_bad_steps()
        if self._spiked and self.spike == "rollback":
            self._roll_back(state.global_step)
        stop = self._ballot.stop if self._ballot is not None else {}
        muon = self._muon()
        # A flipped exponent makes NaN on all ranks: which copy it was is known only now.
        bad = self._bad_in_row > 0 or (muon is not None and muon.guard.in_a_row > 0)
        due = self.hash_every > 0 and state.global_step % self.hash_every == 0
        if due or (self.hash_every > 0 and (stop or bad or control.should_save)):
            self._progress.enter("replica check")
            self._compare_copies()
        if stop:
            newest = self._trainer.commit()
            self.committed = newest.name if newest is not None else None
            self.stopped = stop
            control.should_save = control.should_evaluate = False
            control.should_training_stop = True
        self._progress.step = state.global_step
        self._progress.enter(IDLE)

    # ---- the parts

    def _forward(self, module: torch.nn.Module) -> None:
        if module.training:
            self.resume()

    def _muon(self) -> Muon | None:
        optimizer = getattr(self._trainer, "optimizer", None)
        while optimizer is not None and not isinstance(optimizer, Muon):
            optimizer = getattr(optimizer, "optimizer", None)  # accelerate's and DeepSpeed's wrappers
        return optimizer

    def _first(self, message: str) -> None:
        if self._vote is None or self._vote.rank == 0:
            self._say(message)

    def _read(self) -> None:
        """The vote of this step, read once: before the optimizer acts, or after a step in which it did not."""
        if self._ballot is not None or self._vote is None:
            return
        self._progress.enter("step vote")
        self._ballot = self._vote.result()
        if self._ballot is None:
            return
        if self._stragglers is not None and (message := self._stragglers.add(self._ballot.busy)):
            self._first(message)
        if self.spike != "off":
            limit = self.detector.limit()
            self._spiked = self.detector.is_spike(self._ballot.loss)
            if self._spiked:
                self.spikes += 1
                self._first(
                    f"step {self._trainer.state.global_step + 1} left out: its loss {self._ballot.loss:.4f} is above "
                    f"{limit:.4f}, {self.detector.sigmas:g} standard deviations over the mean of the last steps"
                )

    def _veto(self) -> bool:
        self._read()
        return self._spiked

    def _count_bad_steps(self) -> None:
        """DeepSpeed leaves bad steps out without asking the optimizer, for ever if need be."""
        wrapper = getattr(getattr(self._trainer, "deepspeed", None), "optimizer", None)
        dynamic = getattr(getattr(wrapper, "loss_scaler", None), "dynamic", False)
        if not getattr(wrapper, "overflow", False) or dynamic:
            self._bad_in_row = 0
            return
        self._bad_in_row += 1
        if self._bad_in_row >= self.max_nonfinite:
            raise NonFiniteError(
                f"gradients were NaN or infinite in {self._bad_in_row} optimizer steps in a row (max_nonfinite), the "
                f"last one step {self._trainer.state.global_step}; DeepSpeed's norm over all parameters says so on "
                "every rank. Nothing was changed by those steps. Lower the learning rate, or look at the data"
            )

    def _roll_back(self, step: int) -> None:
        self.rollbacks += 1
        if self.rollbacks > _MOST_ROLLBACKS:
            raise NonFiniteError(
                f"the loss jumped at step {step} for the {self.rollbacks}th time with guards.spike=rollback: the run "
                "does not get over it. Lower the learning rate, or look at the data"
            )
        self._progress.enter("rollback")
        found = self._trainer.roll_back()
        self._first(f"weights and optimizer state are those of {found} again; data and schedule go on")

    def _compare_copies(self) -> None:
        if self._checks is None:
            self._checks = list(replica_checks(self._trainer.model, self._trainer.args.device))
            if not self._checks and self._vote is not None and self._vote.world_size > 1:
                self._first("guards.hash_every: no parameter has copies on several ranks, so nothing is compared")
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        check_everywhere(self._checks, group)


class GuardedLoop:
    """The places of a Trainer's loop that guards must know of; to be inherited before Trainer."""

    guards: Guards | None = None

    def watch_with(self, guards: Guards) -> None:
        """Let `guards` watch over this trainer."""
        self.guards = guards
        guards.attach(self)
        self.add_callback(guards)  # type: ignore[attr-defined]

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._inner_training_loop(*args, **kwargs)  # type: ignore[misc]
        except RuntimeError as error:
            named = self.guards.named(error) if self.guards is not None else None
            if named is None:
                raise
            raise named from error
        finally:
            if self.guards is not None:
                self.guards.close()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if self.guards is None:
            return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self.guards.begin_data()
        batch = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self.guards.resume()
        return batch

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Any:
        if self.guards is not None:
            self.guards.pause()  # it asks all ranks
        return super()._get_num_items_in_batch(*args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.guards is not None:
            self.guards.begin_save()
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.guards is None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self.guards.pause()
        found = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        trainer: Any = self
        # weighted as training_step weights micro-batches
        scaled = trainer.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None
        loss = found[0] if isinstance(found, tuple) else found
        part = loss if scaled or trainer.compute_loss_func else loss / trainer.current_gradient_accumulation_steps
        # a loss of several elements, one per GPU under DataParallel, is averaged as training_step averages it
        self.guards.add_loss(part.mean(), last=trainer.accelerator.sync_gradients)
        return found


def replica_checks(model: torch.nn.Module, device: torch.device) -> Iterator[ReplicaCheck]:
    """The comparisons for a model whose ranks are data-parallel: one for each group of ranks that hold copies.

    Whole parameters over all ranks (DDP, ZeRO-1/2, ZeRO-0); shards over their replicas (HSDP). Under ZeRO-3 and
    plain FSDP2 there are no copies.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    reshard(model)
    whole: list[tuple[str, torch.Tensor]] = []
    shards: dict[tuple[int, ...], tuple[dist.ProcessGroup, list[tuple[str, torch.Tensor]]]] = {}
    for name, p in model.named_parameters():
        if is_sharded(p):
            for group in replica_groups(p):
                ranks = tuple(dist.get_process_group_ranks(group))
                shards.setdefault(ranks, (group, []))[1].append((name, local_part(p.detach())))
        elif not hasattr(p, "ds_tensor"):  # ZeRO-3's mark of a partitioned parameter
            whole.append((name, p.detach()))
    if whole:
        yield ReplicaCheck(whole, dist.group.WORLD, device)
    for group, named in shards.values():
        yield ReplicaCheck(named, group, device)


def stop_text(stopped: dict[int, int]) -> str:
    """ "SIGTERM on rank 2"."""
    return ", ".join(f"{signal.Signals(number).name} on rank {rank}" for rank, number in sorted(stopped.items()))
