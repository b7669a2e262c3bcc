"""`torch.distributed.pipelining`: two stages, two copies of each, one optimizer a stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor

from muon_dist import Muon
from muon_dist.errors import FrameworkError, MuonDistError
from tests.distributed import run_ranks

WIDTH, STEPS, LR = 12, 4, 0.02


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()) for _ in range(4)]


def batch(step: int, copy: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + copy)
    x = torch.randn(4, WIDTH, generator=generator)
    return x, x.roll(1, -1)


def optimizer(module: nn.Module, **options: Any) -> Muon:
    names = [f"{i}.weight" for i, _ in enumerate(module.parameters())]
    return Muon(
        [{"params": list(module.parameters()), "param_names": names}], lr=LR, ns_dtype=torch.float32, **options
    )


def alone() -> list[torch.Tensor]:
    model = nn.Sequential(*layers())
    steps = optimizer(model, process_group=None)
    for step in range(STEPS):
        for copy in range(2):
            x, y = batch(step, copy)
            (nn.functional.mse_loss(model(x), y) / 2).backward()
        steps.step()
        steps.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def staged(kind: str) -> tuple[int, list[torch.Tensor]]:
    """(stage, its whole weights) after the steps; `kind`: what the optimizer knows of its ranks."""
    mesh: DeviceMesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    number, copy = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    module = nn.Sequential(*layers()[2 * number : 2 * number + 2])
    if kind == "fsdp2":
        fully_shard(module, mesh=mesh["dp"])
    stage = PipelineStage(module, number, 2, torch.device("cpu"), group=mesh["pp"].get_group())
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=nn.functional.mse_loss)
    options = {"process_group": mesh["dp"].get_group()} if kind == "group" else {}
    steps = optimizer(module, **options)  # each stage numbers its layers from 0
    for step in range(STEPS):
        x, y = batch(step, copy)
        schedule.step(*([x] if number == 0 else []), **({"target": y, "losses": []} if number == 1 else {}))
        for p in module.parameters():
            if not isinstance(p, DTensor):
                dist.all_reduce(p.grad, group=mesh["dp"].get_group())
                p.grad /= 2
        steps.step()
        steps.zero_grad()
    return number, [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("kind", ["group", "fsdp2"])
def test_one_optimizer_a_stage_is_that_of_the_whole_model(kind: str) -> None:
    wanted = alone()
    for stage, found in run_ranks(staged, 4, kind):
        for a, b in zip(found, wanted[2 * stage : 2 * stage + 2], strict=True):
            assert torch.allclose(a, b, rtol=0, atol=2e-5), float((a - b).abs().max())


def refused() -> str:
    with pytest.raises(MuonDistError) as caught:
        staged("nothing")
    assert not isinstance(caught.value, FrameworkError)
    return str(caught.value)


def test_stages_under_the_default_group_are_refused_by_name() -> None:
    """Without a group, stages look like copies of one model: same names, same shapes, other weights."""
    for message in run_ranks(refused, 4):
        assert "0.weight" in message and "process_group=" in message and "pipeline stages" in message
