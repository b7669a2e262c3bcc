"""DeepSpeed's AutoTP under ZeRO 1, 2 and 3.

A rank of tensor parallelism holds a part of each weight, and ZeRO cuts this part over the ranks that hold the same
part.

The rules are those of DeepSpeed 0.19.8, which uses the model's own tensor-parallel plan (module_inject/auto_tp.py,
tp_plan_converter.py). tests/planner/test_meshes.py compares the layouts with those of real engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from muon_dist.errors import ConfigError
from muon_dist.layout import Fragments, Shard, StoredParameter
from muon_dist.planner.model import PlannedParameter
from muon_dist.planner.sharding import tensor_cut

_STYLES = frozenset(
    {"colwise", "colwise_rep", "colwise_gather_output", "rowwise", "replicated_with_grad_allreduce"}
    | {"embedding_rowwise"}
)


def over_tensor_parallel_ranks(
    members: Sequence[Sequence[PlannedParameter]],
    tp: int,
    copies: int,
    zero: Callable[[Sequence[Sequence[PlannedParameter]]], list[list[StoredParameter]]],
) -> list[list[StoredParameter]]:
    """The parameters of each buffer on `copies` x `tp` ranks, tp the fastest.

    Args:
        members: the parameters of each of Muon's groups.
        zero: cuts one tensor-parallel rank's parts of `members` over `copies` ranks, as ZeRO does.

    Raises:
        ConfigError: AutoTP refuses the model's plan, or would cut a weight unevenly.
    """
    shards = {p.name: [shard_of(p, tp, part) for part in range(tp)] for group in members for p in group}
    by_part = []
    for part in range(tp):
        mine = [[replace(p, numel=shards[p.name][part].numel) for p in group] for group in members]
        by_part.append(zero(mine))
    return [
        [_united(parts, shards[parts[0].name], copies) for parts in zip(*of_buffer, strict=True)]
        for of_buffer in zip(*by_part, strict=True)
    ]


def _united(parts: Sequence[StoredParameter], shards: Sequence[Shard], copies: int) -> StoredParameter:
    """One parameter on all ranks, composed of the pieces that ZeRO makes of each tensor-parallel rank's part."""
    held = Fragments.of(
        fragment
        for copy in range(copies)
        for part, (stored, shard) in enumerate(zip(parts, shards, strict=True))
        for fragment in shard.fragments(copy * len(parts) + part, stored.fragments.on(copy))
    )
    return replace(parts[0], fragments=held)


def shard_of(p: PlannedParameter, tp: int, part: int) -> Shard:
    """The part of a parameter on tensor-parallel rank `part`. Raises ConfigError as `autotp_layout`."""
    if p.tp is not None and p.tp not in _STYLES:
        raise ConfigError(
            f"deepspeed.tensor_parallel: AutoTP does not take the style '{p.tp}' of {p.name}; give it a "
            f"partition_config, which is not planned, or plan --layout fsdp2 --tp {tp}"
        )
    cut = tensor_cut(p) if p.tp != "embedding_rowwise" else None
    if cut is None:
        return Shard.whole(p.shape)
    axis, length = cut[0], p.shape[cut[0]]
    if length % tp:
        raise ConfigError(f"--tp {tp}: does not divide axis {axis} of {p.name}, {length}")
    return Shard.cut(p.shape, axis, [[length // tp] * tp], part)
