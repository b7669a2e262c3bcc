"""Numerics study: the effect of every Newton-Schulz schedule on a spectrum and on the stable step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muon_dist.errors import DataError
from muon_dist.experiments import e8_tiny_gpt
from muon_dist.experiments.quadratics import gaussian, log_spaced, with_spectrum
from muon_dist.experiments.result import Criterion, result, summary
from muon_dist.experiments.training import Rule
from muon_dist.numerics import SCHEDULES, coefficients, newton_schulz, newton_schulz_flops

TITLE = "Newton-Schulz, measured"
CLAIM = "After 5 iterations the largest singular value deviates from 1 by less than 0.01 (the rebuttal)."

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Config:
    """Sizes of the study; the defaults are the full profile. ``momentum``: a file saved by ``save_momentum``."""

    seeds: tuple[int, ...] = (0, 1, 2)
    shape: tuple[int, int] = (128, 512)
    conditions: tuple[float, ...] = (1e2, 1e4, 1e6)
    steps: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8)
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    momentum_dtypes: tuple[str, ...] = ("float32", "bfloat16")
    training: e8_tiny_gpt.Config = e8_tiny_gpt.PROFILES["full"]
    momentum: str | None = None


PROFILES = {
    "full": Config(),
    "quick": Config(seeds=(0,), steps=(1, 3, 5, 6, 8), training=e8_tiny_gpt.PROFILES["quick"]),
}


def combinations(steps: tuple[int, ...], dtypes: tuple[str, ...]) -> list[tuple[str, int, str]]:
    """Every (schedule, number of steps, dtype) that exists: a schedule of fixed length has one number of steps."""
    return [
        (name, count, dtype)
        for name, schedule in SCHEDULES.items()
        for count in ((schedule.fixed_length,) if schedule.fixed_length else steps)
        for dtype in (("float32",) if schedule.fp32_only else dtypes)
    ]


@dataclass(frozen=True)
class Spectrum:
    """A matrix with its exact decomposition, computed once."""

    matrix: Tensor
    values: Tensor
    polar: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Spectrum:
        """The decomposition, in fp64, of a matrix (m, n) with m <= n after transposition."""
        wide = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT).double()
        u, s, vt = torch.linalg.svd(wide, full_matrices=False)
        return cls(wide, s, u @ vt)


def measure(spectrum: Spectrum, schedule: str, steps: int, dtype: str) -> dict[str, Any]:
    """Range of the singular values, residual, relative polar error, cosine, and the stable step's ratio.

    ``stable_ratio`` is eta* with X in place of the polar factor, over eta* with the polar factor, isotropic Hessian:
    (<G, X> / |X|_F^2) / (|G|_* / r) = (sum s x / sum x^2) / s_mean.
    """
    g, o, s = spectrum.matrix, spectrum.polar, spectrum.values
    x = newton_schulz(g.float(), steps=steps, schedule=schedule, dtype=DTYPES[dtype]).double()
    if not bool(torch.isfinite(x).all()):
        return {"finite": False}
    singular = torch.linalg.eigvalsh(x @ x.mT).clamp_min(0).sqrt()
    squared = float(x.square().sum())
    return {
        "finite": True,
        "low": float(singular[0]),
        "high": float(singular[-1]),
        "residual": float((singular.square() - 1).square().mean().sqrt()),
        "max_deviation": float((singular - 1).abs().max()),
        "polar_error": float(torch.linalg.matrix_norm(x - o) / len(s) ** 0.5),
        "cosine": float((x * o).sum()) / (squared * len(s)) ** 0.5,
        "stable_ratio": float((g * x).sum()) / squared / float(s.mean()),
    }


def synthetic(config: Config) -> dict[str, list[Spectrum]]:
    """Gaussian matrices and log-spaced spectra of each condition number, one per seed."""
    found: dict[str, list[Spectrum]] = {"Gaussian": []}
    for seed in config.seeds:
        generator = torch.Generator().manual_seed(seed)
        found["Gaussian"].append(Spectrum.of(gaussian(config.shape, generator)))
        for condition in config.conditions:
            s = log_spaced(condition, config.shape[0]).flip(0)[None]
            found.setdefault(f"cond {condition:.0e}".replace("e+0", "e"), []).append(
                Spectrum.of(with_spectrum(s, config.shape[1], generator)[0])
            )
    return found


def captured_momentum(training: e8_tiny_gpt.Config, seeds: tuple[int, ...]) -> dict[str, Tensor]:
    """Momentum of every hidden matrix of E8's GPT at ``training.capture_steps``, trained with Muon."""
    found: dict[str, Tensor] = {}
    for seed in seeds:
        capture: dict[str, Tensor] = {}
        rule = Rule("muon", training.ablation_lr, training.beta, nesterov=True)
        e8_tiny_gpt.train_gpt(training, rule, seed, capture)
        found |= {f"seed {seed} {name}": momentum for name, momentum in capture.items()}
    return found


def save_momentum(momentum: dict[str, Tensor], path: Path) -> None:
    torch.save(momentum, path)


def load_momentum(path: Path) -> dict[str, Tensor]:
    """Named matrices from a file of ``torch.save``; raises DataError naming file and entry."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(f"{path}: not a file of tensors written by torch.save ({error})") from error
    if not isinstance(loaded, dict) or not loaded:
        raise DataError(f"{path}: expected a non-empty dictionary of name -> matrix")
    for name, value in loaded.items():
        matrix = isinstance(value, Tensor) and value.ndim == 2
        if not matrix or not bool(torch.isfinite(value).all()) or not bool(value.any()):
            raise DataError(f"{path}: entry {name!r} is not a finite, nonzero matrix (M, N)")
    return loaded


def _aggregate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Worst range and means over the matrices of one spectrum."""
    finite = [row for row in rows if row["finite"]]
    if len(finite) < len(rows):
        return {"overflowed": len(rows) - len(finite)}
    return {
        "low": min(row["low"] for row in finite),
        "high": max(row["high"] for row in finite),
        "max_deviation": max(row["max_deviation"] for row in finite),
        **{key: summary(row[key] for row in finite) for key in ("residual", "polar_error", "cosine", "stable_ratio")},
    }


def run(config: Config) -> dict[str, Any]:
    """Run the study; see docs/theory.md, section "Newton-Schulz, honestly"."""
    table = []
    for label, spectra in synthetic(config).items():
        for schedule, steps, dtype in combinations(config.steps, config.dtypes):
            rows = [measure(spectrum, schedule, steps, dtype) for spectrum in spectra]
            flops = newton_schulz_flops(*config.shape, len(coefficients(schedule, steps)))
            table.append(
                {"spectrum": label, "schedule": schedule, "steps": steps, "dtype": dtype, "flops": flops}
                | _aggregate(rows)
            )
    momentum = (
        load_momentum(Path(config.momentum)) if config.momentum else captured_momentum(config.training, config.seeds)
    )
    spectra = [Spectrum.of(matrix) for matrix in momentum.values()]
    real = []
    for schedule, steps, dtype in combinations((5, 6, 8), config.momentum_dtypes):
        rows = [measure(spectrum, schedule, steps, dtype) for spectrum in spectra]
        real.append(
            {"schedule": schedule, "steps": steps, "dtype": dtype}
            | _aggregate(rows)
            | {"within_0.01": sum(r["finite"] and abs(r["high"] - 1) < 0.01 for r in rows)}
            | {"highest": summary(r["high"] for r in rows if r["finite"])}
        )
    described = {
        name: {
            "condition": float(s.values[0] / s.values[-1]) if s.values[-1] > 0 else math.inf,
            "nuclear_rank_ratio": float(s.values.sum() ** 2 / s.values.square().sum() / len(s.values)),
        }
        for name, s in zip(momentum, spectra, strict=True)
    }
    data = {"table": table, "real": real, "momentum": described, "band": keller_band()}
    criteria = _criteria(data, len(spectra))
    return result("NS", TITLE, CLAIM, config, criteria, data, [answer(data, len(spectra))])


def keller_band(lowest: float = 0.0015, points: int = 200_001) -> tuple[float, float]:
    """Range of five Keller steps over normalised singular values in [lowest, 1], on a fine logarithmic grid."""
    x = torch.logspace(math.log10(lowest), 0, points, dtype=torch.float64)
    for a, b, c in coefficients("keller", 5):
        x = a * x + b * x**3 + c * x**5
    return float(x.min()), float(x.max())


def pick(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The one row with these values."""
    (row,) = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
    return row


def _criteria(data: dict[str, Any], count: int) -> list[Criterion]:
    keller = pick(data["real"], schedule="keller", steps=5, dtype="float32")
    express = pick(data["real"], schedule="polar_express", steps=5, dtype="float32")
    strict = {s: pick(data["table"], spectrum=s, schedule="strict", steps=6) for s in ("Gaussian", "cond 1e2")}
    strict_worst = max(row["max_deviation"] for row in strict.values())
    low, high = data["band"]
    share = min(keller["stable_ratio"]["min"], express["stable_ratio"]["min"])
    ill = pick(data["table"], spectrum="cond 1e4", schedule="strict", steps=6)["low"]
    return [
        Criterion(f"Keller x5, real momentum: largest singular value within 0.01 of 1, of {count} matrices",
                  keller["within_0.01"], f"{count}", keller["within_0.01"] == count, "paper", central=False),
        Criterion(f"Polar Express x5, real momentum: the same, of {count} matrices", express["within_0.01"],
                  f"{count}", express["within_0.01"] == count, "paper", central=False),
        Criterion("strict (Polar Express x6, fp32): max |x - 1|, Gaussian and condition 1e2", strict_worst, "< 0.01",
                  strict_worst < 0.01),
        Criterion("five Keller steps on normalised inputs >= 0.0015: range", f"[{low:.3f}, {high:.3f}]",
                  "within [0.680, 1.203]", low >= 0.6795 and high <= 1.203),
        Criterion("real momentum, 5 steps: stable step against the polar factor's, smallest ratio", share, ">= 0.99",
                  share >= 0.99, "reading"),
        Criterion("strict reaches condition 1e4 too: smallest singular value", ill, ">= 0.99", ill >= 0.99,
                  "falsifier", central=False),
    ]  # fmt: skip


def _span(stats: dict[str, Any]) -> str:
    return f"{stats['min']:.3f} to {stats['max']:.3f} (median {stats['median']:.3f})"


def answer(data: dict[str, Any], count: int) -> str:
    """The referee's question, answered with the numbers of this run."""
    keller = pick(data["real"], schedule="keller", steps=5, dtype="float32")
    express = pick(data["real"], schedule="polar_express", steps=5, dtype="float32")
    strict = pick(data["real"], schedule="strict", steps=6)
    clean = pick(data["table"], spectrum="cond 1e2", schedule="strict", steps=6)
    conditions = [m["condition"] for m in data["momentum"].values()]
    k_step, e_step = keller["stable_ratio"], express["stable_ratio"]
    return (
        "Does the residual of a few Newton-Schulz steps bring the largest singular value back into the stable step? "
        f"On {count} momentum matrices of a real training run (condition {min(conditions):.1e} to "
        f"{max(conditions):.1e}), five Keller steps leave the largest singular value at "
        f"{keller['highest']['median']:.3f} (median; within 0.01 of 1 in {keller['within_0.01']} of {count}), the "
        f"smallest at {keller['low']:.1e}, and a residual of {keller['residual']['mean']:.2f}; five Polar Express "
        f"steps leave the largest at {express['highest']['median']:.3f} ({express['within_0.01']} of {count}). So the "
        "rebuttal's 'deviates from 1 by less than 0.01 after 5 iterations' does not hold. It does for six Polar "
        f"Express steps in fp32 up to condition 1e2 (range {clean['low']:.4f} to {clean['high']:.4f}); on the real "
        f"momentum even those leave the smallest at {strict['low']:.1e}. The stable step, however, is "
        "(2/L) sum(s x) / sum(x^2): singular values that stay small lower the denominator more than the numerator, "
        f"and only overshoot costs. With the approximate factor it is {_span(k_step)} times that of the exact one for "
        f"Keller and {_span(e_step)} for Polar Express: at worst {max(0.0, 1 - k_step['min']):.0%} and "
        f"{max(0.0, 1 - e_step['min']):.0%} are lost to overshoot, a constant near 1 and not a return of the largest "
        "singular value."
    )
