"""A flipped bit in one copy is found, and its parameter and rank are named."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist

from muon_dist.errors import ReplicaError
from muon_dist.guards.replicas import ReplicaCheck, checksum
from tests.distributed import run_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


def tensors() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = [(f"layer.{i}", torch.randn(7, 5, generator=generator).to(d)) for i, d in enumerate(DTYPES)]
    return [*found, ("empty", torch.empty(0)), ("strided", torch.randn(6, 6, generator=generator).t())]


def flip(tensor: torch.Tensor, bit: int) -> None:
    """Flip bit `bit` of a tensor's contiguous storage, counted from its first byte."""
    raw = tensor.untyped_storage()
    raw[bit // 8] = raw[bit // 8] ^ (1 << bit % 8)


def flips(count: int, seed: int) -> list[str]:
    """Each time one bit in one rank's copy: what the check says on this rank."""
    named = tensors()
    check = ReplicaCheck(named, dist.group.WORLD, torch.device("cpu"))
    check.check()
    chooser = random.Random(seed)
    said = []
    for _ in range(count):
        rank, index = chooser.randrange(dist.get_world_size()), chooser.choice([0, 1, 2, 3, 4, 6])
        name, tensor = named[index]
        bit = chooser.randrange(tensor.numel() * tensor.element_size() * 8)
        if dist.get_rank() == rank:
            flip(tensor, bit)
        try:
            check.check()
            said.append("nothing")
        except ReplicaError as error:
            assert error.exit_code == 11
            wanted = f"{name}: rank {rank} differs from the others"
            said.append("ok" if wanted in str(error) else str(error))
        if dist.get_rank() == rank:
            flip(tensor, bit)
    check.check()
    return said


def test_every_flip_is_found_and_named() -> None:
    assert run_ranks(flips, 3, 40, 1) == [["ok"] * 40] * 3


def two() -> str:
    value = torch.ones(4)
    if dist.get_rank() == 1:
        flip(value, 5)
    with pytest.raises(ReplicaError) as caught:
        ReplicaCheck([("w", value)], dist.group.WORLD, torch.device("cpu")).check()
    return str(caught.value)


def test_two_ranks_have_no_majority() -> None:
    assert all("w: ranks 0, 1 do not agree, and there is no majority" in text for text in run_ranks(two, 2))


def test_alone_there_is_nothing_to_compare() -> None:
    ReplicaCheck(tensors(), None, torch.device("cpu")).check()


def test_the_sum_does_not_depend_on_strides_and_sees_nan_payloads() -> None:
    x = torch.randn(8, 8)
    assert torch.equal(checksum(x.t().contiguous()), checksum(x.t()))
    nan = torch.full((4,), torch.nan)
    before = checksum(nan)
    flip(nan, 1)
    assert not torch.equal(before, checksum(nan))
