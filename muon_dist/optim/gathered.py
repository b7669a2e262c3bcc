"""The state of Muon groups gathered from all ranks: for a new plan, and for one state dict."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muon_dist.errors import CheckpointError, ConfigError
from muon_dist.layout import view
from muon_dist.optim.runtime import Runtime
from muon_dist.optim.state import MOMENTUM, RESTING, Loaded, entries, follow, put


def carried(runtime: Runtime, state: MutableMapping[Tensor, dict[str, Any]]) -> dict[Tensor, Loaded]:
    """The state of this rank's Muon groups, for a new plan that has more parameters; a collective.

    The same state is put into `state`, as after a load.

    Raises:
        ConfigError: under this layout or rule the state would have to move between ranks, which is not supported.
    """
    layout, transport = runtime.plan.layout, runtime.transport
    everywhere = layout.kind == "replicated"
    owners = any(runtime.memory.owner_names.values())
    if not everywhere and (layout.kind != "dtensor" or layout.columns or owners):
        kind = (
            "HSDP" if layout.columns else f"the {layout.kind} layout" if not owners else "a rule with memory on owners"
        )
        raise ConfigError(
            f"a parameter group cannot be added after the first step under {kind}: save a checkpoint, make the "
            "optimizer with all groups, and load it"
        )
    follow(runtime, state)
    found = {}
    for buffer, parameter in enumerate(runtime.binding.buffers):
        memory: dict[str, Tensor] = dict(runtime.memory.numbers[buffer])
        memory[RESTING] = runtime.resting[runtime.memory.matrices[buffer]]
        if everywhere:
            for name, whole in _padded(runtime, buffer, parameter).items():
                if transport.world_size > 1:
                    dist.all_reduce(whole, group=transport.group)
                memory[name] = whole
        else:
            memory[MOMENTUM] = entries(runtime, buffer)[MOMENTUM]
        found[parameter] = Loaded(memory.pop(MOMENTUM), None, memory)
        put(state, parameter, found[parameter].entries())
    return found


def full_state(runtime: Runtime, local: dict[str, Any], parameters: Iterable[Tensor]) -> dict[str, Any]:
    """`local`, this rank's state dict, completed with the state of all ranks; {} except on rank 0. A collective."""
    layout, group, rank = runtime.plan.layout, runtime.transport.group, runtime.transport.rank
    if layout.kind != "replicated":
        raise CheckpointError(
            f"full_state_dict supports only the replicated layout, and this one is {layout.kind}: let the framework "
            "save each rank's shard (engine.save_checkpoint under DeepSpeed, torch.distributed.checkpoint under FSDP2)"
        )
    # copied, because torch's inner dicts are the live state
    local["state"] = {
        index: {key: value for key, value in entry.items() if ":" not in key}
        for index, entry in local["state"].items()
    }
    index_of = {id(p): i for i, p in enumerate(parameters)}
    assert group is not None
    first = dist.get_global_rank(group, 0)
    for buffer, parameter in enumerate(runtime.binding.buffers):
        # Sources do not overlap, and a matrix has one owner: the sum over ranks places every element exactly once.
        for name, whole in _padded(runtime, buffer, parameter).items():
            dist.reduce(whole, first, group=group)
            if rank == 0:
                local["state"].setdefault(index_of[id(parameter)], {})[name] = whole.cpu()
    return local if rank == 0 else {}


def _padded(runtime: Runtime, buffer: int, parameter: Tensor) -> dict[str, Tensor]:
    """This rank's part of every distributed entry, in full size: zeros where this rank holds nothing."""
    memory, found = runtime.memory, dict[str, Tensor]()
    if buffer not in runtime.at_owners:
        found[MOMENTUM] = torch.zeros(parameter.shape, dtype=torch.float32, device=runtime.binding.device)
        for _, f, piece in runtime.momentum_pieces(buffer):
            view(found[MOMENTUM].view(-1), f.local).copy_(piece)
    for name in memory.owner_names[buffer]:
        sizes = [memory.size(name, i) for i in memory.matrices[buffer]]
        found[name] = torch.zeros(sum(sizes), dtype=torch.float32, device=runtime.binding.device)
        for i, part in zip(memory.matrices[buffer], found[name].split(sizes), strict=True):
            if i in memory.owned[buffer]:
                part.copy_(memory.owners[name][i])
    return found
