"""The pieces of a model and an optimizer whose parameters are whole on every rank (DDP) or DTensors (FSDP2)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from muon_dist.adapters.fsdp2.storage import check_parameter, holders, is_sharded, local_part, sharded
from muon_dist.adapters.muon_state import kept_by_all, muon_pieces
from muon_dist.checkpoint import BUFFER, WEIGHT, Checkpoint, Holding, Piece
from muon_dist.checkpoint.piece import MOMENTUM as MOMENTUM_KIND
from muon_dist.checkpoint.piece import clean_name, shaped, whole
from muon_dist.errors import CheckpointError
from muon_dist.optim.muon import Muon
from muon_dist.optim.state import MOMENTUM, is_own


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
        FrameworkError: parameters flattened by FSDP1, or a DTensor that is a sum not yet taken.
        CheckpointError: state that cannot be saved by parameter.
    """
    everyone = tuple(range(world_size))
    pieces: list[Piece] = []
    strided: Copies = []
    named: list[tuple[str, torch.Tensor]] = []
    distributed = False
    masters = optimizer.master_weights() if isinstance(optimizer, Muon) else {}
    within = _model_ranks(optimizer)
    for kind, name, tensor in named_tensors(model):
        check_parameter(name, tensor)
        distributed |= is_sharded(tensor)
        pieces += _placed(name, kind, masters.get(tensor, tensor), tensor, everyone, strided, within)
        if kind == WEIGHT:
            named.append((name, tensor))
    if optimizer is not None:
        copied: set[int] = set()
        if isinstance(optimizer, Muon):
            pieces += muon_pieces(optimizer, source)
            copied = kept_by_all(optimizer)
        steps = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, p in named:
            if id(p) in steps:
                if source is not None:
                    make_state(optimizer, p, name, source, steps[id(p)])
                pieces += state_pieces(optimizer, name, p, everyone, strided, within)
                if id(p) in copied:
                    pieces += _placed(name, MOMENTUM_KIND, optimizer.state[p][MOMENTUM], p, everyone, strided, within)

    @torch.no_grad()
    def finish() -> None:
        copy_back(strided)
        for parameter, master in masters.items():
            local_part(parameter).copy_(local_part(master))

    return Holding("dtensor" if distributed else "replicated", pieces, finish)


Copies = list[tuple[torch.Tensor, torch.Tensor]]
"""Tensors of another memory format, such as channels_last, and contiguous copies, which are what pieces view."""


@torch.no_grad()
def copy_back(strided: Copies) -> None:
    """After a load, bring what was loaded into the tensors themselves."""
    for tensor, loaded in strided:
        tensor.copy_(loaded)


def _model_ranks(optimizer: torch.optim.Optimizer | None) -> tuple[int, ...]:
    """The ranks that hold one model (a stage of a pipeline is one), as far as its optimizer knows."""
    group = optimizer.bound_runtime().binding.group if isinstance(optimizer, Muon) else None
    return () if group is None else tuple(dist.get_process_group_ranks(group))


def state_pieces(
    optimizer: torch.optim.Optimizer,
    name: str,
    p: torch.Tensor,
    everyone: tuple[int, ...],
    strided: Copies,
    within: Collection[int] = (),
) -> list[Piece]:
    """The pieces of an optimizer's state of `p`. within: as of `holders`."""
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
            pieces += _placed(name, key, value, p, everyone, strided, within)
        elif value.numel() == 1 and not is_sharded(value):
            ranks = everyone
            if is_sharded(p):
                if local_part(p).numel() == 0:
                    continue  # Muon keeps no state of no elements, so such a rank is no holder
                ranks = holders(p, set(sharded(name, p).fragments(0).rank.tolist()), within)
            pieces += whole(name, key, (), value, ranks)
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
        if kind in state or (isinstance(optimizer, Muon) and (kind == MOMENTUM_KIND or is_own(kind))):
            continue
        if tensor.shape == () and p.dim() > 0:
            device = p.device if group.get("fused") or group.get("capturable") else "cpu"
            state[kind] = torch.zeros((), dtype=tensor.torch_dtype, device=device)
        else:
            dtype = optimizer.moment_dtype(p) if isinstance(optimizer, Muon) else tensor.torch_dtype
            state[kind] = torch.zeros_like(p, dtype=dtype, requires_grad=False)


# Where a tensor lies -------------------------------------------------------------------------------------------------


def _placed(
    name: str,
    kind: str,
    tensor: Any,
    like: Any,
    everyone: tuple[int, ...],
    strided: Copies,
    within: Collection[int],
) -> list[Piece]:
    """The pieces of `tensor`, which lies as `like` does. `strided` gets what a load must copy back."""
    if not is_sharded(tensor):
        if is_sharded(like):
            raise CheckpointError(f"{kind} of {name} is a plain tensor, the parameter a DTensor")
        if not tensor.is_contiguous():
            strided.append((tensor, tensor.detach().contiguous()))
            tensor = strided[-1][1]
        return whole(name, kind, tuple(like.shape), tensor, everyone)
    local = local_part(tensor)
    if local.numel() == 0:
        return []
    if not local.is_contiguous():
        raise CheckpointError(f"{name} ({kind}): its local shard is not contiguous in memory")
    placed, rank = sharded(name, tensor), dist.get_rank()
    ranks = holders(tensor, next(ranks for ranks in placed.shards() if rank in ranks), within)
    return [
        Piece(name, kind, placed.shape, f.block, shaped(local, f.local), ranks if len(ranks) > 1 else ())
        for f in placed.fragments(0).on(rank)
    ]
