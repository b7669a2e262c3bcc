"""Checkpoint pieces of a model and its optimizer; parameters are whole on every rank (DDP) or DTensors (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from muon_dist.adapters.fsdp2.storage import (
    check_parameter,
    is_sharded,
    local_part,
    placed_over,
    reshard,
    sharded,
)
from muon_dist.adapters.muon_state import kept_by_all, muon_pieces
from muon_dist.checkpoint import BUFFER, WEIGHT, Checkpoint, Holding, Piece
from muon_dist.checkpoint.piece import MOMENTUM as MOMENTUM_KIND
from muon_dist.checkpoint.piece import clean_name, shaped, whole
from muon_dist.errors import CheckpointError
from muon_dist.optim.muon import Muon
from muon_dist.optim.state import MOMENTUM, is_own


def named_tensors(model: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(kind, clean name, tensor) of every parameter and persistent buffer; a tied parameter once."""
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
    """This rank's part of the model and of the optimizer's state, as pieces of a checkpoint.

    A collective if `optimizer` is a Muon without a plan.

    Args:
        model: bare or wrapped (DDP, torch.compile, FSDP2).
        optimizer: Muon, or a torch optimizer whose state has only numbers and tensors in the shape of the parameter;
            None: only weights.
        world_size: number of ranks that save or load together; each holds all parameters that are not DTensors whole.
        source: the checkpoint to load; optimizer state that it has and the optimizer lacks is created.

    Raises:
        FrameworkError: parameters flattened by FSDP1, or a DTensor with the placement `Partial`.
        CheckpointError: state that cannot be saved by parameter.
    """
    reshard(model)
    pieces: list[Piece] = []
    masters = optimizer.master_weights() if isinstance(optimizer, Muon) else {}
    tensors = list(named_tensors(model))
    for _, name, tensor in tensors:
        check_parameter(name, tensor)
    places = Places([(name, tensor) for _, name, tensor in tensors], world_size)
    for kind, name, tensor in tensors:
        pieces += places.pieces(name, kind, masters.get(tensor, tensor), tensor)
    if optimizer is not None:
        copied: set[int] = set()
        if isinstance(optimizer, Muon):
            pieces += muon_pieces(optimizer, source)
            copied = kept_by_all(optimizer)
        steps = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for kind, name, p in tensors:
            if kind == WEIGHT and id(p) in steps:
                if source is not None:
                    make_state(optimizer, p, name, source, steps[id(p)])
                pieces += state_pieces(optimizer, name, p, places)
                if id(p) in copied:
                    pieces += places.pieces(name, MOMENTUM_KIND, optimizer.state[p][MOMENTUM], p)

    @torch.no_grad()
    def finish() -> None:
        places.copy_back()
        for parameter, master in masters.items():
            local_part(parameter).copy_(local_part(master))

    distributed = any(is_sharded(tensor) for *_, tensor in tensors)
    return Holding("dtensor" if distributed else "replicated", pieces, finish)


def state_pieces(optimizer: torch.optim.Optimizer, name: str, p: torch.Tensor, places: Places) -> list[Piece]:
    pieces: list[Piece] = []
    for key, value in optimizer.state.get(p, {}).items():
        if value is None or (isinstance(optimizer, Muon) and is_own(key)):
            continue
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{type(optimizer).__name__} keeps {key} of {name} as a {type(value).__name__}: only tensors can be "
                "saved by parameter"
            )
        if value.shape == p.shape:
            pieces += places.pieces(name, key, value, p)
        elif value.numel() == 1 and not is_sharded(value):
            if not is_sharded(p) or local_part(p).numel():  # Muon keeps no state for empty shards
                pieces += whole(name, key, (), value, places.ranks(p))
        else:
            raise CheckpointError(
                f"{type(optimizer).__name__} keeps {key} of {name} in shape {tuple(value.shape)}, but the parameter "
                f"has {tuple(p.shape)}: it cannot be sharded as the parameter is"
            )
    return pieces


def make_state(
    optimizer: torch.optim.Optimizer, p: torch.Tensor, name: str, source: Checkpoint, group: dict[str, Any]
) -> None:
    """Create initial optimizer state for all entries of the checkpoint."""
    for kind, tensor in source.states.get(name, {}).items():
        state = optimizer.state[p]
        if kind in state or (isinstance(optimizer, Muon) and (kind == MOMENTUM_KIND or is_own(kind))):
            continue
        if tensor.shape == () and p.dim() > 0:
            device = p.device if group.get("fused") or group.get("capturable") else "cpu"
            state[kind] = torch.zeros((), dtype=tensor.torch_dtype, device=device)
        else:
            dtype = optimizer.moment_dtype(p) if isinstance(optimizer, Muon) else tensor.torch_dtype
            state[kind] = torch.zeros_like(p, dtype=dtype, requires_grad=False)


# Where a tensor lies -------------------------------------------------------------------------------------------------


class Places:
    """The blocks of every tensor on each rank that saves or loads.

    If these ranks are the default group and there are DTensors, making this object is a collective: a DTensor may be
    on some ranks only, so all ranks exchange their blocks.

    Args:
        named: names and tensors of a model, equal on all ranks.
        world_size: number of ranks that save or load together.
    """

    def __init__(self, named: Sequence[tuple[str, torch.Tensor]], world_size: int) -> None:
        self._everyone = tuple(range(world_size))
        # Tensors in another memory format, such as channels_last, with contiguous copies, which the pieces use.
        self._strided: list[tuple[torch.Tensor, torch.Tensor]] = []
        ours = [(name, tensor, ()) for name, tensor in named if is_sharded(tensor)]
        world = dist.group.WORLD if ours else None
        together = world is not None and dist.get_world_size() == world_size
        placed = placed_over(world, ours) if together and world else [sharded(name, t) for name, t, _ in ours]
        self._placed = {id(tensor): where for (_, tensor, _), where in zip(ours, placed, strict=True)}

    def ranks(self, parameter: torch.Tensor) -> tuple[int, ...]:
        """The ranks that hold at least one element of a parameter."""
        where = self._placed.get(id(parameter))
        return self._everyone if where is None else tuple(sorted(set(where.fragments(0).rank.tolist())))

    def pieces(self, name: str, kind: str, tensor: Any, like: Any) -> list[Piece]:
        """The pieces of `tensor`, which has the placement of `like`, a parameter or buffer of the model."""
        if not is_sharded(tensor):
            if is_sharded(like):
                raise CheckpointError(f"{kind} of {name} is a plain tensor, but the parameter is a DTensor")
            if not tensor.is_contiguous():
                self._strided.append((tensor, tensor.detach().contiguous()))
                tensor = self._strided[-1][1]
            return whole(name, kind, tuple(like.shape), tensor, self._everyone)
        local = local_part(tensor)
        if local.numel() == 0:
            return []
        if not local.is_contiguous():
            raise CheckpointError(f"{name} ({kind}): its local shard is not contiguous in memory")
        placed, rank = self._placed[id(like)], dist.get_rank()
        holders = next(tuple(sorted(ranks)) for ranks in placed.shards() if rank in ranks)
        return [
            Piece(name, kind, placed.shape, f.block, shaped(local, f.local), holders if len(holders) > 1 else ())
            for f in placed.fragments(0).on(rank)
        ]

    @torch.no_grad()
    def copy_back(self) -> None:
        """Copy loaded values into the model's non-contiguous tensors; call it after a load."""
        for tensor, loaded in self._strided:
            tensor.copy_(loaded)
