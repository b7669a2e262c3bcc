"""DeepSpeed engines, ZeRO 0 to 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import logger, safe_get_full_fp32_param

from muon_dist.adapters import deepspeed_state
from muon_dist.adapters.deepspeed import attach, prepare_process
from muon_dist.checkpoint import Checkpoint, Holding
from muon_dist.fuzz.case import Case, Setup
from muon_dist.fuzz.holders import Holder
from muon_dist.fuzz.model import Tensors, named


class EngineHolder(Holder):
    """An engine steps, accumulates and clips."""

    def __init__(self, case: Case, setup: Setup, weights: Mapping[str, torch.Tensor]) -> None:
        logger.setLevel("ERROR")
        prepare_process(gpu=False)
        super().__init__(case, setup, weights)
        self.engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, config=_configuration(case, setup)
        )
        attach(self.engine, clip_muon=case.clip_muon)
        self.parameters = named(case, self.engine.module)

    def backward(self, fed: Tensors, last: bool) -> None:
        self.engine.backward(self.engine(fed))
        if not last:
            self.engine.step()

    def finish(self) -> None:
        self.engine.step()

    def whole(self) -> Tensors:
        found = {}
        for name, p in self.parameters.items():
            if not p.requires_grad:
                with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
                    found[name] = p.detach().clone()
            elif self.engine.zero_optimization():
                shape = tuple(getattr(p, "ds_shape", p.shape))
                found[name] = safe_get_full_fp32_param(p).detach().reshape(shape).clone()
            else:
                found[name] = p.detach().clone()
        return found

    def holding(self, source: Checkpoint | None = None) -> Holding:
        return deepspeed_state.holding(self.engine, source=source)

    def close(self) -> None:
        self.engine.destroy()


def _configuration(case: Case, setup: Setup) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": setup.stage, "reduce_bucket_size": 2**20}
    if setup.stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    return {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": dist.get_world_size() * case.accumulation,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.clip or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }
