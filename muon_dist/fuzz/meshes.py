"""FSDP2, HSDP and tensor parallelism, alone and together."""

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

REPLICATE, SHARD, TP = "dp_replicate", "dp_shard", "tp"


@functools.cache
def mesh_of(setup: Setup) -> DeviceMesh:
    """The axes of more than one rank. Made once: each makes process groups, which stay."""
    axes = {REPLICATE: setup.replicate, SHARD: setup.shard, TP: setup.tp}
    used = {name: size for name, size in axes.items() if size > 1}
    return init_device_mesh("cpu", tuple(used.values()), mesh_dim_names=tuple(used))


class MeshHolder(Holder):
    """Parameters as `parallelize_module` leaves them, below `fully_shard` of every layer and of the whole."""

    def wrap(self, model: Model) -> Any:
        mesh = mesh_of(self.setup)
        if self.setup.tp > 1:
            for p in self.case.parameters:
                if p.tp is not None:
                    _distribute(model.layers[p.layer], p, mesh[TP])
        if self.setup.shard > 1:
            over: Any = mesh[(REPLICATE, SHARD)] if self.setup.replicate > 1 else mesh[SHARD]
            for layer in (*model.layers, model):
                if any(True for _ in layer.parameters()):
                    fully_shard(layer, mesh=over, shard_placement_fn=self._placements(layer))
        return model

    def _placements(self, layer: nn.Module) -> Any:
        by_name = {p.name: p for p in self.case.parameters}
        by_id = {id(q): by_name.get(name.rpartition(".")[2]) for name, q in layer.named_parameters()}

        def placement(parameter: nn.Parameter) -> Shard | None:
            p = by_id.get(id(parameter))
            if p is None or p.fsdp_dim == 0 or (p.tp is not None and self.setup.tp > 1):
                return None
            return Shard(p.fsdp_dim) if p.shape[p.fsdp_dim] % self.setup.shard == 0 else None

        return placement


def _distribute(layer: Any, p: Parameter, mesh: DeviceMesh) -> None:
    """Distribute a layer like `ColwiseParallel` and `RowwiseParallel`, for experts too."""
    given = getattr(layer, p.name)
    cut = nn.Parameter(distribute_tensor(given.detach(), mesh, [Shard(p.tp or 0)]), requires_grad=given.requires_grad)
    layer.register_parameter(p.name, cut)
    if p.tied:
        layer.register_parameter(p.name + TIED, cut)
