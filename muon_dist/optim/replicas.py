"""Whether copies that must be equal still are: a flipped bit is found and its parameter and rank named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from muon_dist.errors import ReplicaError
from muon_dist.exchange.transport import Transport

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's words, taken as integers of its own width, modulo 2^64 (a 0-d int64 on its device).

    Any change of one element changes it, so any flipped bit is found for certain; changes of several elements that
    cancel are not.
    """
    return tensor.contiguous().view(_WORDS[tensor.element_size()]).sum(dtype=torch.int64)


class ReplicaCheck:
    """Compares the copies of tensors over the ranks that hold the same of them.

    named: (name, local tensor) in the same order on every rank of `group`.
    group: the ranks that hold copies of one another: the default group under DDP and ZeRO-1/2, the replicas of a
        shard under HSDP.
    """

    def __init__(
        self, named: Iterable[tuple[str, torch.Tensor]], group: dist.ProcessGroup | None, device: torch.device
    ) -> None:
        self.named = list(named)
        self._transport = Transport(group, device)

    def check(self) -> None:
        """A collective over the group: one all-reduce of 16 bytes for each tensor; on all ranks the same outcome.

        Raises:
            ReplicaError: names the first tensor that differs, and the rank whose copy differs from the majority's.
        """
        transport = self._transport
        if transport.world_size == 1 or not self.named:
            return
        sums = torch.stack([checksum(t).to(transport.device) for _, t in self.named])
        # ~x falls as x rises, also at the ends of the range: one maximum gives both bounds
        bounds = torch.cat([sums, ~sums])
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=transport.group)
        highest, lowest = bounds[: len(sums)], ~bounds[len(sums) :]
        wrong = (highest != lowest).nonzero().flatten().tolist()
        if wrong:
            every = transport.gather_objects([int(sums[i]) for i in wrong])
            raise ReplicaError(self._message(wrong, every))

    def _message(self, wrong: Sequence[int], every: Sequence[Sequence[int]]) -> str:
        ranks = range(len(every))
        group = self._transport.group
        globally = dist.get_process_group_ranks(group) if group is not None else list(ranks)
        parts = []
        for column, index in enumerate(wrong[:3]):
            values = [every[r][column] for r in ranks]
            value, holders = Counter(values).most_common(1)[0]
            odd = [globally[r] for r in ranks if values[r] != value]
            who = f"rank {', '.join(map(str, odd))} differs from the others"
            if holders * 2 <= len(values):
                who = f"ranks {', '.join(map(str, globally))} do not agree, and there is no majority"
            parts.append(f"{self.named[index][0]}: {who}")
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return (
            f"copies of parameters that must be equal are not: {'; '.join(parts)}{more}. Memory or a network card of "
            "that host may be faulty: go on from the last checkpoint, without that host"
        )
