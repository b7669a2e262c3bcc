"""What only a CUDA machine reaches, with stand-ins that behave as one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from muon_dist.adapters.fsdp2 import binder
from muon_dist.checkpoint import RandomState
from muon_dist.doctor import software
from muon_dist.errors import FrameworkError
from muon_dist.guards.vote import Stopwatch
from muon_dist.model.peaks import gpu_peak_flops
from muon_dist.ranks import Ranks
from tests.distributed import run_ranks


class Event:
    """As `torch.cuda.Event`: one that was never recorded answers True to `query`, and has no time."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.recorded = False

    def record(self) -> None:
        self.recorded = True

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        if not (self.recorded and end.recorded):
            raise RuntimeError("both events must be recorded")
        return 5.0


def test_a_stopwatch_that_was_left_running_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for an empty list of batches, after which nothing pauses it."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(torch.device("cuda", 0))
    for _ in range(3):
        watch.start()
    watch.pause()
    assert watch.seconds() >= 5e-3


def _gathered() -> tuple[list[int], list[Any]]:
    entered: list[Any] = []

    @contextlib.contextmanager
    def device(own: torch.device) -> Iterator[None]:
        entered.append(own)
        yield

    torch.cuda.device = device  # type: ignore[assignment,misc]
    return Ranks(dist.group.WORLD, torch.device("cuda", 3)).gather(dist.get_rank()), entered


def test_values_travel_through_the_ranks_own_device() -> None:
    """An NCCL group would take the current device, which a script may never have set."""
    assert run_ranks(_gathered, 2) == [([0, 1], [torch.device("cuda", 3)])] * 2


def _bound_world() -> str:
    dist.group.WORLD.bound_device_id = torch.device("cpu", 0)  # as init_process_group(device_id=...)
    try:
        binder._new_group([0])
    except FrameworkError as error:
        return str(error)
    return "made"


def test_a_group_of_some_ranks_is_refused_where_making_it_would_hang() -> None:
    for text in run_ranks(_bound_world, 2):
        assert "ranks [0]" in text and "device_id" in text and "process_group=" in text


@pytest.mark.parametrize(("shard", "expected"), [("cuda:3", "cuda:3"), ("cpu", "cuda:1")])
def test_the_device_is_that_of_the_shard_unless_it_is_offloaded(
    monkeypatch: pytest.MonkeyPatch, shard: str, expected: str
) -> None:
    monkeypatch.setattr(binder, "local_part", lambda parameter: SimpleNamespace(device=torch.device(shard)))
    monkeypatch.setattr(torch, "get_device_module", lambda name: SimpleNamespace(current_device=lambda: 1))
    parameter: Any = SimpleNamespace(device_mesh=SimpleNamespace(device_type="cuda"))
    assert binder._device(parameter) == torch.device(expected)


def test_a_run_on_the_cpu_makes_no_context_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: pytest.fail("made a CUDA context"))
    assert "cuda" not in RandomState().state_dict()


def test_emulated_bf16_is_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that a V100 or T4 supports bf16, because it emulates it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index=None: (15 * 2**30, 15 * 2**30))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert any("no bfloat16" in verdict.text for verdict in software.check_devices())


@pytest.mark.parametrize("name", ["NVIDIA GH200 480GB", "NVIDIA GeForce RTX 5090", "NVIDIA L20", "NVIDIA GB200"])
def test_recent_gpus_have_a_peak(name: str) -> None:
    assert (gpu_peak_flops(name, torch.bfloat16) or 0) > (gpu_peak_flops(name, torch.float32) or 0) > 1e13
