"""Where each ZeRO stage keeps the matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine

from muon_dist.errors import FrameworkError, LayoutError
from muon_dist.layout import FlatGroup, Layout, PlacedParameter, flat_layout, per_parameter_layout, replicated_layout
from muon_dist.layout.per_parameter import slice_length
from muon_dist.optim.binding import ParameterSpec
from muon_dist.optim.muon import Muon
from muon_dist.routing import logical_shape

Tensors = list[torch.Tensor]
Parts = tuple[Layout, Tensors, dict[int, int], Tensors]
"""layout, Muon's buffers, the parameter group of each, AdamW's tensors"""


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


def stage0(engine: DeepSpeedEngine, optimizer: Muon) -> Parts:
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


def stage12(wrapper: Any, optimizer: Muon) -> Parts:
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


def stage3(wrapper: Any, optimizer: Muon) -> Parts:
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
