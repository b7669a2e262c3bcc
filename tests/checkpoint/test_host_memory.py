"""Host memory of background saves: buffers are kept, do not overlap, and lie in arenas of powers of two."""

from __future__ import annotations

import pytest
import torch

from muon_dist.checkpoint import host_memory
from muon_dist.checkpoint.host_memory import HostMemory


def test_arenas_hold_many_odd_buffers_without_waste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "ARENA_BYTES", 2**16)
    memory = HostMemory(pinned=True)
    shapes = [(33, 100), (7,), (), (0, 5), (130, 257), (64, 65), (3, 3, 3), (1000,)] * 3
    dtypes = [torch.float32, torch.bfloat16, torch.int64]
    tensors = {f"{i}": torch.randn(s).mul(100).to(dtypes[i % 3]) for i, s in enumerate(shapes)}
    for _ in range(2):
        copies = {key: memory.copy(key, t) for key, t in tensors.items()}
        arenas = len(memory.arenas)
        assert all(torch.equal(copies[key], t) and copies[key].dtype == t.dtype for key, t in tensors.items())
        for t in tensors.values():
            t.add_(1)
    assert len(memory.arenas) == arenas, "the second save took new memory"
    assert all((len(a) & (len(a) - 1)) == 0 for a in memory.arenas)
    used = sum(t.numel() * t.element_size() for t in tensors.values())
    assert sum(map(len, memory.arenas)) <= 2 * used


def test_a_buffer_follows_the_shape_of_its_tensor() -> None:
    memory = HostMemory()
    first = memory.copy("w", torch.ones(4))
    assert memory.copy("w", torch.zeros(4)).data_ptr() == first.data_ptr()
    assert memory.copy("w", torch.ones(2, 3)).shape == (2, 3)
    assert memory.arenas == []  # tensors of the CPU need no page-locked memory
