"""A Trainer with our checkpoints instead of its own: committed, verified, for every layout, without pickle."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HubStrategy

from muon_dist.adapters import deepspeed_state, module_state
from muon_dist.adapters.hf.flow import BeginRun
from muon_dist.adapters.hf.guarded import GuardedTrainer
from muon_dist.adapters.rates import GroupRates
from muon_dist.checkpoint import (
    BUFFER,
    MODEL_FOLDER,
    WEIGHT,
    Checkpoint,
    Contents,
    Holding,
    Provider,
    RandomState,
    Ranks,
    Saver,
    checkpoint_name,
    load,
    newest_good,
    open_checkpoint,
    set_aside_after,
    tidy,
)
from muon_dist.errors import CheckpointError, ConfigError
from muon_dist.optim.muon import Muon
from muon_dist.optim.unwrap import bare_optimizer

TRAINER_STATE = "trainer_state.json"


def _print(text: str) -> None:
    print(text, flush=True)


@dataclass
class CheckpointOptions:
    """How a `MuonTrainer` saves.

    background: training stops only for the copy to host memory. keep_last, keep_every: see `checkpoint.folder.retire`;
    `save_total_limit` is the default of `keep_last`. on_error: "stop" or "continue" if a save fails. config: the run's
    configuration, as plain data without secrets, stored in every manifest. say: prints messages; called on the first
    rank. begin: called on the first rank right before the first step, before the run changes its folder; an error in
    it ends the run on all ranks.
    """

    background: bool = False
    keep_last: int | None = None
    keep_every: int | None = None
    on_error: str = "stop"
    config: Mapping[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = _print
    begin: Callable[[], None] = lambda: None


@contextlib.contextmanager
def _sharded_at_load(args: TrainingArguments | None, model: Any) -> Iterator[None]:
    """Context in which a Trainer accepts a model that transformers has sharded at load time (`DistributedConfig`).

    Trainer refuses to save the optimizer of such a model. Our checkpoints can save it.
    """
    if args is None or args.save_only_model or not getattr(model, "is_distributed_loading_by_transformers", False):
        yield
        return
    args.save_only_model = True
    try:
        yield
    finally:
        args.save_only_model = False


class CheckpointTrainer(GuardedTrainer):
    """A `Trainer` that saves and resumes through `muon_dist.checkpoint`.

    Attributes:
        providers: name -> provider of small state for checkpoints, equal on all ranks; add before `train`.
        rank_providers: the same, for state that differs between ranks.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *rest: Any,
        checkpoint: CheckpointOptions | None = None,
        **kwargs: Any,
    ) -> None:
        if args is not None and args.push_to_hub and args.hub_strategy != HubStrategy.END:
            raise ConfigError(
                f"hub_strategy={args.hub_strategy.value} would push checkpoints while they are written: use "
                "hub_strategy='end', or push the output of `muon-dist checkpoint export`"
            )
        with _sharded_at_load(args, model):
            super().__init__(model, args, *rest, **kwargs)
        self.checkpoint_options = checkpoint or CheckpointOptions()
        self.providers: dict[str, Provider] = {}
        self._random = RandomState()
        self.rank_providers: dict[str, Provider] = {"random": self._random}
        self._saver: Saver | None = None
        self._source: Checkpoint | None = None
        self._documents: dict[str, bytes] | None = None
        self._best_step: int | None = None
        self.add_callback(BeginRun(self))

    @property
    def weights_step(self) -> int:
        """The optimizer step of the model's weights; an earlier step after the best checkpoint was loaded."""
        return self._best_step if self._best_step is not None else self.state.global_step

    # ---- saving

    @property
    def saver(self) -> Saver:
        """The object that commits checkpoints. The first use makes it, and is a collective."""
        if self._saver is None:
            options = self.checkpoint_options
            self._saver = Saver(
                self.args.output_dir,
                Ranks.of_the_run(self.args.ddp_timeout),
                background=options.background,
                on_error=options.on_error,
                keep_last=options.keep_last or self.args.save_total_limit,
                keep_every=options.keep_every,
            )
        return self._saver

    def commit(self) -> Path | None:
        """Save now, wait until the checkpoint is committed, and return the newest commit. Call it on every rank."""
        self.write_checkpoint(Path(self.args.output_dir))
        return self.saver.wait()

    def position(self) -> dict[str, Any]:
        """The run's position in the data, for the manifest."""
        return {"global_step": self.state.global_step, "world_size": self.args.world_size}

    def write_checkpoint(self, folder: Path) -> None:
        """Save `checkpoint-STEP` below `folder`, instead of Trainer's checkpoint; every rank calls it."""
        super().write_checkpoint(folder)
        self.store_flos()
        root = self.saver.root = folder
        best = self.state.best_global_step
        if best and (best == self.state.global_step or (root / checkpoint_name(best)).is_dir()):
            self.state.best_model_checkpoint = str(root / checkpoint_name(best))
        held = self.holding()
        state = {name: provider.state_dict() for name, provider in self._shared().items()}
        if self.args.save_only_model:
            held.pieces = [p for p in held.pieces if p.kind in (WEIGHT, BUFFER)]
            state = {}
        first = self.saver.ranks.rank == 0
        contents = Contents(
            step=self.state.global_step,
            layout=held.layout,
            info={"position": self.position(), "config": dict(self.checkpoint_options.config), **_versions()},
            documents={TRAINER_STATE: self._trainer_state(), **self._model_documents()} if first else {},
        )
        self.saver.save(
            held.pieces,
            contents,
            state=state,
            rank_state={name: provider.state_dict() for name, provider in self.rank_providers.items()},
            protected=[Path(self.state.best_model_checkpoint)] if self.state.best_model_checkpoint else (),
        )

    def holding(self, source: Checkpoint | None = None) -> Holding:
        """This rank's part of the model and its optimizer."""
        if self.is_deepspeed_enabled:
            return deepspeed_state.holding(self.deepspeed, source=source)
        return module_state.holding(self.model, bare_optimizer(self.optimizer), self.saver.ranks.size, source=source)

    def _shared(self) -> dict[str, Provider]:
        """The providers that are equal on all ranks. The rates come last, to correct the scheduler's state."""
        found: dict[str, Provider] = dict(self.providers)
        found["scheduler"] = self.lr_scheduler
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None:
            found["scaler"] = scaler
        if self.is_deepspeed_enabled:
            found["deepspeed"] = deepspeed_state.EngineState(self.deepspeed)
        found["rates"] = GroupRates(self.optimizer, self.lr_scheduler, self._first)
        return found

    def _first(self, text: str) -> None:
        if self.saver.ranks.rank == 0:
            self.checkpoint_options.say(text)

    def _trainer_state(self) -> bytes:
        """Trainer's state, with the state of its callbacks, in Trainer's file format."""
        for callback in (*self.callback_handler.callbacks, self.control):
            if not isinstance(callback, ExportableState):
                continue
            name, state = callback.__class__.__name__, callback.state()
            kept = self.state.stateful_callbacks.get(name)
            if isinstance(kept, list):
                kept.append(state)
            else:
                self.state.stateful_callbacks[name] = state
        return (json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True) + "\n").encode()

    def _model_documents(self) -> dict[str, bytes]:
        """The files of configuration and tokenizer that transformers saves; they do not change during a run."""
        if self._documents is None:
            with tempfile.TemporaryDirectory() as folder:
                model = self.accelerator.unwrap_model(self.model)
                parts: list[Any] = [getattr(model, name, None) for name in ("config", "generation_config")]
                for part in (*parts, self.processing_class):
                    if hasattr(part, "save_pretrained"):
                        part.save_pretrained(folder)
                self._documents = {
                    f"{MODEL_FOLDER}/{p.name}": p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.is_file()
                }
        return self._documents

    # ---- resuming

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's `train`. `resume_from_checkpoint`: a path, an open `Checkpoint`, or True for the newest good one.

        From a checkpoint with only weights, the run starts at step 0 with a fresh optimizer.

        Raises:
            CheckpointError: there is no checkpoint, it is damaged, or it belongs to another model.
        """
        self._source = self._opened(resume_from_checkpoint)
        self._best_step = None
        self.begin_at(self._source if self._source is not None and not self._source.beginning else None)
        path = None
        if self._source is not None and self._source.beginning:
            what = "only weights" if self._source.weights_only else "weights and optimizer state of another program"
            self._first(f"{self._source.path} has {what}: the run starts at step 0 with them")
        elif self._source is not None:
            path = str(self._source.path)
        try:
            result = super().train(path, *args, **kwargs)
        except BaseException:
            if self._saver is not None:  # making it here would be a collective, and other ranks may not come
                self._saver.settle()  # finish pending saves, but raise the error that ended the run
            raise
        self.saver.wait()
        return result

    def begin_at(self, source: Checkpoint | None) -> None:
        """Prepare to train after `source`, or from step 0 if None. Called before the data loader is made."""

    def _opened(self, wanted: Any) -> Checkpoint | None:
        if wanted is None or wanted is False or isinstance(wanted, Checkpoint):
            return wanted or None
        if wanted is not True:
            return open_checkpoint(wanted, self.saver.ranks)
        found = newest_good(self.args.output_dir, self.saver.ranks, self.saver.warn)
        if found is None:
            raise CheckpointError(f"{self.args.output_dir} holds no finished checkpoint")
        return found

    def begin_run(self) -> None:
        """Prepare the run folder for the first step; on every rank. Nothing in it changes before this call."""
        self.saver.ranks.first(self._make_room)

    def _make_room(self) -> None:
        """On the first rank: begin the run, delete files that a killed process left, and rename later checkpoints,
        which belong to an abandoned branch of the run."""
        self.checkpoint_options.begin()
        root, source = Path(self.args.output_dir), self._source
        tidy(root)
        if source is not None and not source.beginning and source.path.resolve().parent == root.resolve():
            for moved in set_aside_after(root, source.step):
                self._first(f"a later checkpoint than the one from which the run resumes was renamed to {moved}")

    def restore(self) -> None:
        """Load weights, optimizer state and named states of the checkpoint to resume from, if any."""
        if self._source is not None:
            self._fill(self._source)
            if not self._source.beginning:
                self._restore_states(self._source)
                # Trainer took logging_steps, eval_steps and save_steps from the saved state. Use this run's values.
                self.state.compute_steps(self.args, self.state.max_steps)

    def _fill(self, source: Checkpoint) -> None:
        """Load weights and optimizer state."""
        if self.is_deepspeed_enabled and isinstance(self.deepspeed.basic_optimizer, Muon):
            from muon_dist.adapters.deepspeed import attach  # imports DeepSpeed, so only where it is used

            attach(self.deepspeed)
        load(source, self.holding(source), self.saver.ranks)
        source.close()

    def _restore_states(self, source: Checkpoint) -> None:
        saved = source.state()
        for name, provider in self._shared().items():
            if name in saved:
                provider.load_state_dict(saved.pop(name))
            else:
                self._first(f"{source.path} has no state of '{name}', which starts from its initial state")
        for name in saved:
            self._first(f"{source.path} has a state of '{name}', which this run does not have: the state is ignored")
        source.close()

    def restore_rank(self) -> None:
        """Restore the random generators and the other state of this rank."""
        source = self._source
        if source is None or source.beginning:
            return
        rank = self.saver.ranks.rank
        saved = source.rank_state(rank)
        source.close()
        if saved is None or source.manifest.world_size != self.saver.ranks.size:
            # At another world size random numbers cannot continue as before: only make the ranks differ.
            self._random.start_anew(self.args.seed + 1_000_003 * (source.step + 1) + rank)
            return
        for name, provider in self.rank_providers.items():
            if name in saved:
                provider.load_state_dict(saved[name])

    def roll_back(self) -> str:
        """Load weights and optimizer state from the newest good checkpoint, on every rank; return its name.

        Step count, schedule, data and random generators do not change. Raises CheckpointError without a checkpoint.
        """
        self.saver.wait()
        source = newest_good(self.saver.root, self.saver.ranks, self.saver.warn)
        if source is None:
            raise CheckpointError(f"{self.saver.root} has no checkpoint to roll back to: save more often")
        self._fill(source)
        return source.path.name

    def load_best_weights(self, path: Path) -> None:
        """Load only the weights of the checkpoint `path`."""
        source = open_checkpoint(path, self.saver.ranks)
        held = self.holding(source)
        held.pieces = [p for p in held.pieces if p.kind in (WEIGHT, BUFFER)]
        load(source, held, self.saver.ranks)
        self._best_step = source.step
        source.close()

    def finish_saves(self) -> None:
        """Wait until the last save is committed."""
        self.saver.wait()


def _versions() -> dict[str, Any]:
    import transformers

    return {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}


def read_position(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint's position in the data. Raises CheckpointError if it has none."""
    position = checkpoint.manifest.info.get("position", {})
    wrong = [k for k in ("global_step", "consumed_samples", "tokens") if not isinstance(position.get(k), int)]
    if wrong or "order" not in position:
        raise CheckpointError(f"{checkpoint.path} does not contain its position in the data ({', '.join(wrong)})")
    return dict(position)
