"""Bytes and FLOPs of a plan, counted from the real layouts, owners and buckets."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from muon_dist.exchange.schedule import cut_buckets, smallest_bucket
from muon_dist.optim.rules import MuonRule
from muon_dist.ownership import OwnershipPlan
from muon_dist.ownership.cost import CostModel

INSIDE, BETWEEN = 0, 1


@dataclass(frozen=True)
class Exchange:
    """Muon's own communication in one optimizer step.

    Attributes:
        sent, received: bytes, (2, ranks): to and from ranks of the same node, and of others. In a broadcast (DDP,
            HSDP) each rank receives the whole message. A node receives it once from outside, in equal parts through
            the network cards of its participating ranks, and passes it on, as in a ring.
        buckets: their number. collectives: calls of the rank with most calls, counting exchanges in both directions
            and broadcasts.
    """

    sent: np.ndarray
    received: np.ndarray
    buckets: int
    collectives: int

    def seconds(self, inside: float, between: float, per_collective: float) -> float:
        """Seconds of the rank that needs longest, at a rank's bytes/s inside a node and between nodes."""
        slowest = max(
            float((way[INSIDE] / inside + way[BETWEEN] / between).max()) for way in (self.sent, self.received)
        )
        return slowest + self.collectives * per_collective


def buckets_of(
    plan: OwnershipPlan, bucket_elements: int, overlap: bool, device_type: str = "cpu"
) -> list[list[tuple[int, ...]]]:
    """The matrices of each bucket, phase by phase, as `Runtime` makes buckets on a device of this type."""
    smallest = smallest_bucket(device_type)
    members: dict[int, list[int]] = {}
    for i, m in enumerate(plan.layout.matrices):
        members.setdefault(plan.layout.phase(m), []).append(i)
    return [cut_buckets(plan, members[p], bucket_elements, overlap, smallest) for p in sorted(members)]


def exchange_of(
    plan: OwnershipPlan,
    buckets: list[list[tuple[int, ...]]],
    *,
    per_node: int,
    gather_bytes: int,
    scatter_bytes: int,
    gathers: int = 1,
) -> Exchange:
    """Bytes and collectives of a step of `plan` in `buckets`, with `per_node` consecutive ranks on each node.

    gather_bytes, scatter_bytes: bytes per element of a message. gathers: tensors that the owner receives per matrix.
    """
    world = plan.layout.world_size
    node = np.arange(world) // per_node
    sent, received = np.zeros((2, world)), np.zeros((2, world))
    broadcast = np.zeros(world)
    columns = np.asarray(plan.layout.columns or range(world))
    collectives = 0
    for bucket in (b for phase in buckets for b in phase):
        moves = [False, False]
        relays = np.zeros(world)
        for i in bucket:
            owner, given = plan.owners[i], plan.direct[i]
            if plan.layout.relayed(i):
                np.add.at(relays, given.rank, given.length * scatter_bytes)
            ways = (plan.sources[i], gather_bytes * gathers), (given, scatter_bytes)
            for way, (pieces, width) in enumerate(ways):
                elsewhere = pieces.rank != owner
                ranks, volume = pieces.rank[elsewhere], pieces.length[elsewhere] * width
                moves[way] |= len(ranks) > 0
                link = (node[ranks] != node[owner]).astype(int)
                from_others, to_others = (sent, received) if way == 0 else (received, sent)
                np.add.at(from_others, (link, ranks), volume)
                for kind in (INSIDE, BETWEEN):
                    to_others[kind, owner] += volume[link == kind].sum()
        collectives += gathers * moves[0] + moves[1] + int(np.bincount(columns, weights=relays > 0).max())
        broadcast += relays
    for column in set(plan.layout.columns):
        ranks = np.flatnonzero(columns == column)
        _add_broadcasts(sent, received, broadcast[ranks], ranks, node[ranks])
    return Exchange(sent, received, sum(len(phase) for phase in buckets), collectives)


def _add_broadcasts(
    sent: np.ndarray, received: np.ndarray, broadcast: np.ndarray, ranks: np.ndarray, node: np.ndarray
) -> None:
    """Bytes that each of `ranks` (a replica group) sends to the others, along a ring that passes each node once."""
    total = broadcast.sum()
    own_node = np.bincount(node, weights=broadcast)[node]
    size = np.bincount(node)[node]
    outside = (total - own_node) / size
    received[BETWEEN, ranks] += outside
    received[INSIDE, ranks] += total - broadcast - outside
    nodes = len(set(node.tolist()))
    sent[BETWEEN, ranks] += (total - total / nodes) / size
    sent[INSIDE, ranks] += (total - broadcast) - outside


def newton_schulz_seconds(
    plan: OwnershipPlan,
    buckets: list[list[tuple[int, ...]]],
    cost: CostModel,
    steps: int,
    dtype: torch.dtype,
) -> tuple[np.ndarray, float]:
    """(seconds of each rank, seconds until the last rank has ended if ranks wait for each other's buckets).

    Two buckets are under way at a time (`optim.runtime`): a rank begins a bucket when it has ended the one before, all
    ranks have begun that one (and so sent their part of this one), and all owners have ended the one before that (so
    that its updates have arrived).
    """
    loads = np.zeros(plan.layout.world_size)
    end = np.zeros_like(loads)
    all_begun, all_ended, ended_before = 0.0, 0.0, 0.0
    known: dict[tuple[int, int, int], float] = {}
    for bucket in (b for phase in buckets for b in phase):
        here = np.zeros_like(loads)
        shapes = Counter(
            (plan.owners[i], plan.layout.matrices[i].matrix.rows, plan.layout.matrices[i].matrix.cols) for i in bucket
        )
        for (owner, rows, cols), count in shapes.items():
            key = rows, cols, count
            if key not in known:
                known[key] = cost.orthogonalize(rows, cols, steps, dtype, count)
            here[owner] += known[key]
        loads += here
        begin = np.maximum(end, max(all_begun, ended_before))
        end = begin + here
        all_begun, ended_before, all_ended = float(begin.max()), all_ended, float(end.max())
    return loads, float(end.max())


def momentum_bytes(plan: OwnershipPlan, rule: MuonRule) -> np.ndarray:
    """Bytes per rank of fp32 momentum, without the padding of flat groups, and of the rule's state on owners."""
    held = np.zeros(plan.layout.world_size)
    for owner, pieces, m in zip(plan.owners, plan.sources, plan.layout.matrices, strict=True):
        if not rule.momentum_at_owner:
            np.add.at(held, pieces.rank, pieces.length * 4)
        held[owner] += 4 * sum(size(m.matrix) for size in rule.owner_memory.values())
    return held
