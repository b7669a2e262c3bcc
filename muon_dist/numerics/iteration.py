"""The Newton-Schulz iteration itself, on buffers that are made once and written in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from muon_dist.numerics.products import PLAIN, Products
from muon_dist.numerics.schedules import Row, Schedule

_CPU_CHUNK_BYTES = 2 << 20
"""What a thread works on at a time: matrices that fit a core's second-level cache together with their buffers."""


class Workspace:
    """The buffers of the iteration for up to `count` matrices (rows, cols) at a time, in `dtype`.

    One more X, and square buffers of the short side: A and a polynomial in it, two more in Gram form.
    """

    def __init__(
        self, count: int, rows: int, cols: int, segment: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        short = min(rows, cols)
        squares = workspace_squares(segment)
        self.segment = segment
        self.other = torch.empty(count, rows, cols, dtype=dtype, device=device)
        self.squares = [torch.empty(count, short, short, dtype=dtype, device=device) for _ in range(squares)]

    def first(self, count: int) -> tuple[Tensor, list[Tensor]]:
        """The buffers cut to `count` matrices."""
        return self.other[:count], [s[:count] for s in self.squares]


def workspace_squares(segment: int) -> int:
    """Square buffers of the short side that a segment of this length needs."""
    return 2 if segment == 1 else 4


def matrices_at_once(count: int, rows: int, cols: int, segment: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many of `count` matrices are iterated at a time: all on an accelerator, on a CPU what fits its cache."""
    if device.type != "cpu":
        return count
    short = min(rows, cols)
    each = dtype.itemsize * (2 * rows * cols + workspace_squares(segment) * short * short)
    return min(count, max(1, torch.get_num_threads() * _CPU_CHUNK_BYTES // each))


def normalize(x: Tensor, schedule: Schedule, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Bring every matrix of the stack `x` (B, M, N) to spectral norm 1 or less.

    "frobenius": X / (safety ||X||_F). "aol": each row i of the shorter side is also divided by
    sqrt(sum_j |X X^T|_ij), which bounds the spectral norm by 1 more tightly (Prach and Lampert, arXiv 2208.03160;
    Turbo-Muon, arXiv 2512.04632), but changes the polar factor slightly. Zero matrices and zero rows stay zero.

    Args:
        out: gets the result before it is rounded to `dtype`; of dtype `normal_dtype`, and may be `x` itself. A new
            tensor by default.

    Returns:
        A contiguous tensor in `dtype`: `out` where that is its dtype.
    """
    exact = normal_dtype(x.dtype, dtype)
    # Not vector_norm(ord=inf): on CPU that takes 4 ns an element, ten times as long.
    largest = torch.maximum(x.amax(dim=(-2, -1), keepdim=True), -x.amin(dim=(-2, -1), keepdim=True)).to(exact)
    y = out if out is not None else torch.empty(x.shape, dtype=exact, device=x.device)
    torch.div(x, _nonzero(largest), out=y)  # entries up to 1: the squares below neither overflow nor all vanish
    # By rows first: one fp32 sum over 45 million squares is 0.35% too small on CPU.
    row_norms = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    y.div_(_nonzero(torch.linalg.vector_norm(row_norms, dim=-2, keepdim=True)))
    if schedule.normalization == "aol":
        wide = y.mT if y.size(-2) > y.size(-1) else y
        # fp16 would round the small entries of the Gram matrix (below 6e-8) away, and with them the bound.
        low = wide.to(torch.float32 if dtype == torch.float16 else dtype)
        reach = torch.bmm(low, low.mT).abs_().sum(dim=-1, keepdim=True, dtype=exact)
        wide.div_(_nonzero(reach.sqrt_()))
    if schedule.safety != 1.0:
        y.div_(schedule.safety)
    return y.to(dtype)


def normal_dtype(given: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """In what `normalize` computes: fp32, or fp64 where the input or the iteration is fp64."""
    return torch.promote_types(torch.promote_types(given, compute), torch.float32)


def _nonzero(divisor: Tensor) -> Tensor:
    """`divisor` with 1 in place of 0; NaN stays NaN, so that a bad input is never hidden."""
    return torch.where(divisor == 0, torch.ones_like(divisor), divisor)


def iterate(x: Tensor, rows: tuple[Row, ...], space: Workspace, products: Products = PLAIN) -> Tensor:
    """The iteration on a stack (B, M, N) of spectral norm at most 1; works on the shorter side, in the dtype of `x`.

    Overwrites `x`. Returns `x` or the workspace's other buffer, whichever the last step has written.
    """
    tall = x.size(-2) > x.size(-1)
    other, squares = space.first(x.size(0))
    for first in range(0, len(rows), space.segment):
        steps = rows[first : first + space.segment]
        gram, z = squares[:2]
        _gram(x, tall, gram, products)
        if len(steps) > 1:
            factor, beta = _gram_steps(gram, steps, squares[1:], products), 0.0
        else:
            (a, b, c) = steps[0]
            factor, beta = z, a
            _polynomial(gram, b, c, z, products)
        left, right = (x, factor) if tall else (factor, x)
        if beta:  # not (a I + Z) X, which rounds Z: up to 1.6 times the error in fp32
            torch.baddbmm(x, left, right, beta=beta, out=other)
        else:
            torch.bmm(left, right, out=other)
        x, other = other, x
    return x


def _gram(x: Tensor, tall: bool, out: Tensor, products: Products) -> None:
    """out <- X X^T, or X^T X of a tall X."""
    left, right = (x.mT, x) if tall else (x, x.mT)
    products.symmetric(left, right, out)


def _polynomial(gram: Tensor, b: float, c: float, out: Tensor, products: Products) -> None:
    """out <- b A + c A^2."""
    if c == 0.0:
        torch.mul(gram, b, out=out)
    else:
        products.square(gram, b, c, out)


def _gram_steps(gram: Tensor, steps: tuple[Row, ...], buffers: list[Tensor], products: Products) -> Tensor:
    """The Q with which `steps` steps multiply X, from A = X X^T alone: all factors are polynomials in A, commute and
    are symmetric. Overwrites `gram`; returns one of `buffers`."""
    q, free, second = buffers
    z = q
    for k, (a, b, c) in enumerate(steps):
        if k > 0:
            products.symmetric(z, gram, free)
            products.symmetric(free, z, gram)
            z = second
        _polynomial(gram, b, c, z, products)
        z.diagonal(dim1=-2, dim2=-1).add_(a)
        if k > 0:
            products.symmetric(z, q, free)
            q, free = free, q
    return q
