"""A copy of the optimizer goes on as the original does, and neither touches the other."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from muon_dist import Muon
from muon_dist.errors import ConfigError
from muon_dist.optim.rules import RULES
from tests.distributed import run_ranks


def through_torch_save(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "torch.save": through_torch_save,
}


def made(rule: str) -> tuple[Muon, list[torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 12), (3, 4, 6), (5,)]
    weights = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    groups: list[dict[str, Any]] = [
        {"params": weights[:2], "param_names": ["a", "experts"], "rule": rule},
        {"params": weights[2:], "param_names": ["bias"], "algorithm": "adamw"},
    ]
    return Muon(groups, lr=0.05), weights


def give(weights: list[Any], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in weights:
        p.grad = torch.randn(p.shape, generator=generator)


def copied(way: str, rule: str, before: int) -> bool:
    optimizer, weights = made(rule)
    for step in range(before):
        give(weights, step)
        optimizer.step()
    twin = WAYS[way](optimizer)
    others = [p for group in twin.param_groups for p in group["params"]]
    assert all(p is not q and torch.equal(p, q) for p, q in zip(weights, others, strict=True))
    for step in range(before, before + 3):
        give(weights, step)
        optimizer.step()
    for step in range(before, before + 3):
        give(others, step)
        twin.step()
    return all(torch.equal(p, q) for p, q in zip(weights, others, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.each_choice
def test_a_copy_goes_on_as_the_original(way: str, rule: str) -> None:
    assert copied(way, rule, 0) and copied(way, rule, 3)


def test_a_copy_on_several_ranks_keeps_each_ones_part() -> None:
    assert run_ranks(copied, 3, "deepcopy", "muon", 3) == [True] * 3


def _with_a_group() -> str:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    try:
        copy.deepcopy(Muon([weight], process_group=dist.group.WORLD))
    except ConfigError as error:
        return str(error)
    return "copied"


def test_a_process_group_cannot_be_copied_and_that_is_said() -> None:
    assert all("process_group= cannot be copied" in text for text in run_ranks(_with_a_group, 2))
