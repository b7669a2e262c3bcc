"""The pieces of a model and an optimizer whose parameters are whole on every rank (DDP) or DTensors (FSDP2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from muon_dist.adapters.fsdp2 import check_parameter
from muon_dist.checkpoint import BUFFER, WEIGHT, Checkpoint, Extent, Holding, Piece
from muon_dist.checkpoint.piece import MOMENTUM as MOMENTUM_KIND
from muon_dist.checkpoint.piece import clean_name, whole
from muon_dist.errors import CheckpointError, FrameworkError
from muon_dist.optim.muon import Muon
from muon_dist.optim.state import MOMENTUM, kept_by_all, momentum_pieces


def named_tensors(model: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(kind, clean name, tensor) of every parameter, tied ones once, and every persistent buffer."""
    for name, p in model.named_parameters():
        yield WEIGHT, clean_name(name), p
    kept = set(model.state_dict(keep_vars=True))
    for name, b in model.named_buffers():
        if name in kept:
            yield BUFFER, clean_name(name), b


def holding(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    world_size: int,
    *,
    source: Checkpoint | None = None,
) -> Holding:
    """What this rank holds of the model and the state of its optimizer.

    A collective when `optimizer` is a Muon that has not planned yet.

    Args:
        model: bare or wrapped (DDP, torch.compile, FSDP2).
        optimizer: Muon or any of torch whose state is numbers and tensors shaped as their parameter; None for the
            weights alone.
        world_size: ranks that save or load together; parameters that are no DTensors are whole on each.
        source: the checkpoint about to be loaded; state that it has and the optimizer has not yet made is made.

    Raises:
        FrameworkError: parameters flattened by FSDP1, or a DTensor cut over more than one mesh axis or as a sum.
        CheckpointError: state that cannot be saved by parameter.
    """
    everyone = tuple(range(world_size))
    pieces: list[Piece] = []
    named: list[tuple[str, torch.Tensor]] = []
    sharded = False
    for kind, name, tensor in named_tensors(model):
        check_parameter(name, tensor)
        sharded |= isinstance(tensor, DTensor)
        pieces += _placed(name, kind, tensor, tensor, everyone)
        if kind == WEIGHT:
            named.append((name, tensor))
    if optimizer is not None:
        copied: set[int] = set()
        if isinstance(optimizer, Muon):
            pieces += momentum_pieces(optimizer)
            copied = kept_by_all(optimizer)
        steps = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, p in named:
            if id(p) in steps:
                if source is not None:
                    make_state(optimizer, p, name, source, steps[id(p)])
                pieces += state_pieces(optimizer, name, p, everyone)
                if id(p) in copied:
                    pieces += _placed(name, MOMENTUM_KIND, optimizer.state[p][MOMENTUM], p, everyone)
    return Holding("dtensor" if sharded else "replicated", pieces)


def state_pieces(
    optimizer: torch.optim.Optimizer, name: str, p: torch.Tensor, everyone: tuple[int, ...]
) -> list[Piece]:
    pieces: list[Piece] = []
    for key, value in optimizer.state.get(p, {}).items():
        if value is None or (key == MOMENTUM and isinstance(optimizer, Muon)):
            continue
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{type(optimizer).__name__} keeps {key} of {name} as a {type(value).__name__}: only tensors can be "
                "saved by parameter"
            )
        if value.shape == p.shape:
            pieces += _placed(name, key, value, p, everyone)
        elif value.numel() == 1 and not isinstance(value, DTensor):
            holders = _holders_of_all(p) if isinstance(p, DTensor) else everyone
            pieces += whole(name, key, (), value, holders)
        else:
            raise CheckpointError(
                f"{type(optimizer).__name__} keeps {key} of {name} in shape {tuple(value.shape)}, the parameter has "
                f"{tuple(p.shape)}: it cannot be cut as the parameter is"
            )
    return pieces


def make_state(
    optimizer: torch.optim.Optimizer, p: torch.Tensor, name: str, source: Checkpoint, group: dict[str, Any]
) -> None:
    """Make the state that the optimizer would make at its first step, as far as the checkpoint has it."""
    for kind, tensor in source.states.get(name, {}).items():
        state = optimizer.state[p]
        if kind in state or (isinstance(optimizer, Muon) and kind == MOMENTUM_KIND):
            continue
        if tensor.shape == () and p.dim() > 0:
            device = p.device if group.get("fused") or group.get("capturable") else "cpu"
            state[kind] = torch.zeros((), dtype=tensor.torch_dtype, device=device)
        else:
            state[kind] = torch.zeros_like(p, dtype=tensor.torch_dtype, requires_grad=False)


# DTensors ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _placed(name: str, kind: str, tensor: torch.Tensor, like: torch.Tensor, everyone: tuple[int, ...]) -> list[Piece]:
    """The piece of `tensor`, which lies as `like` does."""
    shape = tuple(like.shape)
    if not isinstance(tensor, DTensor):
        if isinstance(like, DTensor):
            raise CheckpointError(f"{kind} of {name} is a plain tensor, the parameter a DTensor")
        if not tensor.is_contiguous():
            raise CheckpointError(f"{name} ({kind}) is not contiguous in memory: call .contiguous() on it")
        return whole(name, kind, shape, tensor, everyone)
    local = tensor.to_local()
    if local.numel() == 0:
        return []
    extent = _extent(name, tensor, local)
    view = local.reshape(-1) if extent.rows == 1 else local.reshape(extent.rows, extent.cols)
    if view.data_ptr() != local.data_ptr():
        raise CheckpointError(f"{name} ({kind}): its local shard is not contiguous in memory")
    return [Piece(name, kind, shape, extent, view, _holders(tensor))]


def _extent(name: str, tensor: DTensor, local: torch.Tensor) -> Extent:
    """Where a local shard lies: the parts of one tensor axis, cut as `torch.chunk` does."""
    shape = tuple(tensor.shape)
    cuts: list[tuple[int, Any]] = [(i, p) for i, p in enumerate(tensor.placements) if not isinstance(p, Replicate)]
    if not cuts:
        return Extent.run(0, math.prod(shape))
    if len(cuts) > 1 or type(cuts[0][1]) is not Shard:
        raise FrameworkError(
            f"{name} is placed {tensor.placements}: checkpoints know tensors cut over one mesh axis, and copies"
        )
    axis, placement = cuts[0]
    cut = placement.dim
    mesh = tensor.device_mesh
    size = -(-shape[cut] // mesh.size(axis))
    first = min(mesh.get_local_rank(axis) * size, shape[cut])
    inner = math.prod(shape[cut + 1 :])
    if local.shape[cut] != min(size, shape[cut] - first):
        raise FrameworkError(
            f"{name}: a local shard of {tuple(local.shape)} is not what Shard({cut}) of {shape} gives"
        )
    return Extent.block(first * inner, math.prod(shape[:cut]), local.shape[cut] * inner, shape[cut] * inner)


def _holders(tensor: DTensor) -> tuple[int, ...]:
    """Ranks with a copy of this rank's shard."""
    ranks = tensor.device_mesh.mesh
    here = tensor.device_mesh.get_coordinate()
    assert here is not None
    index = tuple(
        slice(None) if isinstance(placement, Replicate) else at
        for at, placement in zip(here, tensor.placements, strict=True)
    )
    found = ranks[index].flatten().tolist() if any(isinstance(i, slice) for i in index) else []
    return tuple(sorted(found)) if len(found) > 1 else ()


def _holders_of_all(tensor: DTensor) -> tuple[int, ...]:
    ranks = sorted(tensor.device_mesh.mesh.flatten().tolist())
    return tuple(ranks) if len(ranks) > 1 else ()
