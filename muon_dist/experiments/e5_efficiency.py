"""E5, the efficiency formula: the one-step gain of Muon over SGD, predicted from the gradient's spectrum alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from muon_dist.experiments.quadratics import (
    Quadratic,
    aligned_ratio,
    gaussian,
    kronecker,
    log_spaced,
    measured_ratio,
    predicted_ratio,
)
from muon_dist.experiments.result import Criterion, result, summary

TITLE = "The efficiency formula"
CLAIM = "The improvement is controlled by the spectrum of the gradient covariance."


@dataclass(frozen=True)
class Config:
    """Sizes of E5; the defaults are the full profile."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    draws: int = 40
    shapes: tuple[tuple[int, int], ...] = ((16, 1024), (16, 256), (32, 128), (32, 32))
    kappas: tuple[float, float] = (100.0, 10.0)
    knob_shape: tuple[int, int] = (32, 128)
    alignments: tuple[float, ...] = (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    shuffles: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


PROFILES = {
    "full": Config(),
    "quick": Config(seeds=(0, 1, 2), draws=10, alignments=(0.0, 0.5, 1.0, 1.5, 2.0), shuffles=(0.0, 0.05, 0.1, 1.0)),
}


def ratios(q: Quadratic, d: torch.Tensor) -> dict[str, float]:
    """Medians over the draws d (B, m, n): measured and predicted e_Muon / e_SGD, and of their quotient."""
    measured = measured_ratio(q, d)
    predicted = predicted_ratio(torch.linalg.svdvals(q.gradient(d)))
    return {
        "measured": float(measured.median()),
        "predicted": float(predicted.median()),
        "quotient": float((measured / predicted).median()),
    }


def aligned(config: Config, seed: int, q: float) -> dict[str, float]:
    """Error aligned with the curvature: D = A^-q Z B^-q, so that C is proportional to A^(2(1-q))."""
    m, n = config.knob_shape
    a, b = log_spaced(config.kappas[0], m), log_spaced(config.kappas[1], n)
    z = gaussian((config.draws, m, n), torch.Generator().manual_seed(seed))
    return ratios(Quadratic(torch.outer(a, b)), a[:, None] ** -q * z * b**-q)


def shuffled(config: Config, seed: int, share: float) -> dict[str, float]:
    """A diagonal Hessian whose spectrum is that of A (x) B, with a share of its entries permuted at random.

    The Hessian keeps every eigenvalue; only the Kronecker structure is lost.
    """
    generator = torch.Generator().manual_seed(seed)
    h = kronecker(*config.knob_shape, *config.kappas).h.flatten().clone()
    chosen = torch.randperm(h.numel(), generator=generator)[: round(share * h.numel())]
    h[chosen] = h[chosen[torch.randperm(len(chosen), generator=generator)]]
    z = gaussian((config.draws, *config.knob_shape), generator)
    return ratios(Quadratic(h.view(config.knob_shape)), z)


def _collect(found: list[dict[str, float]]) -> dict[str, Any]:
    return {key: summary(row[key] for row in found) for key in found[0]}


def run(config: Config) -> dict[str, Any]:
    """Run E5; see docs/theory.md, section "One step, from the gradient alone"."""
    by_shape = {}
    for m, n in config.shapes:
        q = kronecker(m, n, *config.kappas)
        draws = [gaussian((config.draws, m, n), torch.Generator().manual_seed(seed)) for seed in config.seeds]
        by_shape[f"{m}x{n}"] = _collect([ratios(q, d) for d in draws])
    by_alignment = {f"{q:g}": _collect([aligned(config, seed, q) for seed in config.seeds]) for q in config.alignments}
    by_shuffle = {
        f"{share:g}": _collect([shuffled(config, seed, share) for seed in config.seeds]) for share in config.shuffles
    }
    a = log_spaced(config.kappas[0], config.knob_shape[0])
    known = {f"{q:g}": aligned_ratio(a, 1 - q) for q in config.alignments}
    data = {"shapes": by_shape, "alignment": by_alignment, "alignment_known": known, "shuffle": by_shuffle}
    return result("E5", TITLE, CLAIM, config, _criteria(by_shape, by_alignment, by_shuffle), data)


def _criteria(shapes: dict[str, Any], alignment: dict[str, Any], shuffle: dict[str, Any]) -> list[Criterion]:
    wide = shapes["16x1024"]["quotient"]
    low, high = wide["min"], wide["max"]
    bad = alignment["1.5"]["measured"]["max"]
    whole, part = shuffle["0"]["measured"]["min"], shuffle["0.1"]["measured"]["max"]
    blind = max(row["predicted"]["mean"] / row["measured"]["mean"] for row in shuffle.values())
    return [
        Criterion("16x1024: measured / predicted, median of draws, every seed", f"{low:.4f} to {high:.4f}",
                  "in [0.97, 1.03]", low >= 0.97 and high <= 1.03),
        Criterion("error aligned against the curvature (q = 1.5): gain, largest seed", bad, "< 0.2", bad < 0.2),
        Criterion("Kronecker Hessian, unshuffled: gain, smallest seed", whole, "> 1.2", whole > 1.2),
        Criterion("10% of the Hessian's entries shuffled: gain, largest seed", part, "< 1.05", part < 1.05),
        Criterion("the formula notices that the Hessian is not Kronecker: predicted / measured, worst share shuffled",
                  blind, "within 10% of 1", abs(blind - 1) <= 0.1, "falsifier", central=False),
    ]  # fmt: skip
