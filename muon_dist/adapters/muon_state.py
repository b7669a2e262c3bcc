"""Muon's state as pieces of a checkpoint: momentum and the state of the rule."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.distributed as dist

from muon_dist.checkpoint import Checkpoint
from muon_dist.checkpoint.piece import MOMENTUM, Piece, clean_name, run, whole
from muon_dist.optim.muon import Muon
from muon_dist.optim.runtime import Runtime
from muon_dist.optim.state import RESTING


def kept_by_all(optimizer: Muon) -> set[int]:
    """`id()` of the parameters whose momentum every holder keeps, not only the sources (`Runtime.everywhere`)."""
    runtime = optimizer.bound_runtime()
    return {id(runtime.binding.buffers[buffer]) for buffer in runtime.everywhere}


def muon_pieces(optimizer: Muon, source: Checkpoint | None = None) -> list[Piece]:
    """Live pieces of this rank's momentum and of the rule's memory, by parameter.

    Each element of momentum is in the pieces of one rank only. Parameters whose momentum every holder keeps
    (`kept_by_all`) are left out: their copies are equal, and a load must fill all copies.

    Args:
        optimizer: makes its plan now if it has none; then this call is a collective.
        source: the checkpoint to load.
    """
    runtime = optimizer.bound_runtime()
    if source is not None:
        runtime.unmoved.clear()  # the checkpoint does not say whether momentum is zero
    kept = kept_by_all(optimizer)
    every = optimizer.specs if runtime.binding.specs is None else runtime.binding.specs
    shapes = {spec.name: spec.shape for specs in every for spec in specs}
    pieces: list[Piece] = []
    for buffer in range(len(runtime.binding.buffers)):
        if id(runtime.binding.buffers[buffer]) not in kept:
            pieces += _momentum(runtime, buffer, shapes)
        pieces += _memory(runtime, buffer)
    if runtime.resting.any() or (source is not None and RESTING in source.manifest.kinds()):
        pieces += _resting(runtime)
    return pieces


def _everyone(runtime: Runtime) -> tuple[int, ...]:
    """Global numbers of the ranks that hold the optimizer's parameters; in a pipeline only the ranks of its stage."""
    group = runtime.binding.group
    return () if group is None or runtime.transport.world_size == 1 else tuple(dist.get_process_group_ranks(group))


def _resting(runtime: Runtime) -> Iterator[Piece]:
    """Pieces of the number of zero-gradient steps per matrix of a parameter; equal on all ranks."""
    everyone = _everyone(runtime)
    names = [m.matrix.parameter for m in runtime.plan.layout.matrices]
    for name, numbers in groupby(range(len(names)), key=names.__getitem__):
        members = list(numbers)
        counts = runtime.resting[members[0] : members[-1] + 1]
        yield from whole(clean_name(name), RESTING, (len(members),), counts, everyone)


def _momentum(runtime: Runtime, buffer: int, shapes: dict[str, tuple[int, ...]]) -> Iterator[Piece]:
    for matrix, f, part in runtime.momentum_pieces(buffer):
        name = matrix.parameter
        blocks = matrix.block.inside(f.block)
        # A run over several rows of a matrix with gaps is several blocks of the parameter.
        parts = [part] if len(blocks) == 1 else part.view(-1).split([b.numel for b in blocks])
        for block, live in zip(blocks, parts, strict=True):
            shaped = live.view(-1) if block.rows == 1 else live.view(block.rows, block.cols)
            yield Piece(clean_name(name), MOMENTUM, shapes[name], block, shaped)


def _memory(runtime: Runtime, buffer: int) -> Iterator[Piece]:
    """Pieces of the rule's state of a parameter: numbers per matrix on all ranks, and the owners' tensors."""
    memory, layouts = runtime.memory, runtime.plan.layout.matrices
    everyone = _everyone(runtime)
    parameters: dict[str, list[int]] = {}
    for i in memory.matrices[buffer]:
        parameters.setdefault(layouts[i].matrix.parameter, []).append(i)
    at = 0
    for name, members in parameters.items():
        for kind, numbers in memory.numbers[buffer].items():
            yield from whole(clean_name(name), kind, (len(members),), numbers[at : at + len(members)], everyone)
        at += len(members)
        for kind in memory.owner_names[buffer]:
            parts = [(memory.size(kind, i), memory.owners[kind].get(i)) for i in members]
            yield from _by_owner(clean_name(name), kind, parts, everyone if memory.everywhere else ())


def _by_owner(
    name: str, kind: str, parts: list[tuple[int, torch.Tensor | None]], holders: tuple[int, ...]
) -> Iterator[Piece]:
    total, at = sum(size for size, _ in parts), 0
    for size, kept in parts:
        if kept is not None:
            yield from run(name, kind, (total,), at, kept, holders)
        at += size
