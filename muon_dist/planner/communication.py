"""Bytes that a rank receives in a training step without Muon, by mesh axis and link.

Rings: in an all-reduce a rank receives 2 (W - 1) / W of the elements, in a gather or a reduce-scatter half of that
(Patarasuk and Yuan 2009). In an all-to-all it receives (W - 1) / W of the elements that it holds.
"""

from __future__ import annotations

from muon_dist.planner.mesh import Mesh
from muon_dist.planner.model import Settings, Workload
from muon_dist.planner.sharding import by_experts, largest_part, whole_parts

Links = tuple[float, float]
"""bytes received (inside the node, from other nodes)"""

DATA_AXES = ("dp_replicate", "dp_shard", "efsdp")
"""Axes whose messages libraries send while layers compute; for messages of the other axes a rank waits."""


def bytes_by_axis(workload: Workload, settings: Settings, mesh: Mesh) -> dict[str, Links]:
    """Bytes that a rank receives per step along each axis with more than one rank; `workload`: of one pipeline stage.

    dp_replicate, dp_shard, efsdp: gradients and weights (`_data`). The others: activations (`_activations`).
    """
    found = _data(workload, settings, mesh) | _activations(workload, settings, mesh)
    return {axis: links for axis, links in found.items() if sum(links)}


def _split(volume: float, between: float) -> Links:
    return volume * (1 - between), volume * between


def _ring(mesh: Mesh, volume: float, size: int, stride: int) -> Links:
    """Bytes per link of one pass of a ring over `volume` bytes."""
    return _split((size - 1) / size * volume, mesh.ring_between(size, stride))


def _data(workload: Workload, settings: Settings, mesh: Mesh) -> dict[str, Links]:
    """Gradients and weights.

    DDP: one all-reduce in fp32. ZeRO-1: one all-reduce of 16-bit gradients and a gather of weights; ZeRO-2 reduces in
    every micro-batch. ZeRO-3 and FSDP2: at most two gathers and a reduce-scatter per micro-batch; HSDP also an
    all-reduce of the shard among the copies.
    """
    low = 2 if settings.low_precision else 4
    rounds, world = settings.accumulation, mesh.stage_ranks // mesh.tp
    total = sum(n * p.numel / whole_parts(p, mesh)[0] for p, n, _ in workload.kinds)
    if mesh.layout in ("ddp", "zero1", "zero2", "zero3"):
        volume = {
            "ddp": 2 * 4 * total,
            "zero1": (2 + 1) * low * total,
            "zero2": (2 * rounds + 1) * low * total,
            "zero3": 3 * rounds * low * total,
        }[mesh.layout]
        return {"dp_replicate" if mesh.layout == "ddp" else "dp_shard": _ring(mesh, volume, world, mesh.tp)}
    each = rounds * (2 * low + 4)
    dense = sum(n * p.numel / whole_parts(p, mesh)[0] for p, n, _ in workload.kinds if not by_experts(p, mesh))
    experts = sum(n * p.numel / mesh.ep for p, n, _ in workload.kinds if by_experts(p, mesh))
    held = sum(n * largest_part(p, mesh) for p, n, _ in workload.kinds)
    return {
        "dp_shard": _ring(mesh, each * dense, mesh.fsdp, mesh.tp),
        "efsdp": _ring(mesh, each * experts, mesh.efsdp, mesh.ep),
        "dp_replicate": _ring(mesh, 2 * 4.0 * held, mesh.dp_replicate, mesh.fsdp * mesh.tp),
    }


def _activations(workload: Workload, settings: Settings, mesh: Mesh) -> dict[str, Links]:
    """Activations and their gradients, of all layers of the stage and all micro-batches.

    tp: an all-reduce after attention and one after the feed-forward layer, in each direction (Shoeybi et al. 2019,
    arXiv 1909.08053, section 3). sp: all-to-all of query, key, value and output (Jacobs et al. 2023, arXiv 2309.14509,
    section 3). cp: keys and values pass all ranks forward, and with their gradients backward (Liu et al. 2023, arXiv
    2310.01889). ep: each token goes to its experts and returns. pp: hidden states forward, their gradients backward.
    With recomputation the forward messages of tp, sp, cp and ep are sent twice.
    """
    a, low = workload.architecture, 2 if settings.low_precision else 4
    tokens = settings.tokens / (mesh.cp * mesh.sp)
    hidden = low * tokens * workload.hidden
    passes = 3 if settings.checkpointing else 2
    layers = workload.layers
    keys = 2 * low * tokens * a.kv_heads * a.head_dim / mesh.tp  # and values
    queries = 2 * low * tokens * a.heads * a.head_dim / mesh.tp  # and outputs
    routed = hidden / mesh.tp * a.experts_per_token
    across = (mesh.ep - 1) / mesh.ep
    return {
        "cp": _split(layers * (passes + 1) * (mesh.cp - 1) * keys, mesh.ring_between(mesh.cp, mesh.sp * mesh.tp)),
        "sp": _split(
            layers * passes * (mesh.sp - 1) / mesh.sp * (keys + queries), mesh.peers_between(mesh.sp, mesh.tp)
        ),
        "tp": _ring(mesh, layers * passes * 2 * 2 * hidden, mesh.tp, 1),
        "ep": _split(layers * passes * 2 * across * routed, mesh.peers_between(mesh.ep, 1)),
        "pp": _split(2.0 * hidden if mesh.pp > 1 else 0.0, mesh.peers_between(mesh.pp, mesh.stage_ranks)),
    }
