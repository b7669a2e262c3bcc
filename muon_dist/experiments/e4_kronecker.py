"""E4, convergence under Kronecker curvature: Muon against the frozen preconditioner C^-1/2 and against descent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muon_dist.experiments.quadratics import (
    Direction,
    Quadratic,
    annealed,
    constant,
    frobenius_matched,
    gaussian,
    guaranteed,
    iterations,
    kronecker,
    line_search,
    log_spaced,
    polar,
    polar_of_wide,
    steepest,
)
from muon_dist.experiments.result import Criterion, result, show, summary

TITLE = "Convergence under Kronecker curvature"
CLAIM = "Under Kronecker-factored curvature Muon acts as C^-1/2 does and improves the convergence factor."


@dataclass(frozen=True)
class Config:
    """Sizes of E4; the defaults are the full profile."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    tolerance: float = 1e-4
    wide: tuple[int, int] = (16, 256)
    square: tuple[int, int] = (32, 32)
    wide_kappas: tuple[float, float] = (100.0, 10.0)
    square_kappas: tuple[float, float] = (30.0, 30.0)
    kappa_a_sweep: tuple[float, ...] = (10.0, 30.0, 100.0, 300.0, 1000.0)
    widths: tuple[int, ...] = (64, 256, 1024, 4096)
    width_seeds: int = 3
    limit: int = 3000
    annealed_limit: int = 400
    starts: tuple[float, ...] = (0.3, 0.5, 0.7, 1.0, 1.5, 2.2, 3.3)
    decays: tuple[float, ...] = (0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
    alignments: tuple[float, ...] = (-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
    alignment_samples: int = 400


PROFILES = {
    "full": Config(),
    "quick": Config(
        seeds=(0, 1, 2),
        kappa_a_sweep=(10.0, 100.0, 1000.0),
        widths=(256, 4096),
        width_seeds=1,
        limit=1500,
        annealed_limit=250,
        starts=(0.7, 1.5, 3.3),
        decays=(0.7, 0.8, 0.9, 0.95, 0.97),
    ),
}


def starting_points(config: Config, shape: tuple[int, int]) -> Tensor:
    """Isotropic error: one Gaussian D (m, n) per seed, (S, m, n)."""
    return torch.stack([gaussian(shape, torch.Generator().manual_seed(seed)) for seed in config.seeds])


def frozen_preconditioner(q: Quadratic, power: float = 1.0) -> Direction:
    """G -> C^-1/2 G with C = E[G G^T] held fixed: diagonal, C proportional to A^(2 power), for isotropic error.

    The row means of h are proportional to the eigenvalues of A, whatever B is.
    """
    a = q.h.mean(1, keepdim=True)
    return lambda g: g * a**-power


def tuned_annealing(config: Config, q: Quadratic, start: Tensor, direction: Direction) -> dict[str, Any]:
    """eta_t = eta_0 decay^t at the grid point with the fewest iterations on average over the seeds.

    eta_0 is given in units of the root-mean-square singular value of the error, so that one grid serves all shapes.
    """
    grid = [(c, rho) for c in config.starts for rho in config.decays]
    unit = torch.linalg.matrix_norm(start) / min(start.shape[-2:]) ** 0.5
    eta = torch.cat([c * unit for c, _ in grid])
    rho = torch.cat([torch.full_like(unit, rho) for _, rho in grid])
    batch = start.repeat(len(grid), 1, 1)
    found = iterations(q, batch, direction, annealed(eta, rho), config.tolerance, config.annealed_limit)
    table = found.view(len(grid), len(start))
    best = int(table.mean(1).argmin())
    return {**summary(table[best].tolist()), "start": grid[best][0], "decay": grid[best][1]}


def compare(
    config: Config, shape: tuple[int, int], kappas: tuple[float, float], anneal: bool = True
) -> dict[str, Any]:
    """Iterations to f / f_0 <= tolerance for every method on one Kronecker problem."""
    q = kronecker(*shape, *kappas)
    start = starting_points(config, shape)
    largest, smallest = q.smoothness, q.convexity

    def count(direction: Direction, step: Any) -> dict[str, Any]:
        return summary(iterations(q, start, direction, step, config.tolerance, config.limit).tolist())

    found = {
        "GD, step 1/L": count(steepest, constant(1 / largest)),
        "GD, step 2/(L + mu)": count(steepest, constant(2 / (largest + smallest))),
        "steepest descent": count(steepest, line_search),
        "frozen C^-1/2, line search": count(frozen_preconditioner(q), line_search),
        "Muon, line search": count(polar, line_search),
        "Muon, step s_mean/L": count(polar, guaranteed()),
    }
    if anneal:
        found["NSGD, annealed"] = tuned_annealing(config, q, start, frobenius_matched)
        found["Muon, annealed"] = tuned_annealing(config, q, start, polar)
    return found


def guaranteed_step(config: Config, cols: int) -> dict[str, Any]:
    """Muon at the paper's guaranteed step s_mean / L, and GD at 1 / L, on ``cols`` columns."""
    rows = config.wide[0]
    q = kronecker(rows, cols, *config.wide_kappas)
    start = starting_points(config, (rows, cols))[: config.width_seeds]
    arms = {
        "GD, step 1/L": (steepest, constant(1 / q.smoothness)),
        "Muon, step s_mean/L": (polar_of_wide, guaranteed()),
    }
    return {
        name: summary(iterations(q, start, direction, step, config.tolerance, config.limit).tolist())
        for name, (direction, step) in arms.items()
    }


def guaranteed_step_theory(config: Config, cols: int = 4096) -> int:
    """Iterations of Muon at s_mean / L as n goes to infinity, from a recursion on the columns alone.

    With C proportional to A^2 the update is mean(a) / (a_max b_max) D B: column j shrinks by 1 - mean(a) b_j in every
    step (a_max = b_max = 1), and f is the sum of b_j times its square. Derived in docs/theory.md.
    """
    a, b = log_spaced(config.wide_kappas[0], config.wide[0]), log_spaced(config.wide_kappas[1], cols)
    size = torch.ones_like(b)
    first = float(b.sum())
    for t in range(config.limit):
        size = size * (1 - a.mean() * b)
        if float((b * size**2).sum()) <= config.tolerance * first:
            return t + 1
    return config.limit


def condition_law(config: Config, s: float) -> dict[str, float]:
    """kappa_SGD / kappa_eff against kappa(C)^(1/2) when C = E[G G^T] is proportional to A^(2s).

    D = A^(s-1) Z gives that C. C is estimated from samples, then P = C^-1/2 is applied: the eigenvalues of P H are
    the measurement, kappa(C)^(1/2) the prediction, both from the same estimate.
    """
    rows, cols = config.wide
    q = kronecker(rows, cols, *config.wide_kappas)
    a = log_spaced(config.wide_kappas[0], rows)
    z = gaussian((config.alignment_samples, rows, cols), torch.Generator().manual_seed(0))
    g = q.gradient(a[:, None] ** (s - 1) * z)
    c = (g @ g.mT).mean(0)
    values, vectors = torch.linalg.eigh(c)
    root = (vectors * values.rsqrt()) @ vectors.T
    # spectrum of C^-1/2 A (similar to a symmetric matrix); the factor kappa(B) is common to both sides and cancels
    half = a.sqrt()
    effective = torch.linalg.eigvalsh(half[:, None] * root * half)
    ratio = float((a.max() / a.min()) / (effective.max() / effective.min()))
    return {"s": s, "ratio": ratio, "kappa_c_half": float((values.max() / values.min()).sqrt())}


def run(config: Config) -> dict[str, Any]:
    """Run E4; see docs/theory.md, section "The preconditioner"."""
    problems = {
        "wide": compare(config, config.wide, config.wide_kappas),
        "square": compare(config, config.square, config.square_kappas),
        "kappa 1": compare(config, config.wide, (1.0, 1.0), anneal=False),
    }
    problems["kappa 1"]["Muon, annealed"] = tuned_annealing(
        config, kronecker(*config.wide, 1.0, 1.0), starting_points(config, config.wide), polar
    )
    sweep = {
        f"{kappa:g}": {
            name: problem[name] for name in ("Muon, line search", "frozen C^-1/2, line search", "steepest descent")
        }
        for kappa in config.kappa_a_sweep
        for problem in [compare(config, config.wide, (kappa, config.wide_kappas[1]), anneal=False)]
    }
    law = [condition_law(config, s) for s in config.alignments]
    widths = {f"{cols}": guaranteed_step(config, cols) for cols in config.widths}
    theory = guaranteed_step_theory(config)
    data = {"problems": problems, "sweep": sweep, "law": law, "widths": widths, "width_theory": theory}
    notes = [
        "The guaranteed step s_mean/L does gain when m << n holds all along: as the columns with large b converge, "
        "few columns carry the error, at 16x256 fewer than the rows, which ends the averaging. See the sweep over n.",
        "A run that did not reach the tolerance within the limit counts as inf; annealed arms use the best point of "
        f"the same grid ({len(config.starts)} starts x {len(config.decays)} decays) for Muon and NSGD.",
    ]
    return result("E4", TITLE, CLAIM, config, _criteria(problems, sweep, law, widths, theory), data, notes)


def _means(problem: dict[str, Any]) -> Callable[[str], float]:
    return lambda name: float(problem[name]["mean"])


def _criteria(
    problems: dict[str, Any],
    sweep: dict[str, Any],
    law: list[dict[str, float]],
    widths: dict[str, Any],
    theory: int,
) -> list[Criterion]:
    wide, square, flat = (_means(problems[name]) for name in ("wide", "square", "kappa 1"))
    muon = wide("Muon, line search")
    against_frozen = abs(muon / wide("frozen C^-1/2, line search") - 1)
    against_descent = wide("steepest descent") / muon
    over_kappa = [row["Muon, line search"]["mean"] for row in sweep.values()]
    spread = (max(over_kappa) - min(over_kappa)) / min(over_kappa)
    guaranteed_gain = [name("GD, step 1/L") / name("Muon, step s_mean/L") for name in (wide, square)]
    widest = list(widths)[-1]
    slow = widths[widest]["Muon, step s_mean/L"]["mean"]
    wide_gain = widths[widest]["GD, step 1/L"]["mean"] / slow
    lost, anneal_gain = square("Muon, line search"), square("NSGD, annealed") / square("Muon, annealed")
    inside = [row for row in law if 0 <= row["s"] <= 1]
    error = max(abs(row["ratio"] / row["kappa_c_half"] - 1) for row in inside)
    outside = max(row["ratio"] for row in law if row["s"] < 0 or row["s"] > 2)
    return [
        Criterion("16x256: Muon (line search) against frozen C^-1/2, relative difference", against_frozen, "<= 0.15",
                  against_frozen <= 0.15),
        Criterion("16x256: steepest descent / Muon (line search), iterations", against_descent, ">= 10",
                  against_descent >= 10),
        Criterion("16x256: spread of Muon's iterations over kappa_A in 10..1000", spread, "<= 0.15", spread <= 0.15),
        Criterion("kappa_SGD / kappa_eff = kappa(C)^(1/2) for 0 <= s <= 1, largest relative error", error, "<= 0.05",
                  error <= 0.05),
        Criterion("the law's limit: ratio for s < 0 or s > 2, largest", outside, "< 1", outside < 1, central=False),
        Criterion("kappa = 1: Muon needs more iterations than GD "
                  f"(GD {flat('GD, step 1/L'):g}, Muon annealed {flat('Muon, annealed'):g})",
                  show(problems["kappa 1"]["Muon, line search"]), "> GD",
                  flat("Muon, line search") > flat("GD, step 1/L") and flat("Muon, annealed") > flat("GD, step 1/L"),
                  "falsifier", central=False),
        Criterion("the gain at the paper's guaranteed step s_mean/L: GD (1/L) / Muon, iterations, 16x256 and 32x32",
                  ", ".join(f"{g:.3g}" for g in guaranteed_gain), "both > 1", min(guaranteed_gain) > 1, "paper",
                  central=False),
        Criterion(f"the same step at 16x{widest}: GD / Muon, iterations (Muon {slow:g}, recursion for n to infinity "
                  f"{theory})", wide_gain, ">= 3", wide_gain >= 3, "reading", central=False),
        Criterion("32x32 (no m << n): steepest descent / Muon (line search), iterations",
                  square("steepest descent") / lost, ">= 1", square("steepest descent") >= lost, "falsifier",
                  central=False),
        Criterion("32x32: annealed NSGD / annealed Muon, iterations", anneal_gain, ">= 2",
                  math.isfinite(anneal_gain) and anneal_gain >= 2, "reading", central=False),
    ]  # fmt: skip
