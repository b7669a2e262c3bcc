"""Checks before the first step that ranks which share a model have equal rates, weights and gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from muon_dist.errors import ReplicaError
from muon_dist.exchange.transport import Transport
from muon_dist.guards.replicas import ReplicaCheck, check_everywhere, checksum, odd_copies
from muon_dist.layout import view
from muon_dist.optim.binding import Binding
from muon_dist.ranks import Ranks

_CAUSES = (
    "If the ranks train one model, wrap it in DistributedDataParallel, or broadcast the weights from one rank first. "
    "If each rank trains a model of its own, pass process_group=None to Muon. If only some ranks share a model "
    "(pipeline stages, several replicas), pass their group as process_group="
)
NEVER_EQUAL = (
    "Muon shares the work of {world} ranks that hold the same weights, but these weights are not the same: {found}. "
    + _CAUSES
)
"""Message of the check of weights before the first step."""

NOT_AVERAGED = (
    "Muon shares the work of {world} ranks that hold the same weights, but their gradients are not the same: {found}. "
    + _CAUSES
    + ". Under DistributedDataParallel the last backward pass before a step must run outside no_sync(). If local "
    "steps are wanted (accelerate's LocalSGD, torch's PostLocalSGDOptimizer), pass the ranks that average their "
    "gradients as process_group=, and None where each rank steps by itself"
)
"""Message of the check of gradients."""

_RATES = (
    "group '{name}': {key} is {values}. It must be equal on all ranks. A scheduler that uses the loss "
    "(ReduceLROnPlateau) must get the loss averaged over all ranks, and rates must be set on all ranks"
)


ROUNDING = 2**-7
"""Largest difference, relative to the norm, of gradients that ranks have added in different orders: one digit of
bfloat16."""


def check_alike(
    binding: Binding, transport: Transport, groups: Sequence[Mapping[str, Any]], rates: Sequence[float]
) -> None:
    """Run `check_rates` and `check_copies`."""
    check_rates(transport, groups, rates)
    check_copies(binding)


def check_rates(transport: Transport, groups: Sequence[Mapping[str, Any]], rates: Sequence[float]) -> None:
    """Check that the rates of the parameter groups are equal on all ranks; a collective.

    rates: "lr", "weight_decay" and "momentum" of each group, in order.

    Raises:
        ReplicaError: they differ; names group, key, and the value on each rank.
    """
    every = transport.ranks.gather(list(rates))
    for place, of_place in enumerate(zip(*every, strict=True)):
        if len(set(of_place)) > 1:
            name = groups[place // 3].get("name", groups[place // 3]["algorithm"])
            first = [(value, of_place.index(value)) for value in dict.fromkeys(of_place)]
            values = ", ".join(f"{value:g} on rank {rank}" for value, rank in first)
            raise ReplicaError(
                _RATES.format(name=name, key=("lr", "weight_decay", "momentum")[place % 3], values=values)
            )


def check_copies(binding: Binding) -> None:
    """Check that copies of weights, and their gradients, are equal on all ranks that hold them; a collective.

    Called in the first step, and when norms of gradients differ. A missing gradient counts as zero on its rank, so it
    is not compared. A layout without copies needs no comparison.

    Raises:
        ReplicaError: the ranks hold different weights or gradients; names parameter and rank.
    """
    layout, local = binding.layout, binding.local
    names = {m.buffer: m.matrix.parameter for m in layout.matrices}
    # Buffers whose copies are not one per replica group: a plain tensor, or one on a part of the mesh, with FSDP2.
    models = max(len(set(layout.domains)), 1)
    across = {
        m.buffer
        for i, m in enumerate(layout.matrices)
        if (held := int(m.fragments.length.sum())) > m.matrix.numel
        and (held > models * m.matrix.numel or not layout.relayed(i))
    }
    found: dict[str, list[tuple[int, str, torch.Tensor | None]]] = {NEVER_EQUAL: [], NOT_AVERAGED: []}
    for i, p in enumerate(binding.buffers):
        if i in names and (layout.columns or i in across):
            gradient = p.grad if binding.parts is None else binding.parts(p)[1]
            found[NEVER_EQUAL].append((i, names[i], local(p.detach())))
            found[NOT_AVERAGED].append((i, names[i], None if gradient is None or gradient.is_sparse else gradient))
    group = binding.column if binding.column is not None else binding.group
    checks = [
        ReplicaCheck([(name, t) for i, name, t in some if i not in across], group, binding.device, message)
        for message, some in found.items()
        if layout.columns
    ]
    if checks:
        check_everywhere(checks, binding.group)
    if across:
        for message, some in found.items():
            _check_across(binding, [entry for entry in some if entry[0] in across], message)


def _check_across(binding: Binding, some: Sequence[tuple[int, str, torch.Tensor | None]], message: str) -> None:
    """Compare every fragment over all ranks that hold the same elements. A collective.

    It compares fragments, not buffers, because a flat buffer of ZeRO holds both copies and elements of only one rank.
    Gradients may differ by rounding: with uneven shards, a framework's reduction buckets differ in size between ranks,
    so it adds in different orders. Weights still stay equal, because all copies get the owner's update.
    """
    ranks = Ranks(binding.group)
    every = ranks.gather([_sums(binding, ranks.rank, buffer, tensor) for buffer, _, tensor in some])
    globally = dist.get_process_group_ranks(binding.group) if binding.group is not None else list(range(len(every)))
    odd: list[tuple[int, _Elements, dict[int, int]]] = []
    for place in range(len(some)):
        holders: dict[_Elements, dict[int, int]] = {}
        for rank, sums in enumerate(every):
            for elements, total in sums[place].items():
                holders.setdefault(elements, {})[rank] = total
        odd += [(place, elements, values) for elements, values in holders.items() if len({*values.values()}) > 1]
    if odd and message is NOT_AVERAGED:
        prints = ranks.gather([_prints(binding, ranks.rank, some[place], elements) for place, elements, _ in odd])
        odd = [entry for n, entry in enumerate(odd) if not _rounded([every[n] for every in prints])]
    found: dict[str, str] = {}
    for _, elements, values in odd:
        name = binding.layout.matrices[elements[0]].matrix.parameter
        found.setdefault(name, f"{name}: {odd_copies(values, [globally[r] for r in values])}")
    if found:
        raise ReplicaError(message.format(found="; ".join([*found.values()][:3]), world=len(every)))


_Elements = tuple[int, int, int, int]
"""Index of a matrix in the layout; first element, rows and columns of a block of it."""


def _prints(
    binding: Binding, rank: int, entry: tuple[int, str, torch.Tensor | None], elements: _Elements
) -> list[float] | None:
    """Norm of a gradient's fragment, and its products with four vectors of random signs that are equal on all ranks.

    If two fragments differ by `d`, these numbers differ by about the norm of `d`. None: not held by this rank.
    """
    buffer, _, tensor = entry
    index, start, rows, cols = elements
    matrix = binding.layout.matrices[index]
    if tensor is None or matrix.buffer != buffer:
        return None
    held = [f for f in matrix.on(rank) if (f.block.start, f.block.rows, f.block.cols) == (start, rows, cols)]
    if not held:
        return None
    values = view(tensor.contiguous().view(-1), held[0].local).reshape(-1).double().cpu()
    generator = torch.Generator().manual_seed(start)
    signs = torch.randint(0, 2, (4, len(values)), generator=generator).double() * 2 - 1
    return [float(values.norm()), *(signs @ values).tolist()]


def _rounded(prints: Sequence[list[float] | None]) -> bool:
    """Whether fragments differ only by rounding. Gradients that were not averaged differ by about their norm."""
    held = [p for p in prints if p is not None]
    largest = max((p[0] for p in held), default=0.0)
    gap = max((abs(a - b) for p in held for a, b in zip(p, held[0], strict=True)), default=0.0)
    return gap <= ROUNDING * largest  # False for NaN


def _sums(binding: Binding, rank: int, buffer: int, tensor: torch.Tensor | None) -> dict[_Elements, int]:
    """Checksums of the fragments in `tensor` (buffer number `buffer` on `rank`), for matrices that have copies."""
    if tensor is None:
        return {}
    flat = tensor.contiguous().view(-1)
    return {
        (i, f.block.start, f.block.rows, f.block.cols): int(checksum(view(flat, f.local)))
        for i, m in enumerate(binding.layout.matrices)
        if m.buffer == buffer and int(m.fragments.length.sum()) > m.matrix.numel
        for f in m.on(rank)
    }
