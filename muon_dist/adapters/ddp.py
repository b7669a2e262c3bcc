"""DistributedDataParallel: refuses `join()`, which Muon cannot support."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from muon_dist.adapters.living import living
from muon_dist.errors import FrameworkError
from muon_dist.optim.binding import Bound
from muon_dist.optim.planning import plain_binding

_JOIN = (
    "this step runs inside join() of DistributedDataParallel. There a rank without batches still takes part in the "
    "gradient reduction, but it does not orthogonalize its matrices: the other ranks would hang or fail. Give every "
    "rank the same number of batches (drop_last=True in DistributedSampler and DataLoader), or end all ranks "
    "together: join(throw_on_early_termination=True)"
)
_SHARDED_TWICE = (
    "ZeroRedundancyOptimizer gives each rank different parameters, but Muon itself divides work and memory between "
    "the ranks: leave ZeroRedundancyOptimizer out, and make Muon with all parameters"
)


def bind(optimizer: Any) -> Bound | None:
    """The binder: None if no parameter of `optimizer` belongs to a DistributedDataParallel.

    Raises:
        FrameworkError: a ZeroRedundancyOptimizer holds `optimizer`, or the call is inside `join`.
    """
    if optimizer.process_group is None or not torch.distributed.is_initialized():
        return None
    ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
    sharder = getattr(sys.modules.get("torch.distributed.optim"), "ZeroRedundancyOptimizer", None)
    found = living(DistributedDataParallel, *([] if sharder is None else [sharder]))
    wrapped = [o for o in found if isinstance(o, DistributedDataParallel)]
    if any(vars(o).get("optim") is optimizer for o in found if o not in wrapped):
        raise FrameworkError(_SHARDED_TWICE)
    models = [weakref.ref(m) for m in wrapped if any(id(p) in ours for p in m.parameters())]
    if not models:
        return None

    def check() -> None:
        for model in models:
            join = getattr(model(), "_join_config", None)
            if join is not None and join.enable and not join.throw_on_early_termination:
                raise FrameworkError(_JOIN)

    check()  # before the plan: making it is a collective
    binding, group_of = plain_binding(optimizer.param_groups, optimizer.specs, optimizer.process_group)
    binding.before_step = check
    return binding, group_of
