"""Reads where each ZeRO stage stores the parameters. Layouts and checkpoints use the result.

Attribute names of DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from muon_dist.adapters.deepspeed.parallel import Held, Parallelism
from muon_dist.errors import FrameworkError, LayoutError
from muon_dist.layout import FlatGroup, Fragments, PlacedParameter, StoredParameter
from muon_dist.layout.per_parameter import slice_length, sub_group
from muon_dist.layout.replicated import copies_on_all, whole_on_all
from muon_dist.optim.binding import ParameterSpec
from muon_dist.ranks import Ranks


@dataclass(frozen=True)
class Buffer:
    """A tensor that the optimizer steps; every rank has one with the same number.

    Attributes:
        tensor: this rank's fp32 tensor.
        group: index of its parameter group.
        parameters: the parameters in it, with their fragments on all ranks.
        ranks: the ranks over which ZeRO shards it, if they are not all of `Storage.ranks`.
    """

    tensor: torch.Tensor
    group: int
    parameters: list[StoredParameter]
    ranks: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Storage:
    """All parameters that a DeepSpeed optimizer wrapper updates.

    Attributes:
        kind: "replicated", "sharded" (stage 0 with different parts per rank), "flat" or "per_parameter"; see `Layout`.
        ranks: the process group over which parameters are sharded or copied.
        buffers: the buffers, in the order of the step.
        together: True: one call steps all buffers. False: one call per buffer.
        refresh: copies changed buffers into the model's weights. May be a collective.
        domains, columns: as in `Layout`.
        column: the process group of this rank's replica group; None: all ranks.
        held: this rank's parts, by `id()` of the model's parameters and of stage-0 buffers, if ranks hold different
            parts.
    """

    kind: str
    ranks: dist.ProcessGroup | None
    buffers: list[Buffer]
    together: bool = True
    refresh: Callable[[], None] = field(default=lambda: None)
    domains: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    column: dist.ProcessGroup | None = None
    held: Mapping[int, Held] = field(default_factory=dict)

    @property
    def by_tensor(self) -> bool:
        """Whether every buffer is the tensor of one parameter (stage 0)."""
        return self.kind in ("replicated", "sharded")


def model_parameters(wrapper: Any) -> list[list[Any]] | None:
    """The model's parameters in each parameter group; None if DeepSpeed has no wrapper (stage 0 in fp32)."""
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        found: list[list[Any]] = [[] for _ in wrapper.optimizer.param_groups]
        for index, parameters in enumerate(wrapper.fp16_groups):
            found[wrapper.sub_group_to_group_id[index]] += parameters
        return found
    for attribute in ("bf16_groups", "bit16_groups", "fp16_groups"):
        if hasattr(wrapper, attribute):
            return [list(group) for group in getattr(wrapper, attribute)]
    return None


def read(engine: Any, specs: Mapping[int, ParameterSpec], parallelism: Parallelism) -> Storage:
    """The storage of an engine. A collective if the ranks hold different parts of the model.

    Args:
        specs: parameters by `id()` of the model's parameters, with the names in this rank's module.
        parallelism: the engine's parallelism.

    Raises:
        FrameworkError: the wrapper is not supported, slices are not those of plain ZeRO-3, or AutoTP does not describe
            how it has sharded a parameter.
    """
    storage = _read(engine, specs)
    if not parallelism.sharded:
        return storage
    held = {id(p): parallelism.held(name, p) for name, p in engine.module.named_parameters() if id(p) in specs}
    return _over_all_ranks(storage, {specs[i].name: one for i, one in held.items()}, parallelism.copies)


def _read(engine: Any, specs: Mapping[int, ParameterSpec]) -> Storage:
    """The storage, if this rank's module were the whole model."""
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
    raise FrameworkError(f"DeepSpeed's {type(wrapper).__name__} is not supported: use ZeRO 0, 1, 2 or 3")


def _whole(engine: Any, model: list[Any], kept: list[Any], specs: Mapping[int, ParameterSpec]) -> Storage:
    """Stage 0: every rank holds every parameter."""
    world = dist.get_world_size(engine.seq_data_parallel_group)
    buffers: list[Buffer] = []
    for index, (of_model, of_optimizer) in enumerate(zip(model, kept, strict=True)):
        for given, tensor in zip(of_model, of_optimizer, strict=True):
            spec = specs[id(given)]
            stored = whole_on_all(spec.name, tuple(tensor.shape), len(buffers), world, spec.matrices)
            buffers.append(Buffer(tensor, index, [stored]))
    domains, columns = copies_on_all(world)
    return Storage("replicated", engine.seq_data_parallel_group, buffers, domains=domains, columns=columns)


def _masters(engine: Any, wrapper: Any, specs: Mapping[int, ParameterSpec]) -> Storage:
    """Stage 0 in 16 bits: every rank holds an fp32 copy of every parameter."""

    def refresh() -> None:
        with torch.no_grad():
            for model, kept in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
                for given, master in zip(model, kept, strict=True):
                    given.copy_(master)

    whole = _whole(engine, wrapper.fp16_groups, wrapper.fp32_groups, specs)
    return replace(whole, refresh=refresh)


def _stage12(wrapper: Any, specs: Mapping[int, ParameterSpec]) -> Storage:
    """Stages 1 and 2: parameters of a group end to end, in equal slices.

    Does not use `_hp_mapping`, which is wrong with round_robin_gradients.
    """
    together = hasattr(wrapper, "fp32_groups_flat_partition")  # BF16_Optimizer
    if together:
        slices = wrapper.fp32_groups_flat_partition
        laid_out = [(group, _end_to_end(group)) for group in wrapper.bf16_groups]
    else:
        slices = wrapper.single_partition_of_fp32_groups
        laid_out = list(zip(wrapper.round_robin_bit16_groups, wrapper.round_robin_bit16_offsets, strict=True))
    buffers = []
    for index, (tensor, (parameters, offsets)) in enumerate(zip(slices, laid_out, strict=True)):
        at = {id(p): offset for p, offset in zip(parameters, offsets, strict=True)}
        # In the order of the parameter group: round_robin_gradients changes only the order in the buffer.
        group = model_parameters(wrapper)
        assert group is not None
        placed = tuple(_placed(p, at[id(p)], specs) for p in group[index])
        ranks = wrapper.real_dp_process_group[index]  # experts have another process group
        stored = FlatGroup(placed, tensor.numel()).stored(index, dist.get_world_size(ranks))
        buffers.append(Buffer(tensor, index, stored, ranks))
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
    """Stage 3: one equal, padded slice per parameter; the slices of a sub-group are end to end. Also for zero.Init."""
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
                    f"{specs[id(p)].name} has a slice of {length} elements on {world} ranks: this is not plain ZeRO-3"
                )
            placed.append(_placed(p, offset, specs))
        group = wrapper.sub_group_to_group_id[number]
        buffers.append(Buffer(tensor, group, sub_group(placed, number, world)))

    def refresh() -> None:
        """Copy loaded master weights into the weights, as `DeepSpeedZeroOptimizer_Stage3.load_state_dict` does."""
        for number in range(len(buffers)):
            wrapper._reassign_or_swap_out_partitioned_parameters(number)
        persistent = wrapper.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    return Storage("per_parameter", wrapper.dp_process_group, buffers, together=False, refresh=refresh)


def _over_all_ranks(storage: Storage, held: Mapping[str, Held], copies: dist.ProcessGroup) -> Storage:
    """The storage of the whole model, if ranks hold different parts of it; a collective.

    Each rank knows its slices of its own tensors, and the positions of these tensors in the whole parameters. The
    result joins the fragments of all ranks.

    Args:
        storage: the storage of this rank's module.
        held: this rank's parts, by names in this module.
        copies: the ranks that hold the same parts as this rank.

    Raises:
        LayoutError: ranks describe a parameter differently.
    """
    world = dist.group.WORLD
    assert world is not None
    rank = dist.get_rank()
    own: list[list[tuple[ParameterSpec, Fragments]]] = []
    for buffer in storage.buffers:
        place = dist.get_rank(buffer.ranks if buffer.ranks is not None else storage.ranks)
        own.append([_told(p, held[p.name], rank, place) for p in buffer.parameters])
    every = Ranks(world).gather((own, tuple(dist.get_process_group_ranks(copies))))
    if len({len(buffers) for buffers, _ in every}) > 1:
        raise LayoutError(
            f"the ranks step different numbers of buffers, {[len(buffers) for buffers, _ in every]}: give all ranks "
            "the same groups"
        )
    buffers = [
        replace(buffer, parameters=_united([said[number] for said, _ in every]))
        for number, buffer in enumerate(storage.buffers)
    ]
    kind = "sharded" if storage.by_tensor else storage.kind
    united = replace(storage, kind=kind, ranks=world, buffers=buffers)
    if not storage.by_tensor:
        return united
    of_tensors = {id(b.tensor): held[p.name] for b in storage.buffers for p in b.parameters}
    together = sorted({ranks for _, ranks in every})
    if len(together) == len(every):
        return replace(united, held=of_tensors, domains=(), columns=())
    columns = tuple(together.index(ranks) for _, ranks in every)
    domains = tuple(ranks.index(number) for number, (_, ranks) in enumerate(every))
    return replace(united, held=of_tensors, domains=domains, columns=columns, column=copies)


def _told(p: StoredParameter, held: Held, rank: int, place: int) -> tuple[ParameterSpec, Fragments]:
    """This rank's part of a parameter, with its name in the whole model. place: this rank's index in `p`."""
    matrices = tuple(replace(m, name=held.name + m.name[len(p.name) :]) for m in p.matrices)
    return ParameterSpec(held.name, held.shard.shape, matrices), held.shard.fragments(rank, p.fragments.on(place))


def _united(told: list[list[tuple[ParameterSpec, Fragments]]]) -> list[StoredParameter]:
    """The parameters of a buffer with their fragments on all ranks. told: the parts of each rank, in rank order."""
    found: dict[str, list[tuple[ParameterSpec, Fragments]]] = {}
    for of_rank in told:
        for spec, fragments in of_rank:
            found.setdefault(spec.name, []).append((spec, fragments))
    united = []
    for name, parts in found.items():
        spec = parts[0][0]
        other = next((s for s, _ in parts if s != spec), spec)
        if other != spec:
            raise LayoutError(f"{name} is {spec.shape} on one rank and {other.shape} on another, or split differently")
        fragments = Fragments.of(f for _, of_rank in parts for f in of_rank)
        united.append(StoredParameter(name, spec.shape, fragments, spec.matrices))
    return united
