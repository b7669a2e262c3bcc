"""How the libraries cut a parameter over a mesh of FSDP2, tensor and expert parallelism.

The rules are those of transformers 5.23 (`shard_param` of the styles in distributed/tensor_parallel.py and
expert_parallel.py) and of `fully_shard`, which cuts axis 0 of the remaining part. tests/planner/test_mesh.py
compares the layouts with those of real models.
"""

from __future__ import annotations

import math

import numpy as np

from muon_dist.errors import ConfigError, LayoutError
from muon_dist.layout import ShardedParameter
from muon_dist.layout.cuts import Cut
from muon_dist.planner.mesh import Mesh
from muon_dist.planner.model import PlannedParameter

# Per style: the tensor axis that it cuts, counted from the last, and the split factor.
_CUTS: dict[str, Cut] = {
    "colwise": (-2, 1),
    "colwise_gather_output": (-2, 1),
    "colwise_rep": (-2, 1),
    "rowwise": (-1, 1),
    "rowwise_split_input": (-1, 1),
    "rowwise_rep": (-1, 1),
    "packed_colwise": (-2, 2),
    "packed_rowwise": (-1, 2),
    "embedding_rowwise": (-2, 1),
    "embedding_colwise": (-1, 1),
}
# Styles that keep the module's parameters whole on every rank of the axis.
_WHOLE = frozenset(
    {"replicate", "replicated_with_grad_allreduce", "sequence_parallel", "mla_kv_a_proj", "all_reduce", "local_params"}
    | {"moe_tp_experts", "moe_identity_expert"}
)


def tensor_cut(p: PlannedParameter) -> Cut | None:
    """The cut of tensor parallelism; None if every rank has the whole parameter. Raises ConfigError for an unknown
    style."""
    if p.tp is None or p.tp in _WHOLE:
        return None
    if p.tp not in _CUTS:
        raise ConfigError(f"--tp: `plan` does not know how the style '{p.tp}' of {p.name} cuts it: plan without --tp")
    axis, factor = _CUTS[p.tp]
    if len(p.shape) == 1:  # a bias: cut if the output features are cut, whole if the input features are
        return (0, 1) if axis == -2 else None
    return len(p.shape) + axis, factor


def by_experts(p: PlannedParameter, mesh: Mesh) -> bool:
    """Whether expert parallelism cuts a parameter; then tensor parallelism does not cut it."""
    return mesh.ep > 1 and p.ep == "grouped_gemm"


def whole_parts(p: PlannedParameter, mesh: Mesh) -> tuple[int, int]:
    """(number of parts by tensor or expert parallelism, number of ranks over which FSDP2 cuts each part)."""
    if by_experts(p, mesh):
        return mesh.ep, mesh.efsdp
    # DeepSpeed's AutoTP does not cut embeddings.
    whole = tensor_cut(p) is None or (mesh.layout.startswith("zero") and p.tp == "embedding_rowwise")
    return (mesh.tp if mesh.tp > 1 and not whole else 1), mesh.fsdp


def largest_part(p: PlannedParameter, mesh: Mesh) -> int:
    """Elements of a parameter on the rank that holds most: the first rank, because `torch.chunk` fills the first
    chunks."""
    parts, shards = whole_parts(p, mesh)
    shape = list(p.shape)
    cut = (0, 1) if by_experts(p, mesh) else tensor_cut(p) if parts > 1 else None
    if cut is not None:
        shape[cut[0]] = cut[1] * math.ceil(shape[cut[0]] / cut[1] / parts)
    if shape:
        shape[0] = math.ceil(shape[0] / shards)
    return math.prod(shape)


def sharded_parameter(p: PlannedParameter, mesh: Mesh) -> ShardedParameter:
    """The layout of `p` over the ranks of one pipeline stage. Raises ConfigError for a cut that cannot be exact."""
    ranks = tuple(range(mesh.stage_ranks))
    inner, sharding = (mesh.ep, mesh.efsdp) if by_experts(p, mesh) else (mesh.tp, mesh.fsdp)
    cut = (0, 1) if by_experts(p, mesh) else tensor_cut(p) if mesh.tp > 1 else None
    if cut is None:
        return _whole_on_tp(p, mesh, ranks)
    axes: list[tuple[int, Cut | None]] = [(inner, cut)]
    if mesh.dp_replicate * mesh.fsdp > 1:
        factor = inner if cut[0] == 0 else 1
        axes.insert(0, (sharding, (0, factor)))
    if mesh.dp_replicate > 1:
        axes.insert(0, (mesh.dp_replicate, None))
    try:
        return ShardedParameter(
            p.name, p.shape, tuple(n for n, _ in axes), ranks, tuple(c for _, c in axes), p.matrices
        )
    except LayoutError as error:
        raise ConfigError(f"--tp {mesh.tp}: {error}") from error


def _whole_on_tp(p: PlannedParameter, mesh: Mesh, ranks: tuple[int, ...]) -> ShardedParameter:
    """A parameter that tensor parallelism does not cut: each tp rank has a copy, which FSDP2 cuts over the other
    ranks."""
    if mesh.tp > 1 and mesh.dp_replicate * mesh.fsdp == 1:  # a plain tensor: no axis turned it into a DTensor
        return ShardedParameter(p.name, p.shape, (len(ranks),), ranks, (None,), p.matrices)
    shape, cuts = (mesh.tp, mesh.dp_replicate, mesh.fsdp), (None, None, 0)
    of_each_tp_rank = tuple(np.asarray(ranks).reshape(-1, mesh.tp).T.reshape(-1).tolist())
    return ShardedParameter(p.name, p.shape, shape, of_each_tp_rank, cuts, p.matrices)
