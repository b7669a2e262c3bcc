"""The figures that `MuonTrainer` adds to the log: tokens, tokens per second, MFU, bits per byte, rates, norms."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from muon_dist.model.peaks import peak_flops as device_peak_flops


class Figures(TrainerCallback):
    """Measures a training. It must be the last callback, so that a step's time includes the other callbacks.

    bytes_per_token, passes, flops_per_token, peak_flops: as in `MuonTrainer`.

    Attributes:
        tokens: number of trained tokens since the beginning of the run, over all ranks.
        train_seconds: time of this process's steps, without evaluation and saving.
        grad_norms: algorithm -> norm of its gradients before clipping, in the last step.
    """

    def __init__(
        self,
        trainer: Any,
        bytes_per_token: tuple[float, float] | None,
        passes: Callable[[int], Mapping[str, float]] | None,
        flops_per_token: float | None,
        peak_flops: float | None,
    ) -> None:
        self.trainer = trainer
        self.bytes_per_token, self.passes = bytes_per_token, passes
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.tokens = self._tokens_logged = self._tokens_resumed = 0
        self._seconds = self.train_seconds = 0.0
        self._step_started: float | None = None
        self.grad_norms: dict[str, torch.Tensor] = {}
        self._group_lrs: dict[str, float] = {}

    def begin_at(self, tokens: int) -> None:
        """The next training continues after `tokens` tokens."""
        self.tokens = self._tokens_logged = self._tokens_resumed = tokens
        self._seconds = self.train_seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin_at(self._tokens_resumed)  # `auto_find_batch_size` may start training again
        model = self.trainer.model
        if self.flops_per_token is None and hasattr(model, "num_parameters"):
            self.flops_per_token = 6.0 * model.num_parameters(exclude_embeddings=True)
        if self.peak_flops is None:
            self.peak_flops = device_peak_flops(args.device, _compute_dtype(args, model))

    def begin_step(self) -> None:
        """Start the time of the next step; called before its batches are read."""
        self._step_started = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Called between the optimizer's step and the scheduler's step: these are the rates of the logged step.
        rates: dict[str, float] = {}
        for index, group in enumerate(self.trainer.optimizer.param_groups):
            algorithm, lr = group.get("algorithm"), float(group["lr"])
            if rates.get(f"lr/{algorithm}") != lr:
                rates[f"lr/{group.get('name', algorithm or index)}"] = lr
        self._group_lrs = rates

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._step_started is not None:
            seconds = time.perf_counter() - self._step_started
            self._seconds, self.train_seconds = self._seconds + seconds, self.train_seconds + seconds
            self._step_started = None

    def training(self, loss: float) -> dict[str, float]:
        """Figures for the log with the training loss; the throughput is that since the last call."""
        figures: dict[str, float] = dict(self._group_lrs)
        figures.update({f"grad_norm/{name}": norm.item() for name, norm in self.grad_norms.items()})
        clip = self.trainer.qk_clip
        if clip is not None and clip.max_logit is not None:
            figures["qk_clip/max_logit"], figures["qk_clip/heads"] = clip.max_logit, clip.clipped
        if self.bytes_per_token is not None and self.trainer.trains_on_plain_loss():
            figures["bits_per_byte"] = bits_per_byte(loss, self.bytes_per_token[0])
        figures["tokens"] = self.tokens
        if self.passes is not None:
            passes = self.passes(self.trainer.consumed_samples)
            figures.update({f"passes/{name}": value for name, value in passes.items()})
        if self._seconds > 0:
            rate = (self.tokens - self._tokens_logged) / self._seconds
            figures["tokens_per_s"] = rate
            mfu = self._mfu(rate)
            if mfu is not None:
                figures["mfu"] = mfu
        self._seconds, self._tokens_logged = 0.0, self.tokens
        return figures

    def evaluation(self, loss: float, prefix: str) -> dict[str, float]:
        """Figures logged with a validation loss; `prefix` is "eval" or the prefix of one data set."""
        figures = {f"{prefix}_perplexity": math.exp(loss) if loss < 700 else math.inf}
        if self.bytes_per_token is not None:
            figures[f"{prefix}_bits_per_byte"] = bits_per_byte(loss, self.bytes_per_token[1])
        return figures

    def throughput(self) -> dict[str, float | None]:
        """Tokens and seconds of training, tokens per second over all ranks, and MFU (0 to 1)."""
        tokens, seconds = self.tokens - self._tokens_resumed, self.train_seconds
        rate = tokens / seconds if seconds > 0 else None
        return {
            "tokens": self.tokens,
            "train_seconds": seconds,
            "tokens_per_s": rate,
            "mfu": self._mfu(rate) if rate is not None else None,
            "peak_flops": self.peak_flops,
        }

    def _mfu(self, rate: float) -> float | None:
        if self.flops_per_token is None or self.peak_flops is None:
            return None
        return rate * self.flops_per_token / (self.peak_flops * self.trainer.args.world_size)


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Convert nats per token to bits per byte of text, to compare models with different vocabularies."""
    return loss / math.log(2.0) / bytes_per_token


def _compute_dtype(args: Any, model: torch.nn.Module) -> torch.dtype:
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    return next((p.dtype for p in model.parameters()), torch.float32)
