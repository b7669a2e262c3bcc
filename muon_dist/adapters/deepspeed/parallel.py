"""Parameters that are split between ranks: DeepSpeed's AutoTP, and the experts of its MoE layers.

Only this module reads AutoTP's attributes of parameters, and which experts a rank holds. For DeepSpeed 0.19.8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch.distributed as dist
from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META
from deepspeed.moe.sharded_moe import MOELayer
from deepspeed.utils import groups

from muon_dist.checkpoint.piece import clean_name
from muon_dist.errors import FrameworkError
from muon_dist.layout import Shard
from muon_dist.routing import expert_group, logical_shape


@dataclass(frozen=True)
class Held:
    """The part of a parameter or buffer that this rank holds.

    Attributes:
        name: FQN in the whole model: experts are numbered over all ranks.
        shard: the part in this rank's tensor.
        holders: the ranks of the default group that hold the same part, in order.
    """

    name: str
    shard: Shard
    holders: tuple[int, ...]


@dataclass(frozen=True)
class _Experts:
    """The experts of one MoE layer on this rank: FQN of their list, and the global index of the first expert."""

    prefix: str
    first: int
    group_name: str


class Parallelism:
    """The part of the model that each rank of an engine holds.

    Attributes:
        sharded: False if every rank of a data-parallel group holds the whole model, as plain ZeRO assumes.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._tensor = engine.autotp_size() if not engine.pipeline_parallelism else 1
        self._experts = list(_experts(engine)) if engine.has_moe_layers else []
        self.sharded = self._tensor > 1 or bool(self._experts)

    @cached_property
    def copies(self) -> dist.ProcessGroup:
        """The ranks that hold the same tensors: those of one tensor-parallel rank, or of the same experts."""
        if self._tensor > 1:
            return self._engine.seq_data_parallel_group
        wanted = {e.group_name for e in self._experts}
        every = [self._engine.expert_data_parallel_group[name] for name in sorted(wanted)]
        return min(every, key=dist.get_world_size)

    def name(self, fqn: str) -> str:
        """The FQN in the whole model of this rank's parameter or buffer `fqn`."""
        for experts in self._experts:
            if fqn.startswith(experts.prefix):
                number, dot, rest = fqn[len(experts.prefix) :].partition(".")
                return f"{experts.prefix}{int(number) + experts.first}{dot}{rest}"
        return fqn

    def held(self, fqn: str, tensor: Any) -> Held:
        """This rank's part of a parameter or buffer. fqn: its name in this rank's module.

        Raises:
            FrameworkError: AutoTP does not describe how it has sharded the parameter.
        """
        name, shape = clean_name(fqn), logical_shape(tensor)
        for experts in self._experts:
            if name.startswith(experts.prefix):
                group = self._engine.expert_data_parallel_group[experts.group_name]
                return Held(self.name(name), Shard.whole(shape), tuple(dist.get_process_group_ranks(group)))
        shard = self._shard(name, tensor, shape)
        split = shard.numel != math.prod(shard.shape)
        ranks = dist.get_process_group_ranks(self._engine.seq_data_parallel_group) if split else None
        return Held(name, shard, tuple(ranks) if ranks is not None else tuple(range(dist.get_world_size())))

    def _shard(self, name: str, tensor: Any, shape: tuple[int, ...]) -> Shard:
        """The shard in a local tensor of `shape`."""
        found = getattr(tensor, DS_AUTOTP_UC_META, None)
        if self._tensor == 1 or found is None or found["replicated"]:
            return Shard.whole(shape)
        sizes, axis = found["partition_sizes"], found["partition_dim"]
        widths = found["sub_param_shard_widths"] or ([sizes] if sizes else None)
        why = found["conversion"]["unsupported_reason"]
        if why is None and widths and axis is not None:
            part = dist.get_rank(groups.get_tensor_model_parallel_group())
            blocks = Shard.cut(found["logical_shape"], axis, widths, part).blocks
            shard = Shard(tuple(found["original_shape"]), blocks)
            plain = tuple(n if i != axis else sizes[part] for i, n in enumerate(shard.shape)) if sizes else shape
            if shard.numel == math.prod(shape) and plain == shape:
                return shard
            why = f"by its description this rank holds {shard.numel} elements of {shard.shape}, but it holds {shape}"
        raise FrameworkError(
            f"AutoTP does not describe how it has cut {name}: {why or 'its rows are not split in order'}. "
            "Leave the weight out of AutoTP by a partition_config, or leave out tensor_parallel"
        )


def _experts(engine: Any) -> Iterator[_Experts]:
    for path, module in engine.module.named_modules():
        if isinstance(module, MOELayer) and module.ep_size > 1:
            first = dist.get_rank(module.ep_group) * module.num_local_experts
            name = next((found for p in module.experts.parameters() if (found := expert_group(p)) is not None), None)
            if name is not None:
                prefix = clean_name(f"{path}.experts.deepspeed_experts.")
                yield _Experts(prefix.removeprefix("."), first, name)
