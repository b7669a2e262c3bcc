"""`MuonTrainer`: the Hugging Face Trainer with what a stock one lacks for Muon. `MuonFactory` serves a stock one."""

from __future__ import annotations

import math
import time
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

from muon_dist.adapters import hf_attention
from muon_dist.adapters.device import peak_flops as device_peak_flops
from muon_dist.adapters.factory import MuonFactory, check_trainer, split_kwargs
from muon_dist.adapters.hf_callbacks import AttachDeepSpeed, MetricsFile
from muon_dist.adapters.hf_checkpoint import CheckpointOptions, CheckpointTrainer, read_position
from muon_dist.adapters.hf_curriculum import PartRates, order_at
from muon_dist.adapters.hf_evaluation import PlainLoss
from muon_dist.adapters.hf_flow import Passes
from muon_dist.adapters.hf_guards import GuardedLoop, Guards
from muon_dist.adapters.hf_norms import GradientNorms
from muon_dist.adapters.hf_parallel import (
    consecutive,
    gather_once,
    parallelism_on_cpu,
    sequence_parallel_loss,
    share_of_heads,
)
from muon_dist.adapters.hf_records import AuditStart, SpectraLog, take_watchers
from muon_dist.adapters.hf_settings import outlive_trackers
from muon_dist.checkpoint import Checkpoint
from muon_dist.errors import CheckpointError, ConfigError

__all__ = ["CheckpointOptions", "MuonFactory", "MuonTrainer", "TrainingArguments", "bits_per_byte", "leave_deepspeed"]

_STOCK_MAX_GRAD_NORM = 1.0  # the default of TrainingArguments, indistinguishable from a wish


class _Stream(Sampler[int]):
    """The rest of a sample stream under the length of the whole, by which Trainer counts its steps."""

    def __init__(self, samples: Iterable[int], remaining: int, total: int) -> None:
        self.samples, self.remaining, self.total = samples, remaining, total

    def __iter__(self) -> Iterator[int]:
        return islice(iter(self.samples), self.remaining)

    def __len__(self) -> int:
        return self.total


class MuonTrainer(GuardedLoop, PlainLoss, PartRates, CheckpointTrainer):
    """A `Trainer` that trains with Muon and logs what pretraining is judged by.

    muon: keyword arguments of `MuonFactory`; `lr` and `weight_decay` default to those of `args`. Instead of it,
        `optimizer_cls_and_kwargs` or `optimizers` as in `Trainer`.
    clip_muon, clip_adamw: bounds on the gradient norm over all parameters, by which the gradients of Muon's and of
        AdamW's parameters are scaled down; None for no bound. Muon is scale-free, so it needs none. They replace
        `max_grad_norm`, which must be left alone; except under DeepSpeed, where `max_grad_norm` is AdamW's.
    train_sampler: samples already consumed -> indices into `train_dataset` from there on. With it a resumed run goes
        on with the next sample, also at another world size; `max_steps` is needed.
    bytes_per_token: (train, eval) bytes of text for each token, for bits per byte; None leaves them out.
    passes: samples consumed -> passes over each source of the data, by name, for the log (`passes/<source>`).
    flops_per_token: forward and backward, for MFU; default 6 x the parameters outside embeddings.
    peak_flops: of one rank's device; default from a table (GPU) or measured (CPU).
    metrics_path: a JSON-lines file for all that is logged.
    guards: what watches over the run; None: only Muon's own check that gradients are finite.
    checkpoint: how it saves; see `CheckpointOptions` and `CheckpointTrainer`.
    qk_clip: clip attention logits after each step: a dict with `threshold` (100) and `alpha` (0.5), {} for both
        defaults, None to leave it out; see docs/qk-clip.md.

    In the logs: `lr/<group>`, `grad_norm` (raw, all parameters), `grad_norm/muon`, `grad_norm/adamw`, `tokens_per_s`
    (all ranks, evaluation and saving left out), `tokens`, `mfu`, `bits_per_byte`, `eval_bits_per_byte`,
    `eval_perplexity`; with `qk_clip`, of the last step `qk_clip/max_logit` and `qk_clip/heads` (that were clipped).
    """

    _samples: Any = None  # the order of samples, while there is one

    _step_started: float | None = None

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        muon: Mapping[str, Any] | None = None,
        clip_muon: float | None = None,
        clip_adamw: float | None = 1.0,
        train_sampler: Callable[[int], Iterable[int]] | None = None,
        bytes_per_token: tuple[float, float] | None = None,
        passes: Callable[[int], Mapping[str, float]] | None = None,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        metrics_path: str | Path | None = None,
        guards: Guards | None = None,
        qk_clip: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        hf_attention.check_options(qk_clip or {})
        args = args if args is not None else TrainingArguments(output_dir="tmp_trainer")
        _check(args, muon, clip_muon, train_sampler, kwargs)
        args.max_grad_norm = args.max_grad_norm if args.deepspeed is not None else 0.0
        args.parallelism_config = parallelism_on_cpu(args, model) or args.parallelism_config
        if train_sampler is not None:
            args.ignore_data_skip = True
        own = kwargs.get("optimizer_cls_and_kwargs") is None and kwargs.get("optimizers", (None, None))[0] is None
        if own:
            split_kwargs(muon or {})  # an unknown name is an error now, not at the first step
            # Asked when the optimizer is made: a hyper-parameter search sets rates later, and args may be replaced.
            chosen = {**(muon or {}), "training_arguments": lambda: self.args}
            kwargs["optimizer_cls_and_kwargs"] = (MuonFactory, chosen)
        given = kwargs.pop("optimizer_cls_and_kwargs", None)
        factory, diagnostics, self.audit = take_watchers(given, args.output_dir or ".")
        super().__init__(model, args, optimizer_cls_and_kwargs=factory, **kwargs)
        self.clip = {"muon": clip_muon, "adamw": clip_adamw}
        self.qk_clip, self._qk_clip_options = cast("hf_attention.QKClip | None", None), qk_clip
        self.train_sampler, self.bytes_per_token, self._passes = train_sampler, bytes_per_token, passes
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._grad_norms: dict[str, torch.Tensor] = {}
        self._group_lrs: dict[str, float] = {}
        self._resumed_from: Checkpoint | None = None
        self._order: str | None = None
        self._first_sample = self._first_step = 0
        self._tokens = self._tokens_logged = self._tokens_resumed = 0
        self._seconds = self.train_seconds = 0.0
        if diagnostics is not None:
            self.add_callback(SpectraLog(diagnostics))  # before the file, which takes the log as it finds it
        if self.audit is not None:
            self.add_callback(AuditStart(self.audit))
            self.providers["audit"], self.rank_providers["audit"] = self.audit, self.audit.follow
        if factory is not None and factory[0] is MuonFactory:
            self.add_callback(AttachDeepSpeed(self))
        if train_sampler is not None:
            self.add_callback(Passes(self))
        if metrics_path is not None:
            self.add_callback(MetricsFile(metrics_path))
        outlive_trackers(self.callback_handler.callbacks)
        if guards is not None:
            self.watch_with(guards)
            self.providers["guards"] = guards

    # ---- the position in the data

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step over all ranks and micro-batches."""
        return int(self.get_total_train_batch_size(self.args))

    @property
    def _readers(self) -> int:
        """Ranks that are given the same tokens in a step: those of tensor and context parallelism."""
        return int(self.get_tp_size() * self.get_cp_size())

    @property
    def consumed_samples(self) -> int:
        """Samples that the optimizer steps up to now have used, over all ranks."""
        return self._first_sample + (self.state.global_step - self._first_step) * self.samples_per_step

    def position(self) -> dict[str, Any]:
        """Where in the data the run stands; for the manifest of a checkpoint."""
        return {
            "global_step": self.state.global_step,
            "consumed_samples": self.consumed_samples,
            "samples_per_step": self.samples_per_step,
            "tokens": self._tokens,
            "world_size": self.args.world_size,
            "order": self._order if self._samples is None else order_at(self._samples, self.consumed_samples),
        }

    def _fill(self, source: Checkpoint) -> None:
        super()._fill(source)
        if self.audit is not None:
            self.audit.forget()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._resumed_from, self._order, self._samples = self._source, None, None
        self._first_sample = self._first_step = self._tokens = self._tokens_logged = self._tokens_resumed = 0
        self._seconds = self.train_seconds = 0.0
        if self._source is not None and not self._source.beginning:
            position = read_position(self._source)
            self._first_step, self._first_sample = position["global_step"], position["consumed_samples"]
            self._tokens = self._tokens_logged = self._tokens_resumed = position["tokens"]
            self._order = position["order"]
        if self._flops_per_token is None and hasattr(self.model, "num_parameters"):
            self._flops_per_token = 6.0 * self.model.num_parameters(exclude_embeddings=True)
        if self._peak_flops is None:
            self._peak_flops = device_peak_flops(self.args.device, _compute_dtype(self.args, self.model))
        return super()._inner_training_loop(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.train_sampler is None:
            return super()._get_train_sampler(train_dataset)
        # Trainer has not read the checkpoint's state yet when it asks.
        remaining = max(0, self.args.max_steps - self._first_step) * self.samples_per_step
        samples = self._samples = self.train_sampler(self._first_sample)
        if hasattr(samples, "check_resume"):
            samples.check_resume(self._first_step, self._first_sample)
        order = order_at(samples, self._first_sample)
        if self._order is not None and order != self._order:
            raise CheckpointError(
                f"{self._source.path if self._source else ''} was trained on another order of samples (data, weights, "
                "sequence length or seed differ): go on with those, or start a new run"
            )
        self._order = order
        sp = self.get_sp_size()
        if sp > 1:
            samples = consecutive(samples, self._train_batch_size, (self.args.world_size // sp, sp))
        return _Stream(samples, remaining, self.args.max_steps * self.samples_per_step)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._step_started = time.perf_counter()
        if self.qk_clip is not None:
            self.qk_clip.maxima.clear()  # of a step that DeepSpeed has left out
        batch = super().get_batch_samples(*args, **kwargs)
        if self._resumed_from is not None and self.train_sampler is not None:
            # Making the iterator drew from the generator, as it did at the start of the run that we continue, before
            # the state was saved: restore it afterwards, or dropout differs.
            self._load_rng_state(str(self._resumed_from.path))
        self._resumed_from = None
        return batch

    # ---- the optimizer

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, with QK-clip behind its steps."""
        made = super().create_optimizer(*args, **kwargs)
        options, optimizer = self._qk_clip_options, getattr(made, "optimizer", made)
        if options is not None and (self.qk_clip is None or self.qk_clip.optimizer is not optimizer):
            self.qk_clip = hf_attention.attach(self.model, optimizer, share=partial(share_of_heads, self), **options)
        return made

    # ---- gradients and learning rates

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The raw norm over all parameters; on the way each algorithm's gradients are scaled down by its own bound.

        The factor is min(1, bound / norm over *all* parameters), as DeepSpeed must have it, which knows one norm only:
        so a configuration trains alike under DDP and under every ZeRO stage.
        """
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._get_grad_norm(model, grad_norm)
        self.accelerator.unscale_gradients()
        gradients = GradientNorms(self.optimizer.param_groups)
        self._grad_norms = gradients.norms
        if not self._grad_norms:
            return None
        total = gradients.total
        for algorithm in self._grad_norms:
            bound = self.clip.get(algorithm)
            if bound is not None:
                # torch.nn.utils.clip_grad_norm_ with the same 1e-6, on a norm that is already known
                gradients.scale(algorithm, (bound / (total + 1e-6)).clamp(max=1.0))
        return total

    def _get_learning_rate(self) -> float:
        # Trainer asks between the step and the scheduler's, so these are the rates of the step that is logged.
        rates: dict[str, float] = {}
        for index, group in enumerate(self.optimizer.param_groups):
            algorithm, lr = group.get("algorithm"), float(group["lr"])
            if rates.get(f"lr/{algorithm}") != lr:
                rates[f"lr/{group.get('name', algorithm or index)}"] = lr
        self._group_lrs = rates
        return cast(float, super()._get_learning_rate())

    # ---- figures

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """As Trainer's; under sequence parallelism without its hang over gloo."""
        if self.get_sp_size() == 1 or not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        loss, outputs = sequence_parallel_loss(model, inputs)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        main = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._tokens += 0 if main is None else main.numel() * self.args.world_size // self._readers
        return cast(torch.Tensor, loss)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._step_started is not None:
            seconds = time.perf_counter() - self._step_started
            self._seconds, self.train_seconds = self._seconds + seconds, self.train_seconds + seconds
            self._step_started = None
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, with each sample counted once, also where several ranks evaluate it together."""
        if self._readers > 1:  # Trainer takes accelerate's again at the end
            self.gather_function = gather_once(self.accelerator, self._readers)
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with our figures added to `logs`."""
        if "loss" in logs:
            logs.update(self._train_figures(logs["loss"]))
        for name in [name for name in logs if name.startswith("eval") and name.endswith("_loss")]:
            prefix = name.removesuffix("_loss")
            logs[f"{prefix}_perplexity"] = math.exp(logs[name]) if logs[name] < 700 else math.inf
            if self.bytes_per_token is not None:
                logs[f"{prefix}_bits_per_byte"] = bits_per_byte(logs[name], self.bytes_per_token[1])
        super().log(logs, start_time)

    def _train_figures(self, loss: float) -> dict[str, float]:
        figures: dict[str, float] = dict(self._group_lrs)
        figures.update({f"grad_norm/{name}": norm.item() for name, norm in self._grad_norms.items()})
        if self.qk_clip is not None and self.qk_clip.max_logit is not None:
            figures["qk_clip/max_logit"], figures["qk_clip/heads"] = self.qk_clip.max_logit, self.qk_clip.clipped
        if self.bytes_per_token is not None and self.trains_on_plain_loss():
            figures["bits_per_byte"] = bits_per_byte(loss, self.bytes_per_token[0])
        figures["tokens"] = self._tokens
        if self._passes is not None:
            figures.update({f"passes/{name}": value for name, value in self._passes(self.consumed_samples).items()})
        if self._seconds > 0:
            rate = (self._tokens - self._tokens_logged) / self._seconds
            figures["tokens_per_s"] = rate
            mfu = self._mfu(rate)
            if mfu is not None:
                figures["mfu"] = mfu
        self._seconds, self._tokens_logged = 0.0, self._tokens
        return figures

    def throughput(self) -> dict[str, float | None]:
        """Tokens and seconds of the training of this process group, their rate over all ranks, and MFU (0 to 1)."""
        tokens, seconds = self._tokens - self._tokens_resumed, self.train_seconds
        rate = tokens / seconds if seconds > 0 else None
        return {
            "tokens": self._tokens,
            "train_seconds": seconds,
            "tokens_per_s": rate,
            "mfu": self._mfu(rate) if rate is not None else None,
            "peak_flops": self._peak_flops,
        }

    def _mfu(self, rate: float) -> float | None:
        if self._flops_per_token is None or self._peak_flops is None:
            return None
        return rate * self._flops_per_token / (self._peak_flops * self.args.world_size)

    def show_with(self, console: TrainerCallback) -> None:
        """Let `console` print the log in place of Trainer's printer."""
        self.remove_callback(PrinterCallback)
        self.add_callback(console)


def leave_deepspeed() -> None:
    """After a ZeRO-3 run: from here on transformers loads a model whole instead of partitioning it over the ranks."""
    unset_hf_deepspeed_config()


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Nats per token -> bits per byte of text, which compares models of different vocabularies."""
    return loss / math.log(2.0) / bytes_per_token


def _compute_dtype(args: TrainingArguments, model: nn.Module) -> torch.dtype:
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    return next((p.dtype for p in model.parameters()), torch.float32)


def _check(
    args: TrainingArguments,
    muon: Mapping[str, Any] | None,
    clip_muon: float | None,
    train_sampler: object,
    kwargs: Mapping[str, Any],
) -> None:
    if args.n_gpu > 1:
        raise ConfigError(
            f"this process sees {args.n_gpu} GPUs, for which Trainer would use DataParallel: start one process per "
            f"GPU (torchrun --nproc-per-node {args.n_gpu}), or make one visible (CUDA_VISIBLE_DEVICES=0)"
        )
    if args.fsdp and args.world_size == 1:
        raise ConfigError("fsdp shards a model over several processes, and here is one: use torchrun, or leave it out")
    check_trainer(args)
    if args.deepspeed is not None:
        if clip_muon is not None:
            raise ConfigError(
                f"clip_muon={clip_muon}: under DeepSpeed Muon's parameters are not clipped, so clip_muon (in a "
                "configuration optimizer.clip.muon) must be null; AdamW's are, by max_grad_norm"
            )
    elif args.max_grad_norm not in (None, 0.0, _STOCK_MAX_GRAD_NORM):
        raise ConfigError(
            f"max_grad_norm={args.max_grad_norm} bounds one norm over all parameters; MuonTrainer bounds each "
            "algorithm's: leave max_grad_norm out and pass clip_adamw (and clip_muon, which Muon does not need)"
        )
    if muon is not None and (kwargs.get("optimizer_cls_and_kwargs") or kwargs.get("optimizers")):
        raise ConfigError("muon and optimizer_cls_and_kwargs (or optimizers) both choose the optimizer: pass one")
    if train_sampler is not None and args.max_steps <= 0:
        raise ConfigError("train_sampler is an endless stream of samples: set max_steps in the training arguments")
