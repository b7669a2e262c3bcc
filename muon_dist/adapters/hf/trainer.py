"""`MuonTrainer`: the Hugging Face Trainer with additions for Muon. For a stock Trainer use `MuonFactory`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from muon_dist.adapters.factory import MuonFactory, check_trainer, split_kwargs
from muon_dist.adapters.hf import attention
from muon_dist.adapters.hf.callbacks import AttachDeepSpeed, MetricsFile
from muon_dist.adapters.hf.checkpoint import CheckpointOptions, CheckpointTrainer, read_position
from muon_dist.adapters.hf.curriculum import PartRates, PartRules, RuleChange, order_at
from muon_dist.adapters.hf.evaluation import PlainLoss
from muon_dist.adapters.hf.figures import Figures, bits_per_byte
from muon_dist.adapters.hf.flow import Passes
from muon_dist.adapters.hf.guarded import Guards
from muon_dist.adapters.hf.norms import GradientNorms
from muon_dist.adapters.hf.parallel import consecutive, gather_once, parallelism_on_cpu, share_of_heads
from muon_dist.adapters.hf.records import AuditStart, SpectraLog, take_watchers
from muon_dist.adapters.hf.settings import outlive_trackers
from muon_dist.checkpoint import Checkpoint
from muon_dist.defaults import CLIP_ADAMW
from muon_dist.errors import CheckpointError, ConfigError
from muon_dist.optim.rule_change import rule_settings
from muon_dist.optim.unwrap import find_muon

__all__ = ["CheckpointOptions", "MuonFactory", "MuonTrainer", "TrainingArguments", "bits_per_byte", "leave_deepspeed"]

_STOCK_MAX_GRAD_NORM = 1.0  # TrainingArguments' default; it cannot be told from a value that the user set


class _Stream(Sampler[int]):
    """The rest of a sample stream, with the length of the whole stream, because Trainer counts its steps by it."""

    def __init__(self, samples: Iterable[int], remaining: int, total: int) -> None:
        self.samples, self.remaining, self.total = samples, remaining, total

    def __iter__(self) -> Iterator[int]:
        return islice(iter(self.samples), self.remaining)

    def __len__(self) -> int:
        return self.total


class MuonTrainer(PlainLoss, PartRates, CheckpointTrainer):
    """A `Trainer` that trains with Muon, logs the figures of pretraining, and writes sharded checkpoints.

    muon: keyword arguments of `MuonFactory`. `lr` and `weight_decay` default to those of `args`. You may instead pass
        `optimizer_cls_and_kwargs` or `optimizers` as to `Trainer`.
    clip_muon, clip_adamw: bounds on the gradient norm over all parameters. If the norm is larger, the gradients of
        Muon's or AdamW's parameters are scaled down. None: no bound. Muon's update does not depend on the gradient's
        size, so it needs no bound. Leave `max_grad_norm` at its default; only under DeepSpeed it is AdamW's bound.
    train_sampler: a function from the number of consumed samples to the next indices into `train_dataset`. A resumed
        run then continues with the next sample, at another world size too; `max_steps` is needed.
    bytes_per_token: (train, eval) bytes of text per token, for bits per byte; None: not logged.
    passes: a function from consumed samples to passes over each data source, for the log (`passes/<source>`).
    flops_per_token: forward and backward, for MFU; default: 6 x the parameters outside embeddings.
    peak_flops: FLOP/s of one rank's device; default: from a table (GPU) or measured (CPU).
    metrics_path: a JSON-lines file for everything that is logged.
    guards: checks during the run; None: only Muon's check that gradients are finite.
    checkpoint: how to save; see `CheckpointOptions` and `CheckpointTrainer`.
    rule_parts: the update rules of parts of the run; None: one rule for the whole run.
    qk_clip: clip attention logits after each step: a dict with `threshold` (100) and `alpha` (0.5), {} for both
        defaults; None: no clipping. See docs/qk-clip.md.

    In the logs: `lr/<group>`, `grad_norm` (raw, all parameters), `grad_norm/muon`, `grad_norm/adamw`, `tokens_per_s`
    (all ranks, without evaluation and saving), `tokens`, `mfu`, `bits_per_byte`, `eval_bits_per_byte`,
    `eval_perplexity`. With `qk_clip`, for the last step: `qk_clip/max_logit`, `qk_clip/heads` (clipped heads).
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        muon: Mapping[str, Any] | None = None,
        clip_muon: float | None = None,
        clip_adamw: float | None = CLIP_ADAMW,
        train_sampler: Callable[[int], Iterable[int]] | None = None,
        bytes_per_token: tuple[float, float] | None = None,
        passes: Callable[[int], Mapping[str, float]] | None = None,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        metrics_path: str | Path | None = None,
        guards: Guards | None = None,
        qk_clip: Mapping[str, float] | None = None,
        rule_parts: PartRules | None = None,
        **kwargs: Any,
    ) -> None:
        attention.check_options(qk_clip or {})
        args = args if args is not None else TrainingArguments(output_dir="tmp_trainer")
        _check(args, muon, clip_muon, train_sampler, kwargs)
        args.max_grad_norm = args.max_grad_norm if args.deepspeed is not None else 0.0
        args.parallelism_config = parallelism_on_cpu(args, model) or args.parallelism_config
        if train_sampler is not None:
            args.ignore_data_skip = True
        own = kwargs.get("optimizer_cls_and_kwargs") is None and kwargs.get("optimizers", (None, None))[0] is None
        if own:
            split_kwargs(muon or {})  # report unknown names now, not at the first step
            # A function, called when the optimizer is made: a hyper-parameter search may change rates or args before.
            chosen = {**(muon or {}), "training_arguments": lambda: self.args}
            kwargs["optimizer_cls_and_kwargs"] = (MuonFactory, chosen)
        given = kwargs.pop("optimizer_cls_and_kwargs", None)
        factory, diagnostics, self.audit = take_watchers(given, args.output_dir or ".")
        super().__init__(model, args, optimizer_cls_and_kwargs=factory, **kwargs)
        self.clip = {"muon": clip_muon, "adamw": clip_adamw}
        self.qk_clip, self._qk_clip_options = cast("attention.QKClip | None", None), qk_clip
        self.train_sampler, self.rule_parts = train_sampler, rule_parts
        self.figures = Figures(self, bytes_per_token, passes, flops_per_token, peak_flops)
        self.begin_at(None)
        self._first_batch = False
        if diagnostics is not None:
            self.add_callback(SpectraLog(diagnostics))  # before the file, so that the file gets its figures
        if self.audit is not None:
            self.add_callback(AuditStart(self.audit))
            self.providers["audit"], self.rank_providers["audit"] = self.audit, self.audit.follow
        if factory is not None and factory[0] is MuonFactory:
            self.add_callback(AttachDeepSpeed(self))
        if train_sampler is not None:
            self.add_callback(Passes(self))
        if rule_parts is not None:
            self.add_callback(RuleChange(self))
        if metrics_path is not None:
            self.add_callback(MetricsFile(metrics_path))
        outlive_trackers(self.callback_handler.callbacks)
        if guards is not None:
            self.watch_with(guards)
            self.providers["guards"] = guards
        self.add_callback(self.figures)  # last, so that a step's time includes the other callbacks

    # ---- the position in the data

    @property
    def samples_per_step(self) -> int:
        """Samples per optimizer step, over all ranks and micro-batches."""
        return int(self.get_total_train_batch_size(self.args))

    @property
    def _readers(self) -> int:
        """Number of ranks that read the same tokens in a step: tensor times context parallelism."""
        return int(self.get_tp_size() * self.get_cp_size())

    @property
    def consumed_samples(self) -> int:
        """Samples that all optimizer steps so far have used, over all ranks."""
        return self._first_sample + (self.state.global_step - self._first_step) * self.samples_per_step

    def position(self) -> dict[str, Any]:
        """The run's position in the data, and its update rules, for the manifest of a checkpoint."""
        muon = find_muon(self.optimizer)
        return {
            "rules": rule_settings(muon).names() if muon is not None else {},
            "global_step": self.state.global_step,
            "consumed_samples": self.consumed_samples,
            "samples_per_step": self.samples_per_step,
            "tokens": self.figures.tokens,
            "world_size": self.args.world_size,
            "order": self._order if self._samples is None else order_at(self._samples, self.consumed_samples),
        }

    def _fill(self, source: Checkpoint) -> None:
        if self.rule_parts is not None:  # load with the saved rule, before a part changes it
            self.rule_parts.use(self.optimizer, max(source.step - 1, 0))
        super()._fill(source)
        if self.audit is not None:
            self.audit.forget()

    def begin_at(self, source: Checkpoint | None) -> None:
        """Continue data and counts at the position of `source`; None: from the beginning."""
        position = read_position(source) if source is not None else {}
        self._first_step, self._first_sample = position.get("global_step", 0), position.get("consumed_samples", 0)
        self._order: str | None = position.get("order")
        self._samples: Any = None  # the order of samples, while there is one
        self.figures.begin_at(position.get("tokens", 0))

    def restore(self) -> None:
        """`CheckpointTrainer.restore`. The next batch restores the random generators again."""
        super().restore()
        self._first_batch = self._source is not None

    def training_order(self, dataset: Any) -> Any:
        """The samples of `train_sampler` from the run's position on; without `train_sampler` Trainer's order."""
        if self.train_sampler is None:
            return super().training_order(dataset)
        # `self.state` has no step yet: Trainer reads the checkpoint's state later.
        remaining = max(0, self.args.max_steps - self._first_step) * self.samples_per_step
        samples = self._samples = self.train_sampler(self._first_sample)
        if hasattr(samples, "check_resume"):
            samples.check_resume(self._first_step, self._first_sample)
        order = order_at(samples, self._first_sample)
        if self._order is not None and order != self._order:
            raise CheckpointError(
                f"{self._source.path if self._source else ''} was trained on another order of samples (data, weights, "
                "sequence length or seed differ): use the same settings, or start a new run"
            )
        self._order = order
        sp = self.get_sp_size()
        if sp > 1:
            samples = consecutive(samples, self.micro_batch_size, (self.args.world_size // sp, sp))
        return _Stream(samples, remaining, self.args.max_steps * self.samples_per_step)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of the next step, as Trainer's."""
        self.figures.begin_step()
        if self.qk_clip is not None:
            self.qk_clip.maxima.clear()  # left from a step that DeepSpeed has skipped
        batch = super().get_batch_samples(*args, **kwargs)
        if self._first_batch and self.train_sampler is not None:
            # Making the iterator draws random numbers. In the saved run this happened before the state was saved, so
            # restore the state again, or dropout would differ.
            self.restore_rank()
        self._first_batch = False
        return batch

    # ---- the optimizer

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's `create_optimizer`, with QK-clip after each step."""
        made = super().create_optimizer(*args, **kwargs)
        options, optimizer = self._qk_clip_options, getattr(made, "optimizer", made)
        if self.rule_parts is not None:
            self.rule_parts.read(self.model)
        if options is not None and (self.qk_clip is None or self.qk_clip.optimizer is not optimizer):
            self.qk_clip = attention.attach(self.model, optimizer, share=partial(share_of_heads, self), **options)
        return made

    # ---- gradients and learning rates

    def clip_gradients(self, model: nn.Module, norm: Any) -> Any:
        """Clip each algorithm's gradients by its bound, and return the raw norm over all parameters.

        The factor is min(1, bound / norm over *all* parameters), because DeepSpeed has only this norm. So a
        configuration trains equally under DDP and every ZeRO stage.
        """
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super().clip_gradients(model, norm)
        self.accelerator.unscale_gradients()
        gradients = GradientNorms(self.optimizer.param_groups)
        self.figures.grad_norms = gradients.norms
        if not gradients.norms:
            return None
        total = gradients.total
        for algorithm in gradients.norms:
            bound = self.clip.get(algorithm)
            if bound is not None:
                # as torch.nn.utils.clip_grad_norm_, with its 1e-6, but the norm is already computed
                gradients.scale(algorithm, (bound / (total + 1e-6)).clamp(max=1.0))
        return total

    # ---- figures

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one micro-batch, as Trainer's; also counts its tokens."""
        main = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.figures.tokens += 0 if main is None else main.numel() * self.args.world_size // self._readers
        return cast(torch.Tensor, loss)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's `evaluation_loop`, but each sample counts once even if several ranks evaluate it."""
        if self._readers > 1:  # at the end Trainer sets accelerate's function again
            self.gather_function = gather_once(self.accelerator, self._readers)
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's `log`, with more figures in `logs`."""
        if "loss" in logs:
            logs.update(self.figures.training(logs["loss"]))
        for name in [name for name in logs if name.startswith("eval") and name.endswith("_loss")]:
            logs.update(self.figures.evaluation(logs[name], name.removesuffix("_loss")))
        super().log(logs, start_time)

    def throughput(self) -> dict[str, float | None]:
        """Tokens and seconds of training, tokens per second over all ranks, and MFU (0 to 1)."""
        return self.figures.throughput()

    def show_with(self, console: TrainerCallback) -> None:
        """Let `console` print the log instead of Trainer's printer."""
        self.remove_callback(PrinterCallback)
        self.add_callback(console)


def leave_deepspeed() -> None:
    """Let transformers load whole models again after a ZeRO-3 run, instead of partitioning them over the ranks."""
    unset_hf_deepspeed_config()


def _check(
    args: TrainingArguments,
    muon: Mapping[str, Any] | None,
    clip_muon: float | None,
    train_sampler: object,
    kwargs: Mapping[str, Any],
) -> None:
    if args.n_gpu > 1:
        raise ConfigError(
            f"this process sees {args.n_gpu} GPUs, so Trainer would use DataParallel: start one process per GPU "
            f"(torchrun --nproc-per-node {args.n_gpu}), or make only one visible (CUDA_VISIBLE_DEVICES=0)"
        )
    if args.fsdp and args.world_size == 1:
        raise ConfigError("fsdp shards a model over several processes, but here is one: use torchrun, or leave it out")
    check_trainer(args)
    if args.deepspeed is not None:
        if clip_muon is not None:
            raise ConfigError(
                f"clip_muon={clip_muon}: under DeepSpeed Muon's parameters are not clipped, so clip_muon (in a "
                "configuration optimizer.clip.muon) must be null; AdamW's are, by max_grad_norm"
            )
    elif args.max_grad_norm not in (None, 0.0, _STOCK_MAX_GRAD_NORM):
        raise ConfigError(
            f"max_grad_norm={args.max_grad_norm} bounds one norm over all parameters, but MuonTrainer has one bound "
            "per algorithm: leave max_grad_norm out and pass clip_adamw (and clip_muon, which Muon does not need)"
        )
    if muon is not None and (kwargs.get("optimizer_cls_and_kwargs") or kwargs.get("optimizers")):
        raise ConfigError("muon and optimizer_cls_and_kwargs (or optimizers) both choose the optimizer: pass one")
    if train_sampler is not None and args.max_steps <= 0:
        raise ConfigError("train_sampler is an endless stream of samples: set max_steps in the training arguments")
