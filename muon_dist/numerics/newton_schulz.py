"""Newton-Schulz orthogonalization of a matrix or a stack of matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from muon_dist.errors import ConfigError
from muon_dist.numerics.compiled import orthogonalize_compiled
from muon_dist.numerics.iteration import Form, buffers, matrices_at_once, orthogonalize
from muon_dist.numerics.products import products_for
from muon_dist.numerics.schedules import DEFAULT_STEPS, ScheduleLike, get_schedule

_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def compute_dtype(dtype: torch.dtype | None, device: torch.device, schedule: ScheduleLike = "keller") -> torch.dtype:
    """The dtype in which the iteration runs.

    None means fp16 on a GPU with fp16 matrix units (CUDA of compute capability 7.0 or newer, ROCm), else fp32. Not
    bf16: fp16 is 8 times nearer to fp64, and not slower on an H200 (docs/gpu.md). The range of fp16 is sufficient,
    because X is normalised first. A schedule for fp32 only (`strict`) always uses fp32.

    Raises:
        ConfigError: `dtype` is not float16, bfloat16, float32 or float64, or the schedule needs float32.
    """
    if dtype is not None and dtype not in _COMPUTE_DTYPES:
        raise ConfigError(f"ns_dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    if get_schedule(schedule).fp32_only:
        if dtype not in (None, torch.float32):
            raise ConfigError(
                f"ns_schedule={schedule!r} computes in float32, but ns_dtype={dtype}: leave ns_dtype out, or use "
                "ns_schedule='polar_express' with ns_steps=6 for the same coefficients in another dtype"
            )
        return torch.float32
    if dtype is not None:
        return dtype
    return torch.float16 if _has_fp16_units(device) else torch.float32


def _has_fp16_units(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 7


@torch.no_grad()
def newton_schulz(
    x: Tensor,
    steps: int = DEFAULT_STEPS,
    schedule: ScheduleLike = "keller",
    dtype: torch.dtype | None = None,
    *,
    compiled: bool = False,
) -> Tensor:
    """Approximate the polar factor U V^T of every matrix X = U S V^T.

    X is normalised, then each step computes X <- a X + (b A + c A^2) X with A = X X^T, on the shorter side (Bernstein
    and Newhouse, arXiv 2409.20325; Keller Jordan, 2024). The result depends only on the direction of X: the norm is
    computed in fp32 (fp64 for an fp64 input) after a division by the largest magnitude, without an epsilon. So inputs
    of norm 1e-30 and fp16 inputs of 6e4 give the same result as inputs of norm 1.

    Args:
        x: (M, N) or (B, M, N), any real floating dtype. Not modified.
        steps: number of iterations; see `schedules.coefficients`.
        schedule: one of `schedules.SCHEDULES`, or your own rows [[a, b, c], ...].
        dtype: compute dtype; None: chosen by `compute_dtype`.
        compiled: use `torch.compile`, once per shape of a stack; see `compiled.check_compiler`.

    Returns:
        A contiguous tensor of the shape, dtype and device of `x`, without gradient. The matrices
        of a stack do not affect each other: a zero matrix gives exactly zero, and a matrix with a NaN or an infinity
        gives NaN in all its entries. On one CPU thread a stack gives the same bits as its single matrices; with
        several threads products are divided differently (3e-6 relative in fp32). Autocast has no effect inside.

    Raises:
        ConfigError: the schedule is unknown, or steps or dtype do not fit it.
        ValueError: `x` is not a matrix or a stack of matrices of real floating numbers.
    """
    if x.ndim not in (2, 3):
        raise ValueError(f"newton_schulz needs a matrix (M, N) or a stack (B, M, N), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"newton_schulz needs real floating numbers, got {x.dtype}")
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    run = orthogonalizer(x.size(-2), x.size(-1), x.device, steps, schedule, dtype, compiled=compiled)
    if x.ndim == 3:
        run(x, result)
    else:
        run(x.unsqueeze(0), result.unsqueeze(0))
    return result


@torch.no_grad()
def newton_schulz_(
    stack: Tensor,
    steps: int = DEFAULT_STEPS,
    schedule: ScheduleLike = "keller",
    dtype: torch.dtype | None = None,
    *,
    compiled: bool = False,
) -> None:
    """`newton_schulz` of a contiguous stack (B, M, N), in place: no second stack is allocated.

    Raises as `newton_schulz`.
    """
    assert stack.ndim == 3 and stack.is_contiguous() and stack.is_floating_point()
    run = orthogonalizer(stack.size(1), stack.size(2), stack.device, steps, schedule, dtype, compiled=compiled)
    run(stack)


def orthogonalizer(
    m: int,
    n: int,
    device: torch.device,
    steps: int = DEFAULT_STEPS,
    schedule: ScheduleLike = "keller",
    dtype: torch.dtype | None = None,
    *,
    compiled: bool = False,
) -> Callable[..., None]:
    """A function (source, target) that writes the orthogonalized matrices of `source` (B, m, n) into `target`.

    `target` is contiguous, and `source` by default. Raises as `newton_schulz` does.
    """
    chosen = get_schedule(schedule)
    rows = chosen.coefficients(steps)
    work_dtype = compute_dtype(dtype, device, schedule)
    products = products_for(min(m, n), max(m, n), work_dtype, device, compiled=compiled)
    segment = segment_length(m, n, work_dtype)
    at_once = matrices_at_once(2**62, m, n, segment, work_dtype, device)
    form = Form(chosen, rows, segment, work_dtype, products, at_once, buffers(segment))
    return functools.partial(orthogonalize_compiled if compiled else orthogonalize, form=form)


def kernel_name(m: int, n: int, dtype: torch.dtype, device: torch.device, *, compiled: bool = False) -> str:
    """Text about form and matrix products for (m, n) matrices, such as "Gram form, segments of 3, float32, torch"."""
    segment = segment_length(m, n, dtype)
    form = "standard" if segment == 1 else f"Gram form, segments of {segment}"
    who = products_for(min(m, n), max(m, n), dtype, device, compiled=compiled).name
    return f"{form}, {str(dtype).removeprefix('torch.')}, {who}{', compiled' if compiled else ''}"


def segment_length(m: int, n: int, dtype: torch.dtype) -> int:
    """Number of steps on the Gram matrix before X is computed again: 1 is the standard form, more is Gram form.

    Gram form does the arithmetic of a step only on the small A = X X^T, because each step changes X to Q X with Q a
    polynomial in A (Gram Newton-Schulz, as in the gram-newton-schulz package and DeepSpeed). A has the squares of the
    singular values and loses the small ones, so X must be computed again. Up to condition 1e6 and for rank 1 (tests):

    - fp32: after three steps; the error against fp64 stays within a factor of 4 of the standard iteration's. Without
      computing X again it is up to a hundred times larger.
    - fp16: after two and after four; within a factor of 4 of the standard iteration's in fp16 or below 0.5%, and
      never above the standard iteration's in bf16.
    - bf16: not used.

    Segments of three cost 8 m^2 n + 28 m^3 FLOPs for five steps, segments of two 12 m^2 n + 22 m^3, standard steps
    20 m^2 n + 10 m^3: more than both for n > 1.5 m.
    """
    if 2 * max(m, n) <= 3 * min(m, n):
        return 1
    return {torch.float32: 3, torch.float64: 3, torch.float16: 2}.get(dtype, 1)


def newton_schulz_flops(m: int, n: int, steps: int = DEFAULT_STEPS, segment: int = 1) -> int:
    """Matrix-product FLOPs (2 m n k each) of `steps` steps on an (m, n) matrix, `segment` of them on the Gram matrix.

    With s = min(m, n), l = max(m, n): a standard step is X X^T (2 s^2 l), A^2 (2 s^3) and B X (2 s^2 l), 20 s^2 l +
    10 s^3 for five. A segment of k steps is X X^T and Q X once, A^2 k times, and 6 s^3 for each step after the first:
    8 s^2 l + 28 s^3 for segments of 3 and 2. For a schedule of fixed length, `steps` is
    `len(coefficients(schedule, steps))`.
    """
    short, long = min(m, n), max(m, n)
    lengths = [min(segment, steps - first) for first in range(0, steps, segment)]
    return sum(4 * short**2 * long + (8 * k - 6) * short**3 for k in lengths)
