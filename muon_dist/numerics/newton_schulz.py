"""Newton-Schulz orthogonalization of a matrix or a stack of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from muon_dist.errors import ConfigError
from muon_dist.numerics.schedules import DEFAULT_STEPS, Row, Schedule, get_schedule

_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def compute_dtype(dtype: torch.dtype | None, device: torch.device, schedule: str = "keller") -> torch.dtype:
    """The dtype in which the iteration runs.

    None stands for the policy: bf16 on a CUDA device that has bf16 matrix units (compute capability 8.0 or newer, or
    ROCm), fp32 everywhere else. A schedule that is fp32 only (`strict`) is fp32 everywhere.

    Raises:
        ConfigError: not float16, bfloat16, float32 or float64; or the schedule demands float32 and `dtype` is another,
            or PyTorch is set to compute fp32 matrix products of this device in TF32 or bf16.
    """
    if dtype is not None and dtype not in _COMPUTE_DTYPES:
        raise ConfigError(f"ns_dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    if get_schedule(schedule).fp32_only:
        if dtype not in (None, torch.float32):
            raise ConfigError(
                f"ns_schedule={schedule!r} computes in float32, but ns_dtype={dtype}: leave ns_dtype out, or use "
                "ns_schedule='polar_express' with ns_steps=6 for the same coefficients in another dtype"
            )
        _require_full_fp32(device, schedule)
        return torch.float32
    if dtype is not None:
        return dtype
    return torch.bfloat16 if _has_bf16_units(device) else torch.float32


def _has_bf16_units(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8


def _require_full_fp32(device: torch.device, schedule: str) -> None:
    # On a CPU with AMX, set_float32_matmul_precision("medium") alone turns an fp32 product's relative error of 3e-7
    # into 2e-3, and TF32 on a GPU does much the same: "fp32" in name only.
    if device.type == "cuda":
        precision = torch.backends.cuda.matmul.fp32_precision
    else:
        precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    if precision in ("tf32", "bf16"):
        raise ConfigError(
            f"ns_schedule={schedule!r} needs full fp32 matrix products, but PyTorch is set to compute those of "
            f"{device.type} in {precision}: call torch.set_float32_matmul_precision('highest') (the Trainer's tf32: "
            "false), or use another ns_schedule"
        )


@torch.no_grad()
def newton_schulz(
    x: Tensor, steps: int = DEFAULT_STEPS, schedule: str = "keller", dtype: torch.dtype | None = None
) -> Tensor:
    """Approximate the polar factor U V^T of every matrix X = U S V^T.

    X is normalised, then steps of X <- a X + (b A + c A^2) X with A = X X^T are taken, on the shorter side (Bernstein
    and Newhouse, arXiv 2409.20325; Keller Jordan, 2024). The result depends on the direction of X alone: its norm is
    taken in fp32 (fp64 for an fp64 input) after dividing by the largest magnitude, with no epsilon, so inputs of norm
    1e-30 and fp16 inputs of 6e4 give what inputs of norm 1 give.

    Args:
        x: (M, N) or (B, M, N), any real floating dtype. Not modified.
        steps: number of iterations; see `schedules.coefficients`.
        schedule: one of `schedules.SCHEDULES`.
        dtype: compute dtype; None for the policy of `compute_dtype`.

    Returns:
        A contiguous tensor of the shape, dtype and device of `x`, without gradient. Every matrix of a stack is
        treated alone: a zero matrix gives exactly zero, one with a NaN or an infinity gives NaN in all its entries,
        and neither touches its neighbours. On one CPU thread a stack gives bit for bit what its matrices give alone;
        with several threads products are cut differently (3e-6 relative in fp32). Autocast does not apply inside.

    Raises:
        ConfigError: an unknown schedule, or steps or dtype that do not fit it.
        ValueError: `x` is not a matrix or a stack of matrices of real floating numbers.
    """
    chosen = get_schedule(schedule)
    rows = chosen.coefficients(steps)
    work_dtype = compute_dtype(dtype, x.device, schedule)
    if x.ndim not in (2, 3):
        raise ValueError(f"newton_schulz needs a matrix (M, N) or a stack (B, M, N), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"newton_schulz needs real floating numbers, got {x.dtype}")
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    stack = x if x.ndim == 3 else x.unsqueeze(0)
    tall = stack.size(-2) > stack.size(-1)
    with torch.autocast(device_type=x.device.type, enabled=False):
        wide = normalize(stack.mT if tall else stack, chosen, work_dtype)
        wide = _iterate(wide, rows, segment_length(wide.size(-2), wide.size(-1), work_dtype))
    result = (wide.mT if tall else wide).to(x.dtype).contiguous()
    return result if x.ndim == 3 else result.squeeze(0)


def normalize(x: Tensor, schedule: Schedule, dtype: torch.dtype) -> Tensor:
    """Bring every matrix of the stack `x` (B, M, N), M <= N, to spectral norm 1 or less: a new contiguous tensor.

    "frobenius": X / (safety ||X||_F). "aol": each row i is also divided by sqrt(sum_j |X X^T|_ij), which bounds the
    spectral norm by 1 more tightly (Prach and Lampert, arXiv 2208.03160; Turbo-Muon, arXiv 2512.04632), but changes
    the polar factor slightly. Zero matrices and zero rows stay zero. The result has dtype `dtype`.
    """
    exact = torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32)
    largest = torch.linalg.vector_norm(x, ord=torch.inf, dim=(-2, -1), keepdim=True, dtype=exact)
    y = torch.empty(x.shape, dtype=exact, device=x.device)
    torch.div(x, _nonzero(largest), out=y)  # entries up to 1: the squares below neither overflow nor all vanish
    # By rows first: one fp32 sum over 45 million squares is 0.35% too small on CPU.
    row_norms = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    y.div_(_nonzero(torch.linalg.vector_norm(row_norms, dim=-2, keepdim=True)))
    if schedule.normalization == "aol":
        # fp16 would round the small entries of the Gram matrix (below 6e-8) away, and with them the bound.
        low = y.to(torch.float32 if dtype == torch.float16 else dtype)
        reach = torch.bmm(low, low.mT).abs().sum(dim=-1, keepdim=True, dtype=exact)
        y.div_(_nonzero(reach.sqrt_()))
    if schedule.safety != 1.0:
        y.div_(schedule.safety)
    return y.to(dtype)


def _nonzero(divisor: Tensor) -> Tensor:
    """`divisor` with 1 in place of 0; NaN stays NaN, so that a bad input is never hidden."""
    return torch.where(divisor == 0, torch.ones_like(divisor), divisor)


def segment_length(m: int, n: int, dtype: torch.dtype) -> int:
    """How many steps are taken on the Gram matrix before X is formed again: 1 is the standard iteration, 3 Gram form.

    Gram form does the arithmetic of a step on the small A = X X^T alone, since X only ever changes by Q X with Q a
    polynomial in A (Gram Newton-Schulz, as in the gram-newton-schulz package and DeepSpeed). It squares the singular
    values, so A loses the small ones: X is formed again after three steps. In fp32 that keeps the error against fp64
    near that of the standard iteration (tests: within a factor of 4, up to condition 1e6 and for rank 1); without
    forming X again it is up to a hundred times larger. In bf16 and fp16 it is not used.

    Three steps cost 4 m^2 n + 18 m^3 FLOPs in place of 12 m^2 n + 6 m^3, which is less for n > 1.5 m.
    """
    return 3 if dtype in (torch.float32, torch.float64) and 2 * max(m, n) > 3 * min(m, n) else 1


def _iterate(x: Tensor, rows: tuple[Row, ...], segment: int) -> Tensor:
    """The iteration on a stack (B, M, N), M <= N, of spectral norm at most 1. Computes in the dtype of `x`."""
    for first in range(0, len(rows), segment):
        gram = torch.bmm(x, x.mT)
        steps = rows[first : first + segment]
        (a, b, c), *more = steps
        z = _polynomial(gram, b, c)
        if not more:
            x = torch.baddbmm(x, z, x, beta=a)
            continue
        z.diagonal(dim1=-2, dim2=-1).add_(a)
        q = z
        for a, b, c in more:
            gram = torch.bmm(torch.bmm(z, gram), z)
            z = _polynomial(gram, b, c)
            z.diagonal(dim1=-2, dim2=-1).add_(a)
            q = torch.bmm(z, q)
        x = torch.bmm(q, x)
    return x


def _polynomial(gram: Tensor, b: float, c: float) -> Tensor:
    """b A + c A^2: a new tensor."""
    return gram * b if c == 0.0 else torch.baddbmm(gram, gram, gram, beta=b, alpha=c)


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
