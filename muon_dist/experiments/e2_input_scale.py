"""E2, units: with inputs scaled by s, SGD's stable step is proportional to s^-2 and Muon's to s^-1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muon_dist.experiments.networks import Init, batches, cross_entropy, digits, mlp, seeded
from muon_dist.experiments.result import Criterion, result, summary
from muon_dist.experiments.training import Kind, MatrixOptimizer, Rule, train
from muon_dist.numerics import polar_factor

TITLE = "Input scale"
CLAIM = "Scaling the inputs by s moves SGD's stable step as s^-2 and Muon's as s^-1: one learning rate fits more data."


@dataclass(frozen=True)
class Config:
    """Sizes of E2; the defaults are the full profile."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    regression_scales: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    scales: tuple[float, ...] = (1.0, 4.0, 16.0)
    arms: tuple[Kind, ...] = ("sgd", "nsgd", "spectral", "muon", "random", "adam", "flat_adam")
    steps: int = 100
    batch: int = 128
    exponents: tuple[int, int] = (-14, 6)
    blow_up: float = 10.0


PROFILES = {
    "full": Config(),
    "quick": Config(seeds=(0, 1), scales=(1.0, 16.0), arms=("sgd", "nsgd", "muon", "adam", "flat_adam"), steps=60),
}


def one_hot_thresholds(seed: int, scale: float) -> dict[str, float]:
    """Largest step that lowers f(W) = |X W^T - Y|^2 / 2n from W = 0, by bisection on f, for SGD and Muon."""
    data = digits(seed, scale)
    x, y = data.x.double(), torch.nn.functional.one_hot(data.y, 10).double()

    def value(w: Tensor) -> float:
        return float((x @ w.T - y).square().sum() / (2 * len(x)))

    w = torch.zeros(10, 64, dtype=torch.float64)
    g = -(y.T @ x) / len(x)
    found = {}
    for name, update in (("sgd", g), ("muon", polar_factor(g))):
        low, high = 0.0, 1e-9
        while value(w - high * update) < value(w):
            low, high = high, 2 * high
        for _ in range(60):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if value(w - middle * update) < value(w) else (low, middle)
        found[name] = low
    return found


def slope(x: list[float], y: list[float]) -> float:
    """Least-squares slope of log y on log x."""
    a, b = torch.tensor(x, dtype=torch.float64).log(), torch.tensor(y, dtype=torch.float64).log()
    a = a - a.mean()
    return float((a * b).sum() / a.square().sum())


def stable_norm(config: Config, kind: Kind, lr: float, scale: float, seed: int, init: Init = "he") -> float | None:
    """Root mean square norm ||dW||_F of a run's steps; None for a run that exceeds ``blow_up`` times its first loss
    or does not end below it."""
    data = digits(seed, scale)
    model = seeded(lambda: mlp(init=init), seed)
    beta = 0.9 if kind in ("adam", "flat_adam") else 0.0
    optimizer = MatrixOptimizer(list(model.parameters()), Rule(kind, lr, beta), seed)
    stream = batches(data.x, data.y, config.batch, seed)
    trace = train(cross_entropy(model), optimizer, stream, config.steps, blow_up=config.blow_up)
    stable = trace.blown_up_at is None and trace.last() < trace.first
    return lr * optimizer.update_norm if stable else None


def largest_stable(config: Config, kind: Kind, scale: float, seed: int, init: Init = "he") -> dict[str, float]:
    """Largest stable lr on the grid of powers of two, and the norm of the steps taken at it.

    The walk starts at a step that is small for every arm (2^-4 / scale), goes down while that is unstable, and stops
    at the last step before the first unstable one above it.
    """
    low, high = config.exponents
    exponent = min(max(-4 - round(math.log2(max(scale, 1.0))), low), high)
    while (norm := stable_norm(config, kind, 2.0**exponent, scale, seed, init)) is None:
        exponent -= 1
        if exponent < low:
            raise ValueError(f"E2: {kind} is unstable on the whole grid at scale {scale:g}: lower Config.exponents")
    while (
        exponent < high and (above := stable_norm(config, kind, 2.0 ** (exponent + 1), scale, seed, init)) is not None
    ):
        exponent, norm = exponent + 1, above
    return {"lr": 2.0**exponent, "norm": norm}


_DEFAULT_INIT_ARMS: tuple[Kind, ...] = ("sgd", "muon")


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def run(config: Config) -> dict[str, Any]:
    """Run E2; see docs/theory.md, section "Units"."""
    thresholds = {
        seed: {scale: one_hot_thresholds(seed, scale) for scale in config.regression_scales} for seed in config.seeds
    }
    fits = {
        arm: summary(
            slope(list(config.regression_scales), [found[scale][arm] for scale in config.regression_scales])
            for found in thresholds.values()
        )
        for arm in ("sgd", "muon")
    }
    stable: dict[str, dict[str, list[dict[str, float]]]] = {
        arm: {
            f"{scale:g}": [largest_stable(config, arm, scale, seed) for seed in config.seeds]
            for scale in config.scales
        }
        for arm in config.arms
    }
    centre: dict[str, dict[str, dict[str, float]]] = {
        key: {
            arm: {scale: geometric_mean([v[key] for v in found]) for scale, found in row.items()}
            for arm, row in stable.items()
        }
        for key in ("lr", "norm")
    }
    default_init: dict[str, float] = {
        arm: geometric_mean([largest_stable(config, arm, 1.0, seed, "default")["lr"] for seed in config.seeds])
        for arm in _DEFAULT_INIT_ARMS
    }
    data = {
        "default_init": default_init,
        "slopes": fits,
        "thresholds": thresholds,
        "stable": stable,
        "stable_geometric_mean": centre,
    }
    return result("E2", TITLE, CLAIM, config, _criteria(config, fits, default_init, **centre), data, _notes(config))


def _criteria(
    config: Config,
    fits: dict[str, Any],
    default_init: dict[str, float],
    lr: dict[str, dict[str, float]],
    norm: dict[str, dict[str, float]],
) -> list[Criterion]:
    sgd, muon = (max(abs(v - want) for v in fits[arm]["values"]) for arm, want in (("sgd", -2), ("muon", -1)))
    at_one, at_sixteen = lr["muon"]["1"] / lr["sgd"]["1"], lr["muon"]["16"] / lr["sgd"]["16"]
    default = default_init["muon"] / default_init["sgd"]
    against = min(lr["muon"][f"{s:g}"] / lr["nsgd"][f"{s:g}"] for s in config.scales if s >= 1)
    flat, flat_norm = (min(t["flat_adam"][f"{s:g}"] / t["adam"][f"{s:g}"] for s in config.scales) for t in (lr, norm))
    return [
        Criterion("one-hot regression: SGD's slope is -2, worst seed", sgd, "|slope + 2| < 0.01", sgd < 0.01),
        Criterion("one-hot regression: Muon's slope is -1, worst seed", muon, "|slope + 1| < 0.01", muon < 0.01),
        Criterion("MLP: largest stable lr, Muon / SGD at s = 1", at_one, "< 1", at_one < 1),
        Criterion("the same from torch's default initialisation", default, "< 1", default < 1, "reading", False),
        Criterion("MLP: largest stable lr, Muon / SGD at s = 16", at_sixteen, "> 3", at_sixteen > 3),
        Criterion("MLP: largest stable lr, Muon / NSGD, smallest over s >= 1", against, ">= 2", against >= 2),
        Criterion("flattening Adam raises its stable lr, smallest ratio over s", flat, "> 1", flat > 1, "reading",
                  central=False),
        Criterion("flattening Adam raises its stable step ||dW||_F, smallest ratio over s", flat_norm, "> 1",
                  flat_norm > 1, "reading", central=False),
    ]  # fmt: skip


def _notes(config: Config) -> list[str]:
    return [
        "Adam's update has entries of order 1, flattened Adam's a Frobenius norm of sqrt(min(m, n)): at 128 x 128 the "
        "first is up to 11 times longer at the same lr. The norms of the steps taken at the largest stable lr are the "
        "fair comparison, and stand beside the learning rates.",
        f"Stable means: never above {config.blow_up:g} times the first loss in {config.steps} steps, and below it at "
        "the end; momentum 0 (0.9 for the Adam arms), grid of powers of two.",
    ]
