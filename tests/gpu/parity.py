"""One rank of several: steps under a layout, and compares with one process. Started by torchrun; rank 0 prints JSON.

torchrun --nproc-per-node 2 -m tests.gpu.parity copies --backend gloo --device cuda:0
torchrun --nproc-per-node 2 -m tests.gpu.parity zero3 --backend cpu:gloo,cuda:nccl --device cuda:0

NCCL refuses two ranks on one GPU of one host. Here each rank names a host of its own (NCCL_HOSTID), so that NCCL, with
its kernels and streams, runs on a machine with one GPU; its messages go through sockets.
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

LAYOUTS = ("copies", "rows", "fsdp2", "hsdp", "zero0", "zero1", "zero2", "zero3")


class Weight(torch.nn.Module):
    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, gradient: torch.Tensor) -> torch.Tensor:
        return (self.weight * gradient).sum()


class Weights(torch.nn.Module):
    """A loss whose gradients are those given."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.each = torch.nn.ModuleList(Weight(p) for p in parameters(device))

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([m(g) for m, g in zip(self.each, gradients, strict=True)]).sum()


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


def zero(stage: int, device: torch.device, options: dict[str, Any]) -> list[torch.Tensor]:
    """The whole weights after the steps of a DeepSpeed engine."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    from muon_dist.adapters.deepspeed import attach

    model = Weights(device)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 2**18, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 10**9,
    }
    muon = optimizer(list(model.parameters()), **options)
    engine, *_ = deepspeed.initialize(model=model, optimizer=muon, config=config)
    attach(engine)
    for step in range(STEPS):
        engine.backward(engine([g.to(device) for g in gradients(step)]))
        engine.step()
    found = [p if stage == 0 else safe_get_full_fp32_param(p) for p in model.parameters()]
    held = [p.detach().cpu().clone() for p in found]
    engine.destroy()
    return held


def run(layout: str, device: torch.device, options: dict[str, Any]) -> list[torch.Tensor]:
    """The whole weights after the steps, on every rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if layout.startswith("zero"):
        return zero(int(layout[-1]), device, options)
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


def compare(layout: str, device: torch.device) -> dict[str, Any]:
    """This rank's weights against one process, against the other ranks' and with overlap on and off."""
    on, off = (run(layout, device, {"bucket_mb": 2.0, "overlap": overlap}) for overlap in (True, False))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, on)
    return {
        "error": error(on, alone(device)),
        "copies_equal": all(torch.equal(a, b) for other in every for a, b in zip(on, other, strict=True)),
        "overlap_same_bits": all(torch.equal(a, b) for a, b in zip(on, off, strict=True)),
        "overlap_error": error(on, off),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layout", choices=LAYOUTS)
    parser.add_argument("--backend", default="gloo")
    parser.add_argument("--device", default="", help="of every rank; by default the rank's own GPU")
    given = parser.parse_args()
    local_rank = os.environ["LOCAL_RANK"]
    device = torch.device(given.device or f"cuda:{local_rank}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if given.device and "nccl" in given.backend:
        os.environ.update(NCCL_HOSTID=f"rank-{os.environ['RANK']}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
        os.environ["LOCAL_RANK"] = str(device.index or 0)
    dist.init_process_group(given.backend)
    found = compare(given.layout, device)
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
