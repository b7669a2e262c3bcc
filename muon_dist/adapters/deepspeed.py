"""DeepSpeed: where ZeRO 0, 1, 2 and 3 keep the tensors that Muon steps, and what cannot be exact there.

The only file that knows DeepSpeed (0.19.8; attributes by that version). Nothing is patched on a class and nothing is
set on a parameter: a `use_muon` attribute would make DeepSpeed orthogonalize as well.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups as parallel

from muon_dist.errors import FrameworkError, LayoutError
from muon_dist.layout import FlatGroup, Layout, PlacedParameter, flat_layout, per_parameter_layout, replicated_layout
from muon_dist.layout.per_parameter import slice_length
from muon_dist.optim.adamw import adamw_state
from muon_dist.optim.binding import Binding, Bound, NotReady, ParameterSpec
from muon_dist.optim.muon import Muon
from muon_dist.routing import logical_shape

WRAPPERS = (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer, FP16_UnfusedOptimizer)
_CLIP_EPSILON = 1e-6  # in every clip of DeepSpeed's: gradient / max(1, (norm + 1e-6) / gradient_clipping)

Tensors = list[torch.Tensor]


def attach(engine: DeepSpeedEngine, *, clip_muon: bool = False) -> Muon:
    """Check the engine and plan on its tensors now; without this call the first step does so.

    A collective: every rank calls it, after `deepspeed.initialize` (or `accelerator.prepare`).

    Args:
        engine: as `deepspeed.initialize` returned it.
        clip_muon: keep `gradient_clipping` on the gradients of Muon groups too. By default they are exempt: the
            orthogonalized update has no scale, and a clip would only weigh the gradients in the momentum unequally.
            At stage 0 in fp32 they are exempt only with this call.

    Returns:
        The `Muon` inside the engine.

    Raises:
        FrameworkError: the engine's optimizer is not ours any more, or a setting cannot be exact; names it.
    """
    if not isinstance(engine, DeepSpeedEngine):
        raise FrameworkError(
            f"attach takes the engine that deepspeed.initialize returned, not {type(engine).__name__}"
        )
    optimizer = engine.basic_optimizer
    if not isinstance(optimizer, Muon):
        raise FrameworkError(
            f"the engine steps {type(optimizer).__name__}, not muon_dist.Muon: it was replaced. accelerate and the "
            "Trainer replace any optimizer by DeepSpeedCPUAdam when offload_optimizer is set: put "
            '"zero_force_ds_cpu_optimizer": false into the DeepSpeed configuration, and no "optimizer" block'
        )
    clip = _Clip(engine, clip_muon)
    if isinstance(engine.optimizer, Muon):
        clip.record_norms()
    if optimizer.runtime is None:
        optimizer.bind(*_bound(engine, optimizer, clip))
    else:
        optimizer.runtime.binding.gradient_factor = clip
    return optimizer


def avoid_cpu_builds() -> None:
    """Without a GPU, keep `deepspeed.init_distributed` from compiling its shared-memory collectives for 40 s.

    Training uses torch.distributed's. A build that is killed leaves a lock on which later runs hang without a word.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def bind(optimizer: Muon) -> Bound | NotReady | None:
    """The binder: looks for the engine or wrapper that holds `optimizer`. None where DeepSpeed does not hold it.

    `NotReady` while `deepspeed.initialize` runs: FP16_UnfusedOptimizer makes a real step on zero gradients there.
    """
    engine, wrapper = _find(optimizer)
    if engine is None:
        return NotReady() if wrapper is not None else None
    if engine.optimizer is optimizer and engine.gradient_clipping() > 0:
        warnings.warn(
            f"gradient_clipping={engine.gradient_clipping()} applies to the gradients of Muon groups too at stage 0 "
            "in fp32: call muon_dist.attach(engine) after deepspeed.initialize to exempt them",
            stacklevel=2,
        )
    return _bound(engine, optimizer, _Clip(engine, False))


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


# Finding -----------------------------------------------------------------------------------------------------------


def _find(optimizer: Muon) -> tuple[DeepSpeedEngine | None, Any]:
    """The engine and the wrapper that hold `optimizer`; an engine still in its __init__ holds no wrapper yet.

    DeepSpeed keeps no list of its engines, and our optimizer is not told of its wrapper, so all living objects are
    looked through, once. By type, not isinstance: that asks the objects, and some import modules when asked.
    """
    kinds = set(_with_subclasses((*WRAPPERS, DeepSpeedEngine)))
    living = [candidate for candidate in gc.get_objects() if type(candidate) in kinds]
    wrappers = [w for w in living if isinstance(w, WRAPPERS) and vars(w).get("optimizer") is optimizer]
    held = wrappers[0] if wrappers else optimizer
    engines = [e for e in living if isinstance(e, DeepSpeedEngine) and vars(e).get("optimizer") is held]
    return engines[0] if engines else None, wrappers[0] if wrappers else None


def _with_subclasses(classes: Iterable[type]) -> Iterator[type]:
    for cls in classes:
        yield cls
        yield from _with_subclasses(cls.__subclasses__())


# Refusals ----------------------------------------------------------------------------------------------------------


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


def _check(engine: DeepSpeedEngine, optimizer: Muon) -> None:
    for reason in _refusals(engine):
        raise FrameworkError(f"muon_dist under DeepSpeed {deepspeed.__version__} cannot be exact with {reason}")
    if not all(optimizer.specs):
        raise FrameworkError("DeepSpeed removes parameter groups without parameters: leave them out")


def _matched(parameters: Sequence[Any], specs: Sequence[ParameterSpec], group: int) -> list[tuple[Any, ParameterSpec]]:
    """Pair DeepSpeed's parameters with what the optimizer was given, checked by shape."""
    shapes = [logical_shape(p) for p in parameters]
    wrong = [s.name for s, shape in zip(specs, shapes, strict=False) if s.shape != shape]
    if wrong or len(shapes) != len(specs):
        raise LayoutError(
            f"group {group}: DeepSpeed holds {len(shapes)} parameters, Muon was given {len(specs)}"
            f"{', first difference at ' + wrong[0] if wrong else ''}. Freeze parameters before making Muon, and leave "
            "out those without elements"
        )
    return list(zip(parameters, specs, strict=True))


def _one_group(group: dist.ProcessGroup, others: Iterable[dist.ProcessGroup]) -> dist.ProcessGroup:
    ranks = dist.get_process_group_ranks(group)
    if any(dist.get_process_group_ranks(other) != ranks for other in others):
        raise FrameworkError("parameters are partitioned over different process groups: use one for all")
    return group


# Layouts -----------------------------------------------------------------------------------------------------------


def _bound(engine: DeepSpeedEngine, optimizer: Muon, clip: _Clip) -> Bound:
    _check(engine, optimizer)
    wrapper: Any = engine.optimizer
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        layout, buffers, groups, others = _stage3(wrapper, optimizer)
        group = _one_group(wrapper.dp_process_group, wrapper.sub_group_process_groups)
    elif isinstance(wrapper, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        layout, buffers, groups, others = _stage12(wrapper, optimizer)
        group = _one_group(wrapper.dp_process_group, wrapper.real_dp_process_group)
    elif isinstance(wrapper, (FP16_UnfusedOptimizer, Muon)):
        layout, buffers, groups, others = _stage0(engine, optimizer)
        group = engine.seq_data_parallel_group
        hooked: Any = wrapper  # hooks of the engine, see `_stage0`
        hooked.checkpoint_event_prologue = optimizer.gather_state
        hooked.checkpoint_event_epilogue = optimizer.release_state
    else:
        raise FrameworkError(f"Muon is inside a {type(wrapper).__name__}, of which muon_dist does not know the layout")
    for tensor in (*buffers, *others):
        if tensor.dtype != torch.float32 and not isinstance(wrapper, Muon):
            raise FrameworkError(f"master weights in {tensor.dtype}: leave out *_master_weights_and_grads")
    # DeepSpeed links the state of all groups after the first group's step: what is not there by then, it never sees.
    for tensor in others:
        if "exp_avg" not in optimizer.state[tensor]:
            optimizer.state[tensor].update(adamw_state(tensor))
    return Binding(layout, tuple(buffers), group, engine.device, clip), groups


_Parts = tuple[Layout, Tensors, dict[int, int], Tensors]
"""layout, Muon's buffers, the parameter group of each, AdamW's tensors"""


def _stage0(engine: DeepSpeedEngine, optimizer: Muon) -> _Parts:
    """Every rank holds every parameter, in fp32 as it is or as a copy of the bf16 one.

    DeepSpeed saves the optimizer of rank 0 alone, while momentum lives on its owners. The engine calls
    `checkpoint_event_prologue` of the optimizer on all ranks before a save: there the momentum is gathered.
    """
    wrapper = engine.optimizer
    kept = wrapper.fp32_groups if wrapper is not optimizer else [g["params"] for g in optimizer.param_groups]
    buffers: Tensors = []
    others: Tensors = []
    matrices = []
    groups: dict[int, int] = {}
    for index, (parameters, specs) in enumerate(zip(kept, optimizer.specs, strict=True)):
        for p, spec in _matched(parameters, specs, index):
            if spec.matrices:
                groups[len(buffers)] = index
                buffers.append(p)
                matrices.append(spec.matrices)
            else:
                others.append(p)
    return replicated_layout(matrices, dist.get_world_size(engine.seq_data_parallel_group)), buffers, groups, others


def _offsets(numels: Iterable[int]) -> list[int]:
    offsets = [0]
    for n in numels:
        offsets.append(offsets[-1] + n)
    return offsets[:-1]


def _stage12(wrapper: Any, optimizer: Muon) -> _Parts:
    """One flat slice a group. Not by `_hp_mapping`, which is wrong under round_robin_gradients."""
    if isinstance(wrapper, BF16_Optimizer):
        model, slices = wrapper.bf16_groups, wrapper.fp32_groups_flat_partition
        placed = [_offsets(p.numel() for p in g) for g in model]
    else:
        model, slices = wrapper.bit16_groups, wrapper.single_partition_of_fp32_groups
        placed = []
        for given, reordered, offsets in zip(
            model, wrapper.round_robin_bit16_groups, wrapper.round_robin_bit16_offsets, strict=True
        ):
            at = {id(p): offset for p, offset in zip(reordered, offsets, strict=True)}
            placed.append([at[id(p)] for p in given])
    buffers: Tensors = []
    others: Tensors = []
    flat: list[FlatGroup] = []
    groups: dict[int, int] = {}
    for index, (specs, tensor) in enumerate(zip(optimizer.specs, slices, strict=True)):
        pairs = _matched(model[index], specs, index)
        if optimizer.algorithms[index] == "muon":
            groups[len(buffers)] = index
            buffers.append(tensor)
            parameters = (
                PlacedParameter(spec.name, math.prod(spec.shape), offset, spec.matrices)
                for (_, spec), offset in zip(pairs, placed[index], strict=True)
            )
            flat.append(FlatGroup(tuple(parameters), tensor.numel()))
        else:
            others.append(tensor)
    world = dist.get_world_size(wrapper.dp_process_group)
    return flat_layout(flat, world, together=isinstance(wrapper, BF16_Optimizer)), buffers, groups, others


def _stage3(wrapper: Any, optimizer: Muon) -> _Parts:
    """One slice of every parameter, sub-group by sub-group; `ds_shape` is the shape, also under zero.Init."""
    world = dist.get_world_size(wrapper.dp_process_group)
    held: list[list[Any]] = [[] for _ in optimizer.specs]
    for sub_group, parameters in enumerate(wrapper.fp16_groups):
        held[wrapper.sub_group_to_group_id[sub_group]] += parameters
    spec_of = {
        id(p): spec
        for index, (parameters, specs) in enumerate(zip(held, optimizer.specs, strict=True))
        for p, spec in _matched(parameters, specs, index)
    }
    buffers: Tensors = []
    others: Tensors = []
    sub_groups: list[list[PlacedParameter]] = []
    groups: dict[int, int] = {}
    for sub_group, (parameters, tensor) in enumerate(
        zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True)
    ):
        index = wrapper.sub_group_to_group_id[sub_group]
        if optimizer.algorithms[index] != "muon":
            others.append(tensor)
            continue
        groups[len(buffers)] = index
        buffers.append(tensor)
        sub_groups.append([])
        for p in parameters:
            spec = spec_of[id(p)]
            _, offset, length = wrapper.grad_position[wrapper.get_param_id(p)]
            if length != slice_length(p.ds_numel, world):
                raise FrameworkError(
                    f"{spec.name} has a slice of {length} elements on {world} ranks: not plain ZeRO-3"
                )
            sub_groups[-1].append(PlacedParameter(spec.name, int(p.ds_numel), offset, spec.matrices))
    return per_parameter_layout(sub_groups, world), buffers, groups, others


# Gradients ---------------------------------------------------------------------------------------------------------


class _Clip:
    """The factor that gives a Muon group its true gradient back, from what DeepSpeed made of it for this step."""

    def __init__(self, engine: DeepSpeedEngine, clip_muon: bool) -> None:
        self.engine = engine
        self.clip_muon = clip_muon
        self.norm = 0.0

    def record_norms(self) -> None:
        """At stage 0 in fp32 the engine clips the parameters' own gradients and forgets the norm: keep it."""
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
        # Stages 1 and 2 report the true norm and clip by the one divided by the new loss scale; stage 3 reports that.
        stage3 = isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3)
        used, true = (norm, norm * growth) if stage3 else (norm / growth, norm)
        divided_by = growth * max(1.0, (used + _CLIP_EPSILON) / bound)
        return divided_by / max(1.0, (true + _CLIP_EPSILON) / bound) if self.clip_muon else divided_by


def _growth(wrapper: Any) -> float:
    """By how much the dynamic loss scale grew in this step, else 1.

    DeepSpeed unscales by the scale *after* its update, so the gradient of such a step arrives divided by that much
    too much (fp16, every `loss_scale_window` steps).
    """
    scaler = getattr(wrapper, "loss_scaler", None)
    if scaler is None or not scaler.dynamic or wrapper.custom_loss_scaler:
        return 1.0
    stable = (scaler.cur_iter - 1) - scaler.last_overflow_iter - 1
    return float(scaler.scale_factor) if stable > 0 and stable % scaler.scale_window == 0 else 1.0
