"""Checks that copies of parameters are equal: a flipped bit is found, and its parameter and rank are named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

from muon_dist.errors import ReplicaError
from muon_dist.exchange.transport import Transport
from muon_dist.ranks import Ranks

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's elements, read as integers of the same width, modulo 2^64: a 0-d int64 on its device.

    A change of one element always changes the sum, so every single flipped bit is found. Changes of several elements
    can cancel, and are then not found.
    """
    return tensor.contiguous().view(_WORDS[tensor.element_size()]).sum(dtype=torch.int64)


FAULTY_HARDWARE = (
    "copies of parameters that must be equal are not: {found}. Memory or a network card of that host may be faulty: "
    "continue from the last checkpoint, without that host"
)
"""Message of a check during a run, when the copies were equal before."""

_ABSENT = torch.iinfo(torch.int64).min


class ReplicaCheck:
    """Compares the copies of tensors over the ranks that hold them.

    named: (name, local tensor) in the same order on every rank of `group`; None in place of a tensor leaves this
        rank's copy out of the comparison.
    group: the ranks that hold copies of the same tensors: the default group under DDP and ZeRO-1/2, the replica group
        under HSDP.
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
        """Compare the copies. A collective: one all-reduce of 16 bytes per tensor; same result on all ranks.

        Raises:
            ReplicaError: names the first tensors that differ, and the rank whose copy differs from the majority.
        """
        transport = self._transport
        if transport.world_size == 1 or not self.named:
            return
        sums = torch.stack([self._sum(t) for _, t in self.named])
        # ~x falls as x rises, for all int64 values, so one maximum of x and ~x gives both bounds.
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
        """Text for up to three tensors, such as "h.0.weight: rank 2 differs from the others"."""
        group = self._transport.group
        globally = dist.get_process_group_ranks(group) if group is not None else list(range(len(every)))
        parts = []
        for column, index in enumerate(wrong[:3]):
            values = {r: sums[column] for r, sums in enumerate(every) if sums[column] != _ABSENT}
            parts.append(f"{self.named[index][0]}: {odd_copies(values, [globally[r] for r in values])}")
        return "; ".join(parts) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def check_everywhere(checks: Iterable[ReplicaCheck], group: dist.ProcessGroup | None) -> None:
    """Run the checks of this rank's groups; an error on any rank is raised on all ranks of `group`. A collective.

    Under HSDP each shard has a different group: without this, ranks with an equal shard would continue and wait
    forever for the others.

    Raises:
        ReplicaError: the error of this rank, or else of the lowest rank with an error.
    """

    def every() -> None:
        problem = None
        for check in checks:  # run all, because other ranks wait for this rank in the next check
            try:
                check.check()
            except ReplicaError as error:
                problem = problem or error
        if problem is not None:
            raise problem

    Ranks(group).everywhere(every)


def odd_copies(values: Mapping[int, int], names: Sequence[int]) -> str:
    """Text such as "rank 2 differs from the others". values: checksum by rank; names: rank numbers for the text."""
    value, holders = Counter(values.values()).most_common(1)[0]
    if holders * 2 <= len(values):
        return f"ranks {', '.join(map(str, names))} do not agree, and there is no majority"
    odd = [name for name, own in zip(names, values.values(), strict=True) if own != value]
    return f"rank {', '.join(map(str, odd))} differs from the others"
