"""Muon's state as DTensors, which torch.distributed.checkpoint saves and reshards."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from muon_dist.adapters.fsdp2.storage import local_part
from muon_dist.errors import FrameworkError
from muon_dist.layout import ShardedParameter
from muon_dist.ownership import OwnershipPlan


class _SourceMesh(DeviceMesh):
    """A mesh without process groups: it only lists ranks, and nothing is sent over it."""

    def __init__(self, device_type: str, ranks: Any) -> None:
        super().__init__(device_type, ranks, _init_backend=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # torch's method needs process groups

    def __getattr__(self, name: str) -> Any:
        if name != "_dim_group_names":  # DTensor reads it before it communicates
            raise AttributeError(name)
        raise FrameworkError(
            "only some ranks of the mesh hold this part of the optimizer's state (momentum under HSDP, and the rule's "
            "state on the owner of a matrix), so it cannot be gathered as a full tensor: save sharded "
            "(torch.distributed.checkpoint without full_state_dict; SHARDED_STATE_DICT under accelerate)"
        )


class DTensorState:
    """Momentum and the owners' memory as DTensors.

    Without copies, momentum has the placements of its parameter. With copies (HSDP) only the sources hold it: it is a
    DTensor over these ranks, sharded as the parameter is. If the matrices of one parameter (heads, experts) have
    sources in different copies, there is no such mesh, so all copies keep its momentum. All ranks keep the momentum of
    a plain tensor. An owner's tensor for a matrix is a DTensor over this rank only.
    """

    def __init__(self, parameters: list[Any], placed: list[ShardedParameter], group: dist.ProcessGroup) -> None:
        self._parameters = parameters
        self._placed = placed
        self._ranks = dist.get_process_group_ranks(group)
        self._meshes: dict[tuple[Any, ...], DeviceMesh] = {}
        self._sources: list[tuple[int, ...] | None] = []

    def everywhere(self, plan: OwnershipPlan, wanted: bool = False) -> set[int]:
        """Buffers with a shard whose sources are on several ranks; all buffers if `wanted`."""
        if wanted:
            self._sources = [None] * len(self._placed)
            return {buffer for buffer, p in enumerate(self._placed) if len(p.shards()) < len(p.ranks)}
        found: list[list[set[int]]] = [[set() for _ in p.shards()] for p in self._placed]
        shard_of = [{rank: i for i, holders in enumerate(p.shards()) for rank in holders} for p in self._placed]
        for fragments in plan.sources:
            for buffer, rank in zip(fragments.buffer.tolist(), fragments.rank.tolist(), strict=True):
                found[buffer][shard_of[buffer][rank]].add(rank)
        self._sources = []
        for tensor, p, shards in zip(self._parameters, self._placed, found, strict=True):
            if not isinstance(tensor, DTensor) or any(len(ranks) > 1 for ranks in shards):
                self._sources.append(None)
                continue
            # An empty shard has no source, so any of its holders can be in the mesh.
            self._sources.append(
                tuple(min(ranks) if ranks else holders[0] for ranks, holders in zip(shards, p.shards(), strict=True))
            )
        return {buffer for buffer, ranks in enumerate(self._sources) if ranks is None}

    def _mesh(self, device_type: str, ranks: tuple[int, ...], shape: tuple[int, ...]) -> DeviceMesh:
        """A mesh over ranks of the layout; equal arguments return the same object."""
        key = (ranks, shape)
        if key not in self._meshes:
            self._meshes[key] = _SourceMesh(device_type, torch.tensor([self._ranks[r] for r in ranks]).view(shape))
        return self._meshes[key]

    def momentum(self, plan: OwnershipPlan, buffer: int, momentum: torch.Tensor | None) -> torch.Tensor:
        """`momentum` as a DTensor that shares its memory; an empty part on ranks that keep none."""
        p, placed, ranks = self._parameters[buffer], self._placed[buffer], self._sources[buffer]
        if not isinstance(p, DTensor):  # all ranks keep it
            assert momentum is not None
            return momentum
        mesh, placements = p.device_mesh, p.placements
        if ranks is not None and len(ranks) < len(placed.ranks):
            # If no mesh axis shards the parameter, its one source holds it whole.
            shape = tuple(n for n, cut in zip(placed.mesh_shape, placed.cuts, strict=True) if cut is not None) or (1,)
            mesh = self._mesh(mesh.device_type, ranks, shape)
            placements = tuple(p for p in placements if type(p) is not Replicate) or (Replicate(),)
        if momentum is None:
            momentum = torch.empty(0, dtype=torch.float32, device=local_part(p).device)
        return DTensor.from_local(momentum, mesh, placements, run_check=False, shape=p.shape, stride=p.stride())

    def by_owner(self, plan: OwnershipPlan, matrix: int, kept: torch.Tensor | None, length: int) -> torch.Tensor:
        """An owner's state of a matrix (`length` numbers) as a DTensor; other ranks have an empty part."""
        p = self._parameters[plan.layout.matrices[matrix].buffer]
        device_type = p.device_mesh.device_type if isinstance(p, DTensor) else p.device.type
        mesh = self._mesh(device_type, (plan.owners[matrix],), (1,))
        if kept is None:
            kept = torch.empty(0, dtype=torch.float32, device=local_part(p).device)
        return DTensor.from_local(kept, mesh, (Shard(0),), run_check=False, shape=torch.Size((length,)), stride=(1,))
