"""What rules keep beside momentum: numbers for the output features of a matrix, and numbers for a matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from muon_dist.exchange.transport import Transport
from muon_dist.optim.rules import MuonRule
from muon_dist.ownership import OwnershipPlan

ROUNDINGS = "rounding_steps"
"""Of each matrix of a parameter, how often it was stepped with stochastic rounding; on the CPU, where it is read."""


class RuleMemory:
    """The memory of all rules on one rank, all zero at first.

    Args:
        plan, rank: who owns what.
        device: of the exchange.
        rules: by buffer.
        rounded: buffers that are rounded stochastically.
        every_row: keep `rows` of all matrices, not of owned ones alone; see `share`.

    Attributes:
        matrices: of each buffer.
        owned: of each buffer, the matrices that this rank owns.
        numbers: by buffer and name of `matrix_memory`, one fp64 number for each matrix of the buffer.
        row_names: by buffer, the names of `row_memory`.
        rows: by name of `row_memory` and matrix that this rank owns, one fp32 number for each output feature.
        every_row: `rows` has all matrices.
        started: buffers of which `MuonRule.start` has seen the memory.
    """

    def __init__(
        self,
        plan: OwnershipPlan,
        rank: int,
        device: torch.device,
        rules: Mapping[int, MuonRule],
        rounded: Set[int] = frozenset(),
        every_row: bool = False,
    ) -> None:
        self._layouts = plan.layout.matrices
        self.matrices: dict[int, list[int]] = {b: [] for b in rules}
        for i, m in enumerate(plan.layout.matrices):
            self.matrices[m.buffer].append(i)
        self.owned = {b: [i for i in members if plan.owners[i] == rank] for b, members in self.matrices.items()}
        self.numbers: dict[int, dict[str, Tensor]] = {}
        self.row_names = {b: rule.row_memory for b, rule in rules.items()}
        self.rows: dict[str, dict[int, Tensor]] = {}
        self.started: set[int] = set()
        self.every_row = every_row
        for buffer, rule in rules.items():
            count = len(self.matrices[buffer])
            self.numbers[buffer] = {
                name: torch.zeros(count, dtype=torch.float64, device=device) for name in rule.matrix_memory
            }
            if buffer in rounded:
                self.numbers[buffer][ROUNDINGS] = torch.zeros(count, dtype=torch.float64)
            for name in rule.row_memory:
                of_name = self.rows.setdefault(name, {})
                for i in self.matrices[buffer] if every_row else self.owned[buffer]:
                    of_name[i] = torch.zeros(self.features(i), dtype=torch.float32, device=device)

    def features(self, i: int) -> int:
        """Output features of a matrix."""
        return self._layouts[i].matrix.fan[0]

    def vector(self, name: str, buffers: Sequence[int]) -> Tensor:
        """A copy of the numbers of all matrices of some buffers, one buffer after another."""
        return torch.cat([self.numbers[b][name] for b in buffers])

    def store(self, name: str, buffers: Sequence[int], vector: Tensor) -> None:
        """Take over what `vector` has returned and a rule has changed."""
        kept = [self.numbers[b][name] for b in buffers]
        torch._foreach_copy_(kept, list(vector.split([len(t) for t in kept])))

    def share(self, buffers: Sequence[int], transport: Transport) -> None:
        """Give all ranks the owners' `rows` of some buffers; one small all-reduce if there are any."""
        kept = [
            (rows[i], i in self.owned[b])
            for rows in self.rows.values()
            for b in buffers
            for i in self.matrices[b]
            if i in rows
        ]
        if kept:
            whole = transport.sum(torch.cat([rows if own else torch.zeros_like(rows) for rows, own in kept]))
            torch._foreach_copy_([rows for rows, _ in kept], list(whole.split([len(rows) for rows, _ in kept])))

    def count(self, buffers: Sequence[int]) -> dict[int, int]:
        """By matrix of the buffers that are rounded, how often it was stepped, this step included."""
        found: dict[int, int] = {}
        for b in buffers:
            if ROUNDINGS in self.numbers[b]:
                steps = self.numbers[b][ROUNDINGS].add_(1)
                found.update(zip(self.matrices[b], map(int, steps.tolist()), strict=True))
        return found

    def clear(self, buffer: int) -> None:
        """Back to the beginning, for one buffer."""
        kept = [self.rows[name] for name in self.row_names[buffer]]
        rows = [of_name[i] for of_name in kept for i in self.matrices[buffer] if i in of_name]
        for tensor in (*self.numbers[buffer].values(), *rows):
            tensor.zero_()
        self.started.discard(buffer)
