"""The first step looks at what is called a copy."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import muon_dist
from muon_dist.errors import ReplicaError
from tests.distributed import run_ranks


def small_model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))


def first_steps(seeds: list[int], batches: list[int], ddp: bool, group: str, steps: int = 2) -> str:
    """Steps of Muon on a model of seed `seeds[rank]` and data of seed `batches[rank]`; "taken", or the error."""
    rank = dist.get_rank()
    model = small_model(seeds[rank])
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if ddp else model
    options: dict = {}
    if group == "pairs":
        options["process_group"] = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    elif group == "none":
        options["process_group"] = None
    optimizer = muon_dist.Muon([{"params": [p for p in model.parameters() if p.ndim == 2]}], lr=0.1, **options)
    data = torch.Generator().manual_seed(batches[rank])
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(steps):
        optimizer.zero_grad()
        wrapped(torch.randn(8, 6, generator=data)).square().mean().backward()
        try:
            optimizer.step()
        except ReplicaError as error:
            assert step == 0 and error.exit_code == 11
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "nothing was moved"
            return str(error)
    return "taken"


def test_one_model_for_each_rank_is_refused() -> None:
    for text in run_ranks(first_steps, 2, [0, 1], [5, 5], False, "default"):
        assert "these weights are not the same" in text and "group0.param0: ranks 0, 1 do not agree" in text
        assert all(cure in text for cure in ("DistributedDataParallel", "process_group=None", "pipeline stages"))


def test_a_forgotten_ddp_wrapper_is_refused() -> None:
    for text in run_ranks(first_steps, 3, [0, 0, 0], [5, 6, 7], False, "default"):
        assert "their gradients are not the same" in text and "no_sync" in text
        assert "DistributedDataParallel" in text and "process_group=" in text


def test_stages_of_a_pipeline_under_one_group_are_refused() -> None:
    """Ranks 0, 1 hold one stage and 2, 3 another: same names and shapes, as each numbers its modules from 0."""
    for text in run_ranks(first_steps, 4, [0, 0, 1, 1], [5, 5, 6, 6], False, "default"):
        assert "ranks 0, 1, 2, 3 do not agree, and there is no majority" in text


@pytest.mark.parametrize(
    ("seeds", "batches", "ddp", "group"),
    [
        ([0, 0, 0, 0], [5, 6, 7, 8], True, "default"),
        ([0, 1, 2, 3], [5, 6, 7, 8], True, "default"),  # DDP makes the weights equal
        ([0, 1, 2, 3], [5, 6, 7, 8], False, "none"),
        ([0, 0, 1, 1], [5, 5, 6, 6], False, "pairs"),
    ],
)
def test_what_is_right_is_taken(seeds: list[int], batches: list[int], ddp: bool, group: str) -> None:
    assert run_ranks(first_steps, 4, seeds, batches, ddp, group) == ["taken"] * 4


def local_steps() -> str:
    """Steps inside no_sync, with the weights averaged later: each rank has a gradient of its own."""
    model = small_model(0)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = muon_dist.Muon([{"params": [p for p in model.parameters() if p.ndim == 2]}], lr=0.1)
    data = torch.Generator().manual_seed(dist.get_rank())
    with wrapped.no_sync():
        wrapped(torch.randn(8, 6, generator=data)).square().mean().backward()
    with pytest.raises(ReplicaError, match="must run outside no_sync") as caught:
        optimizer.step()
    return str(caught.value)


def test_local_steps_are_refused() -> None:
    assert len(set(run_ranks(local_steps, 2))) == 1


def one_absent() -> str:
    """A gradient that one rank lacks counts as zero there, and is not compared."""
    model = small_model(0)
    parameters = [p for p in model.parameters() if p.ndim == 2]
    optimizer = muon_dist.Muon([{"params": parameters}], lr=0.1)
    for i, p in enumerate(parameters):
        p.grad = None if (i, dist.get_rank()) == (1, 0) else torch.ones_like(p)
    optimizer.step()
    return "taken"


def test_an_absent_gradient_is_not_compared() -> None:
    assert run_ranks(one_absent, 2) == ["taken", "taken"]
