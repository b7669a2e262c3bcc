"""The Newton-Schulz iteration on buffers that are allocated once, and its matrix products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muon_dist.numerics.schedules import Row, Schedule

BLOCKS = 4
_CPU_CHUNK_BYTES = 3 << 20
"""Bytes of matrices and buffers that a thread works on at a time: about a core's second-level cache. From 2 to 6 MB
the time is equal within 5% (with 2 MB of cache); with less, calls take as long as small products."""


@dataclass(frozen=True)
class Workspace:
    """The buffers of the iteration for up to B matrices (M, N) at a time, in its dtype.

    Attributes:
        segment: see `Form`.
        other: a second X, (B, M, N).
        squares: `buffers(segment)` tensors (B, S, S) with S the short side: A and a polynomial in A; two more in Gram
            form.
    """

    segment: int
    other: Tensor
    squares: list[Tensor]


def buffers(segment: int) -> int:
    """Number of square buffers that the iteration needs."""
    return 2 if segment == 1 else 4


def matrices_at_once(count: int, rows: int, cols: int, segment: int, dtype: torch.dtype, device: torch.device) -> int:
    """Number of matrices iterated at a time: all `count` on an accelerator, on a CPU as many as fit into its cache."""
    if device.type != "cpu":
        return count
    short = min(rows, cols)
    each = dtype.itemsize * (2 * rows * cols + buffers(segment) * short * short)
    return min(count, max(1, torch.get_num_threads() * _CPU_CHUNK_BYTES // max(each, 1)))


# Products -----------------------------------------------------------------------------------------------------------


class Products:
    """Batched products by `torch.bmm`, all with preallocated results.

    Attributes:
        name: name of the implementation in reports and logs.
        symmetric_half: True if only half of a symmetric product is computed.
    """

    name = "torch"
    symmetric_half = False

    symmetric: Callable[..., Any] = staticmethod(torch.bmm)
    """(x, y, out=out): out <- x y, where the product is symmetric."""

    def square(self, x: Tensor, beta: float, alpha: float, out: Tensor) -> None:
        """out <- beta x + alpha x^2, of a symmetric x."""
        torch.baddbmm(x, x, x, beta=beta, alpha=alpha, out=out)

    def product_plus(self, left: Tensor, right: Tensor, x: Tensor, beta: float, out: Tensor) -> None:
        """out <- left right + beta x."""
        torch.baddbmm(x, left, right, beta=beta, out=out)


class AddedAfter(Products):
    """Products on a CPU in fp32 and fp64, with sums added after the products.

    `baddbmm` first copies a summand to `out`, which is not in the cache yet. It is faster to add to the product that
    was just written: the whole iteration takes 0.95 of the time for sides of 64. Not used in bf16, where the product
    would be rounded before the sum, and adding is slow.
    """

    def square(self, x: Tensor, beta: float, alpha: float, out: Tensor) -> None:
        torch.baddbmm(out, x, x, beta=0.0, alpha=alpha, out=out).add_(x, alpha=beta)

    def product_plus(self, left: Tensor, right: Tensor, x: Tensor, beta: float, out: Tensor) -> None:
        torch.bmm(left, right, out=out).add_(x, alpha=beta)


class SymmetricKernels(Products):
    """The CuTe kernels of quack-kernels, which the `gram-newton-schulz` package also uses; for Hopper and newer."""

    name = "quack gemm_symmetric"
    symmetric_half = True

    def __init__(self, gemm_symmetric: Any) -> None:
        self._gemm = gemm_symmetric

    def symmetric(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        self._gemm(x, y, out=out)

    def square(self, x: Tensor, beta: float, alpha: float, out: Tensor) -> None:
        self._gemm(x, x, C=x, out=out, alpha=float(alpha), beta=float(beta))


class BlockedHalf(AddedAfter):
    """Symmetric products on a CPU, for large matrices: computes block rows up to the diagonal and copies the rest."""

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


# A stack ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """The form of the iteration for matrices of one shape and dtype on one device.

    Attributes:
        schedule, rows: the coefficients of the steps.
        segment: number of steps on the Gram matrix before X is computed again; 1 is the standard form.
        dtype: dtype of the iteration.
        products: the matrix products.
        at_once: number of matrices iterated at a time.
        squares: `buffers(segment)`.
    """

    schedule: Schedule
    rows: tuple[Row, ...]
    segment: int
    dtype: torch.dtype
    products: Products
    at_once: int
    squares: int


REDUCED = ("tf32", "bf16")
"""PyTorch's settings with which fp32 products are computed in lower precision."""


@contextlib.contextmanager
def full_fp32(device: torch.device) -> Iterator[None]:
    """Context in which fp32 matrix products on `device` are really computed in fp32.

    `torch.set_float32_matmul_precision`, or the Trainer's `tf32`, may have set TF32 or bf16, also on a CPU with AMX.
    Then the relative error is 2e-3 instead of 3e-7.
    """
    settings = (torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn).matmul
    before = settings.fp32_precision
    if before in REDUCED:
        settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


@torch.no_grad()
def orthogonalize(source: Tensor, target: Tensor | None = None, *, form: Form) -> None:
    """Write the orthogonalized matrices of `source` (B, M, N) into the contiguous `target`, by default `source`.

    Products in fp32 are never reduced to TF32 or bf16, even if PyTorch is set to do so.
    """
    target = source if target is None else target
    if source.numel() == 0:
        return
    count, m, n = source.shape
    dtype = form.dtype
    # Autocast does not support the meta device.
    inside = contextlib.nullcontext() if source.is_meta else torch.autocast(source.device.type, enabled=False)
    precision = (torch.backends.cuda if source.is_cuda else torch.backends.mkldnn).matmul.fp32_precision
    with full_fp32(source.device) if precision in REDUCED else contextlib.nullcontext(), inside:
        at_once = min(count, form.at_once)
        other_x = torch.empty(at_once, m, n, dtype=dtype, device=source.device)
        squares = [other_x.new_empty(at_once, min(m, n), min(m, n)) for _ in range(form.squares)]
        space = Workspace(form.segment, other_x, squares)
        exact_dtype = torch.promote_types(torch.promote_types(source.dtype, dtype), torch.float32)
        # The last product is written directly into the result if its dtype fits. X is normalised in an existing buffer
        # if one has the needed dtype.
        ends = target if target.dtype == dtype else torch.empty_like(space.other)
        there = exact_dtype in (dtype, target.dtype)
        exact = target if there else torch.empty_like(space.other, dtype=exact_dtype)
        times_formed = -(-len(form.rows) // form.segment)
        begins_at_end = times_formed % 2 == 0
        for first in range(0, count, at_once):
            given, result = source[first : first + at_once], target[first : first + at_once]
            size = len(result)
            last = result if ends is target else ends[:size]
            start, other = (last, space.other[:size]) if begins_at_end else (space.other[:size], last)
            wide = result if exact is target else exact[:size]
            normalize(given, form.schedule, start, start if dtype == exact_dtype else wide)
            iterate(start, other, form.rows, space, form.products)
            if last is not result:
                result.copy_(last)


def normalize(x: Tensor, schedule: Schedule, out: Tensor, exact: Tensor) -> None:
    """out <- the stack `x` (B, M, N), with every matrix divided so that its spectral norm is at most 1.

    "frobenius": X / (safety ||X||_F). "aol": each row i of the shorter side is also divided by
    sqrt(sum_j |X X^T|_ij), which bounds the spectral norm by 1 more tightly (Prach and Lampert, arXiv 2208.03160;
    Turbo-Muon, arXiv 2512.04632), but changes the polar factor slightly. Zero matrices and zero rows stay zero.

    Args:
        out: tensor in the dtype of the iteration; may be `x` itself.
        exact: tensor in `normal_dtype` for the result before it is rounded to `out`; may be `out` or `x` itself.
    """
    if x.is_cuda and schedule.normalization == "frobenius":
        return _divided_on_device(x, schedule.safety, out, exact)
    # Convert once, because reading bf16 in every pass costs more. Strides would change the order of the sums.
    if x.dtype != exact.dtype or not x.is_contiguous():
        x = exact.copy_(x)
    # Sum by rows first: a single fp32 sum of 45 million squares is 0.35% too small on CPU.
    norms = torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1, keepdim=True), dim=-2, keepdim=True)
    limits = torch.finfo(x.dtype)
    low, high = 1e9 * limits.tiny**0.5, 1e-3 * limits.max**0.5
    usual = False  # on a device do not check: the host would have to wait
    if norms.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = torch.aminmax(norms)  # one call, because for few matrices each comparison of tensors takes 15 us
        usual = low < least.item() and most.item() < high  # False for NaN
    if not usual:
        x, norms = _brought_into_range(x, norms, low, high, exact)
    torch.mul(x, norms.reciprocal_(), out=exact)  # takes half the time of a division
    if schedule.normalization == "aol":
        wide = exact.mT if exact.size(-2) > exact.size(-1) else exact
        # In fp16 small entries of the Gram matrix (below 6e-8) would become zero, and the bound would not hold.
        low = wide.to(torch.float32 if out.dtype == torch.float16 else out.dtype)
        reach = torch.bmm(low, low.mT).abs_().sum(dim=-1, keepdim=True, dtype=exact.dtype)
        wide.div_(_nonzero(reach.sqrt_()))
    if schedule.safety != 1.0:
        exact.div_(schedule.safety)
    if out is not exact:
        out.copy_(exact)


def _divided_on_device(x: Tensor, safety: float, out: Tensor, exact: Tensor) -> None:
    """`normalize` by the Frobenius norm in eight kernels, four over the whole stack; the host does not wait.

    It first divides every matrix by its largest magnitude, so that squares stay in the range of the dtype. An infinity
    divided by itself is NaN, so the norm is NaN too.
    """
    largest = _nonzero(torch.linalg.vector_norm(x, ord=torch.inf, dim=(-2, -1), keepdim=True, dtype=exact.dtype))
    x = torch.mul(x, largest.reciprocal_(), out=exact)
    norms = _nonzero(torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True))
    torch.mul(x, norms.mul_(safety).reciprocal_() if safety != 1.0 else norms.reciprocal_(), out=out)


def normal_dtype(given: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """The dtype in which `normalize` computes: fp32, or fp64 if the input or the iteration is fp64."""
    return torch.promote_types(torch.promote_types(given, compute), torch.float32)


def _brought_into_range(x: Tensor, norms: Tensor, low: float, high: float, out: Tensor) -> tuple[Tensor, Tensor]:
    """X scaled so that squares are inside the range of the dtype, in `out`, and its norms, which are not zero.

    A matrix whose norm is not between `low` and `high` is divided by a power of two, which is exact; all others by 1.
    So no matrix affects another.
    """
    if x.device.type == "cpu":  # vector_norm(ord=inf) takes 4 ns per element here, ten times as long
        largest = torch.maximum(x.amax(dim=(-2, -1), keepdim=True), -x.amin(dim=(-2, -1), keepdim=True))
    else:  # one pass
        largest = torch.linalg.vector_norm(x, ord=torch.inf, dim=(-2, -1), keepdim=True)
    largest = _nonzero(largest)
    power = largest / (2 * torch.frexp(largest).mantissa)  # an infinity becomes NaN, as intended
    x = torch.div(x, power.masked_fill_((norms > low) & (norms < high), 1.0), out=out)
    rows = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x, _nonzero(torch.linalg.vector_norm(rows, dim=-2, keepdim=True))


def _nonzero(divisor: Tensor) -> Tensor:
    """`divisor`, but at least the smallest normal number. NaN stays NaN, so that a bad input is never hidden."""
    return divisor.clamp_min_(torch.finfo(divisor.dtype).tiny)


def iterate(x: Tensor, other: Tensor, rows: tuple[Row, ...], space: Workspace, products: Products = PLAIN) -> Tensor:
    """The iteration on a stack (B, M, N) with spectral norms of at most 1, on the shorter side, in the dtype of `x`.

    Writes X alternately to `other` and `x`, once per segment; returns the last one written.
    """
    tall = x.size(-2) > x.size(-1)
    squares = [square[: x.size(0)] for square in space.squares]
    gram, z = squares[:2]
    for first in range(0, len(rows), space.segment):
        steps = rows[first : first + space.segment]
        if tall:
            products.symmetric(x.mT, x, out=gram)
        else:
            products.symmetric(x, x.mT, out=gram)
        if len(steps) > 1:
            factor, beta = _gram_steps(gram, steps, squares[1:], products), 0.0
        else:
            (a, b, c) = steps[0]
            factor, beta = z, a
            if c == 0.0:
                torch.mul(gram, b, out=z)
            else:
                products.square(gram, b, c, z)
        left, right = (x, factor) if tall else (factor, x)
        if beta:  # not (a I + Z) X, which rounds Z: the error would be 1.6 times as large in fp32, twice in bf16
            products.product_plus(left, right, x, beta, other)
        else:
            torch.bmm(left, right, out=other)
        x, other = other, x
    return x


def _polynomial(gram: Tensor, b: float, c: float, out: Tensor, products: Products) -> None:
    """out <- b A + c A^2."""
    if c == 0.0:
        torch.mul(gram, b, out=out)
    else:
        products.square(gram, b, c, out)


def _gram_steps(gram: Tensor, steps: tuple[Row, ...], buffers: list[Tensor], products: Products) -> Tensor:
    """The matrix Q such that `steps` steps give Q X, computed from A = X X^T only.

    All factors are polynomials in A, so they commute and are symmetric. Overwrites `gram`; returns one of `buffers`.
    """
    q, free, second = buffers
    z = q
    for k, (a, b, c) in enumerate(steps):
        if k > 0:
            products.symmetric(z, gram, out=free)
            products.symmetric(free, z, out=gram)
            z = second
        _polynomial(gram, b, c, z, products)
        z.diagonal(dim1=-2, dim2=-1).add_(a)
        if k > 0:
            products.symmetric(z, q, out=free)
            q, free = free, q
    return q
