"""Undoes DeepSpeed's changes of gradients before the step: clipping and loss scale."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import clip_grad_norm_, is_invalid_grad_norm
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from muon_dist.optim.muon import Muon

_CLIP_EPSILON = 1e-6  # DeepSpeed clips by gradient / max(1, (norm + 1e-6) / gradient_clipping)


class Clip:
    """The factor that undoes DeepSpeed's clip and loss scale on the gradient of a Muon group."""

    def __init__(self, engine: DeepSpeedEngine, clip_muon: bool) -> None:
        self.engine = engine
        self.clip_muon = clip_muon
        self.norm = 0.0

    def record_norms(self) -> None:
        """Record the norm when the engine clips at stage 0 in fp32, because DeepSpeed does not keep it."""
        engine = self.engine

        def clip_fp32_gradients() -> None:
            bound = engine.gradient_clipping()
            self.norm = float(clip_grad_norm_(engine.module.parameters(), max_norm=bound, mpu=engine.mpu))

        engine.clip_fp32_gradients = clip_fp32_gradients

    def __call__(self) -> float:
        wrapper = self.engine.optimizer
        growth = _growth(wrapper)
        if isinstance(wrapper, Muon):
            bound, norm = self.engine.gradient_clipping(), self.norm
        else:
            bound, norm = wrapper.clip_grad, wrapper._global_grad_norm
        if not bound > 0 or norm is None:
            return growth
        norm = float(norm)
        # Stages 1 and 2 report the true norm, but clip by the norm divided by the new loss scale. Stage 3 reports the
        # divided norm.
        stage3 = isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3)
        used, true = (norm, norm * growth) if stage3 else (norm / growth, norm)
        divided_by = growth * max(1.0, (used + _CLIP_EPSILON) / bound)
        return divided_by / max(1.0, (true + _CLIP_EPSILON) / bound) if self.clip_muon else divided_by


def _growth(wrapper: Any) -> float:
    """The factor by which the dynamic loss scale grew in this step; 1 if it did not grow.

    DeepSpeed unscales with the scale *after* its update, so the gradient of such a step is too small by this factor
    (fp16, every `loss_scale_window` steps).
    """
    scaler = getattr(wrapper, "loss_scaler", None)
    if scaler is None or not scaler.dynamic or wrapper.custom_loss_scaler:
        return 1.0
    stable = (scaler.cur_iter - 1) - scaler.last_overflow_iter - 1
    return float(scaler.scale_factor) if stable > 0 and stable % scaler.scale_window == 0 else 1.0


def is_finite(wrapper: Any) -> bool | None:
    """Whether all gradients are finite, from the wrapper's norm over all ranks; None without a wrapper.

    There is no wrapper at stage 0 in fp32. Usually DeepSpeed skips a bad step itself and does not call `step`, but not
    in bf16 without check_grad_overflow.
    """
    return None if isinstance(wrapper, Muon) else not is_invalid_grad_norm(wrapper._global_grad_norm)
