"""Host memory for the copies of a save in the background, reused by later saves."""

from __future__ import annotations

import torch

ARENA_BYTES = 2**28
_ALIGNMENT = 256


class HostMemory:
    """Buffers by key. Buffers for GPU tensors are page-locked, and are parts of arenas.

    torch's allocator of page-locked memory rounds every request up to a power of two and never frees it, so separate
    buffers could take twice the host memory. The size of an arena is a power of two.

    Args:
        pinned: True: always page-locked; False: never; None: only for GPU tensors.

    Attributes:
        arenas: flat uint8 tensors.
    """

    def __init__(self, pinned: bool | None = None) -> None:
        self.arenas: list[torch.Tensor] = []
        self._pinned = pinned
        self._free: list[int] = []
        self._kept: dict[str, torch.Tensor] = {}

    def copy(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A finished copy of `tensor` in the buffer of `key`. The next call with `key` overwrites the buffer."""
        kept = self._kept.get(key)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            pinned = tensor.is_cuda if self._pinned is None else self._pinned
            kept = self._taken(tensor) if pinned else torch.empty(tensor.shape, dtype=tensor.dtype)
            self._kept[key] = kept
        return kept.copy_(tensor)

    def _taken(self, like: torch.Tensor) -> torch.Tensor:
        """Memory for a tensor, from the first arena with enough free memory."""
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
