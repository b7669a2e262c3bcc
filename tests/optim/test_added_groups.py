"""Parameters that come in mid-run: the next step plans again, and nobody's momentum is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # 2 s that every forked rank would pay again
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate

from muon_dist import Muon
from muon_dist.errors import ConfigError
from muon_dist.optim.rules import RULES
from tests.distributed import run_ranks
from tests.optim.plain_rules import PlainRule
from tests.optim.test_muon import CUTS, gradients, make_groups, make_parameters
from tests.optim.test_rules import Held, assert_close, options_of

LATE = ("wide", "experts")


def unfrozen(layout: str, rule: str, mesh: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """3 steps without LATE, which is then added as a group of its own, and 3 steps with all."""
    model = Held()
    if layout == "fsdp2":
        names = ("replicate", "shard")[-len(mesh or (1,)) :]
        fully_shard(model, mesh=init_device_mesh("cpu", mesh or (dist.get_world_size(),), mesh_dim_names=names))
    parameters: dict[str, Any] = dict(model.named_parameters())
    early = {n: p for n, p in parameters.items() if n not in LATE}
    optimizer = Muon(make_groups(early), bucket_mb=0.01, **options_of(rule))
    for step in range(6):
        if step == 3:
            (group,) = make_groups({n: parameters[n] for n in LATE})
            optimizer.add_param_group(group)
        for n, p in (early if step < 3 else parameters).items():
            p.grad = gradients(step)[n].clone()
            if layout == "fsdp2":
                whole = DTensor.from_local(p.grad, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
                p.grad = whole.redistribute(placements=p.placements)
        optimizer.step()
    state = optimizer.state_dict()["state"]
    held = sum(entry["momentum_buffer"].numel() for entry in state.values() if "momentum_buffer" in entry)
    assert layout == "fsdp2" or dist.get_world_size() == 1 or held < sum(p.numel() for p in parameters.values())
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in parameters.items()}


@pytest.mark.parametrize(("layout", "world", "rules"), [
    pytest.param("copies", 1, tuple(RULES), marks=pytest.mark.slow),
    ("copies", 3, tuple(RULES)), ("fsdp2", 3, ("muon", "namo")),
])  # fmt: skip
def test_a_group_that_is_added_in_mid_run(layout: str, world: int, rules: tuple[str, ...]) -> None:
    for rule in rules:
        options = {"weight_decay": 0.0, **options_of(rule)}
        reference = PlainRule(dict(make_parameters()), CUTS, **{**options, **options.pop("rule_options", {})})
        for step in range(6):
            given = gradients(step)
            reference.step({n: g for n, g in given.items() if step >= 3 or n not in LATE})
        for found in run_ranks(unfrozen, world, layout, rule):
            assert_close(found, reference.weights, 2e-5)


def _refused(rule: str, mesh: tuple[int, ...]) -> str:
    try:
        unfrozen("fsdp2", rule, mesh)
    except ConfigError as error:
        return str(error)
    return "added"


@pytest.mark.parametrize(("rule", "mesh", "words"), [("muon", (2, 2), "HSDP"), ("normuon", (2,), "memory on owners")])
def test_where_state_cannot_move_it_is_refused(rule: str, mesh: tuple[int, ...], words: str) -> None:
    world = torch.Size(mesh).numel()
    assert all(words in text and "save a checkpoint" in text for text in run_ranks(_refused, world, rule, mesh))
