"""Which rank orthogonalizes each matrix: deterministic, balanced, and placed where the data already lies."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from muon_dist.cost import CostModel
from muon_dist.errors import ConfigError, PlanMismatchError
from muon_dist.layout.fragment import Fragment, Layout, MatrixLayout


@dataclass(frozen=True)
class OwnershipPlan:
    """A layout and the owner of each of its matrices; everything that the exchange does follows from it.

    Attributes:
        layout: where the fragments are.
        owners: rank of the owner of `layout.matrices[i]`.
        policy: how they were chosen, for messages.
    """

    layout: Layout
    owners: tuple[int, ...]
    policy: str = "balanced"

    def __post_init__(self) -> None:
        if len(self.owners) != len(self.layout.matrices):
            raise PlanMismatchError(f"{len(self.owners)} owners for {len(self.layout.matrices)} matrices")
        wrong = [r for r in self.owners if not 0 <= r < self.layout.world_size]
        if wrong:
            raise PlanMismatchError(f"owner {wrong[0]} is not a rank of a world of {self.layout.world_size}")

    @cached_property
    def sources(self) -> tuple[tuple[Fragment, ...], ...]:
        """For each matrix, the fragments that hold its momentum and send it to the owner."""
        return tuple(m.sources(owner) for m, owner in zip(self.layout.matrices, self.owners, strict=True))

    def owned_by(self, rank: int) -> tuple[int, ...]:
        """Indices of the matrices that `rank` owns."""
        return tuple(i for i, owner in enumerate(self.owners) if owner == rank)

    def load(self, cost: Callable[[MatrixLayout], float]) -> list[float]:
        """Sum of `cost` over the matrices of each rank."""
        total = [0.0] * self.layout.world_size
        for m, owner in zip(self.layout.matrices, self.owners, strict=True):
            total[owner] += cost(m)
        return total

    def fields(self) -> Iterable[tuple[str, object]]:
        """(name, value) of everything that must be equal on all ranks, in a fixed order."""
        yield from self.layout.fields()
        yield "owner policy", self.policy
        for m, owner in zip(self.layout.matrices, self.owners, strict=True):
            yield f"{m.matrix.name}: owner", owner


def digest(fields: Iterable[tuple[str, object]]) -> bytes:
    """SHA-256 over (name, value) pairs; 32 bytes, equal on two ranks exactly when all pairs are."""
    state = hashlib.sha256()
    for name, value in fields:
        state.update(f"{name}={value!r}\n".encode())
    return state.digest()


def first_difference(by_rank: Mapping[int, Sequence[tuple[str, object]]]) -> str:
    """The first field in which ranks differ, with each rank's value; for the message of a PlanMismatchError."""
    ranks = sorted(by_rank)
    for i in range(max(len(f) for f in by_rank.values())):
        rows = {r: by_rank[r][i] if i < len(by_rank[r]) else ("(nothing)", None) for r in ranks}
        if len({repr(v) for v in rows.values()}) > 1:
            names = sorted({str(name) for name, _ in rows.values()})
            values = ", ".join(f"rank {r}: {_short(value)}" for r, (_, value) in rows.items())
            return f"field '{' | '.join(names)}' differs: {values}"
    return "no field differs"


def _short(value: object, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def assign_owners(
    layout: Layout,
    *,
    policy: str = "balanced",
    cost: CostModel | None = None,
    steps: Callable[[MatrixLayout], int] = lambda m: 5,
    bytes_per_element: int = 4,
) -> OwnershipPlan:
    """Choose the owner of every matrix.

    `balanced`: largest first (Graham's LPT), each to the rank on which it ends earliest, counting the seconds of the
    iteration and of the bytes that must move to that rank and back. A matrix that lies whole on one rank moves
    nothing there, so it stays unless balance pays for the move. Balance is sought within each phase.
    `local`: each to the rank that holds most of it (the lowest of several); fewest bytes, no balance.
    `round_robin`: in the order of the parameters; for comparison.

    Ties go to the lowest rank and to the earlier name, so every rank computes the same plan without communication.
    """
    world = layout.world_size
    if policy == "round_robin":
        return OwnershipPlan(layout, tuple(i % world for i in range(len(layout.matrices))), policy)
    if policy == "local":
        held = ([m.held(r) for r in range(world)] for m in layout.matrices)
        return OwnershipPlan(layout, tuple(h.index(max(h)) for h in held), policy)
    if policy != "balanced":
        raise ConfigError(f"owner_policy '{policy}' is unknown: use balanced, local or round_robin")
    model = cost or CostModel()
    work = [model.orthogonalize(m.matrix.rows, m.matrix.cols, steps(m)) for m in layout.matrices]
    order = sorted(range(len(work)), key=lambda i: (-work[i], layout.matrices[i].matrix.name))
    owners = [0] * len(work)
    loads: dict[int, list[float]] = {}
    for i in order:
        m = layout.matrices[i]
        load = loads.setdefault(layout.phase(m), [0.0] * world)
        missing = [m.matrix.numel] * world
        for f in m.fragments:
            missing[f.rank] -= f.length
        # Twice: to the owner, and back. A copy that is already everywhere (DDP) misses nothing anywhere, so its
        # broadcast, the same whoever owns it, does not count.
        ends = [load[r] + work[i] + 2 * model.move(missing[r], bytes_per_element) for r in range(world)]
        owners[i] = ends.index(min(ends))
        load[owners[i]] = ends[owners[i]]
    return OwnershipPlan(layout, tuple(owners), policy)
