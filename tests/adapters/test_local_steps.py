"""Ranks that step by themselves: right with the process group that fits, or refused before the first wrong step."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.algorithms.model_averaging.averagers as averagers
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

from muon_dist import Muon
from muon_dist.errors import FrameworkError, MuonDistError, ReplicaError
from tests.distributed import run_ranks

STEPS = 4


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))


def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
    return [
        {
            "params": [p for p in named.values() if p.ndim == axes],
            "param_names": [n for n, p in named.items() if p.ndim == axes],
            "algorithm": algorithm,
        }
        for axes, algorithm in ((2, "muon"), (1, "adamw"))
    ]


def batches(count: int = STEPS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return [torch.randn(8, 6, generator=generator) for _ in range(count)]


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def joined(options: dict[str, Any], uneven: bool, before: int) -> str:
    """`before` steps outside of join(), then steps inside, where rank 0 may have more batches."""
    model = network()
    wrapped = DistributedDataParallel(model)
    optimizer = Muon(groups(model), lr=0.1)

    def step(batch: torch.Tensor) -> None:
        optimizer.zero_grad()
        wrapped(batch).square().mean().backward()
        optimizer.step()

    for batch in batches(before):
        step(batch)
    kept = weights(model)
    try:
        with wrapped.join(**options):
            for batch in batches(STEPS + (2 if uneven and dist.get_rank() == 0 else 0)):
                step(batch)
    except FrameworkError as error:
        assert all(torch.equal(a, b) for a, b in zip(kept, weights(model), strict=True)), "something was moved"
        return str(error)
    except RuntimeError as error:
        return f"torch: {error}"
    return "taken"


@pytest.mark.parametrize("before", [0, 2])
def test_uneven_inputs_are_refused_before_the_first_step(before: int) -> None:
    for text in run_ranks(joined, 2, {}, True, before):
        assert "inside join()" in text and "drop_last=True" in text and "throw_on_early_termination" in text


def test_a_join_that_ends_all_ranks_together_is_right() -> None:
    texts = run_ranks(joined, 2, {"throw_on_early_termination": True}, True, 0)
    assert all("exhausted" in text and text.startswith("torch") for text in texts)
    assert run_ranks(joined, 2, {"enable": False}, False, 0) == ["taken"] * 2


def local_from(step_of_change: int, way: str) -> tuple[int, str]:
    """Data-parallel steps, then local ones from `step_of_change` on: the step that was refused, and why."""
    model = network()
    wrapped = DistributedDataParallel(model)
    optimizer: Any = Muon(groups(model), lr=0.1)
    stepper = optimizer
    if way == "PostLocalSGD":
        own = [dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()]
        state = PostLocalSGDState(process_group=None, subgroup=own, start_localSGD_iter=step_of_change)
        wrapped.register_comm_hook(state, post_localSGD_hook)
        averager = averagers.PeriodicModelAverager(period=2, warmup_steps=step_of_change)
        stepper = PostLocalSGDOptimizer(optim=optimizer, averager=averager)
    for step, batch in enumerate(batches(6)):
        optimizer.zero_grad()
        kept = weights(model)
        if way == "no_sync" and step >= step_of_change:
            with wrapped.no_sync():
                wrapped(batch).square().mean().backward()
        else:
            wrapped(batch).square().mean().backward()
        try:
            stepper.step()
        except ReplicaError as error:
            assert all(torch.equal(a, b) for a, b in zip(kept, weights(model), strict=True)), "something was moved"
            return step, str(error)
    return 6, "taken"


@pytest.mark.parametrize("way", ["no_sync", "PostLocalSGD"])
@pytest.mark.parametrize("step", [0, 3])
def test_local_steps_are_refused_whenever_they_begin(way: str, step: int) -> None:
    for at, text in run_ranks(local_from, 2, step, way):
        assert at == step
        assert "gradients are not the same" in text and "LocalSGD" in text and "process_group=" in text


def local_sgd(process_group: str) -> tuple[bool, bool]:
    """PostLocalSGD over pairs from step 2 on, against the same with plain copies of the optimizer in each pair."""
    rank, world = dist.get_rank(), dist.get_world_size()
    size = 2 if process_group == "pairs" else 1
    subgroups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    own = subgroups[rank // size]
    found = []
    for shared in (True, False):
        model = network()
        wrapped = DistributedDataParallel(model)
        state = PostLocalSGDState(process_group=None, subgroup=own, start_localSGD_iter=2)
        wrapped.register_comm_hook(state, post_localSGD_hook)
        chosen = own if shared and size > 1 else None
        optimizer = Muon(groups(model), lr=0.1, process_group=chosen)
        averager = averagers.PeriodicModelAverager(period=2, warmup_steps=2)
        stepper = PostLocalSGDOptimizer(optim=optimizer, averager=averager)
        for batch in batches(6):
            optimizer.zero_grad()
            wrapped(batch).square().mean().backward()
            stepper.step()
        found.append(weights(model))
    same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    every: list[Any] = [None] * world
    dist.all_gather_object(every, found[0])
    copies = all(torch.allclose(a, b) for other in every for a, b in zip(found[0], other, strict=True))
    return same, copies


@pytest.mark.parametrize(("world", "process_group"), [(2, "none"), (4, "pairs")])
def test_local_steps_over_the_group_that_averages_are_right(world: int, process_group: str) -> None:
    for same, _ in run_ranks(local_sgd, world, process_group):
        assert same


def accelerates_local_sgd() -> tuple[bool, bool, str]:
    """Whether accelerate's LocalSGD with Muon on each rank alone is what plain steps and means by hand are; whether
    ranks differed between two means; and what Muon over all ranks says."""
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    accelerator, plain = Accelerator(cpu=True), network()
    by_hand, differed = Muon(groups(plain), lr=0.1, process_group=None), False
    model = network()
    own = Muon(groups(model), lr=0.1, process_group=None)
    wrapped, stepper = accelerator.prepare(model, own)
    with LocalSGD(accelerator=accelerator, model=wrapped, local_sgd_steps=2) as local:
        for number, batch in enumerate(batches()):
            stepper.zero_grad()
            accelerator.backward(wrapped(batch).square().mean())
            stepper.step()
            first = next(iter(model.parameters())).detach().clone()
            dist.broadcast(first, 0)
            differed |= dist.get_rank() == 0 or not torch.equal(first, next(iter(model.parameters())))
            local.step()
            by_hand.zero_grad()
            plain(batch).square().mean().backward()
            by_hand.step()
            for p in plain.parameters() if number % 2 else ():
                dist.all_reduce(p.data)
                p.data /= dist.get_world_size()
    same = all(torch.equal(a, b) for a, b in zip(weights(model), weights(plain), strict=True))
    model = network()
    wrapped, stepper = accelerator.prepare(model, Muon(groups(model), lr=0.1))
    with LocalSGD(accelerator=accelerator, model=wrapped, local_sgd_steps=2):
        accelerator.backward(wrapped(batches()[0]).square().mean())
        with pytest.raises(ReplicaError) as raised:
            stepper.step()
    return same, differed, str(raised.value)


def test_accelerates_local_sgd_is_right_on_each_rank_alone_and_refused_over_all() -> None:
    for same, differed, text in run_ranks(accelerates_local_sgd, 2):
        assert same and differed
        assert "gradients are not the same" in text and "process_group=" in text


def plateau(averaged: bool) -> str:
    """ReduceLROnPlateau by each rank's own loss: the ranks take other rates, and step apart without a word."""
    model = network()
    wrapped = DistributedDataParallel(model)
    optimizer = Muon(groups(model), lr=0.1)
    scheduler = ReduceLROnPlateau(optimizer, patience=0, threshold=0.0)
    for step, batch in enumerate(batches()):
        optimizer.zero_grad()
        wrapped(batch).square().mean().backward()
        try:
            optimizer.step()
        except ReplicaError as error:
            return f"step {step}: {error}"
        loss = torch.tensor(float(step if dist.get_rank() == 1 else -step))
        if averaged:
            dist.all_reduce(loss)
        scheduler.step(float(loss))
    return "taken"


def test_rates_that_differ_between_ranks_are_named() -> None:
    for text in run_ranks(plateau, 2, False):
        assert "group 'muon': lr is 0.1 on rank 0, 0.01 on rank 1" in text and "averaged over all ranks" in text
        assert text.startswith("step 2:")
    assert run_ranks(plateau, 2, True) == ["taken"] * 2


def different_rates_when_sharded() -> str:
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = Muon(groups(model), lr=0.1)
    for step, batch in enumerate(batches()):
        if step == 2 and dist.get_rank() == 1:
            optimizer.param_groups[1]["weight_decay"] = 0.5
        model(batch).square().mean().backward()
        try:
            optimizer.step()
        except ReplicaError as error:
            return str(error)
    return "taken"


def test_rates_are_compared_under_fsdp2_too() -> None:
    assert all(
        "weight_decay is 0.1 on rank 0, 0.5 on rank 1" in text for text in run_ranks(different_rates_when_sharded, 2)
    )


def inside_zero_redundancy() -> str:
    model = DistributedDataParallel(network())
    try:
        optimizer = ZeroRedundancyOptimizer(
            [p for p in model.parameters() if p.ndim == 2], optimizer_class=Muon, lr=0.1
        )
        model(batches(1)[0]).square().mean().backward()
        optimizer.step()
    except MuonDistError as error:
        return str(error)
    return "taken"


def test_zero_redundancy_optimizer_around_ours_is_refused_by_name() -> None:
    for text in run_ranks(inside_zero_redundancy, 2):
        assert "ZeroRedundancyOptimizer" in text and "leave ZeroRedundancyOptimizer out" in text


def misplaced(way: str) -> Any:
    model = torch.nn.Linear(6, 4, bias=False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    with torch.no_grad():
        model.weight.copy_(torch.randn(4, 6))
    alone = torch.nn.Parameter(model.weight.detach().clone())
    given = torch.randn(4, 6)
    fully_shard(model, mesh=mesh)
    optimizer = Muon([{"params": [model.weight], "param_names": ["weight"]}], lr=0.1)
    reference = Muon([alone], lr=0.1, process_group=None)
    alone.grad = given.clone()
    reference.step()
    gradients = {
        "Partial": lambda: DTensor.from_local(given / dist.get_world_size(), mesh, [Partial()]),
        "Replicate": lambda: DTensor.from_local(given, mesh, [Replicate()]),
        "another axis": lambda: DTensor.from_local(given, mesh, [Replicate()]).redistribute(placements=[Shard(1)]),
        "another mesh": lambda: DTensor.from_local(
            given, init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("a", "b")), [Replicate()] * 2
        ),
        "plain": lambda: given,
    }
    try:
        model.weight.grad = gradients[way]()
        optimizer.step()
    except (FrameworkError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return float((model.weight.full_tensor() - alone).norm() / alone.norm())


@pytest.mark.parametrize("way", ["Partial", "Replicate", "another axis"])
def test_a_gradient_that_is_placed_otherwise_is_moved(way: str) -> None:
    assert all(error < 1e-5 for error in run_ranks(misplaced, 2, way))


@pytest.mark.parametrize("way", ["another mesh", "plain"])
def test_a_gradient_that_cannot_be_the_parameters_is_refused_by_name(way: str) -> None:
    for text in run_ranks(misplaced, 2, way):
        assert "FrameworkError: weight is a DTensor on" in text and "distribute_tensor" in text


def same_gradients_other_strides() -> str:
    """The norms of equal gradients are equal: whatever the rank, no comparison in mid-run is a false alarm."""
    model = network()
    wrapped = DistributedDataParallel(model)
    optimizer = Muon(groups(model), lr=0.1)
    for batch in batches():
        optimizer.zero_grad()
        wrapped(batch).square().mean().backward()
        if dist.get_rank() == 1:
            for p in optimizer.param_groups[0]["params"]:
                p.grad = p.grad.mT.contiguous().mT
        optimizer.step()
    other: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(other, copy.deepcopy(weights(model)))
    assert all(torch.equal(a, b) for a, b in zip(*other, strict=True))
    return "taken"


def test_equal_gradients_are_never_refused() -> None:
    assert run_ranks(same_gradients_other_strides, 2) == ["taken"] * 2
