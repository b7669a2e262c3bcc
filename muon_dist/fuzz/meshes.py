"""FSDP2, HSDP and tensor parallelism, each and in combination."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from muon_dist.fuzz.case import Parameter, Setup
from muon_dist.fuzz.holders import Holder
from muon_dist.fuzz.model import TIED, Model

REPLICATE, SHARD, TP, EP = "dp_replicate", "dp_shard", "tp", "ep"


@functools.cache
def mesh_of(setup: Setup) -> DeviceMesh:
    """The mesh of the axes with more than one rank. It is made once, because its process groups stay."""
    axes = {REPLICATE: setup.replicate, SHARD: setup.shard, TP: setup.tp}
    used = {name: size for name, size in axes.items() if size > 1}
    return init_device_mesh("cpu", tuple(used.values()), mesh_dim_names=tuple(used))


@functools.cache
def mesh_of_experts(setup: Setup) -> DeviceMesh:
    """The second mesh of the same ranks: `ep`, and shard x tp / ep even if that is 1."""
    axes = {REPLICATE: setup.replicate, SHARD: setup.shard * setup.tp // setup.ep, EP: setup.ep}
    used = {name: size for name, size in axes.items() if size > 1 or name == SHARD}
    return init_device_mesh("cpu", tuple(used.values()), mesh_dim_names=tuple(used))


def _data(mesh: DeviceMesh, setup: Setup) -> Any:
    """The mesh over which `fully_shard` cuts and copies."""
    return mesh[(REPLICATE, SHARD)] if setup.replicate > 1 else mesh[SHARD]


class MeshHolder(Holder):
    """A holder with the parameters of `parallelize_module`, then `fully_shard` of every layer and of the whole
    model."""

    def wrap(self, model: Model) -> Any:
        for p in self.case.parameters:
            if self.setup.shares(p):
                experts = mesh_of_experts(self.setup)
                _distribute(model.layers[p.layer], p, experts[EP])
                fully_shard(model.layers[p.layer].get_submodule(p.name), mesh=_data(experts, self.setup))
            elif self.setup.tp > 1 and p.tp is not None:
                _distribute(model.layers[p.layer], p, mesh_of(self.setup)[TP])
        if self.setup.shard > 1:
            over = _data(mesh_of(self.setup), self.setup)
            for layer in (*model.layers, model):
                if any(True for _ in layer.parameters()):
                    fully_shard(layer, mesh=over, shard_placement_fn=self._placements(layer))
        return model

    def _placements(self, layer: nn.Module) -> Any:
        by_name = {p.name: p for p in self.case.parameters}
        by_id = {id(q): by_name.get(name.split(".")[0]) for name, q in layer.named_parameters()}

        def placement(parameter: nn.Parameter) -> Shard | None:
            p = by_id.get(id(parameter))
            if p is None or p.fsdp_dim == 0 or (p.tp is not None and self.setup.tp > 1):
                return None
            return Shard(p.fsdp_dim) if parameter.shape[p.fsdp_dim] % self.setup.shard == 0 else None

        return placement


def _distribute(layer: Any, p: Parameter, mesh: DeviceMesh) -> None:
    """Cuts parameters like `ColwiseParallel` and `RowwiseParallel` cut a Linear; those two do not accept experts."""
    module = layer.get_submodule(p.name)
    given = module.weight
    cut = nn.Parameter(distribute_tensor(given.detach(), mesh, [Shard(p.tp or 0)]), requires_grad=given.requires_grad)
    module.weight = cut
    if p.tied:
        layer.get_submodule(p.name + TIED).weight = cut
