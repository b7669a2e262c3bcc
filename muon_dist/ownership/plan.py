"""Chooses the owner of each matrix: deterministic, balanced, and if possible a rank that holds the whole matrix."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from muon_dist.errors import ConfigError, PlanMismatchError
from muon_dist.layout import Layout, MatrixLayout
from muon_dist.layout.fragments import Fragments
from muon_dist.ownership.cost import CostModel


@dataclass(frozen=True)
class OwnershipPlan:
    """A layout and the owner of each of its matrices. They determine all messages of a step.

    Attributes:
        layout: the fragments of every matrix.
        owners: `owners[i]` is the rank that owns `layout.matrices[i]`.
        policy: the policy that chose the owners, for messages.
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
    def sources(self) -> tuple[Fragments, ...]:
        """Per matrix, its sources: the fragments that hold its momentum and send it to the owner."""
        domains = self.layout.domains
        return tuple(m.sources(owner, domains) for m, owner in zip(self.layout.matrices, self.owners, strict=True))

    @cached_property
    def direct(self) -> tuple[Fragments, ...]:
        """Per matrix, the fragments whose updates the owner itself sends: all, or if the matrix is relayed
        (`Layout.relayed`), those in the owner's copy of the model."""
        domain = np.asarray(self.layout.domains)
        return tuple(
            m.fragments.chosen(domain[m.fragments.rank] == domain[owner]) if self.layout.relayed(i) else m.fragments
            for i, (m, owner) in enumerate(zip(self.layout.matrices, self.owners, strict=True))
        )

    def owned_by(self, rank: int) -> tuple[int, ...]:
        """Indices of the matrices that `rank` owns."""
        return tuple(i for i, owner in enumerate(self.owners) if owner == rank)

    def names_owned_by(self, rank: int) -> tuple[str, ...]:
        """Names of the matrices that `rank` owns."""
        return tuple(self.layout.matrices[i].matrix.name for i in self.owned_by(rank))

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
    """SHA-256 of (name, value) pairs; 32 bytes, equal on two ranks exactly if all pairs are equal."""
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
    dtype: Callable[[MatrixLayout], torch.dtype] = lambda m: torch.float32,
    bytes_per_element: int = 4,
) -> OwnershipPlan:
    """The ownership plan of a layout. All ranks compute the same plan without communication.

    Args:
        layout: the fragments of every matrix on every rank.
        policy:
            - "balanced": largest matrix first, each to the rank that would finish it earliest (Graham's LPT). The time
              counts the iteration, and the bytes sent to that rank and back. If one rank holds more than half of a
              matrix, the matrix starts there. It leaves the busiest rank only if the last rank then finishes earlier.
              Each phase of the layout is balanced separately.
            - "local": the rank that holds most of the matrix. Fewest bytes, no balance.
            - "round_robin": in the order of the parameters; for comparison.
        cost: seconds of an iteration and of a transfer; None: the analytic model.
        steps: returns the number of Newton-Schulz steps of a matrix.
        dtype: returns the dtype in which a matrix is orthogonalized.
        bytes_per_element: bytes per element of the messages.

    Ties go to the lowest rank, then to the earlier name.

    Raises:
        ConfigError: the policy is unknown.
    """
    world = layout.world_size
    if policy == "round_robin":
        return OwnershipPlan(layout, tuple(i % world for i in range(len(layout.matrices))), policy)
    if policy == "local":
        held = (m.held_by_rank(world) for m in layout.matrices)
        return OwnershipPlan(layout, tuple(int(h.argmax()) for h in held), policy)
    if policy != "balanced":
        raise ConfigError(f"owner_policy '{policy}' is unknown: use balanced, local or round_robin")
    model = cost or CostModel()
    phases: dict[int, list[int]] = {}
    for i, m in enumerate(layout.matrices):
        phases.setdefault(layout.phase(m), []).append(i)
    owners = [0] * len(layout.matrices)
    for members in phases.values():
        seconds = _seconds(layout, members, model, steps, dtype)
        balance = _Balance(layout, members, seconds, 2 * model.move(1, bytes_per_element))
        balance.place()
        balance.improve()
        for i, owner in balance.owner.items():
            owners[i] = owner
    return OwnershipPlan(layout, tuple(owners), policy)


def _seconds(
    layout: Layout,
    members: Sequence[int],
    model: CostModel,
    steps: Callable[[MatrixLayout], int],
    dtype: Callable[[MatrixLayout], torch.dtype],
) -> list[float]:
    """Seconds per matrix, in a stack of the length that each rank will have for its shape."""
    keys = []
    for i in members:
        m = layout.matrices[i]
        keys.append((min(m.matrix.rows, m.matrix.cols), max(m.matrix.rows, m.matrix.cols), steps(m), dtype(m)))
    length = {key: stack_length(n, layout.world_size) for key, n in Counter(keys).items()}
    seconds = {key: model.orthogonalize(*key, count=length[key]) / length[key] for key in length}
    return [seconds[key] for key in keys]


def stack_length(matrices: int, world_size: int) -> int:
    """Length of a rank's stack if `matrices` matrices of one shape are spread evenly over the ranks."""
    return -(-matrices // world_size)


class _Balance:
    """Owners of the matrices of one phase, and the time when each rank finishes.

    Args:
        layout, members: the layout, and the indices of the matrices.
        seconds: seconds of the iteration, per matrix.
        round_trip: seconds to send one element to an owner and back. If every rank holds the whole matrix (DDP), no
            gather is needed. The broadcast costs the same for every owner, so it does not count.
    """

    def __init__(self, layout: Layout, members: Sequence[int], seconds: Sequence[float], round_trip: float) -> None:
        self.layout = layout
        self.members = members
        self.seconds = dict(zip(members, seconds, strict=True))
        self.round_trip = round_trip
        self.ends = np.zeros(layout.world_size)
        self.owner: dict[int, int] = {}
        self.owned: list[set[int]] = [set() for _ in range(layout.world_size)]
        # Positions by size, then by name; kept, because `improve` sorts by them many times.
        names = sorted(members, key=lambda i: (-self.seconds[i], layout.matrices[i].matrix.name))
        self.order = {i: position for position, i in enumerate(names)}
        self._whole: dict[int, bool] = {}

    def cost(self, i: int) -> np.ndarray:
        """Seconds that matrix `i` costs its owner, for each rank as the owner; (world_size,)."""
        m = self.layout.matrices[i]
        return self.seconds[i] + (m.matrix.numel - m.held_by_rank(self.layout.world_size)) * self.round_trip

    def give(self, i: int, rank: int, seconds: float) -> None:
        self.owner[i] = rank
        self.owned[rank].add(i)
        self.ends[rank] += seconds
        self._whole.pop(i, None)

    def _lies_whole(self, i: int) -> bool:
        """Whether the owner of matrix `i` holds all of it."""
        if i not in self._whole:
            m = self.layout.matrices[i]
            self._whole[i] = m.held(self.owner[i]) == m.matrix.numel
        return self._whole[i]

    def place(self) -> None:
        """Give each matrix to the rank that holds more than half of it, then all others, largest first."""
        loose = []
        for i in self.members:
            m = self.layout.matrices[i]
            held = m.held_by_rank(self.layout.world_size)
            home = int(held.argmax())
            copies = int(held.sum()) > m.matrix.numel
            if 2 * int(held[home]) > m.matrix.numel and not copies:
                self.give(i, home, self.seconds[i] + (m.matrix.numel - int(held[home])) * self.round_trip)
            else:
                loose.append(i)
        for i in sorted(loose, key=self.order.__getitem__):
            cost = self.cost(i)
            rank = int((self.ends + cost).argmin())
            self.give(i, rank, float(cost[rank]))

    def improve(self) -> None:
        """Move matrices from the rank that finishes last, one at a time, while both ranks then finish earlier."""
        while True:
            busiest = int(self.ends.argmax())
            before = self.ends[busiest]
            best: tuple[float, int, int, float, float] | None = None
            seen = set()
            for i in sorted(self.owned[busiest], key=self.order.__getitem__):
                # Equivalent candidates: the same arithmetic, and completely on this rank.
                numel = self.layout.matrices[i].matrix.numel
                alike = (self.seconds[i], numel) if self._lies_whole(i) else (i,)
                if alike in seen:
                    continue
                seen.add(alike)
                cost = self.cost(i)
                there = self.ends + cost
                there[busiest] = np.inf
                receiver = int(there.argmin())
                last = max(float(there[receiver]), float(before - cost[busiest]))
                if last < before * (1 - 1e-9) and (best is None or last < best[0]):
                    best = last, i, receiver, float(cost[busiest]), float(cost[receiver])
            if best is None:
                return
            _, i, receiver, saved, spent = best
            self.owned[busiest].remove(i)
            self.ends[busiest] -= saved
            self.give(i, receiver, spent)
