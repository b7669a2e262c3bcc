"""Momentum in and out of state dicts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from muon_dist.checkpoint.piece import MOMENTUM as MOMENTUM_KIND
from muon_dist.checkpoint.piece import Extent, Piece, clean_name
from muon_dist.errors import CheckpointError, FrameworkError
from muon_dist.optim.runtime import Runtime, view

if TYPE_CHECKING:
    from muon_dist.optim.muon import Muon

MOMENTUM = "momentum_buffer"
PARTIAL = "partial_momentum"
"""Key of a rank's own state dict: for each parameter whose momentum the rank holds in part, the matrices it holds."""


def indexed_parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The parameters in the order in which torch numbers them in a state dict."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def bound_runtime(optimizer: Muon) -> Runtime:
    """The optimizer's runtime, planned now if it was not yet; then a collective.

    Raises:
        FrameworkError: the framework around the optimizer is still being built.
    """
    if optimizer.runtime is None and not optimizer._bind_first():
        raise FrameworkError("the framework has not finished making the optimizer: save or load after it has")
    assert optimizer.runtime is not None
    return optimizer.runtime


def kept_by_all(optimizer: Muon) -> set[int]:
    """`id()` of the parameters whose momentum every holder keeps, not its sources alone (`Binding.everywhere`)."""
    runtime = bound_runtime(optimizer)
    return {id(runtime.binding.buffers[buffer]) for buffer in runtime.binding.everywhere(runtime.plan)}


def momentum_pieces(optimizer: Muon) -> list[Piece]:
    """The momentum that this rank is a source of, as live pieces of the whole momentum of each parameter.

    No element is listed by two ranks. Parameters of which every holder keeps the momentum (`kept_by_all`) are left
    out: their copies are equal, and a load must fill them all.
    """
    runtime = bound_runtime(optimizer)
    kept = kept_by_all(optimizer)
    shapes = {spec.name: spec.shape for specs in optimizer.specs for spec in specs}
    pieces = []
    for buffer in runtime.momentum:
        if id(runtime.binding.buffers[buffer]) in kept:
            continue
        for matrix, span, part in runtime.momentum_pieces(buffer):
            row, column = divmod(span.offset, matrix.cols)
            at = matrix.start + row * matrix.stride + column
            extent = Extent.block(at, span.rows, span.cols, matrix.stride)
            live = part.view(-1) if extent.rows == 1 else part
            name = matrix.parameter
            pieces.append(Piece(clean_name(name), MOMENTUM_KIND, shapes[name], extent, live))
    return pieces


def _held_matrices(runtime: Runtime, buffer: int) -> list[str]:
    return sorted({matrix.name for matrix, _, _ in runtime.momentum_pieces(buffer)})


def partial_momentum(optimizer: Muon) -> dict[int, list[str]]:
    """The `PARTIAL` entry of this rank: state-dict index -> names of the matrices, where momentum is not whole."""
    runtime = optimizer.runtime
    if runtime is None:
        return {}
    index_of = {id(p): i for i, p in enumerate(indexed_parameters(optimizer))}
    return {
        index_of[id(runtime.binding.buffers[buffer])]: _held_matrices(runtime, buffer)
        for buffer, shard in runtime.momentum.items()
        if shard.shape != runtime.binding.local(runtime.binding.buffers[buffer]).shape
        and id(runtime.binding.buffers[buffer]) in index_of
    }


def missing_momentum(optimizer: Muon) -> int:
    """Parameters whose momentum lies on other ranks, wholly or in part, so that this rank's state dict lacks it.

    None under ZeRO and FSDP2: there each rank's part of the state belongs to its part of the parameters.
    """
    runtime = optimizer.runtime
    if runtime is None or runtime.transport.world_size == 1:
        return 0
    held = [(p, optimizer.state.get(p, {}).get(MOMENTUM)) for p in runtime.binding.buffers]
    return sum(momentum is None or momentum.shape != p.shape for p, momentum in held)


def warn_of_partial_state(optimizer: Muon, missing: int) -> None:
    """The RuntimeWarning of `Muon.state_dict`."""
    runtime = bound_runtime(optimizer)
    warnings.warn(
        f"this state_dict is the part of rank {runtime.transport.rank} alone: it lacks the momentum of {missing} of "
        f"{len(runtime.binding.buffers)} parameters, which lies on other ranks. It loads only on this rank and for "
        "the same plan. To save everything, call full_state_dict() on all ranks and save what rank 0 gets, or let "
        "MuonTrainer save the checkpoint",
        RuntimeWarning,
        stacklevel=3,
    )


def split_momentum(
    optimizer: Muon, state_dict: Mapping[str, Any]
) -> tuple[dict[torch.Tensor, tuple[torch.Tensor, list[str] | None]], dict[str, Any]]:
    """Take momentum out of a state dict: torch's own loading would cast it to the parameter's dtype.

    Returns (parameter -> (momentum, names of the matrices that it holds, None for all), the state dict without).
    """
    # As torch matches them: by order. The keys are numbers, or FQNs from torch.distributed.checkpoint.
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    parameters = dict(zip(keys, indexed_parameters(optimizer), strict=False))
    partial = state_dict.get(PARTIAL, {})
    momentum: dict[torch.Tensor, tuple[torch.Tensor, list[str] | None]] = {}
    rest: dict[Any, dict[str, Any]] = {}
    for key, entry in state_dict["state"].items():
        rest[key] = {name: value for name, value in entry.items() if name != MOMENTUM}
        if MOMENTUM in entry and key in parameters:
            momentum[parameters[key]] = (entry[MOMENTUM].detach().clone(), partial.get(key))
    return momentum, {"state": rest, "param_groups": state_dict["param_groups"]}


def adopt_momentum(runtime: Runtime, loaded: Mapping[torch.Tensor, tuple[torch.Tensor, list[str] | None]]) -> None:
    """Copy loaded momentum into this rank's shards.

    Raises:
        CheckpointError: momentum that this rank holds is missing or has another shape.
    """
    for buffer, shard in runtime.momentum.items():
        parameter = runtime.binding.buffers[buffer]
        pieces = runtime.momentum_pieces(buffer)
        if parameter not in loaded:
            if not pieces:  # padding, or a copy
                continue
            raise CheckpointError(
                f"the state dict has no momentum of {pieces[0][0].name}, which rank {runtime.transport.rank} owns: it "
                "is one rank's part only. Save with full_state_dict() on all ranks (MuonTrainer does), or load on "
                "each rank the file that this rank saved"
            )
        value, names = loaded[parameter]
        value, parameter = runtime.binding.local(value), runtime.binding.local(parameter)
        label = pieces[0][0].name if pieces else f"what rank {runtime.transport.rank} only copies or pads"
        if names is not None:
            if names != _held_matrices(runtime, buffer) or value.numel() != shard.numel():
                raise CheckpointError(
                    f"the state dict holds momentum of {names[:3]} of {len(names)} matrices, rank "
                    f"{runtime.transport.rank} holds {_held_matrices(runtime, buffer)[:3]}: it was saved by another "
                    "rank or plan. Save with full_state_dict()"
                )
            shard.copy_(value.view_as(shard))
        elif value.numel() != parameter.numel():
            raise CheckpointError(
                f"momentum of {label} has {value.numel()} elements in the state dict, its parameter "
                f"{parameter.numel()}"
            )
        else:
            flat = value.to(shard.device).reshape(-1)
            if shard.numel() == parameter.numel():
                shard.view(-1).copy_(flat)
            else:
                for _, span, piece in pieces:
                    piece.copy_(view(flat, span))


def full_state_dict(optimizer: Muon) -> dict[str, Any]:
    """See `Muon.full_state_dict`."""
    local = torch.optim.Optimizer.state_dict(optimizer)
    runtime = optimizer.runtime
    if runtime is None or runtime.transport.world_size == 1:
        return local
    layout, group, rank = runtime.plan.layout, runtime.transport.group, runtime.transport.rank
    if layout.kind != "replicated":
        raise CheckpointError(
            f"full_state_dict gathers the replicated layout only, this one is {layout.kind}: the framework saves each "
            "rank's own shard (engine.save_checkpoint under DeepSpeed, torch.distributed.checkpoint under FSDP2)"
        )
    # torch's inner dicts are the live state
    local["state"] = {index: dict(entry) for index, entry in local["state"].items()}
    index_of = {id(p): i for i, p in enumerate(indexed_parameters(optimizer))}
    for buffer, parameter in enumerate(runtime.binding.buffers):
        # Sources do not overlap, so the sum over ranks places every element exactly once.
        whole = torch.zeros(parameter.shape, dtype=torch.float32, device=runtime.binding.device)
        if buffer in runtime.momentum:
            for _, span, piece in runtime.momentum_pieces(buffer):
                view(whole.view(-1), span).copy_(piece)
        assert group is not None
        dist.reduce(whole, dist.get_global_rank(group, 0), group=group)
        if rank == 0:
            local["state"].setdefault(index_of[id(parameter)], {})[MOMENTUM] = whole.cpu()
    return local if rank == 0 else {}
