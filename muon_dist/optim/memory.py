"""State of rules besides momentum: tensors on a matrix's owner, and one number per matrix on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from muon_dist.exchange.transport import Transport
from muon_dist.optim.rules import MuonRule
from muon_dist.ownership import OwnershipPlan

ROUNDINGS = "rounding_steps"
"""Key of the number of stochastically rounded steps of each matrix of a parameter. Stored on the CPU, which reads it.
"""


class RuleMemory:
    """The memory of all rules on one rank, all zero at first.

    Args:
        plan, rank: the ownership plan, and this rank.
        device: the device of the exchange.
        rules: the rule of each buffer.
        rounded: buffers that are rounded stochastically.
        everywhere: keep `owners` for all matrices, not only for owned ones; see `share`.

    Attributes:
        matrices: the matrices in each buffer.
        owned: per buffer, the matrices that this rank owns.
        numbers: by buffer and name of `matrix_memory`, one fp64 number per matrix of the buffer.
        owner_names: by buffer, the names of `owner_memory`.
        owners: by name of `owner_memory` and matrix, the 1-D fp32 tensor that the matrix's owner keeps.
        everywhere: `owners` has all matrices.
        started: buffers whose memory `MuonRule.start` has prepared.
    """

    def __init__(
        self,
        plan: OwnershipPlan,
        rank: int,
        device: torch.device,
        rules: Mapping[int, MuonRule],
        rounded: Set[int] = frozenset(),
        everywhere: bool = False,
    ) -> None:
        self._layouts = plan.layout.matrices
        self.matrices: dict[int, list[int]] = {b: [] for b in rules}
        for i, m in enumerate(plan.layout.matrices):
            self.matrices[m.buffer].append(i)
        self.owned = {b: [i for i in members if plan.owners[i] == rank] for b, members in self.matrices.items()}
        self.numbers: dict[int, dict[str, Tensor]] = {}
        self.owner_names = {b: tuple(rule.owner_memory) for b, rule in rules.items()}
        self.owners: dict[str, dict[int, Tensor]] = {}
        self._sizes = {name: size for rule in rules.values() for name, size in rule.owner_memory.items()}
        self.started: set[int] = set()
        self.everywhere = everywhere
        for buffer, rule in rules.items():
            count = len(self.matrices[buffer])
            self.numbers[buffer] = {
                name: torch.zeros(count, dtype=torch.float64, device=device) for name in rule.matrix_memory
            }
            if buffer in rounded:
                self.numbers[buffer][ROUNDINGS] = torch.zeros(count, dtype=torch.float64)
            for name in rule.owner_memory:
                of_name = self.owners.setdefault(name, {})
                for i in self.matrices[buffer] if everywhere else self.owned[buffer]:
                    of_name[i] = torch.zeros(self.size(name, i), dtype=torch.float32, device=device)

    def size(self, name: str, i: int) -> int:
        """Number of elements that the owner of matrix `i` keeps for entry `name` of `owner_memory`."""
        return self._sizes[name](self._layouts[i].matrix)

    def vector(self, name: str, buffers: Sequence[int]) -> Tensor:
        """A copy of entry `name` of all matrices of `buffers`, (matrices,), one buffer after another."""
        return torch.cat([self.numbers[b][name] for b in buffers])

    def store(self, name: str, buffers: Sequence[int], vector: Tensor) -> None:
        """Store a result of `vector` that a rule has changed."""
        kept = [self.numbers[b][name] for b in buffers]
        torch._foreach_copy_(kept, list(vector.split([len(t) for t in kept])))

    def share(self, buffers: Sequence[int], transport: Transport) -> None:
        """Send the owners' memory of `buffers` to all ranks; one all-reduce, or none if there is no such memory."""
        kept = [
            (of_name[i], i in self.owned[b])
            for of_name in self.owners.values()
            for b in buffers
            for i in self.matrices[b]
            if i in of_name
        ]
        if kept:
            whole = transport.sum(torch.cat([part if own else torch.zeros_like(part) for part, own in kept]))
            torch._foreach_copy_([part for part, _ in kept], list(whole.split([len(part) for part, _ in kept])))

    def count(self, buffers: Sequence[int]) -> dict[int, int]:
        """Count this step; return the number of steps so far of each stochastically rounded matrix of `buffers`."""
        found: dict[int, int] = {}
        for b in buffers:
            if ROUNDINGS in self.numbers[b]:
                steps = self.numbers[b][ROUNDINGS].add_(1)
                found.update(zip(self.matrices[b], map(int, steps.tolist()), strict=True))
        return found

    def adopt(self, other: RuleMemory) -> None:
        """Use the tensors of `other`, a memory of the same plan, for all entries that both have by name."""
        for buffer, numbers in self.numbers.items():
            numbers.update({name: kept for name, kept in other.numbers[buffer].items() if name in numbers})
        for name, of_name in self.owners.items():
            of_name.update({i: kept for i, kept in other.owners.get(name, {}).items() if i in of_name})

    def clear(self, buffer: int) -> None:
        """Set the memory of one buffer to zero, as before its first step."""
        kept = [self.owners[name] for name in self.owner_names[buffer]]
        of_owner = [of_name[i] for of_name in kept for i in self.matrices[buffer] if i in of_name]
        for tensor in (*self.numbers[buffer].values(), *of_owner):
            tensor.zero_()
        self.started.discard(buffer)
