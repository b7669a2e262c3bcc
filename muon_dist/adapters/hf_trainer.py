"""`MuonTrainer`: the Hugging Face Trainer with what a stock one lacks for Muon. `MuonFactory` serves a stock one."""

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

from muon_dist.adapters import hf_attention
from muon_dist.adapters.factory import MuonFactory, check_trainer, split_kwargs
from muon_dist.adapters.hf_callbacks import AttachDeepSpeed, MetricsFile
from muon_dist.adapters.hf_checkpoint import CheckpointOptions, CheckpointTrainer, read_position
from muon_dist.adapters.hf_curriculum import PartRates, PartRules, RuleChange, order_at
from muon_dist.adapters.hf_evaluation import PlainLoss
from muon_dist.adapters.hf_figures import Figures, bits_per_byte
from muon_dist.adapters.hf_flow import Passes
from muon_dist.adapters.hf_guards import Guards
from muon_dist.adapters.hf_norms import GradientNorms
from muon_dist.adapters.hf_parallel import consecutive, gather_once, parallelism_on_cpu, share_of_heads
from muon_dist.adapters.hf_records import AuditStart, SpectraLog, take_watchers
from muon_dist.adapters.hf_settings import outlive_trackers
from muon_dist.adapters.unwrap import find_muon
from muon_dist.checkpoint import Checkpoint
from muon_dist.errors import CheckpointError, ConfigError
from muon_dist.optim.rule_change import rule_settings

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


class MuonTrainer(PlainLoss, PartRates, CheckpointTrainer):
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
    rule_parts: the update rules of parts of the run; None: one for all of it.
    qk_clip: clip attention logits after each step: a dict with `threshold` (100) and `alpha` (0.5), {} for both
        defaults, None to leave it out; see docs/qk-clip.md.

    In the logs: `lr/<group>`, `grad_norm` (raw, all parameters), `grad_norm/muon`, `grad_norm/adamw`, `tokens_per_s`
    (all ranks, evaluation and saving left out), `tokens`, `mfu`, `bits_per_byte`, `eval_bits_per_byte`,
    `eval_perplexity`; with `qk_clip`, of the last step `qk_clip/max_logit` and `qk_clip/heads` (that were clipped).
    """

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
        rule_parts: PartRules | None = None,
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
        self.train_sampler, self.rule_parts = train_sampler, rule_parts
        self.figures = Figures(self, bytes_per_token, passes, flops_per_token, peak_flops)
        self._order: str | None = None
        self._samples: Any = None  # the order of samples, while there is one
        self._first_sample, self._first_step, self._first_batch = 0, 0, False
        if diagnostics is not None:
            self.add_callback(SpectraLog(diagnostics))  # before the file, which takes the log as it finds it
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
        self.add_callback(self.figures)  # last: a step's seconds include what the others do at its end

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
        """Where in the data the run stands, and the rules that made its state; for the manifest of a checkpoint."""
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
        if self.rule_parts is not None:  # as it was saved: before a part changes the rule
            self.rule_parts.use(self.optimizer, max(source.step - 1, 0))
        super()._fill(source)
        if self.audit is not None:
            self.audit.forget()

    def begin_at(self, source: Checkpoint | None) -> None:
        """The data and the counts go on where `source` stands; None: from the beginning."""
        position = read_position(source) if source is not None else {}
        self._first_step, self._first_sample = position.get("global_step", 0), position.get("consumed_samples", 0)
        self._order, self._samples = position.get("order"), None
        self.figures.begin_at(position.get("tokens", 0))

    def restore(self) -> None:
        """As `CheckpointTrainer`'s; the first batch after it restores the random generators once more."""
        super().restore()
        self._first_batch = self._source is not None

    def training_order(self, dataset: Any) -> Any:
        """The samples of `train_sampler` from the position of the run on; without it Trainer's own order."""
        if self.train_sampler is None:
            return super().training_order(dataset)
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
            samples = consecutive(samples, self.micro_batch_size, (self.args.world_size // sp, sp))
        return _Stream(samples, remaining, self.args.max_steps * self.samples_per_step)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of the next step, as Trainer's."""
        self.figures.begin_step()
        if self.qk_clip is not None:
            self.qk_clip.maxima.clear()  # of a step that DeepSpeed has left out
        batch = super().get_batch_samples(*args, **kwargs)
        if self._first_batch and self.train_sampler is not None:
            # Making the iterator drew from the generator, as it did at the start of the run that we continue, before
            # the state was saved: restore it afterwards, or dropout differs.
            self.restore_rank()
        self._first_batch = False
        return batch

    # ---- the optimizer

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, with QK-clip behind its steps."""
        made = super().create_optimizer(*args, **kwargs)
        options, optimizer = self._qk_clip_options, getattr(made, "optimizer", made)
        if self.rule_parts is not None:
            self.rule_parts.read(self.model)
        if options is not None and (self.qk_clip is None or self.qk_clip.optimizer is not optimizer):
            self.qk_clip = hf_attention.attach(self.model, optimizer, share=partial(share_of_heads, self), **options)
        return made

    # ---- gradients and learning rates

    def clip_gradients(self, model: nn.Module, norm: Any) -> Any:
        """The raw norm over all parameters; on the way each algorithm's gradients are scaled down by its own bound.

        The factor is min(1, bound / norm over *all* parameters), as DeepSpeed must have it, which knows one norm only:
        so a configuration trains alike under DDP and under every ZeRO stage.
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
                # torch.nn.utils.clip_grad_norm_ with the same 1e-6, on a norm that is already known
                gradients.scale(algorithm, (bound / (total + 1e-6)).clamp(max=1.0))
        return total

    # ---- figures

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one micro-batch, as Trainer's; its tokens are counted."""
        main = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.figures.tokens += 0 if main is None else main.numel() * self.args.world_size // self._readers
        return cast(torch.Tensor, loss)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, with each sample counted once, also where several ranks evaluate it together."""
        if self._readers > 1:  # Trainer takes accelerate's again at the end
            self.gather_function = gather_once(self.accelerator, self._readers)
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with our figures added to `logs`."""
        if "loss" in logs:
            logs.update(self.figures.training(logs["loss"]))
        for name in [name for name in logs if name.startswith("eval") and name.endswith("_loss")]:
            logs.update(self.figures.evaluation(logs[name], name.removesuffix("_loss")))
        super().log(logs, start_time)

    def throughput(self) -> dict[str, float | None]:
        """Tokens and seconds of the training of this process group, their rate over all ranks, and MFU (0 to 1)."""
        return self.figures.throughput()

    def show_with(self, console: TrainerCallback) -> None:
        """Let `console` print the log in place of Trainer's printer."""
        self.remove_callback(PrinterCallback)
        self.add_callback(console)


def leave_deepspeed() -> None:
    """After a ZeRO-3 run: from here on transformers loads a model whole instead of partitioning it over the ranks."""
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
