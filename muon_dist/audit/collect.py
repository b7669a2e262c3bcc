"""Keeps the parts of an audited tensor before and after a step, and gathers them on one rank.

The parts come from the layout and from the momentum's sources, not from the buckets of the step, so they do not depend
on the owner or on the data that the step gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from muon_dist.audit.recompute import Before
from muon_dist.exchange.transport import Transport
from muon_dist.guards.replicas import checksum
from muon_dist.layout import Fragment, Fragments, view
from muon_dist.optim.adamw import AdamWork
from muon_dist.optim.rules.parts import OWNER_MOMENTUM
from muon_dist.optim.runtime import Runtime

SLICE = 2**16
"""Number of audited elements of an AdamW parameter; few are enough, because AdamW is elementwise."""


@dataclass
class MatrixParts:
    """This rank's parts of one Muon matrix.

    Args:
        runtime: the optimizer's runtime.
        number: number of the matrix in the layout.
        auditor: rank that recomputes.
        parameter, gradient: this rank's buffer and its gradient; the step will write `parameter`.

    Attributes:
        cover: fragments that cover the whole matrix, the auditor's fragments first.
        sums: checksums of this rank's copy before and after the step.
    """

    runtime: Runtime
    number: int
    auditor: int
    parameter: Tensor
    gradient: Tensor
    sums: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        runtime, plan = self.runtime, self.runtime.plan
        held = plan.layout.matrices[self.number]
        self.matrix, self.buffer = held.matrix, held.buffer
        self.owner = int(plan.owners[self.number])
        self.rank = runtime.transport.rank
        self.held, self.cover = held.fragments, held.sources(self.auditor, plan.layout.domains)
        at_owner = self.buffer in runtime.at_owners
        self.sources = _ordered([] if at_owner else plan.sources[self.number])
        self.device = runtime.binding.device
        self.dtype = torch.float64 if self.parameter.dtype == torch.float64 else torch.float32
        memory = runtime.memory
        self.rows = sorted(name for name in memory.owner_names[self.buffer])
        self.numbers = {
            name: values[memory.matrices[self.buffer].index(self.number)].clone()
            for name, values in memory.numbers[self.buffer].items()
        }
        gradient = self._parts(self.gradient, self.cover)
        self.first = [*self._parts(self.parameter, self.cover), *gradient, *self._state()]
        self._sum()

    def finish(self) -> list[Tensor]:
        """The flat tensors that this rank sends to the auditor; call it after the step."""
        self._sum()
        return [*self.first, *self._parts(self.parameter, self.cover), *self._state()]

    def copy_of(self, rank: int) -> list[Tensor]:
        """The fragments of the weight after the step, if `rank` is this rank; else empty."""
        return self._parts(self.parameter, self.held) if rank == self.rank else []

    def sent_by(self, rank: int) -> int:
        """Number of elements that `rank` sends to the auditor."""
        return 3 * _count(self.cover, rank) + 2 * self._state_size(rank)

    def _state_size(self, rank: int) -> int:
        kept = sum(self.runtime.memory.size(name, self.number) for name in self.rows) if rank == self.owner else 0
        return _count(self.sources, rank) + kept

    def _parts(self, tensor: Tensor, fragments: Fragments) -> list[Tensor]:
        flat = tensor.detach().contiguous()
        return [self._flat(view(flat, f.local)) for f in fragments.on(self.rank)]

    def _state(self) -> list[Tensor]:
        pieces = [(f, v) for m, f, v in self.runtime.momentum_pieces(self.buffer) if m == self.matrix]
        found = [self._flat(v) for _, v in sorted(pieces, key=lambda piece: piece[0].block.start)]
        if self.rank == self.owner:
            found += [self._flat(self.runtime.memory.owners[name][self.number]) for name in self.rows]
        return found

    def _flat(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, self.dtype, copy=True).reshape(-1)

    def _sum(self) -> None:
        flat = self.parameter.detach().contiguous()
        self.sums.append(sum(int(checksum(view(flat, f.local))) for f in self.held.on(self.rank)))

    def whole(self, received: Sequence[Tensor]) -> tuple[Before, Tensor, Tensor, dict[str, Tensor]]:
        """On the auditor: (tensors before the step, momentum, weight, memory after it), from all ranks' messages."""
        names = ("weight", "gradient", "momentum", "weight after", "momentum after")
        found = {name: torch.zeros(self.matrix.numel, dtype=self.dtype, device=self.device) for name in names}
        memory: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for rank, flat in enumerate(received):
            n, s = _count(self.cover, rank), self._state_size(rank)
            parts = flat.split([n, n, s, n, s])
            for name, part in zip(names, parts, strict=True):
                fragments = self.sources if name.startswith("momentum") else self.cover
                _place(found[name], fragments, rank, part)
            for rows, part in zip(memory, (parts[2], parts[4]), strict=True):
                if rank == self.owner:
                    sizes = [self.runtime.memory.size(name, self.number) for name in self.rows]
                    kept = part[_count(self.sources, rank) :].split(sizes) if sizes else ()
                    rows.update(zip(self.rows, kept, strict=True))
        for name, rows in zip(("momentum", "momentum after"), memory, strict=True):
            found[name] = rows.pop(OWNER_MOMENTUM, found[name])
        shape = (self.matrix.rows, self.matrix.cols)
        whole = {name: tensor.view(shape) for name, tensor in found.items()}
        before = Before(whole["weight"], whole["gradient"], whole["momentum"], {**self.numbers, **memory[0]})
        return before, whole["momentum after"], whole["weight after"], memory[1]

    def copies(self, sums: Sequence[Sequence[int]]) -> list[int]:
        """Ranks whose copy after the step differs from the copy in the cover."""
        like: dict[tuple[tuple[int, int, int], ...], list[int]] = {}
        for rank in dict.fromkeys(int(r) for r in self.held.rank):
            places = tuple((f.block.start, f.block.rows, f.block.cols) for f in self.held.on(rank))
            like.setdefault(places, []).append(rank)
        inside = {int(r) for r in self.cover.rank}
        found = []
        for ranks in like.values():
            first = next((r for r in ranks if r in inside), ranks[0])
            found += [r for r in ranks if sums[r][1] != sums[first][1]]
        return found

    def on(self, rank: int, whole: Tensor) -> Tensor:
        """The part of a whole tensor that `rank` holds, flat, in the order of `copy_of`."""
        return _cut(self.held, rank, whole)


def cuts(fragments: Fragments) -> dict[int, Callable[[Tensor], Tensor]]:
    """By rank, a function that returns the rank's fragments of a whole matrix, flat."""
    return {rank: partial(_cut, fragments, rank) for rank in sorted({int(r) for r in fragments.rank})}


def _cut(fragments: Fragments, rank: int, whole: Tensor) -> Tensor:
    flat = whole.contiguous().view(-1)
    return torch.cat([view(flat, f.block).reshape(-1) for f in fragments.on(rank)])


def _count(fragments: Fragments, rank: int) -> int:
    return int(fragments.length[fragments.rank == rank].sum())


def _ordered(fragments: Iterable[Fragment]) -> Fragments:
    return Fragments.of(sorted(fragments, key=lambda f: f.block.start))


def _place(whole: Tensor, fragments: Fragments, rank: int, flat: Tensor) -> None:
    at = 0
    for f in fragments.on(rank):
        view(whole, f.block).copy_(flat[at : at + f.length].view(f.block.rows, f.block.cols))
        at += f.length


class SliceParts:
    """This rank's slice of one AdamW parameter.

    Args:
        work: parameter, this rank's part and its gradient; None if this rank has none.
        state: AdamW's state of the parameter.
        local: returns this rank's part of a state tensor.
        place: returns the first element of the slice in the part, from the number of possible positions.
        device: device of the messages.
    """

    def __init__(
        self,
        work: AdamWork | None,
        state: Mapping[str, Tensor],
        local: Callable[[Tensor], Tensor],
        place: Callable[[int], int],
        device: torch.device,
    ) -> None:
        self.work, self.state, self.local, self.device = work, state, local, device
        self.length = min(SLICE, work[1].numel()) if work is not None else 0
        self.sums: list[int] = []
        if work is None or not self.length:
            self.dtype = torch.float32
            return
        self.start = place(work[1].numel() - self.length + 1)
        self.dtype = torch.float64 if work[1].dtype == torch.float64 else torch.float32
        self.steps = float(state["step"]) if "step" in state else 0.0
        self.first = [self._cut(work[1]), self._cut(work[2]), *self._moments(state)]
        self._sum()

    def finish(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """The flat tensors for the auditor; call it after the step. `state`: AdamW's state of the parameter."""
        if self.work is None or not self.length:
            return []
        self._sum()
        return [*self.first, self._cut(self.work[1]), *self._moments(state)]

    def _moments(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        assert self.work is not None
        if "exp_avg" not in state:
            return [torch.zeros(self.length, dtype=self.dtype, device=self.device) for _ in range(2)]
        return [self._cut(self.local(state[name])) for name in ("exp_avg", "exp_avg_sq")]

    def _cut(self, tensor: Tensor) -> Tensor:
        flat = tensor.detach().reshape(-1)[self.start : self.start + self.length]
        return flat.to(self.device, self.dtype, copy=True)

    def _sum(self) -> None:
        assert self.work is not None
        self.sums.append(int(checksum(self.work[1].detach().reshape(-1)[self.start : self.start + self.length])))


def exchange(
    transport: Transport, sent: Sequence[Sequence[Tensor]], sizes: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    """Send flat tensors to each rank; return the tensors that each rank has sent to this rank. A collective.

    Args:
        sent: the tensors for each rank, in rank order.
        sizes: number of elements that each rank sends to this rank.
    """
    device = transport.device
    flats = [torch.cat([p.to(dtype) for p in parts]) if parts else torch.empty(0, dtype=dtype, device=device)
             for parts in sent]  # fmt: skip
    own = flats[transport.rank]
    if transport.world_size == 1:
        return [own]
    # Tensors for this rank itself are not sent.
    flats[transport.rank] = own[:0]
    receives = [0 if r == transport.rank else n for r, n in enumerate(sizes)]
    received = torch.empty(sum(receives), dtype=dtype, device=device)
    works = transport.all_to_all(torch.cat(flats), [f.numel() for f in flats], received, receives)
    for work in works:
        work.wait()
    parts = list(received.split(receives))
    parts[transport.rank] = own
    return parts
