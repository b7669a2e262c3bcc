"""Chooses the matrix products of the iteration: PyTorch, or kernels that compute half of a symmetric product."""

from __future__ import annotations

import functools
import logging

import torch

from muon_dist.numerics.iteration import (
    ADDED_AFTER,
    BLOCKED,
    BLOCKS,
    PLAIN,
    AddedAfter,
    BlockedHalf,
    Products,
    SymmetricKernels,
)

__all__ = [
    "ADDED_AFTER",
    "BLOCKED",
    "BLOCKS",
    "PLAIN",
    "AddedAfter",
    "BlockedHalf",
    "Products",
    "SymmetricKernels",
    "products_for",
]

logger = logging.getLogger("muon_dist")

SYMMETRIC_DTYPES = (torch.float16, torch.bfloat16)
SYMMETRIC_TILE = 256
"""Below this side a symmetric product is a single tile, so no half can be skipped (gram-newton-schulz 0.1.6)."""
SYMMETRIC_ALIGNMENT = 8
"""The kernels read 16 bytes at a time, so rows must be multiples of 8 two-byte elements."""
HOPPER = (9, 0)
BLOCKED_FROM = 512
"""Smallest short side for which block rows are faster on a CPU: 0.74 to 0.9 of a whole product's time at 512 to 1024,
more than 1 at 256 (one thread, AVX-512)."""


@functools.cache
def _symmetric_kernels() -> Products:
    """The kernels, or the plain products and a line in the log with the reason.

    The kernels are compiled at the first call, and may fail in any way, so they are tested here.
    """
    try:
        from quack.gemm_interface import gemm_symmetric

        kernels = SymmetricKernels(gemm_symmetric)
        prove(kernels, torch.device("cuda", torch.cuda.current_device()))
    except Exception as error:
        logger.info(
            "Newton-Schulz runs on torch.bmm: this GPU could use symmetric kernels, but they do not work here (%s: "
            "%s). Install them with pip install quack-kernels.",
            type(error).__name__,
            error,
        )
        return PLAIN
    logger.info("Newton-Schulz runs on %s where shapes and dtype allow it", SymmetricKernels.name)
    return kernels


def prove(products: Products, device: torch.device) -> None:
    """Multiply matrices of both orientations, and compare with `torch.bmm`.

    Raises:
        RuntimeError: a product is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    side = SYMMETRIC_TILE
    for dtype in SYMMETRIC_DTYPES:
        for shape in ((2, side, 2 * side), (2, 2 * side, side)):
            x = (torch.randn(shape, generator=generator) / side**0.5).to(device, dtype)
            left, right = (x, x.mT) if shape[1] == side else (x.mT, x)
            gram, square = (torch.empty(2, side, side, dtype=dtype, device=device) for _ in range(2))
            products.symmetric(left, right, out=gram)
            expected = torch.bmm(left.float(), right.float())
            products.square(gram, -0.5, 0.25, square)
            wanted = -0.5 * gram.float() + 0.25 * torch.bmm(gram.float(), gram.float())
            for what, found, exact in (("X X^T", gram, expected), ("b A + c A^2", square, wanted)):
                error = float((found.float() - exact).norm() / exact.norm())
                if not error < 0.02:  # rounding to bf16 gives 0.003
                    raise RuntimeError(f"{what} of {tuple(shape)} in {dtype} is {error:.2g} off")


def products_for(
    short: int, long: int, dtype: torch.dtype, device: torch.device, *, compiled: bool = False
) -> Products:
    """The matrix products for sides `short` <= `long` in compute dtype `dtype` on `device`.

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
