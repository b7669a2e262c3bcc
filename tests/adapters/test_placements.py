"""DTensors of every placement: our blocks are the elements that torch means, and a step on them is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from muon_dist import Muon
from muon_dist.adapters.fsdp2.storage import sharded
from muon_dist.layout import cut_parameter, view
from muon_dist.numerics import newton_schulz
from muon_dist.optim.reference import reference_step
from tests.distributed import run_ranks

S0, S1, S2, R = Shard(0), Shard(1), Shard(2), Replicate()
LINE: list[list[Placement]] = [[S0], [S1], [S2], [R], [_StridedShard(1, split_factor=2)]]
SQUARE: list[list[Placement]] = [
    [S0, S1], [S1, S0], [S0, S0], [R, S1], [S1, R], [S2, S0], [S1, S1], [R, R],
    [_StridedShard(0, split_factor=2), S0], [_StridedShard(1, split_factor=2), S1],
]  # fmt: skip
SHAPES = [(8, 12), (7, 5), (4, 6, 5), (3, 4, 7), (2, 1), (12, 3, 2)]


def chunks(tensor: torch.Tensor, parts: int, dim: int) -> list[torch.Tensor]:
    """As `torch.chunk`, with empty parts at the end."""
    found = list(tensor.chunk(parts, dim))
    return found + [tensor.narrow(dim, 0, 0)] * (parts - len(found))


def local_shape(shape: tuple[int, ...], placements: list[Placement], mesh: Any) -> torch.Size:
    """The size of this rank's part, as torch itself cuts a tensor: the strided cut last, as `fully_shard` does."""
    part = torch.empty(shape)
    for i in sorted(range(len(placements)), key=lambda i: isinstance(placements[i], _StridedShard)):
        placement: Any = placements[i]
        if isinstance(placement, _StridedShard) and mesh.ndim == 1:
            pieces = chunks(part, placement.split_factor, placement.dim)
        elif hasattr(placement, "dim"):
            pieces = [part]
        else:
            continue
        held = [chunks(piece, mesh.size(i), placement.dim)[mesh.get_local_rank(i)] for piece in pieces]
        part = torch.cat(held, placement.dim)
    return part.shape


def rebuilt(mesh_shape: tuple[int, ...], cases: list[list[Placement]]) -> int:
    """Every element's number is written where our fragments say; torch must put the whole tensor together again."""
    mesh = init_device_mesh("cpu", mesh_shape)
    done = 0
    for placements in cases:
        for shape in SHAPES:
            if any(getattr(p, "dim", 0) >= len(shape) for p in placements):
                continue
            numel = torch.Size(shape).numel()
            whole = torch.arange(numel, dtype=torch.float32)
            local = torch.full(local_shape(shape, placements, mesh), torch.nan)
            strides = torch.empty(shape).stride()
            given = DTensor.from_local(
                local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides
            )
            placed = sharded("w", given)
            for f in placed.fragments(0).on(dist.get_rank()):
                view(local, f.local).copy_(view(whole, f.block))
            assert torch.equal(given.full_tensor().reshape(-1), whole), (shape, placements)
            done += 1
    return done


@pytest.mark.parametrize(("mesh_shape", "cases"), [((4,), LINE), ((2, 2), SQUARE), ((3, 2), SQUARE)])
def test_fragments_are_the_elements_that_torch_means(mesh_shape, cases):
    assert min(run_ranks(rebuilt, torch.Size(mesh_shape).numel(), mesh_shape, cases)) > 20


def parallel_step(mesh_shape: tuple[int, ...], styles: dict[str, Any]) -> tuple[float, int]:
    """Largest difference from one process's weights after three steps, and the matrices orthogonalized here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.Linear(16, 12, bias=False))
    truth = {n: p.detach().clone() for n, p in model.named_parameters()}
    names = ("dp_replicate", "dp_shard", "tp")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    parallelize_module(model, mesh["tp"], styles)
    if len(mesh_shape) > 1:
        fully_shard(model, mesh=mesh[names[:-1]])
    named: dict[str, Any] = dict(model.named_parameters())
    cuts = {n: {"heads": 4} if n == "0.weight" else {} for n in named}
    group = {"params": list(named.values()), "param_names": list(named), "cuts": list(cuts.values())}
    optimizer = Muon([group], lr=0.02)
    momentum = {n: torch.zeros_like(w) for n, w in truth.items()}
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for n, p in named.items():
            gradient = torch.randn(p.shape, generator=generator)
            whole = DTensor.from_local(gradient, p.device_mesh, [R] * p.device_mesh.ndim, run_check=False)
            p.grad = whole.redistribute(placements=p.placements)
            reference_step(
                truth[n], gradient, momentum[n], cut_parameter(n, p.shape, **cuts[n]), lr=0.02, weight_decay=0.1,
                iteration=newton_schulz,
            )  # fmt: skip
        optimizer.step()
    found = {n: p.full_tensor() for n, p in named.items()}
    return max(float((found[n] - w).detach().abs().max()) for n, w in truth.items()), optimizer.orthogonalized


@pytest.mark.parametrize("mesh_shape", [(2,), (2, 2), (2, 2, 2)])
def test_a_step_under_tensor_parallelism_is_that_of_one_process(mesh_shape):
    """Columns, rows, and both below fully_shard, with and without copies; heads are cut along the rows."""
    styles = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    results = run_ranks(parallel_step, torch.Size(mesh_shape).numel(), mesh_shape, styles)
    assert max(error for error, _ in results) == 0.0
    assert sum(calls for _, calls in results) == 3 * (4 + 1)
