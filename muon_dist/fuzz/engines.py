"""DeepSpeed engines, ZeRO 0 to 3, with AutoTP, Ulysses and MoE layers."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.utils import logger, safe_get_full_fp32_param
from torch import nn

from muon_dist.adapters import deepspeed_state
from muon_dist.adapters.deepspeed import attach, prepare_process
from muon_dist.checkpoint import Checkpoint, Holding
from muon_dist.fuzz.case import Case, Parameter, Setup
from muon_dist.fuzz.holders import Holder
from muon_dist.fuzz.model import Layer, Model, Tensors, named


class EngineHolder(Holder):
    """A holder whose DeepSpeed engine steps, accumulates and clips."""

    def __init__(self, case: Case, setup: Setup, weights: Mapping[str, torch.Tensor]) -> None:
        logger.setLevel("ERROR")
        prepare_process(gpu=False)
        super().__init__(case, setup, weights)
        mpu = None
        if setup.sp > 1:
            parallel_state_sp.initialize_sequence_parallel(setup.sp)
            mpu = parallel_state_sp
        with contextlib.redirect_stdout(io.StringIO()):  # each MoE layer prints its group
            self.engine, *_ = deepspeed.initialize(
                model=self.model, optimizer=self.optimizer, config=_configuration(case, setup), mpu=mpu
            )
        attach(self.engine, clip_muon=case.clip_muon)
        self.parameters = named(self.engine.module)

    def wrap(self, model: Model) -> Any:
        for p in self.case.parameters:
            layer: Any = model.layers[p.layer]
            if self.setup.shares(p):
                _share(layer, p, self.setup.ep)
            elif cut_by_autotp(p, self.setup):
                rank = dist.get_rank() % self.setup.tp
                part = partial(_part, p=p, tp=self.setup.tp, rank=rank)
                layer.uses = [replace(use, part=part) if use.key == p.fqn else use for use in layer.uses]
        return model

    def fed(self, step: int, micro: int) -> Tensors:
        """Below stage 3 DeepSpeed sums the gradients of a sequence-parallel group, so each rank has a part."""
        found = super().fed(step, micro)
        share = self.setup.sp if self.setup.stage < 3 else 1
        return {name: given / share for name, given in found.items()}

    def backward(self, fed: Tensors, last: bool) -> None:
        self.engine.backward(self.engine(**fed))
        if not last:
            self.engine.step()

    def finish(self) -> None:
        self.engine.step()

    def wholes(self) -> Tensors:
        mine = self._of_this_rank()
        if max(self.setup.tp, self.setup.ep) == 1:
            return mine
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        found = {name: w for of_rank in every for name, w in of_rank.items()} | mine
        first = dist.get_rank() // self.setup.tp * self.setup.tp
        for p in self.case.parameters:
            if cut_by_autotp(p, self.setup):
                found[p.fqn] = _joined([of_rank[p.fqn] for of_rank in every[first : first + self.setup.tp]], p)
        return found

    def _of_this_rank(self) -> Tensors:
        """The whole weights by their names in this rank's module."""
        found = {}
        for name, p in self.parameters.items():
            if not p.requires_grad:
                with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
                    found[name] = p.detach().clone()
            elif self.engine.zero_optimization() and self.setup.ep == 1:
                shape = tuple(getattr(p, "ds_shape", p.shape))
                found[name] = safe_get_full_fp32_param(p).detach().reshape(shape).clone()
            else:
                found[name] = p.detach().clone()
        return found

    def holding(self, source: Checkpoint | None = None) -> Holding:
        return deepspeed_state.holding(self.engine, source=source)

    def close(self) -> None:
        self.engine.destroy()


def _share(layer: Layer, p: Parameter, ep: int) -> None:
    """Replace all experts by a DeepSpeed MoE layer; this rank holds some of them."""
    local = p.shape[0] // ep
    first = dist.get_rank() % ep * local
    of_all = [use for use in layer.uses if use.key == p.fqn]
    modules: list[Any] = [layer.get_submodule(use.path) for use in of_all]
    moe: Any = MoE(p.shape[-1], modules[0], p.shape[0], ep)
    moe.deepspeed_moe.gate.wg = nn.Identity()  # the router's weight would be a parameter that is not in the case
    layer.add_module(p.name, moe)
    held = [replace(use, path=of_all[i].path) for i, use in enumerate(of_all[first : first + local])]
    for made, module in zip(moe.deepspeed_moe.experts.deepspeed_experts, modules[first : first + local], strict=True):
        made.weight.data.copy_(module.weight.data)
    layer.uses = [use for use in layer.uses if use.key != p.fqn] + held


def cut_by_autotp(p: Parameter, setup: Setup) -> bool:
    """Whether AutoTP cuts a parameter: the weight of a linear module that is used once."""
    return setup.tp > 1 and p.tp is not None and len(p.shape) == 2 and not p.tied


def _fused(p: Parameter, tp: int) -> tuple[int, ...]:
    """Sizes of the parts along the first axis; each is split over the ranks. One part if the weight is not fused."""
    fused = p.sizes is not None and not p.transposed and p.tp == 0 and all(n % tp == 0 for n in p.sizes)
    return p.sizes if fused and p.sizes is not None else (p.shape[p.tp or 0],)


def _part(whole: torch.Tensor, p: Parameter, tp: int, rank: int) -> torch.Tensor:
    axis = p.tp or 0
    return torch.cat([part.tensor_split(tp, axis)[rank] for part in whole.split(_fused(p, tp), axis)], axis)


def _joined(parts: list[torch.Tensor], p: Parameter) -> torch.Tensor:
    """The whole weight from the parts of all ranks, the inverse of `_part`."""
    axis, tp = p.tp or 0, len(parts)
    fused = _fused(p, tp)
    if len(fused) == 1:
        return torch.cat(parts, axis)
    by_rank = [part.split([n // tp for n in fused], axis) for part in parts]
    return torch.cat([of_rank[i] for i in range(len(fused)) for of_rank in by_rank], axis)


def _autotp(case: Case, setup: Setup) -> dict[str, Any]:
    """The `tensor_parallel` block."""
    specs = []
    for p in case.parameters:
        if cut_by_autotp(p, setup):
            spec: dict[str, Any] = {
                "patterns": [re.escape(p.fqn) + "$"],
                "partition_type": ("column", "row")[p.tp or 0],
            }
            fused = _fused(p, setup.tp)
            specs.append(spec | ({"shape": [list(fused), -1], "partition_dim": 0} if len(fused) > 1 else {}))
    return {"autotp_size": setup.tp, "partition_config": {"layer_specs": specs, "use_default_specs": False}}


def _configuration(case: Case, setup: Setup) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": setup.stage, "reduce_bucket_size": 2**20}
    if setup.stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    axes: dict[str, Any] = {"sequence_parallel_size": setup.sp} if setup.sp > 1 else {}
    if setup.tp > 1:
        axes = {"tensor_parallel": _autotp(case, setup)}
    return {
        **axes,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.clip or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }
