"""Host memory into which a save in the background copies, kept from save to save."""

from __future__ import annotations

import torch

ARENA_BYTES = 2**28
_ALIGNMENT = 256


class HostMemory:
    """Buffers by key. Those for tensors of a GPU are page-locked, and lie together in arenas.

    torch's allocator of page-locked memory rounds every request up to a power of two, and keeps it for the life of the
    process. So many buffers of odd sizes would take up to twice the host memory. An arena is a power of two itself.

    Args:
        pinned: page-locked whatever the tensor's device, or never; by default for tensors of a GPU.

    Attributes:
        arenas: flat memory, uint8.
    """

    def __init__(self, pinned: bool | None = None) -> None:
        self.arenas: list[torch.Tensor] = []
        self._pinned = pinned
        self._free: list[int] = []
        self._kept: dict[str, torch.Tensor] = {}

    def copy(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor` in the buffer of `key`, which the next call with `key` overwrites; waits for the copy."""
        kept = self._kept.get(key)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            pinned = tensor.is_cuda if self._pinned is None else self._pinned
            kept = self._taken(tensor) if pinned else torch.empty(tensor.shape, dtype=tensor.dtype)
            self._kept[key] = kept
        return kept.copy_(tensor)

    def _taken(self, like: torch.Tensor) -> torch.Tensor:
        """Room for a tensor in the first arena that has it."""
        size = like.numel() * like.element_size()
        room = -(-size // _ALIGNMENT) * _ALIGNMENT
        number = next((i for i, free in enumerate(self._free) if free >= room), None)
        if number is None:
            number = len(self.arenas)
            length = max(ARENA_BYTES, 1 << (room - 1).bit_length()) if room else ARENA_BYTES
            pin = torch.cuda.is_available()
            self.arenas.append(torch.empty(length, dtype=torch.uint8, pin_memory=pin))
            self._free.append(length)
        arena = self.arenas[number]
        start = len(arena) - self._free[number]
        self._free[number] -= room
        return arena[start : start + size].view(like.dtype).view(like.shape)
