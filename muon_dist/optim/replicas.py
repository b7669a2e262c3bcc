"""Whether copies that must be equal still are: a flipped bit is found and its parameter and rank named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from muon_dist.errors import ReplicaError
from muon_dist.exchange.transport import Transport
from muon_dist.layout import view
from muon_dist.optim.binding import Binding
from muon_dist.ranks import Ranks

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's words, taken as integers of its own width, modulo 2^64 (a 0-d int64 on its device).

    Any change of one element changes it, so any flipped bit is found for certain; changes of several elements that
    cancel are not.
    """
    return tensor.contiguous().view(_WORDS[tensor.element_size()]).sum(dtype=torch.int64)


FAULTY_HARDWARE = (
    "copies of parameters that must be equal are not: {found}. Memory or a network card of that host may be faulty: "
    "continue from the last checkpoint, without that host"
)
"""Message of a check in the middle of a run: the copies were equal once."""

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
    "group '{name}': {key} is {values}. Every rank must step with the same. A scheduler that goes by a loss "
    "(ReduceLROnPlateau) must get the loss that is averaged over all ranks, and rates must be set on all ranks"
)

_ABSENT = torch.iinfo(torch.int64).min


class ReplicaCheck:
    """Compares the copies of tensors over the ranks that hold them.

    named: (name, local tensor) in the same order on every rank of `group`; None in place of a tensor leaves this
        rank's copy out of the comparison.
    group: the ranks that hold copies of one another: the default group under DDP and ZeRO-1/2, the replicas of a
        shard under HSDP.
    message: text of the error, with {found} and {world} (the number of ranks).
    """

    def __init__(
        self,
        named: Iterable[tuple[str, torch.Tensor | None]],
        group: dist.ProcessGroup | None,
        device: torch.device,
        message: str = FAULTY_HARDWARE,
    ) -> None:
        self.named = list(named)
        self._message = message
        self._transport = Transport(group, device)

    def check(self) -> None:
        """A collective over the group: one all-reduce of 16 bytes for each tensor; on all ranks the same outcome.

        Raises:
            ReplicaError: names the first tensors that differ, and the rank whose copy differs from the majority's.
        """
        transport = self._transport
        if transport.world_size == 1 or not self.named:
            return
        sums = torch.stack([self._sum(t) for _, t in self.named])
        # ~x falls as x rises, also at the ends of the range: one maximum gives both bounds
        bounds = torch.cat([sums, torch.where(sums == _ABSENT, sums, ~sums)])
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=transport.group)
        highest, lowest = bounds[: len(sums)], ~bounds[len(sums) :]
        wrong = ((highest != lowest) & (highest != _ABSENT)).nonzero().flatten().tolist()
        if wrong:
            every = transport.ranks.gather([int(sums[i]) for i in wrong])
            found = self._describe(wrong, every)
            raise ReplicaError(self._message.format(found=found, world=transport.world_size))

    def _sum(self, tensor: torch.Tensor | None) -> torch.Tensor:
        device = self._transport.device
        if tensor is None:
            return torch.full((), _ABSENT, dtype=torch.int64, device=device)
        total = checksum(tensor).to(device)
        return torch.where(total == _ABSENT, total + 1, total)

    def _describe(self, wrong: Sequence[int], every: Sequence[Sequence[int]]) -> str:
        """ "h.0.weight: rank 2 differs from the others", for up to three tensors."""
        group = self._transport.group
        globally = dist.get_process_group_ranks(group) if group is not None else list(range(len(every)))
        parts = []
        for column, index in enumerate(wrong[:3]):
            values = {r: sums[column] for r, sums in enumerate(every) if sums[column] != _ABSENT}
            parts.append(f"{self.named[index][0]}: {_odd(values, [globally[r] for r in values])}")
        return "; ".join(parts) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def check_everywhere(checks: Iterable[ReplicaCheck], group: dist.ProcessGroup | None) -> None:
    """Run the checks of this rank's groups; what any rank found is raised on all ranks of `group`. A collective.

    Under HSDP each shard has a group of its own: without this, ranks whose shard is good would continue and wait
    for the others.

    Raises:
        ReplicaError: what this rank found, or else the lowest rank that found something.
    """

    def every() -> None:
        problem = None
        for check in checks:  # all of them: other ranks wait for this one in the next
            try:
                check.check()
            except ReplicaError as error:
                problem = problem or error
        if problem is not None:
            raise problem

    Ranks(group).everywhere(every)


def check_alike(
    binding: Binding, transport: Transport, groups: Sequence[Mapping[str, Any]], rates: Sequence[float]
) -> None:
    """`check_rates` and `check_copies`."""
    check_rates(transport, groups, rates)
    check_copies(binding)


def check_rates(transport: Transport, groups: Sequence[Mapping[str, Any]], rates: Sequence[float]) -> None:
    """Compare the rates of the parameter groups over the ranks; a collective.

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
    """Compare the weights that the layout calls copies, then their gradients; a collective, for the first step and
    where the norms of gradients differ.

    A gradient that is missing on a rank counts as zero there, so it is not compared. A layout without copies needs no
    comparison.

    Raises:
        ReplicaError: the ranks hold different weights or gradients; names parameter and rank.
    """
    layout, local = binding.layout, binding.local
    names = {m.buffer: m.matrix.parameter for m in layout.matrices}
    # Copies that lie across the columns: a plain tensor, or one on a part of the mesh, beside sharded ones.
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
    """Compare fragments over all ranks that hold the same elements, whichever these are. A collective.

    By fragments, because a flat buffer of ZeRO holds copies beside what only this rank has.
    """
    ranks = Ranks(binding.group)
    every = ranks.gather([_sums(binding, ranks.rank, buffer, tensor) for buffer, _, tensor in some])
    globally = dist.get_process_group_ranks(binding.group) if binding.group is not None else list(range(len(every)))
    found: dict[str, str] = {}
    for place in range(len(some)):
        holders: dict[_Elements, dict[int, int]] = {}
        for rank, sums in enumerate(every):
            for elements, total in sums[place].items():
                holders.setdefault(elements, {})[rank] = total
        for elements, values in holders.items():
            if len({*values.values()}) > 1:
                name = binding.layout.matrices[elements[0]].matrix.parameter
                found.setdefault(name, f"{name}: {_odd(values, [globally[r] for r in values])}")
    if found:
        raise ReplicaError(message.format(found="; ".join([*found.values()][:3]), world=len(every)))


_Elements = tuple[int, int, int, int]
"""Index of a matrix in the layout; first element, rows and columns of a block of it."""


def _sums(binding: Binding, rank: int, buffer: int, tensor: torch.Tensor | None) -> dict[_Elements, int]:
    """Checksums of what `rank` holds in `tensor`, laid out as buffer number `buffer`, of matrices that have copies."""
    if tensor is None:
        return {}
    flat = tensor.contiguous().view(-1)
    return {
        (i, f.block.start, f.block.rows, f.block.cols): int(checksum(view(flat, f.local)))
        for i, m in enumerate(binding.layout.matrices)
        if m.buffer == buffer and int(m.fragments.length.sum()) > m.matrix.numel
        for f in m.on(rank)
    }


def _odd(values: Mapping[int, int], names: Sequence[int]) -> str:
    """ "rank 2 differs from the others", of ranks that hold `values`, under the numbers `names`."""
    value, holders = Counter(values.values()).most_common(1)[0]
    if holders * 2 <= len(values):
        return f"ranks {', '.join(map(str, names))} do not agree, and there is no majority"
    odd = [name for name, own in zip(names, values.values(), strict=True) if own != value]
    return f"rank {', '.join(map(str, odd))} differs from the others"
