"""What muon_dist refuses under DeepSpeed, because it could not be exact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups as parallel

from muon_dist.errors import FrameworkError
from muon_dist.optim.muon import Muon


def check_config(config: dict[str, Any]) -> None:
    """Refuse a DeepSpeed configuration under which accelerate or the Trainer would replace our optimizer.

    Raises FrameworkError: optimizer offload without `zero_force_ds_cpu_optimizer: false`, or an "optimizer" block.
    """
    if "optimizer" in config:
        raise FrameworkError(
            'the DeepSpeed configuration has an "optimizer" block, which would take the place of Muon: remove it'
        )
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    if offload.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise FrameworkError(
            "with offload_optimizer, accelerate and the Trainer would replace Muon by DeepSpeedCPUAdam: put "
            '"zero_force_ds_cpu_optimizer": false into the DeepSpeed configuration'
        )


def _refusals(engine: DeepSpeedEngine) -> Iterator[str]:
    wrapper = engine.optimizer
    stage, zero = engine.zero_optimization_stage(), engine._config.zero_config
    if engine.fp16_enabled() and stage == 0:
        yield "fp16 at stage 0, where gradients arrive divided by the loss scale: use bf16, or ZeRO stage 1"
    if engine.zero_nvme_offload_optimizer():
        yield "offload_optimizer to NVMe: use device cpu"
    if getattr(wrapper, "offload_optimizer", False) and getattr(wrapper, "partial_offload", 1.0) != 1.0:
        yield "offload_optimizer with a ratio below 1: use 1"
    if engine.zenflow or engine.super_offload():
        yield "ZenFlow and SuperOffload: leave them out"
    if zero.zero_hpz_partition_size > 1:
        yield "zero_hpz_partition_size above 1: use 1"
    if not zero.compute_grad_norm:
        yield "zero_optimization.compute_grad_norm false, with which a NaN would be met group by group: leave it out"
    if zero.elastic_checkpoint:
        yield "elastic_checkpoint, which saves one kind of state for all groups: leave it out"
    if engine.is_deepcompile_enabled():
        yield "compile.deepcompile, which steps the optimizer by itself: leave it out"
    if engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16:
        yield "torch_autocast in float16, whose scaler may skip a step on one rank alone: use bfloat16"
    if engine.pipeline_parallelism:
        yield "pipeline parallelism"
    if engine.autotp_size() > 1 or getattr(wrapper, "model_parallel_group", None) is not None:
        yield "tensor parallelism"
    if parallel._get_sequence_parallel_world_size() > 1:
        yield "sequence parallelism"
    if engine.has_moe_layers:
        yield "DeepSpeed's own MoE layers and their expert-parallel groups: use the model's own experts"
    marked = [name for name, p in engine.module.named_parameters() if getattr(p, "use_muon", False)]
    if marked:
        yield f"a `use_muon` attribute on {marked[0]}, which turns on DeepSpeed's own Muon as well: remove it"


def check_engine(engine: DeepSpeedEngine, optimizer: Muon) -> None:
    for reason in _refusals(engine):
        raise FrameworkError(f"muon_dist under DeepSpeed {deepspeed.__version__} cannot be exact with {reason}")
    if not all(optimizer.specs):
        raise FrameworkError("DeepSpeed removes parameter groups without parameters: leave them out")


def one_group(group: dist.ProcessGroup, others: Iterable[dist.ProcessGroup]) -> dist.ProcessGroup:
    ranks = dist.get_process_group_ranks(group)
    if any(dist.get_process_group_ranks(other) != ranks for other in others):
        raise FrameworkError("parameters are partitioned over different process groups: use one for all")
    return group
