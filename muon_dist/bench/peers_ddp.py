"""DDP."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from muon_dist.bench.cases import Case
from muon_dist.bench.sides import Builder, PlainSide


def wrap(model: nn.Module) -> DistributedDataParallel:
    """`model` under DDP with its default settings."""
    return DistributedDataParallel(model)


def make(model: nn.Module, case: Case, build: Builder) -> PlainSide:
    """`model` under DDP, with all-reduces in the Python hook, so that the byte counter sees them."""
    built = build(model, case)
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(dist.group.WORLD, allreduce_hook)
    return PlainSide(wrapped, model, built)
