"""The CUDA branch of a step without a card: fake tensors on `cuda:0`, the fake process group, everything counted."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from muon_dist.bench.host import measure
from muon_dist.config import load_config
from muon_dist.optim import guard
from muon_dist.planner.cli import routed, unpack

ROOT = Path(__file__).resolve().parents[2]
ADAMW = ("_foreach_addcmul_", "_foreach_addcdiv_", "_foreach_sqrt", "_foreach_div_", "_foreach_lerp_", "_foreach_add_")


@pytest.fixture(scope="module")
def llama_7b() -> tuple[Any, ...]:
    config = load_config(ROOT / "configs" / "llama-7b.yaml")
    return (*routed(config), *unpack(config))


def in_a_fork(function: Callable[[], Any]) -> Any:
    """The result of `function` in a process of its own.

    Fake CUDA tensors start autograd's threads in a CUDA build of torch: later tests of this process could not fork.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=lambda: send.send(function()))
    process.start()
    send.close()
    try:
        return receive.recv()
    finally:
        process.join()


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        pytest.param("fsdp2", 64, marks=pytest.mark.slow),
        ("ddp", 64),
        pytest.param("zero3", 64, marks=pytest.mark.slow),
    ],
)
def test_a_step_on_cuda_launches_little_and_reads_nothing(
    llama_7b: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, layout: str, ranks: int
) -> None:
    """At most 400 kernels without Newton-Schulz; with torch's own measure 1,840 (FSDP2) and 800 (DDP) before."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))

    def measured() -> dict[str, Any]:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return measure(*llama_7b, layout, ranks, 0, torch.device("cuda", 0))

    found = in_a_fork(measured)
    assert found["kernels"] <= 400, found["by_kind"]
    assert found["host_reads"] == 0
    # ZeRO-3 cuts weights, gradients and momentum out of its flat tensors, and looks at the gradients: once each. One
    # more is of the bits of the numbers that ranks compare.
    views = ("view", "as_strided", "slice", "split", "split_with_sizes", "select", "narrow")
    assert sum(found["by_kind"].get(kind, 0) for kind in views) <= 2 * 4 + 1, found["by_kind"]


@pytest.mark.slow
def test_offloaded_weights_are_transferred_by_the_bucket(
    llama_7b: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 on 8 ranks. Before: 448 copies to the GPU and 224 back, two and one for each fragment."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    transfers: list[str] = []
    real, real_foreach = torch.Tensor.copy_, torch._foreach_copy_

    def copy_(self: torch.Tensor, origin: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if self.device.type == origin.device.type:
            return real(self, origin, non_blocking)
        transfers.append("copy_")  # fake tensors cannot do it
        return self

    def foreach_copy(targets: list[torch.Tensor], origins: list[torch.Tensor], non_blocking: bool = False) -> None:
        if targets[0].device.type == origins[0].device.type:
            real_foreach(targets, origins, non_blocking)
        else:
            transfers.extend("_foreach_copy_" for _ in targets)

    def states(gradients: Any, matrices: Any, device: torch.device, *, exact: bool = False) -> Any:
        count = sum(len(m.matrices) if isinstance(m, guard.Split) else 1 for m in matrices)
        # gradients on a CPU are looked at, and these have no values
        return torch.empty(count, dtype=torch.uint8, device=device), torch.empty(1, dtype=torch.float64, device=device)

    monkeypatch.setattr(guard, "states", states)
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(torch, "_foreach_copy_", foreach_copy)

    def counted() -> int:
        with FakeTensorMode(allow_non_fake_inputs=True):
            measure(*llama_7b, "fsdp2", 8, 0, torch.device("cuda", 0), offloaded=True)
        return len(transfers)

    steps = 22
    assert 0 < in_a_fork(counted) / steps <= 100
