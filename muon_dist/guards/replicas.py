"""Whether copies that must be equal still are: a flipped bit is found and its parameter and rank named."""

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
            parts.append(f"{self.named[index][0]}: {odd_copies(values, [globally[r] for r in values])}")
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


def odd_copies(values: Mapping[int, int], names: Sequence[int]) -> str:
    """ "rank 2 differs from the others", of ranks that hold `values`, under the numbers `names`."""
    value, holders = Counter(values.values()).most_common(1)[0]
    if holders * 2 <= len(values):
        return f"ranks {', '.join(map(str, names))} do not agree, and there is no majority"
    odd = [name for name, own in zip(names, values.values(), strict=True) if own != value]
    return f"rank {', '.join(map(str, odd))} differs from the others"
