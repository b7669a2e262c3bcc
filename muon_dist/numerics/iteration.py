"""The Newton-Schulz iteration itself, on buffers that are made once and written in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from muon_dist.numerics.products import PLAIN, Products
from muon_dist.numerics.schedules import Row, Schedule

_CPU_CHUNK_BYTES = 3 << 20
"""What a thread works on at a time, matrices with their buffers: about a core's second-level cache. With 2 to 6 MB it
takes the same time within 5% (2 MB of cache); with less, calls take as long as small products."""


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


def normalize(x: Tensor, schedule: Schedule, out: Tensor, exact: Tensor) -> None:
    """out <- the stack `x` (B, M, N) with every matrix brought to spectral norm 1 or less.

    "frobenius": X / (safety ||X||_F). "aol": each row i of the shorter side is also divided by
    sqrt(sum_j |X X^T|_ij), which bounds the spectral norm by 1 more tightly (Prach and Lampert, arXiv 2208.03160;
    Turbo-Muon, arXiv 2512.04632), but changes the polar factor slightly. Zero matrices and zero rows stay zero.

    Args:
        out: in the dtype of the iteration; may be `x` itself.
        exact: of dtype `normal_dtype`, gets the result before it is rounded to `out`; may be `out` or `x` itself.
    """
    # One pass that widens is cheaper than every pass reading bf16; strides would change the order of the sums.
    if x.dtype != exact.dtype or not x.is_contiguous():
        x = exact.copy_(x)
    _divide_by_norm(x, exact)
    if schedule.normalization == "aol":
        wide = exact.mT if exact.size(-2) > exact.size(-1) else exact
        # fp16 would round the small entries of the Gram matrix (below 6e-8) away, and with them the bound.
        low = wide.to(torch.float32 if out.dtype == torch.float16 else out.dtype)
        reach = torch.bmm(low, low.mT).abs_().sum(dim=-1, keepdim=True, dtype=exact.dtype)
        wide.div_(_nonzero(reach.sqrt_()))
    if schedule.safety != 1.0:
        exact.div_(schedule.safety)
    if out is not exact:
        out.copy_(exact)


def normal_dtype(given: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """In what `normalize` computes: fp32, or fp64 where the input or the iteration is fp64."""
    return torch.promote_types(torch.promote_types(given, compute), torch.float32)


def _divide_by_norm(x: Tensor, out: Tensor) -> None:
    """out <- X / ||X||_F of every matrix, whatever its magnitude.

    A matrix whose squares would leave the dtype's range is first divided by a power of two, which rounds nothing; all
    others by 1. So each is treated alone, and where the host can look at the norms for nothing, a stack that needs no
    such division is spared three passes.
    """
    limits = torch.finfo(x.dtype)
    low, high = 1e9 * limits.tiny**0.5, 1e-3 * limits.max**0.5
    norms = _norms(x)
    if not _known_within(norms, low, high):
        # Not vector_norm(ord=inf): on CPU that takes 4 ns an element, ten times as long.
        largest = _nonzero(torch.maximum(x.amax(dim=(-2, -1), keepdim=True), -x.amin(dim=(-2, -1), keepdim=True)))
        power = largest / (2 * torch.frexp(largest).mantissa)  # an infinity becomes NaN, as it should
        x = torch.div(x, power.masked_fill_((norms > low) & (norms < high), 1.0), out=out)
        norms = _nonzero(_norms(x))
    torch.mul(x, norms.reciprocal_(), out=out)  # half the time of dividing


def _known_within(norms: Tensor, low: float, high: float) -> bool:
    """Whether all norms are between two bounds; False, too, where to look would make the host wait for a device."""
    if norms.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    least, most = torch.aminmax(norms)  # two calls: of a few matrices, each comparison of tensors takes 15 us
    return low < least.item() and most.item() < high  # False for NaN


def _norms(x: Tensor) -> Tensor:
    """||X||_F of every matrix, (B, 1, 1)."""
    # By rows first: one fp32 sum over 45 million squares is 0.35% too small on CPU.
    rows = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.linalg.vector_norm(rows, dim=-2, keepdim=True)


def _nonzero(divisor: Tensor) -> Tensor:
    """`divisor`, at least the smallest normal number; NaN stays NaN, so that a bad input is never hidden."""
    return divisor.clamp_min_(torch.finfo(divisor.dtype).tiny)


def times_formed(steps: int, segment: int) -> int:
    """How often X is formed again in `steps` steps."""
    return -(-steps // segment)


def iterate(x: Tensor, other: Tensor, rows: tuple[Row, ...], space: Workspace, products: Products = PLAIN) -> Tensor:
    """The iteration on a stack (B, M, N) of spectral norm at most 1; works on the shorter side, in the dtype of `x`.

    X is formed in `other` and `x` in turn, `times_formed` times; returns the one written last.
    """
    tall = x.size(-2) > x.size(-1)
    squares = [square[: x.size(0)] for square in space.squares]
    gram, z = squares[:2]
    for first in range(0, len(rows), space.segment):
        steps = rows[first : first + space.segment]
        _gram(x, tall, gram, products)
        if len(steps) > 1:
            factor, beta = _gram_steps(gram, steps, squares[1:], products), 0.0
        else:
            (a, b, c) = steps[0]
            factor, beta = z, a
            _polynomial(gram, b, c, z, products)
        left, right = (x, factor) if tall else (factor, x)
        if beta:  # not (a I + Z) X, which rounds Z: up to 1.6 times the error in fp32, twice in bf16
            products.product_plus(left, right, x, beta, other)
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
