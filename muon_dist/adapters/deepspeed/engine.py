"""Finds the `Muon` inside a DeepSpeed engine, and the engine around a `Muon`; binds them."""

from __future__ import annotations

import warnings
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from muon_dist.adapters.deepspeed.checks import check_engine, check_expert_groups, one_group
from muon_dist.adapters.deepspeed.gradients import Clip, is_finite
from muon_dist.adapters.deepspeed.layouts import parts
from muon_dist.adapters.deepspeed.parallel import Parallelism
from muon_dist.adapters.living import living
from muon_dist.errors import FrameworkError
from muon_dist.optim.adamw import adamw_state
from muon_dist.optim.binding import Binding, Bound, NotReady, holders_of_copies
from muon_dist.optim.calls import called_as
from muon_dist.optim.muon import Muon

WRAPPERS = (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer, FP16_UnfusedOptimizer)


@called_as("muon_dist.attach(engine), with the engine that deepspeed.initialize returned")
def attach(engine: DeepSpeedEngine, *, clip_muon: bool = False) -> Muon:
    """Check a DeepSpeed engine and make Muon's plan now. Without this call the first step does it.

    A collective: every rank calls it, after `deepspeed.initialize` (or `accelerator.prepare`).

    Args:
        engine: the engine that `deepspeed.initialize` returned.
        clip_muon: apply `gradient_clipping` to the gradients of Muon's groups too. By default they are exempt, because
            the orthogonalized update does not depend on the gradient's size. At stage 0 in fp32 they are exempt only
            with this call.

    Returns:
        The `Muon` inside the engine.

    Raises:
        FrameworkError: the engine's optimizer was replaced, or a setting cannot be exact; the message names it.
    """
    if not isinstance(engine, DeepSpeedEngine):
        raise FrameworkError(
            f"attach needs the engine that deepspeed.initialize returned, not {type(engine).__name__}"
        )
    optimizer = engine.basic_optimizer
    if not isinstance(optimizer, Muon):
        raise FrameworkError(
            f"the engine steps {type(optimizer).__name__}, not muon_dist.Muon: it was replaced. accelerate and the "
            "Trainer replace any optimizer by DeepSpeedCPUAdam when offload_optimizer is set: put "
            '"zero_force_ds_cpu_optimizer": false into the DeepSpeed configuration, and no "optimizer" block'
        )
    clip = Clip(engine, clip_muon)
    if isinstance(engine.optimizer, Muon):
        clip.record_norms()
    if optimizer.runtime is None:
        optimizer.bind(*bound_to(engine, optimizer, clip))
    else:
        optimizer.runtime.binding.gradient_factor = clip
    return optimizer


def prepare_process(gpu: bool) -> None:
    """Prepare this process for DeepSpeed. Call it before `TrainingArguments` and the model are made.

    DeepSpeed learns the existing process group. Otherwise `zero.Init`, which transformers uses to build a model for
    ZeRO-3, would assume a single process. Without a GPU this also stops DeepSpeed from compiling its shared-memory
    collectives for 40 s: training uses torch's collectives, and a killed build leaves a lock on which later runs hang.
    """
    if not gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if dist.is_initialized():
        deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def bind(optimizer: Muon) -> Bound | NotReady | None:
    """The binder: finds the engine or wrapper that holds `optimizer`. None if DeepSpeed does not hold it.

    `NotReady` while `deepspeed.initialize` runs, because FP16_UnfusedOptimizer makes a step on zero gradients there.
    """
    engine, wrapper = find_engine(optimizer)
    if engine is None:
        return NotReady() if wrapper is not None else None
    if engine.optimizer is optimizer and engine.gradient_clipping() > 0:
        warnings.warn(
            f"gradient_clipping={engine.gradient_clipping()} applies to the gradients of Muon groups too at stage 0 "
            "in fp32: call muon_dist.attach(engine) after deepspeed.initialize to exempt them",
            stacklevel=2,
        )
    return bound_to(engine, optimizer, Clip(engine, False))


def find_engine(optimizer: Muon) -> tuple[DeepSpeedEngine | None, Any]:
    """The engine and the wrapper that hold `optimizer`; during the engine's __init__ there is only a wrapper.

    DeepSpeed has no list of its engines, and our optimizer does not know its wrapper.
    """
    if not deepspeed.comm.is_initialized():  # without, no engine can be made
        return None, None
    found = living(*WRAPPERS, DeepSpeedEngine)
    wrapper = next((w for w in found if isinstance(w, WRAPPERS) and vars(w).get("optimizer") is optimizer), None)
    held = optimizer if wrapper is None else wrapper
    engine = next((e for e in found if isinstance(e, DeepSpeedEngine) and vars(e).get("optimizer") is held), None)
    return engine, wrapper


def bound_to(engine: DeepSpeedEngine, optimizer: Muon, clip: Clip) -> Bound:
    check_engine(engine, optimizer)
    wrapper: Any = engine.optimizer
    parallelism = Parallelism(engine)
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        one_group(wrapper.dp_process_group, wrapper.sub_group_process_groups)
    elif isinstance(wrapper, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        check_expert_groups(engine)
    elif parallelism.sharded and isinstance(wrapper, (FP16_UnfusedOptimizer, Muon)):
        pass  # every rank has all momentum that it must save: see `everywhere` below
    elif isinstance(wrapper, (FP16_UnfusedOptimizer, Muon)):
        # DeepSpeed saves only rank 0's optimizer, but momentum is on the owners. DeepSpeed calls this hook on all
        # ranks before a save.
        hooked: Any = wrapper
        hooked.checkpoint_event_prologue = optimizer.gather_state
        hooked.checkpoint_event_epilogue = optimizer.release_state
    else:
        raise FrameworkError(
            f"DeepSpeed has put Muon into a {type(wrapper).__name__}, which muon_dist does not support"
        )
    found = parts(engine, optimizer, parallelism)
    for tensor in (*found.buffers, *found.others):
        if tensor.dtype != torch.float32 and not isinstance(wrapper, Muon):
            raise FrameworkError(f"master weights in {tensor.dtype}: leave out *_master_weights_and_grads")
    # DeepSpeed links the state of all groups after the first group's step, and never sees state created later.
    for tensor in found.others:
        if "exp_avg" not in optimizer.state[tensor]:
            optimizer.state[tensor].update(adamw_state(tensor))
    storage = found.storage
    in_tensor = {id(b.tensor): b.parameters for b in storage.buffers}
    by_the_wrapper = not (parallelism.sharded and storage.by_tensor)  # otherwise its norm lacks the experts
    binding = Binding(
        found.layout,
        tuple(found.buffers),
        storage.ranks,
        engine.device,
        clip,
        finite=lambda: is_finite(wrapper) if by_the_wrapper else None,
        column=storage.column,
        # DeepSpeed saves the state of each rank's tensors, and would lose momentum stored on another rank.
        everywhere=lambda plan, wanted: holders_of_copies(plan, wanted or parallelism.sharded),
        specs=found.specs,
        contents=lambda tensor: in_tensor[id(tensor)],
    )
    return binding, found.group_of
