"""Who multiplies the matrices of the iteration: PyTorch, or kernels that compute half of a symmetric product."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("muon_dist")

SYMMETRIC_DTYPES = (torch.float16, torch.bfloat16)
SYMMETRIC_TILE = 256
"""Below this side a symmetric product is one tile, of which no half can be left out (gram-newton-schulz 0.1.6)."""
SYMMETRIC_ALIGNMENT = 8
"""The kernels read 16 bytes at a time, so rows must be multiples of 8 two-byte elements."""
HOPPER = (9, 0)
BLOCKS = 4
BLOCKED_FROM = 512
"""Shorter sides from which block rows are faster on a CPU: 0.74 to 0.9 of a whole product's time at 512 to 1024, more
than 1 at 256 (one thread, AVX-512)."""


class Products:
    """Batched products of `torch.bmm`, all into given tensors.

    Attributes:
        name: what multiplies, as reports and logs call it.
        symmetric_half: True when only half of a symmetric product is computed.
    """

    name = "torch"
    symmetric_half = False

    def symmetric(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        """out <- x y, known to be symmetric."""
        torch.bmm(x, y, out=out)

    def square(self, x: Tensor, beta: float, alpha: float, out: Tensor) -> None:
        """out <- beta x + alpha x^2, of a symmetric x."""
        torch.baddbmm(x, x, x, beta=beta, alpha=alpha, out=out)

    def product_plus(self, left: Tensor, right: Tensor, x: Tensor, beta: float, out: Tensor) -> None:
        """out <- left right + beta x."""
        torch.baddbmm(x, left, right, beta=beta, out=out)


class AddedAfter(Products):
    """On a CPU in fp32 and fp64: sums are taken after their products.

    `baddbmm` begins by copying a summand to `out`, which waits for memory that the product has not yet brought near:
    adding to what the product has just written takes 0.95 of the time of the whole iteration for sides of 64. Not in
    bf16, where the product would be rounded before the sum, and adding is slow.
    """

    def square(self, x: Tensor, beta: float, alpha: float, out: Tensor) -> None:
        torch.baddbmm(out, x, x, beta=0.0, alpha=alpha, out=out).add_(x, alpha=beta)

    def product_plus(self, left: Tensor, right: Tensor, x: Tensor, beta: float, out: Tensor) -> None:
        torch.bmm(left, right, out=out).add_(x, alpha=beta)


class SymmetricKernels(Products):
    """The CuTe kernels that the `gram-newton-schulz` package is built on (quack-kernels), for Hopper and newer."""

    name = "quack gemm_symmetric"
    symmetric_half = True

    def __init__(self, gemm_symmetric: Any) -> None:
        self._gemm = gemm_symmetric

    def symmetric(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        self._gemm(x, y, out=out)

    def square(self, x: Tensor, beta: float, alpha: float, out: Tensor) -> None:
        self._gemm(x, x, C=x, out=out, alpha=float(alpha), beta=float(beta))


class BlockedHalf(AddedAfter):
    """On a CPU: block rows up to the diagonal, and the rest copied; of large matrices the copies are cheap."""

    name = "torch, symmetric products by half"
    symmetric_half = True

    def symmetric(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        for left, right, result in zip(x, y, out, strict=True):
            for first, last in _block_rows(result.size(0)):
                torch.mm(left[first:last], right[:, :last], out=result[first:last, :last])
                result[:first, first:last].copy_(result[first:last, :first].t())

    def square(self, x: Tensor, beta: float, alpha: float, out: Tensor) -> None:
        for matrix, result in zip(x, out, strict=True):
            for first, last in _block_rows(result.size(0)):
                rows, columns = matrix[first:last], matrix[:, :last]
                target = result[first:last, :last]
                torch.addmm(rows[:, :last], rows, columns, beta=beta, alpha=alpha, out=target)
                result[:first, first:last].copy_(target[:, :first].t())


def _block_rows(size: int) -> list[tuple[int, int]]:
    """Bounds of `BLOCKS` block rows."""
    step = -(-size // BLOCKS)
    return [(first, min(first + step, size)) for first in range(0, size, step)]


PLAIN = Products()
ADDED_AFTER = AddedAfter()
BLOCKED = BlockedHalf()


@functools.cache
def _symmetric_kernels() -> Products:
    """The kernels, or the plain products with one line in the log that says why."""
    try:
        from quack.gemm_interface import gemm_symmetric
    except ImportError as error:
        logger.info(
            "Newton-Schulz runs on torch.bmm: this GPU could use symmetric kernels, but importing them failed (%s). "
            "pip install 'muon-dist[kernels]' brings them.",
            error,
        )
        return PLAIN
    logger.info("Newton-Schulz runs on %s where shapes and dtype allow it", SymmetricKernels.name)
    return SymmetricKernels(gemm_symmetric)


def products_for(
    short: int, long: int, dtype: torch.dtype, device: torch.device, *, compiled: bool = False
) -> Products:
    """What multiplies for matrices of sides `short` <= `long` in compute dtype `dtype` on `device`.

    The symmetric kernels need a GPU of compute capability 9.0 or newer, fp16 or bf16, a short side of 256 or more, and
    sides that are multiples of 8. A CPU takes symmetric products by half in fp32 and fp64 from a short side of 512 on,
    unless they are `compiled`. Everything else, and every machine without the kernels, uses `torch.bmm`.
    """
    if device.type == "cpu" and not compiled and dtype in (torch.float32, torch.float64):
        return BLOCKED if short >= BLOCKED_FROM else ADDED_AFTER
    suits = (
        device.type == "cuda"
        and torch.version.hip is None
        and dtype in SYMMETRIC_DTYPES
        and short >= SYMMETRIC_TILE
        and short % SYMMETRIC_ALIGNMENT == long % SYMMETRIC_ALIGNMENT == 0
        and torch.cuda.get_device_capability(device) >= HOPPER
    )
    return _symmetric_kernels() if suits else PLAIN
