"""Norms of matrices over all ranks, and the factors that rules compute from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from muon_dist.exchange.transport import Transport
from muon_dist.layout import Block, Matrix
from muon_dist.optim.memory import RuleMemory
from muon_dist.optim.program import GroupProgram, Program
from muon_dist.optim.rules import Group

Wanted = tuple[GroupProgram, str]


def matrix_norms(
    wanted: Sequence[Wanted], fragments: Mapping[str, list[Tensor]], factor: float, transport: Transport
) -> dict[Wanted, Tensor]:
    """Frobenius norms of whole matrices, (n,) in fp64 for each entry of `wanted`; one small all-reduce in total.

    The sources hold each element of a matrix once, so their sums of squares add up to that of the matrix.

    Args:
        wanted: group program and tensor ("gradient", "momentum" or "weight") of each result.
        fragments: by tensor, this rank's fragments in the order of the sources.
        factor: multiplies every gradient.
    """
    if not wanted:
        return {}
    squares = []
    for program, which in wanted:
        total = torch.zeros(len(program.matrices), dtype=torch.float64, device=transport.device)
        if program.sources:
            every = fragments[which]
            norms = torch._foreach_norm([every[n] for n in program.sources], 2, dtype=torch.float64)
            of_fragments = torch.stack(list(norms)).to(transport.device).square_()
            total.index_add_(0, program.source_positions, of_fragments)
        squares.append(total)
    norms = transport.sum(torch.cat(squares)).sqrt_().split([len(s) for s in squares])
    return {key: norm * factor if key[1] == "gradient" else norm for key, norm in zip(wanted, norms, strict=True)}


def feature_norms(
    program: Program, weights: list[Tensor], matrices: Sequence[Matrix], transport: Transport
) -> dict[int, Tensor]:
    """Norms of the output features of each matrix whose rule has `feature_norms`, (outputs,) in fp64, by matrix.

    One small all-reduce in total.

    Args:
        weights: this rank's fragments in the order of the sources; empty if no rule needs weights.
        matrices: the matrices of the layout.
    """
    asked = [p for p in program.groups if p.rule.feature_norms]
    if not asked:
        return {}
    wanted = [i for p in asked for i in p.matrices]
    sizes = [matrices[i].fan[0] for i in wanted]
    starts = dict(zip(wanted, accumulate(sizes, initial=0), strict=False))
    squares = torch.zeros(sum(sizes), dtype=torch.float64, device=transport.device)
    for n in (n for p in asked for n in p.sources):
        i = program.sources.matrices[n]
        for feature, piece in _features(weights[n], program.sources.blocks[n], matrices[i]):
            norms = torch.linalg.vector_norm(piece, dim=0 if matrices[i].transposed else 1, dtype=torch.float64)
            at = starts[i] + feature
            squares[at : at + len(norms)] += norms.to(transport.device).square_()
    return dict(zip(wanted, transport.sum(squares).sqrt_().split(sizes), strict=True))


def _features(piece: Tensor, block: Block, matrix: Matrix) -> Iterator[tuple[int, Tensor]]:
    """A fragment as blocks of the matrix, each with the index of its first output feature.

    A run over several rows becomes the end of the first row, whole rows, and the beginning of the last row.
    """
    row, col = divmod(block.start, matrix.cols)
    if block.rows > 1 or col + block.cols <= matrix.cols:
        parts = [(row, col, piece.reshape(block.rows, block.cols))]
    else:
        flat = piece.reshape(-1)
        first = -col % matrix.cols
        whole = (len(flat) - first) // matrix.cols
        begin, rows, end = flat.split([first, whole * matrix.cols, len(flat) - first - whole * matrix.cols])
        after = row + (first > 0)
        parts = [
            (row, col, begin.view(1, -1)),
            (after, 0, rows.view(-1, matrix.cols)),
            (after + whole, 0, end.view(1, -1)),
        ]
    for row, col, part in parts:
        if part.numel():
            yield col if matrix.transposed else row, part


@dataclass(frozen=True)
class RuleSums:
    """Calls `start`, `begin` and `end` of those rules in a step that define them.

    Attributes:
        programs: the groups with such rules.
        groups: the options of all groups.
        memory: the memory of the rules.
        matrices: the matrices of the layout.
        fragments, factor: see `matrix_norms`.
    """

    programs: Sequence[GroupProgram]
    groups: Mapping[int, Group]
    memory: RuleMemory
    matrices: Sequence[Matrix]
    transport: Transport
    fragments: Mapping[str, list[Tensor]]
    factor: float
    _before: dict[GroupProgram, dict[str, Tensor]] = field(default_factory=dict)

    def begin(self) -> dict[int, Tensor]:
        """The factors from `MuonRule.begin` by group, before weights change; no entry for a rule without factors."""
        new = {p.index for p in self.programs if not self.memory.started.issuperset(p.buffers)}
        norms = self._norms(lambda p: {*p.rule.norms_before, *(p.rule.norms_first if p.index in new else ())})
        self._before.update(norms)
        found = {}
        for p in self.programs:
            memory = self._memory_of(p)
            if p.index in new:
                p.rule.start(norms[p], memory, [self.matrices[i].name for i in p.matrices])
                self.memory.started.update(p.buffers)
            factors = p.rule.begin(norms[p], memory, self.groups[p.index])
            for name, vector in memory.items():
                self.memory.store(name, p.buffers, vector)
            if factors is not None:
                found[p.index] = factors
        return found

    def end(self) -> Iterator[tuple[GroupProgram, Tensor]]:
        """The groups with factors from `MuonRule.end` on their changed weights, and these factors."""
        norms = self._norms(lambda p: set(p.rule.norms_after))
        for p in self.programs:
            factors = p.rule.end(norms[p], self._before[p], self._memory_of(p), self.groups[p.index])
            if factors is not None:
                yield p, factors

    def _norms(self, names: Callable[[GroupProgram], set[str]]) -> dict[GroupProgram, dict[str, Tensor]]:
        wanted = [(p, name) for p in self.programs for name in sorted(names(p))]
        norms = matrix_norms(wanted, self.fragments, self.factor, self.transport)
        return {p: {name: norm for (of, name), norm in norms.items() if of is p} for p in self.programs}

    def _memory_of(self, p: GroupProgram) -> dict[str, Tensor]:
        return {name: self.memory.vector(name, p.buffers) for name in p.rule.matrix_memory}
