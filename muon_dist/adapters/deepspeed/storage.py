"""Where each ZeRO stage keeps the parameters. The only place that reads it; layouts and checkpoints derive from it.

Attributes by DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from muon_dist.errors import FrameworkError
from muon_dist.layout import FlatGroup, PlacedParameter, StoredParameter
from muon_dist.layout.per_parameter import slice_length, sub_group
from muon_dist.layout.replicated import whole_on_all
from muon_dist.optim.binding import ParameterSpec


@dataclass(frozen=True)
class Buffer:
    """A tensor that the optimizer steps; every rank has one of the same number.

    Attributes:
        tensor: of this rank, in fp32.
        group: index of its parameter group.
        parameters: what lies in it, on all ranks.
    """

    tensor: torch.Tensor
    group: int
    parameters: list[StoredParameter]


@dataclass(frozen=True)
class Storage:
    """Everything that a wrapper of DeepSpeed's steps.

    Attributes:
        kind: "replicated", "flat" or "per_parameter", as of a `Layout`.
        ranks: the process group over which it is cut or copied.
        buffers: in the order in which they are stepped.
        together: all are stepped in one call; else one call for each.
        refresh: brings the model's weights up to date after the buffers were written. May be a collective.
    """

    kind: str
    ranks: dist.ProcessGroup | None
    buffers: list[Buffer]
    together: bool = True
    refresh: Callable[[], None] = field(default=lambda: None)


def model_parameters(wrapper: Any) -> list[list[Any]] | None:
    """The model's parameters in each parameter group; None where DeepSpeed has no wrapper (stage 0 in fp32)."""
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        found: list[list[Any]] = [[] for _ in wrapper.optimizer.param_groups]
        for index, parameters in enumerate(wrapper.fp16_groups):
            found[wrapper.sub_group_to_group_id[index]] += parameters
        return found
    for attribute in ("bf16_groups", "bit16_groups", "fp16_groups"):
        if hasattr(wrapper, attribute):
            return [list(group) for group in getattr(wrapper, attribute)]
    return None


def read(engine: Any, specs: Mapping[int, ParameterSpec]) -> Storage:
    """The storage of an engine.

    Args:
        specs: by `id()` of the model's parameters, what they are.

    Raises:
        FrameworkError: a wrapper of which the layout is not known, or slices that are not those of plain ZeRO-3.
    """
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return _stage3(wrapper, specs)
    if hasattr(wrapper, "fp32_groups_flat_partition") or hasattr(wrapper, "single_partition_of_fp32_groups"):
        return _stage12(wrapper, specs)
    if hasattr(wrapper, "fp32_groups") and hasattr(wrapper, "fp16_groups"):
        return _masters(engine, wrapper, specs)
    if wrapper is engine.basic_optimizer:
        groups = [group["params"] for group in wrapper.param_groups]
        return _whole(engine, groups, groups, specs)
    raise FrameworkError(f"the layout of DeepSpeed's {type(wrapper).__name__} is not known: use ZeRO 0, 1, 2 or 3")


def _whole(engine: Any, model: list[Any], kept: list[Any], specs: Mapping[int, ParameterSpec]) -> Storage:
    """Stage 0: every rank holds every parameter."""
    world = dist.get_world_size(engine.seq_data_parallel_group)
    buffers: list[Buffer] = []
    for index, (of_model, of_optimizer) in enumerate(zip(model, kept, strict=True)):
        for given, tensor in zip(of_model, of_optimizer, strict=True):
            spec = specs[id(given)]
            stored = whole_on_all(spec.name, tuple(tensor.shape), len(buffers), world, spec.matrices)
            buffers.append(Buffer(tensor, index, [stored]))
    return Storage("replicated", engine.seq_data_parallel_group, buffers)


def _masters(engine: Any, wrapper: Any, specs: Mapping[int, ParameterSpec]) -> Storage:
    """Stage 0 in 16 bits: every rank holds an fp32 copy of every parameter."""

    def refresh() -> None:
        with torch.no_grad():
            for model, kept in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
                for given, master in zip(model, kept, strict=True):
                    given.copy_(master)

    whole = _whole(engine, wrapper.fp16_groups, wrapper.fp32_groups, specs)
    return Storage(whole.kind, whole.ranks, whole.buffers, refresh=refresh)


def _stage12(wrapper: Any, specs: Mapping[int, ParameterSpec]) -> Storage:
    """Equal slices of each group, its parameters end to end. Not by `_hp_mapping`, which is wrong under
    round_robin_gradients."""
    together = hasattr(wrapper, "fp32_groups_flat_partition")  # BF16_Optimizer
    if together:
        slices = wrapper.fp32_groups_flat_partition
        laid_out = [(group, _end_to_end(group)) for group in wrapper.bf16_groups]
    else:
        slices = wrapper.single_partition_of_fp32_groups
        laid_out = list(zip(wrapper.round_robin_bit16_groups, wrapper.round_robin_bit16_offsets, strict=True))
    world = dist.get_world_size(wrapper.dp_process_group)
    buffers = []
    for index, (tensor, (parameters, offsets)) in enumerate(zip(slices, laid_out, strict=True)):
        at = {id(p): offset for p, offset in zip(parameters, offsets, strict=True)}
        # In the order of the parameter group, which round_robin_gradients changes in the buffer alone.
        group = model_parameters(wrapper)
        assert group is not None
        placed = tuple(_placed(p, at[id(p)], specs) for p in group[index])
        buffers.append(Buffer(tensor, index, FlatGroup(placed, tensor.numel()).stored(index, world)))
    return Storage("flat", wrapper.dp_process_group, buffers, together, wrapper.update_lp_params)


def _end_to_end(parameters: Iterable[Any]) -> list[int]:
    offsets, at = [], 0
    for p in parameters:
        offsets.append(at)
        at += p.numel()
    return offsets


def _placed(p: Any, offset: int, specs: Mapping[int, ParameterSpec]) -> PlacedParameter:
    spec = specs[id(p)]
    numel = int(p.ds_numel) if hasattr(p, "ds_numel") else p.numel()
    return PlacedParameter(spec.name, numel, offset, spec.matrices, spec.shape)


def _stage3(wrapper: Any, specs: Mapping[int, ParameterSpec]) -> Storage:
    """One equal, padded slice of each parameter, those of a sub-group end to end; also under zero.Init."""
    world = dist.get_world_size(wrapper.dp_process_group)
    buffers = []
    for number, (parameters, tensor) in enumerate(
        zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True)
    ):
        placed = []
        for p in parameters:
            _, offset, length = wrapper.grad_position[wrapper.get_param_id(p)]
            if length != slice_length(p.ds_numel, world):
                raise FrameworkError(
                    f"{specs[id(p)].name} has a slice of {length} elements on {world} ranks: not plain ZeRO-3"
                )
            placed.append(_placed(p, offset, specs))
        group = wrapper.sub_group_to_group_id[number]
        buffers.append(Buffer(tensor, group, sub_group(placed, number, world)))

    def refresh() -> None:
        """What `DeepSpeedZeroOptimizer_Stage3.load_state_dict` does after it has loaded the masters."""
        for number in range(len(buffers)):
            wrapper._reassign_or_swap_out_partitioned_parameters(number)
        persistent = wrapper.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    return Storage("per_parameter", wrapper.dp_process_group, buffers, together=False, refresh=refresh)
