"""The iteration against fp64, the singular value decomposition, the published ranges and torch.optim.Muon."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from muon_dist.errors import ConfigError
from muon_dist.numerics import SCHEDULES, coefficients, compute_dtype, newton_schulz, newton_schulz_flops, polar_factor
from muon_dist.numerics.compiled import check_compiler
from muon_dist.numerics.iteration import Workspace, buffers, full_fp32, iterate, normalize
from muon_dist.numerics.newton_schulz import kernel_name, newton_schulz_, segment_length
from muon_dist.numerics.products import ADDED_AFTER, BLOCKED, BLOCKS, PLAIN, Products, products_for
from muon_dist.numerics.schedules import Row
from tests.numerics.spectra import gaussian, log_spaced, power_law, reference, relative_error, with_spectrum

FROBENIUS = sorted(name for name, schedule in SCHEDULES.items() if schedule.normalization == "frobenius")
ALL = sorted(SCHEDULES)
LOW_PRECISION = (torch.bfloat16, torch.float16)

# theory.md, "Newton-Schulz, honestly": 128 x 512 in fp32, worst range of singular values over 3 seeds, and relative
# polar error, for Gaussian matrices and log-spaced spectra of condition 1e2, 1e4, 1e6.
TABLE = {
    ("keller", 5): [(0.682, 1.134, 0.218), (0.682, 1.202, 0.193), (0.018, 1.202, 0.549), (2e-4, 1.202, 0.719)],
    ("cubic", 5): [(0.32, 0.79, 0.443), (0.02, 0.99, 0.737), (3e-4, 1.0, 0.854), (3e-6, 1.0, 0.897)],
    ("cubic", 8): [(0.835, 1.0, 0.042), (0.068, 1.0, 0.549), (9e-4, 1.0, 0.774), (1e-5, 1.0, 0.847)],
    ("polar_express", 5): [(0.870, 1.124, 0.086), (0.871, 1.123, 0.083), (0.036, 1.124, 0.465), (4e-4, 1.123, 0.677)],
    ("strict", 6): [(0.997, 1.001, 0.001), (0.998, 1.001, 0.001), (0.066, 1.001, 0.391)],
    ("cans", 5): [(0.886, 1.118, 0.081), (0.886, 1.113, 0.083), (0.039, 1.113, 0.456), (5e-4, 1.113, 0.673)],
    ("you", 5): [(0.978, 1.032, 0.018), (0.978, 1.145, 0.049), (0.018, 1.145, 0.532), (2e-4, 1.145, 0.710)],
}


@functools.cache
def table_matrix(column: int, seed: int) -> tuple[Tensor, Tensor]:
    """The matrix of a column of the table, rounded to fp32, and its polar factor."""
    if column == 0:
        x = gaussian(128, 512, seed=seed)
        return x.float(), polar_factor(x)
    x, polar = with_spectrum(128, 512, log_spaced(128, 10.0 ** (2 * column)), seed)
    return x.float(), polar


@pytest.mark.parametrize(("schedule", "steps"), TABLE)
def test_published_ranges_and_errors(schedule: str, steps: int) -> None:
    for column, (low, high, error) in enumerate(TABLE[schedule, steps]):
        lows, highs, errors = [], [], []
        for seed in range(3):
            x, polar = table_matrix(column, seed)
            y = newton_schulz(x, steps, schedule, dtype=torch.float32)
            values = torch.linalg.svdvals(y.double())
            lows.append(float(values.min()))
            highs.append(float(values.max()))
            errors.append(relative_error(y, polar))
        where = f"{schedule} column {column}"
        assert max(highs) == pytest.approx(high, abs=0.006), where
        assert sum(errors) / 3 == pytest.approx(error, abs=0.008), where
        lowest = pytest.approx(low, abs=0.007) if low > 0.1 else pytest.approx(low, rel=0.2)
        assert min(lows) == lowest, where


@pytest.mark.parametrize("schedule", FROBENIUS)
@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (48, 48), (1, 64), (64, 1), (1, 1), (2, 300)])
def test_equals_the_plain_fp64_iteration(schedule: str, shape: tuple[int, int]) -> None:
    x = gaussian(*shape, seed=1)
    expected = reference(x, coefficients(schedule, 5), SCHEDULES[schedule].safety)
    assert relative_error(newton_schulz(x.float(), schedule=schedule, dtype=torch.float32), expected) < 1e-5
    if schedule != "strict":
        assert relative_error(newton_schulz(x, schedule=schedule, dtype=torch.float64), expected) < 1e-11


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 12])
def test_other_step_counts(steps: int) -> None:
    x = gaussian(24, 40, seed=2)
    for schedule in ("keller", "polar_express", "cans", "you", "cubic", "pade"):
        expected = reference(x, coefficients(schedule, steps), SCHEDULES[schedule].safety)
        assert relative_error(newton_schulz(x, steps, schedule, dtype=torch.float64), expected) < 1e-11, schedule


def test_matches_torch_optim_muon_within_the_error_of_bf16() -> None:
    for shape in [(64, 256), (128, 128), (32, 512)]:
        grad = gaussian(*shape, seed=3).float()
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = grad.clone()
        torch.optim.Muon([p], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
        theirs = -p.detach()
        exact = reference(grad, coefficients("keller", 5), 1.0)
        assert relative_error(newton_schulz(grad, dtype=torch.float32), theirs) < 0.03
        ours = newton_schulz(grad, dtype=torch.bfloat16)
        assert relative_error(ours, theirs) < 0.03
        assert relative_error(ours, exact) < 1.2 * relative_error(theirs, exact)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("schedule", sorted(set(ALL) - {"strict"}))
@pytest.mark.parametrize("spectrum", ["gaussian", "cond1e4", "power1", "power2", "rank8", "rank1"])
def test_low_precision_never_overshoots(schedule: str, dtype: torch.dtype, spectrum: str) -> None:
    """Rounding may fill small directions with noise, but no direction exceeds the schedule's own band."""
    values = {
        "cond1e4": log_spaced(96, 1e4), "power1": power_law(96, 1), "power2": power_law(96, 2),
        "rank8": power_law(8, 0), "rank1": power_law(1, 0),
    }  # fmt: skip
    x = gaussian(96, 256, seed=4) if spectrum == "gaussian" else with_spectrum(96, 256, values[spectrum], 4)[0]
    y = newton_schulz(x.float(), schedule=schedule, dtype=dtype).double()
    assert torch.linalg.matrix_norm(y, ord=2) < 1.22
    assert (x * y).sum() > 0.4 * torch.linalg.svdvals(x).sum()  # downhill


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_low_precision_error_on_a_gaussian(dtype: torch.dtype, bound: float) -> None:
    x = gaussian(256, 688, seed=5)
    for schedule in ("keller", "polar_express", "you"):
        expected = reference(x, coefficients(schedule, 5), SCHEDULES[schedule].safety)
        assert relative_error(newton_schulz(x.float(), schedule=schedule, dtype=dtype), expected) < 2 * bound, schedule


@pytest.mark.parametrize("rank", [1, 3])
def test_rank_deficient_matrices_are_exact_in_fp32(rank: int) -> None:
    x, polar = with_spectrum(128, 256, power_law(rank, 0.5), seed=6)
    y = newton_schulz(x.float(), 8, "polar_express", dtype=torch.float32)
    assert relative_error(y, polar) < 0.01
    assert torch.linalg.svdvals(y.double())[rank] < 1e-3


@pytest.mark.parametrize("values", [power_law(1, 0), power_law(96, 2), power_law(96, 0.5)])
def test_aol_points_downhill_and_is_close_to_the_polar_factor(values: Tensor) -> None:
    """As published, on power-law and rank-1 spectra AOL's leading direction comes out with the wrong sign."""
    x, _ = with_spectrum(96, 256, values, seed=7)
    y = newton_schulz(x.float(), schedule="aol", dtype=torch.float32).double()
    assert (x * y).sum() > 0.85 * values.sum()
    flat = newton_schulz(torch.ones(96, 256), schedule="aol", dtype=torch.float32)
    assert relative_error(flat, polar_factor(torch.ones(96, 256, dtype=torch.float64))) < 0.02


@pytest.mark.parametrize("schedule", ALL)
def test_wide_and_tall_are_the_same_computation(schedule: str) -> None:
    x = gaussian(3, 40, 96, seed=8).float()
    y = newton_schulz(x, schedule=schedule, dtype=torch.float32)
    t = newton_schulz(x.mT, schedule=schedule, dtype=torch.float32)
    assert relative_error(t, y.mT) < 3e-5
    assert torch.equal(newton_schulz(x.mT.contiguous(), schedule=schedule, dtype=torch.float32), t)
    assert y.is_contiguous() and t.is_contiguous()


def test_a_square_matrix_and_its_transpose_agree() -> None:
    x = gaussian(64, 64, seed=9).float()
    for schedule in FROBENIUS:
        y = newton_schulz(x, schedule=schedule, dtype=torch.float32)
        assert relative_error(newton_schulz(x.T, schedule=schedule, dtype=torch.float32), y.T) < 3e-5, schedule


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("shape", [(5, 64, 256), (3, 256, 64), (7, 96, 96), (4, 1, 64), (4, 64, 1), (6, 3, 5)])
def test_a_stack_equals_its_slices(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Bit for bit on one CPU thread (conftest.py); several threads cut products differently, within 3e-6."""
    x = gaussian(*shape, seed=10).float()
    for schedule in ("keller", "polar_express", "aol"):
        stacked = newton_schulz(x, schedule=schedule, dtype=dtype)
        alone = torch.stack([newton_schulz(matrix, schedule=schedule, dtype=dtype) for matrix in x])
        assert torch.equal(stacked, alone), schedule


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("exponent", [-105, -60, -20, 40, 100])
def test_scale_does_not_matter(schedule: str, exponent: int) -> None:
    """Powers of two are exact, so the result is bit-identical: from 1e-32 up to 1e30."""
    x = gaussian(16, 32, seed=11).float()
    assert torch.equal(newton_schulz(x * 2.0**exponent, schedule=schedule), newton_schulz(x, schedule=schedule))


def test_magnitudes_in_one_stack_do_not_meet() -> None:
    """Bit for bit, although a stack that holds extremes is scaled before its norms are taken, and others are not."""
    one = gaussian(16, 32, seed=28).float()
    extremes = torch.stack([one, one * 2.0**-105, one * 2.0**100, torch.zeros(16, 32), one / one.abs().max() * 3e38])
    alone = newton_schulz(one)
    y = newton_schulz(extremes)
    assert all(torch.equal(y[i], alone) for i in range(3))
    assert torch.equal(y[3], torch.zeros(16, 32))
    assert relative_error(y[4], alone) < 1e-5
    subnormal = newton_schulz(one / one.abs().max() * 1e-39)  # has lost some digits
    assert relative_error(subnormal, alone) < 1e-4


@pytest.mark.parametrize("norm", [1e-30, 1e-12, 1e-9, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
def test_tiny_and_huge_norms(norm: float, dtype: torch.dtype) -> None:
    x = gaussian(16, 32, seed=12).float()
    x /= torch.linalg.matrix_norm(x)
    bound = 1e-5 if dtype == torch.float32 else 0.03
    assert relative_error(newton_schulz(x * norm, dtype=dtype), newton_schulz(x, dtype=dtype)) < bound


def test_fp64_inputs_beyond_the_range_of_fp32() -> None:
    x = gaussian(16, 32, seed=13)
    for factor in (1e-250, 1e250):
        assert relative_error(newton_schulz(x * factor), newton_schulz(x)) < 1e-5


def test_fp16_inputs_whose_squares_overflow() -> None:
    x = gaussian(64, 128, seed=14).half()
    huge = x / x.abs().max() * 6e4
    assert huge.abs().max() > 5e4
    assert torch.isinf((huge * huge).sum())
    y = newton_schulz(huge)
    assert y.dtype == torch.float16
    assert relative_error(y, reference(huge, coefficients("keller", 5), 1.0)) < 1e-3


def test_the_norm_of_a_large_matrix_is_not_a_single_fp32_sum() -> None:
    """A one-step linear map shows the normalisation itself: y = 1.5 x - .5 x^3 with all x far below 1."""
    x = gaussian(512, 8192, seed=15).float()
    y = newton_schulz(x, 1, "cubic", dtype=torch.float32)
    assert relative_error(y, reference(x, coefficients("cubic", 1), 1.0)) < 1e-6


@pytest.mark.parametrize("schedule", ALL)
def test_zero_is_exactly_zero(schedule: str) -> None:
    assert torch.equal(newton_schulz(torch.zeros(8, 16), schedule=schedule), torch.zeros(8, 16))
    x = gaussian(3, 8, 16, seed=16).float()
    x[1] = 0
    y = newton_schulz(x, schedule=schedule)
    assert torch.equal(y[1], torch.zeros(8, 16))
    assert torch.equal(y[0], newton_schulz(x[0], schedule=schedule))
    x[0, 3] = 0  # a zero row stays a zero row
    assert torch.equal(newton_schulz(x, schedule=schedule)[0, 3], torch.zeros(16))


@pytest.mark.parametrize("schedule", ["keller", "aol", "strict"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_entry_makes_its_matrix_nan_and_no_other(schedule: str, bad: float) -> None:
    x = gaussian(3, 8, 16, seed=17).float()
    clean = newton_schulz(x, schedule=schedule)
    x[1, 2, 3] = bad
    y = newton_schulz(x, schedule=schedule)
    assert y[1].isnan().all()
    assert torch.equal(y[0], clean[0]) and torch.equal(y[2], clean[2])


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 4, 8), (3, 0, 8), (3, 8, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    assert newton_schulz(torch.empty(shape, dtype=torch.bfloat16)).shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (2, 64, 16)])
def test_dtype_shape_and_layout_of_the_result(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = gaussian(*shape, seed=18).to(dtype)
    before = x.clone()
    for compute in (None, torch.bfloat16, torch.float32):
        y = newton_schulz(x, dtype=compute)
        assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, x.shape, True)
        assert relative_error(y, newton_schulz(x.double(), dtype=torch.float64)) < 0.03
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(4,), (), (2, 2, 2, 2)])
def test_other_ranks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="needs a matrix"):
        newton_schulz(torch.zeros(shape))


def test_integers_and_complex_numbers_are_refused() -> None:
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(ValueError, match="real floating"):
            newton_schulz(torch.zeros(2, 2, dtype=dtype))


def test_errors_come_even_for_an_empty_matrix() -> None:
    with pytest.raises(ConfigError, match="did you mean 'keller'"):
        newton_schulz(torch.empty(0, 4), schedule="keler")


def test_strict_is_fp32_or_an_error() -> None:
    x = gaussian(64, 128, seed=19).float()
    y = newton_schulz(x.bfloat16(), schedule="strict")
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, newton_schulz(x.bfloat16().float(), schedule="strict").bfloat16())
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        with pytest.raises(ConfigError, match=r"'strict' computes in float32, but ns_dtype=torch\."):
            newton_schulz(x, schedule="strict", dtype=dtype)
    values = torch.linalg.svdvals(newton_schulz(x, schedule="strict").double())
    assert (values - 1).abs().max() < 0.01


@pytest.mark.parametrize("precision", ["medium", "high"])
@pytest.mark.parametrize("schedule", ["strict", "keller"])
def test_fp32_is_fp32_whatever_products_are_set_to(precision: str, schedule: str) -> None:
    x = gaussian(64, 128, seed=19).float()
    expected = newton_schulz(x, schedule=schedule)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(newton_schulz(x, schedule=schedule), expected)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_tf32_is_off_inside_and_as_it_was_after() -> None:
    """The setting of CUDA's products, which a machine without CUDA has as well."""
    settings, seen = torch.backends.cuda.matmul, []
    before = settings.fp32_precision
    try:
        for given in ("tf32", "ieee"):
            settings.fp32_precision = given
            with full_fp32(torch.device("cuda")):
                seen.append(settings.fp32_precision)
            assert settings.fp32_precision == given
    finally:
        settings.fp32_precision = before
    assert seen == ["ieee", "ieee"]


def test_compute_dtype_policy() -> None:
    cpu = torch.device("cpu")
    assert compute_dtype(None, cpu) == torch.float32
    assert compute_dtype(torch.bfloat16, cpu) == torch.bfloat16
    assert compute_dtype(None, cpu, "strict") == torch.float32
    with pytest.raises(ConfigError, match="ns_dtype must be"):
        compute_dtype(torch.int8, cpu)


def test_autocast_and_grad_mode_do_not_reach_inside() -> None:
    x = gaussian(16, 32, seed=20).float()
    expected = newton_schulz(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(newton_schulz(x), expected)
    assert not newton_schulz(x.requires_grad_()).requires_grad


def test_bf16_parameters_views_and_strides() -> None:
    x = gaussian(4, 32, 48, seed=21).float()
    assert torch.equal(newton_schulz(x[1, :, ::2]), newton_schulz(x[1, :, ::2].contiguous()))
    assert torch.equal(newton_schulz(x[:, ::2]), newton_schulz(x[:, ::2].contiguous()))


def test_flops() -> None:
    assert newton_schulz_flops(100, 300, 5) == 20 * 100**2 * 300 + 10 * 100**3
    assert newton_schulz_flops(300, 100, 5) == newton_schulz_flops(100, 300, 5)
    assert newton_schulz_flops(8, 8, len(coefficients("deepseek_v4", 5))) == 10 * 6 * 8**3


def iterated(start: Tensor, rows: tuple[tuple[float, float, float], ...], segment: int) -> Tensor:
    """The bare iteration on one normalised matrix, in its dtype, with segments of the given length."""
    count, m, n = start.shape
    squares = [start.new_empty(count, min(m, n), min(m, n)) for _ in range(buffers(segment))]
    space = Workspace(segment, torch.empty_like(start), squares)
    return iterate(start.clone(), space.other, rows, space)[0].double()


SPECTRA = {
    "gaussian": None,
    "cond1e2": log_spaced(96, 1e2),
    "cond1e4": log_spaced(96, 1e4),
    "cond1e6": log_spaced(96, 1e6),
    "power2": power_law(96, 2),
    "rank8": power_law(8, 0),
    "rank1": power_law(1, 0),
}


def prepared(schedule: str, spectrum: str) -> tuple[tuple[Row, ...], torch.Tensor, torch.Tensor]:
    """A schedule's five rows, their result in fp64 on a 96 x 256 matrix of that spectrum, and the normalised start."""
    values = SPECTRA[spectrum]
    x = gaussian(96, 256, seed=0) if values is None else with_spectrum(96, 256, values, seed=0)[0]
    chosen = SCHEDULES[schedule]
    rows = chosen.coefficients(5)
    truth = reference(x.float(), rows, chosen.safety)
    start = x.float().unsqueeze(0)
    normalize(start, chosen, start, start)
    return rows, truth, start


@pytest.mark.parametrize("schedule", FROBENIUS)
@pytest.mark.parametrize("spectrum", list(SPECTRA))
def test_gram_form_is_as_exact_as_the_standard_iteration(schedule: str, spectrum: str) -> None:
    """Error against fp64 of fp32 segments of three steps, at most 4 times that of standard steps in fp32."""
    rows, truth, start = prepared(schedule, spectrum)
    standard, gram = (relative_error(iterated(start, rows, k), truth) for k in (1, 3))
    assert gram <= max(4 * standard, 1e-5)
    assert segment_length(96, 256, torch.float32) == 3


@pytest.mark.parametrize("schedule", sorted(set(FROBENIUS) - {"strict"}))
@pytest.mark.parametrize("spectrum", list(SPECTRA))
def test_gram_form_in_fp16_is_as_exact_as_standard_steps_in_fp16(schedule: str, spectrum: str) -> None:
    """X formed again after two and after four steps: at most 4 times fp16's error or 0.5%, and never above bf16's."""
    rows, truth, start = prepared(schedule, spectrum)
    gram = relative_error(iterated(start.half(), rows, 2), truth)
    assert gram <= max(4 * relative_error(iterated(start.half(), rows, 1), truth), 0.005)
    assert gram <= max(relative_error(iterated(start.bfloat16(), rows, 1), truth), 0.005)
    assert segment_length(96, 256, torch.float16) == 2


@pytest.mark.parametrize("magnitude", [6e4, 6e-8])
def test_gram_form_in_fp16_at_the_ends_of_its_range(magnitude: float) -> None:
    """Inputs whose squares overflow fp16, and inputs that are its smallest subnormal numbers."""
    x = gaussian(48, 128, seed=22)
    extreme = (x / x.abs().max() * magnitude).half()
    y = newton_schulz(extreme.float(), dtype=torch.float16)
    assert relative_error(y, reference(extreme, coefficients("keller", 5), 1.0)) < 0.02
    assert torch.equal(newton_schulz(torch.zeros(48, 128), dtype=torch.float16), torch.zeros(48, 128))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_in_place_is_the_same_computation(dtype: torch.dtype) -> None:
    """Also in chunks that do not divide the stack."""
    for shape in [(70, 32, 128), (3, 96, 40), (5, 24, 24), (0, 4, 4)]:
        x = gaussian(*shape, seed=23).float()
        expected = newton_schulz(x, dtype=dtype)
        newton_schulz_(x, dtype=dtype)
        assert torch.equal(x, expected), shape


@pytest.mark.slow
def test_compiled_equals_uncompiled_within_rounding() -> None:
    """More shapes than torch.compile keeps by default (8): each is compiled, none runs uncompiled."""
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for n in range(40, 49):
        x = gaussian(3, 32, n, seed=24).float()
        y = newton_schulz(x, dtype=torch.float32, compiled=True)
        assert relative_error(y, newton_schulz(x, dtype=torch.float32)) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 9
    y = newton_schulz(x, dtype=torch.bfloat16, compiled=True)
    assert relative_error(y, newton_schulz(x, dtype=torch.bfloat16)) < 0.05
    x = gaussian(2, 512, 800, seed=27).float()  # where uncompiled products are taken by half
    assert relative_error(newton_schulz(x, compiled=True), newton_schulz(x)) < 1e-5


@pytest.mark.slow
def test_a_machine_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    torch.compiler.reset()
    with pytest.raises(ConfigError, match=r"ns_compile=True, but torch\.compile failed on cpu"):
        check_compiler(torch.device("cpu"))


def test_kernels_are_for_hopper_alone_and_the_form_is_named() -> None:
    cpu = torch.device("cpu")
    assert products_for(512, 1024, torch.float16, cpu) is PLAIN
    assert kernel_name(512, 1024, torch.float16, cpu) == "Gram form, segments of 2, float16, torch"
    assert kernel_name(512, 512, torch.bfloat16, cpu, compiled=True) == "standard, bfloat16, torch, compiled"
    assert kernel_name(512, 512, torch.float32, cpu, compiled=True) == "standard, float32, torch, compiled"
    assert kernel_name(512, 512, torch.float32, cpu) == "standard, float32, torch, symmetric products by half"


@pytest.mark.parametrize("size", [512, 513])
def test_symmetric_products_by_half_on_a_cpu(size: int) -> None:
    """As exact as whole products. Blocks beside the diagonal are copies of one another; within a diagonal block the
    two halves are what one product returns, so they are equal to rounding only: it depends on the CPU."""
    assert products_for(size, size, torch.float32, torch.device("cpu")) is BLOCKED
    x = gaussian(2, size, 40, seed=26).float() / 40**0.5
    gram, square = torch.empty(2, size, size), torch.empty(2, size, size)
    BLOCKED.symmetric(x, x.mT, gram)
    BLOCKED.square(gram, -4.775, 2.0315, square)
    for found, expected in ((gram, x.double() @ x.double().mT), (square, None)):
        wide = gram.double()
        expected = expected if expected is not None else -4.775 * wide + 2.0315 * wide @ wide
        assert relative_error(found, expected) < 1e-6
        assert relative_error(found, found.mT) < 1e-6
        step = -(-size // BLOCKS)
        beside = torch.ones(size, size, dtype=torch.bool)
        for first in range(0, size, step):
            beside[first : first + step, first : first + step] = False
        assert torch.equal(found[:, beside], found.mT[:, beside])


@pytest.mark.parametrize("products", [PLAIN, ADDED_AFTER, BLOCKED])
def test_products_with_a_sum(products: Products) -> None:
    a, x = gaussian(2, 48, 48, seed=29).float(), gaussian(2, 48, 80, seed=30).float()
    a = a + a.mT
    square, out = torch.empty_like(a), torch.empty_like(x)
    products.square(a, -4.775, 2.0315, square)
    products.product_plus(a, x, x, 3.4445, out)
    assert relative_error(square, 2.0315 * a.double() @ a.double() - 4.775 * a.double()) < 1e-6
    assert relative_error(out, a.double() @ x.double() + 3.4445 * x.double()) < 1e-6
    assert products_for(48, 80, torch.float32, torch.device("cpu")) is ADDED_AFTER


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_symmetric_kernels_equal_torch(dtype: torch.dtype) -> None:
    pytest.importorskip("quack.gemm_interface")
    device = torch.device("cuda")
    x = gaussian(2, 512, 1024, seed=25).float().to(device)
    products = products_for(512, 1024, dtype, device)
    if not products.symmetric_half:
        pytest.skip("needs compute capability 9.0")
    expected = newton_schulz(x.cpu(), dtype=dtype)
    assert relative_error(newton_schulz(x, dtype=dtype).cpu(), expected) < 0.03


def test_gram_form_where_it_has_fewer_operations_and_the_dtype_bears_it() -> None:
    for m, n in ((64, 64), (64, 96), (64, 97), (64, 256), (256, 64)):
        costs = {k: newton_schulz_flops(m, n, 5, k) for k in (1, 3)}
        assert segment_length(m, n, torch.float32) == min(costs, key=lambda k: costs[k])
        assert segment_length(m, n, torch.bfloat16) == 1
        half = {k: newton_schulz_flops(m, n, 5, k) for k in (1, 2)}
        assert segment_length(m, n, torch.float16) == min(half, key=lambda k: half[k])
    assert newton_schulz_flops(64, 256, 5, 3) == 8 * 64**2 * 256 + 28 * 64**3
