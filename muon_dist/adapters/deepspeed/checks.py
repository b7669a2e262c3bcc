"""DeepSpeed settings that muon_dist refuses, because training could not be exact with them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject.layers import Conv_LinearALlreduce, conv_LinearLayer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn

from muon_dist.adapters.deepspeed.storage import model_parameters
from muon_dist.errors import ConfigError, FrameworkError
from muon_dist.failures import one_line
from muon_dist.optim.muon import Muon
from muon_dist.routing import expert_group

# Schedulers that set one rate for all parameter groups, and the setting with this rate: DeepSpeed's, then torch's. All
# other schedulers multiply each group's rate.
_ONE_RATE = {
    "WarmupLR": "warmup_max_lr",
    "WarmupDecayLR": "warmup_max_lr",
    "OneCycle": "cycle_max_lr",
    "LRRangeTest": "lr_range_test_min_lr",
    "OneCycleLR": "max_lr",
    "CyclicLR": "max_lr",
}


_AUTO_EP = "AutoEP (expert_parallel): use deepspeed.moe.layer.MoE, or leave the model's experts unchanged"


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a DeepSpeed configuration with which accelerate or the Trainer would replace Muon or its learning rates.

    Raises FrameworkError: an "optimizer" block; a "scheduler" block that gives all groups one rate; optimizer offload
        without `zero_force_ds_cpu_optimizer: false`; AutoEP, which replaces the experts.
    """
    if "optimizer" in config:
        raise FrameworkError(
            'the DeepSpeed configuration has an "optimizer" block: the Trainer would train with that optimizer, not '
            'with Muon. Remove the "optimizer" block'
        )
    check_scheduler(config)
    if (config.get("expert_parallel") or {}).get("enabled"):
        raise FrameworkError(f"muon_dist under DeepSpeed {deepspeed.__version__} cannot be exact with {_AUTO_EP}")
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    if offload.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise FrameworkError(
            "with offload_optimizer, accelerate and the Trainer would replace Muon by DeepSpeedCPUAdam: put "
            '"zero_force_ds_cpu_optimizer": false into the DeepSpeed configuration'
        )


def check_zero_settings(config: Mapping[str, Any]) -> None:
    """Raises ConfigError for an invalid `zero_optimization` block, before the data are prepared.

    DeepSpeed itself would fail only when the engine is made. Values "auto" are set later, so they are not checked.
    """
    block = {k: v for k, v in (config.get("zero_optimization") or {}).items() if v != "auto"}
    try:
        DeepSpeedZeroConfig(**block)
    except ValueError as error:
        details: list[Any] = getattr(error, "errors", list)()  # pydantic's, one for each wrong setting
        wrong = [
            f"deepspeed: zero_optimization.{'.'.join(map(str, detail['loc']))}: {detail['input']!r} is wrong: "
            f"{detail['msg'][:1].lower()}{detail['msg'][1:]}"
            for detail in details
        ]
        raise ConfigError("; ".join(wrong) or f"deepspeed: zero_optimization: {one_line(error)}") from error


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Raise FrameworkError for a "scheduler" block that sets the same rate for all parameter groups."""
    block = config.get("scheduler") or {}
    kind = block.get("type")
    if kind not in _ONE_RATE or isinstance((block.get("params") or {}).get(_ONE_RATE[kind]), (list, tuple)):
        return
    raise FrameworkError(
        f'the DeepSpeed configuration has a "scheduler" block of type {kind}, which replaces the learning rates of '
        'Muon and of AdamW by one number. Remove the "scheduler" block and pass a scheduler of torch, which '
        "multiplies the rate of each group (in the Trainer: lr_scheduler_type and warmup_steps); or give "
        f"{_ONE_RATE[kind]} as a list with one rate per parameter group"
    )


def check_partitioned(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Check the dtype of weights made by `deepspeed.zero.Init`, before training.

    Raises FrameworkError for 16-bit weights if the DeepSpeed configuration does not enable 16 bits.
    """
    enabled = {name: (config.get(name) or {}).get("enabled") is True for name in ("bf16", "fp16")}
    wanted = torch.bfloat16 if enabled["bf16"] else torch.float16 if enabled["fp16"] else torch.float32
    for name, p in model.named_parameters():
        found = getattr(p, "ds_tensor", p).dtype
        if found not in (wanted, torch.float32):
            raise FrameworkError(
                f"deepspeed.zero.Init made {name} in {found}, but the DeepSpeed configuration asks for {wanted}: "
                "build the model under zero.Init(config_dict_or_path=config) without dtype="
            )


def _warn_of_half_weights(engine: DeepSpeedEngine) -> None:
    """Warn of 16-bit weights in a float32 engine: DeepSpeed 0.19.8's `zero.Init` ignores its `dtype`."""
    if engine.fp16_enabled() or engine.bfloat16_enabled():
        return
    for name, p in engine.module.named_parameters():
        found = getattr(p, "ds_tensor", p).dtype
        if found.itemsize < 4:
            warnings.warn(
                f"{name} is {found}, but the DeepSpeed configuration enables neither bf16 nor fp16. If float32 was "
                "meant: deepspeed.zero.Init ignores its argument dtype; build the model under "
                "zero.Init(config_dict_or_path=config) without it",
                RuntimeWarning,
                stacklevel=2,
            )
            return


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
    if not zero.compute_grad_norm:
        yield "zero_optimization.compute_grad_norm false, which would detect a NaN in one group only: leave it out"
    if zero.elastic_checkpoint:
        yield "elastic_checkpoint, which saves one kind of state for all groups: leave it out"
    if engine.is_deepcompile_enabled():
        yield "compile.deepcompile, which replaces the optimizer step by its own: leave it out"
    if engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16:
        yield "torch_autocast in float16, whose scaler may skip a step on one rank only: use bfloat16"
    if engine.pipeline_parallelism and stage > 1:
        yield "pipeline parallelism above ZeRO stage 1, which DeepSpeed's own engine does not run: use stage 0 or 1"
    yield from _of_model_parallelism(engine)
    marked = [name for name, p in engine.module.named_parameters() if getattr(p, "use_muon", False)]
    if marked:
        yield f"a `use_muon` attribute on {marked[0]}, which turns on DeepSpeed's own Muon as well: remove it"


def _of_model_parallelism(engine: DeepSpeedEngine) -> Iterator[str]:
    """Problems with model parallelism. In DeepSpeed the term includes pipeline stages."""
    tensor, experts = engine.autotp_size() > 1, engine.has_moe_layers
    sliced = getattr(engine.optimizer, "model_parallel_group", None) is not None
    if engine.pipeline_parallelism:
        sliced = engine.mpu.get_slice_parallel_world_size() > 1
    if sliced and not tensor:
        yield (
            "tensor parallelism of an mpu, which does not say how it has sharded the weights: use DeepSpeed's AutoTP "
            '("tensor_parallel": {"autotp_size": N})'
        )
    expert_config = engine._config.expert_parallel_config
    if expert_config is not None and expert_config.enabled:
        yield _AUTO_EP
    others = {
        "AutoTP (tensor_parallel)": tensor,
        "DeepSpeed's MoE layers": experts,
        "a PipelineModule": engine.pipeline_parallelism,
        "sequence parallelism": engine.sequence_parallel_size > 1,
    }
    together = [name for name, there in others.items() if there]
    if (tensor or experts) and len(together) > 1:
        yield f"{' and '.join(together)} together, a combination that is not tested: leave one of them out"
    if tensor:
        for name, module in engine.module.named_modules():
            if isinstance(module, (conv_LinearLayer, Conv_LinearALlreduce)):
                yield f"AutoTP of {name}, a Conv1D, because AutoTP describes its cut wrong: leave tensor_parallel out"


def check_expert_groups(engine: DeepSpeedEngine) -> None:
    """Raise FrameworkError for parameters that ZeRO shards over other ranks than those that hold their copies."""
    wrapper: Any = engine.optimizer
    for index, group in enumerate(model_parameters(wrapper) or []):
        names = {expert_group(p) for p in group}
        over = dist.get_process_group_ranks(wrapper.real_dp_process_group[index])
        for name in names:
            copies = wrapper.dp_process_group if name is None else engine.expert_data_parallel_group[name]
            if dist.get_process_group_ranks(copies) != over:
                raise FrameworkError(
                    f"group {index} of Muon is sharded over ranks {over}, but some of its parameters have copies on "
                    f"ranks {dist.get_process_group_ranks(copies)}. The experts of each ep_size of DeepSpeed's MoE "
                    "layers need separate groups: create Muon from muon_dist.param_groups(model), which makes them"
                )


def check_engine(engine: DeepSpeedEngine, optimizer: Muon) -> None:
    for reason in _refusals(engine):
        raise FrameworkError(f"muon_dist under DeepSpeed {deepspeed.__version__} cannot be exact with {reason}")
    if not engine.client_lr_scheduler:  # else DeepSpeed ignores the "scheduler" block
        check_scheduler({"scheduler": {"type": engine.scheduler_name(), "params": engine.scheduler_params()}})
    _warn_of_half_weights(engine)
    if not all(optimizer.specs):
        raise FrameworkError("DeepSpeed removes parameter groups without parameters: leave them out")


def one_group(group: dist.ProcessGroup, others: Iterable[dist.ProcessGroup]) -> dist.ProcessGroup:
    ranks = dist.get_process_group_ranks(group)
    if any(dist.get_process_group_ranks(other) != ranks for other in others):
        raise FrameworkError("parameters are partitioned over different process groups: use one group for all")
    return group
