"""One rank of several: steps under a layout, and compares with one process. Started by torchrun; rank 0 prints JSON.

torchrun --nproc-per-node 2 -m tests.gpu.parity copies --backend gloo --device cuda:0
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate

from muon_dist.layout import ShardedParameter, dtensor_layout
from muon_dist.optim import Binding, Muon
from tests.gpu.models import STEPS, alone, error, gradients, optimizer, parameters


class Weights(torch.nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        for i, p in enumerate(parameters(device)):
            self.register_parameter(f"w{i}", p)


def rows(device: torch.device, options: dict[str, Any]) -> tuple[Muon, list[Any]]:
    """Rows over all ranks, by a binding of our own: gloo on a GPU has no reduce-scatter, which FSDP2 needs."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = parameters(device)
    muon = optimizer(whole, **options)
    mine = [torch.nn.Parameter(_own(p.detach(), rank, world)) for p in whole]
    ranks = tuple(range(world))
    placed = [ShardedParameter(s.name, s.shape, (world,), ranks, (0,), s.matrices) for s in muon.specs[0]]
    muon.param_groups[0]["params"] = mine
    binding = Binding(dtensor_layout(placed, world), tuple(mine), dist.group.WORLD, device)
    muon.bind(binding, dict.fromkeys(range(len(mine)), 0))
    return muon, mine


def _own(tensor: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    parts = tensor.chunk(world)
    return parts[rank].clone() if rank < len(parts) else tensor[:0].clone()


def run(layout: str, device: torch.device, options: dict[str, Any]) -> list[torch.Tensor]:
    """The whole weights after the steps, on every rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if layout == "rows":
        muon, held = rows(device, options)
    else:
        model = Weights(device)
        if layout in ("fsdp2", "hsdp"):
            shape = (world // 2, 2) if layout == "hsdp" else (world,)
            names = ("replicate", "shard")[-len(shape) :]
            fully_shard(model, mesh=init_device_mesh(device.type, shape, mesh_dim_names=names))
        held = list(model.parameters())
        muon = optimizer(held, **options)
    for step in range(STEPS):
        for p, gradient in zip(held, gradients(step), strict=True):
            whole = gradient.to(device)
            if layout == "rows":
                p.grad = _own(whole, rank, world)
            elif isinstance(p, DTensor):
                copies = [Replicate()] * p.device_mesh.ndim
                p.grad = DTensor.from_local(whole, p.device_mesh, copies, run_check=False).redistribute(
                    placements=p.placements
                )
            else:
                p.grad = whole
        muon.step()
    if layout == "rows":
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, [p.detach().cpu() for p in held])
        return [torch.cat([of_rank[i] for of_rank in parts]) for i in range(len(held))]
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu() for p in held]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layout", choices=("copies", "rows", "fsdp2", "hsdp"))
    parser.add_argument("--backend", default="gloo")
    parser.add_argument("--device", default="", help="of every rank; by default the rank's own GPU")
    given = parser.parse_args()
    device = torch.device(given.device or f"cuda:{os.environ['LOCAL_RANK']}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(given.backend)
    on, off = (run(given.layout, device, {"bucket_mb": 2.0, "overlap": overlap}) for overlap in (True, False))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, on)
    if dist.get_rank() == 0:
        found = {
            "error": error(on, alone(device)),
            "copies_equal": all(torch.equal(a, b) for other in every for a, b in zip(on, other, strict=True)),
            "overlap_same_bits": all(torch.equal(a, b) for a, b in zip(on, off, strict=True)),
            "overlap_error": error(on, off),
        }
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
