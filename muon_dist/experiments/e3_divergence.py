"""E3, divergence: at learning rates at which SGD blows up in its first steps, Muon and spectrally normalised SGD do
not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from muon_dist.experiments.networks import Init, accuracy, batches, cross_entropy, digits, mlp, seeded
from muon_dist.experiments.quadratics import gaussian, kronecker, polar
from muon_dist.experiments.result import Criterion, result, show, summary
from muon_dist.experiments.training import Kind, MatrixOptimizer, Rule, train

TITLE = "Divergence"
CLAIM = "Muon remains stable at learning rates at which SGD diverges within the first few iterations."


@dataclass(frozen=True)
class Config:
    """Sizes of E3; the defaults are the full profile."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    arms: tuple[Kind, ...] = ("sgd", "muon", "spectral", "nsgd", "random")
    scale: float = 16.0
    lr: float = 0.75
    batch: int = 128
    steps: int = 110
    blow_up: float = 10.0
    falsifier_lrs: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
    plateau_etas: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    plateau_rows: int = 16
    plateau_cols: int = 32
    plateau_kappa: float = 100.0
    plateau_steps: int = 400


PROFILES = {
    "full": Config(),
    "quick": Config(
        seeds=(0, 1, 2), steps=60, falsifier_lrs=(1.0, 3.0, 6.0), plateau_etas=(0.03, 0.3, 3.0, 30.0, 100.0)
    ),
}


def train_mlp(
    config: Config, kind: Kind, lr: float, scale: float, centred: bool, seed: int, init: Init = "he"
) -> dict[str, Any]:
    """One run of the MLP without momentum: losses, step at which it blew up (None: never), test accuracy."""
    data = digits(seed, scale, centred)
    model = seeded(lambda: mlp(init=init), seed)
    optimizer = MatrixOptimizer(list(model.parameters()), Rule(kind, lr), seed)
    stream = batches(data.x, data.y, config.batch, seed)
    trace = train(cross_entropy(model), optimizer, stream, config.steps, blow_up=config.blow_up)
    done = trace.blown_up_at is None
    return {
        "blown_up_at": trace.blown_up_at,
        "accuracy": accuracy(model, data.test_x, data.test_y) if done else None,
        "losses": trace.losses,
    }


def plateau(config: Config, eta: float, seed: int, fixed_start: bool = False) -> dict[str, float]:
    """Muon at a constant step on a quadratic of condition ``plateau_kappa``: level of the plateau and the bound.

    The plateau is the mean over the second half. The start is a fresh Gaussian draw of scale 2 eta, so that the way to
    go does not depend on eta; from one fixed start a step longer than the distance to go falls into another limit
    cycle (see the notes of the result). The bound: f_t <= max(f_0, (eta r L)^2 / (8 mu) + eta^2 r L / 2).
    """
    # one generator state for each (seed, eta): with a shared one, scaling would make the slope exact by construction
    generator = torch.Generator().manual_seed(seed if fixed_start else seed * 100_003 + round(1000 * eta))
    rows, cols = config.plateau_rows, config.plateau_cols
    q = kronecker(rows, cols, config.plateau_kappa, 1.0)
    d = gaussian((1, rows, cols), generator) * (1.0 if fixed_start else 2 * eta)
    values = [float(q.value(d))]
    for _ in range(config.plateau_steps):
        d = d - eta * polar(q.gradient(d))
        values.append(float(q.value(d)))
    tail = values[len(values) // 2 :]
    bound = (eta * rows * q.smoothness) ** 2 / (8 * q.convexity) + eta**2 * rows * q.smoothness / 2
    return {"level": sum(tail) / len(tail), "largest": max(values), "bound": max(values[0], bound)}


def log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    a = torch.tensor(x, dtype=torch.float64).log()
    b = torch.tensor(y, dtype=torch.float64).log()
    a = a - a.mean()
    return float((a * b).sum() / a.square().sum())


def run(config: Config) -> dict[str, Any]:
    """Run E3; see docs/theory.md, section "A constant step cannot diverge on a smooth, strongly convex function"."""
    runs: dict[str, list[dict[str, Any]]] = {
        arm: [train_mlp(config, arm, config.lr, config.scale, True, seed) for seed in config.seeds]
        for arm in config.arms
    }
    falsifier = {
        f"{lr:g}": [train_mlp(config, "muon", lr, 1.0, False, seed) for seed in config.seeds]
        for lr in config.falsifier_lrs
    }
    plateaus = {f"{eta:g}": [plateau(config, eta, seed) for seed in config.seeds] for eta in config.plateau_etas}
    levels = summary(
        log_slope(config.plateau_etas, [found[i]["level"] for found in plateaus.values()])
        for i in range(len(config.seeds))
    )
    reached = [eta for eta in config.plateau_etas if eta >= 0.3]
    fixed = summary(
        log_slope(reached, [plateau(config, eta, seed, fixed_start=True)["level"] for eta in reached])
        for seed in config.seeds
    )
    default_init = [
        train_mlp(config, "sgd", config.lr, config.scale, True, seed, init="default") for seed in config.seeds
    ]
    data = {
        "runs": runs,
        "falsifier": {lr: [{k: v for k, v in r.items() if k != "losses"} for r in rs] for lr, rs in falsifier.items()},
        "plateaus": plateaus,
        "plateau_slope": levels,
        "plateau_slope_fixed_start": fixed,
        "default_init": default_init,
    }
    notes = [
        f"From one fixed start the plateau's slope is {show(fixed)}: a step longer than the distance to go ends in a "
        "limit cycle through the minimum, with up to twice the level of the symmetric one.",
        "The networks start from He's initialisation (variance 2/fan-in). From torch's default (1/(3 fan-in), "
        "a smaller gradient) SGD fails too, but later: see the last criterion.",
    ]
    criteria = _criteria(config, runs, falsifier, plateaus, levels, default_init)
    return result("E3", TITLE, CLAIM, config, criteria, data, notes)


def blown(found: Sequence[dict[str, Any]], within: float = math.inf) -> int:
    """Number of runs that blew up at step ``within`` or earlier."""
    return sum(r["blown_up_at"] is not None and r["blown_up_at"] <= within for r in found)


def _accuracy(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return summary([r["accuracy"] for r in found if r["accuracy"] is not None] or [0.0])


def _criteria(
    config: Config,
    runs: dict[str, list[dict[str, Any]]],
    falsifier: dict[str, list[dict[str, Any]]],
    plateaus: dict[str, list[dict[str, float]]],
    levels: dict[str, Any],
    default_init: list[dict[str, Any]],
) -> list[Criterion]:
    n = len(config.seeds)
    sgd, muon = blown(runs["sgd"], 5), blown(runs["muon"])
    at = [r["blown_up_at"] for r in runs["sgd"] if r["blown_up_at"] is not None]
    muon_accuracy = _accuracy(runs["muon"])
    others = {arm: blown(found) for arm, found in runs.items() if arm not in ("sgd", "muon")}
    default = blown(default_init, 5)
    own = sum(blown(found) for lr, found in falsifier.items() if float(lr) >= 3)
    small = blown(falsifier["1"])
    slope = max(abs(v - 2) for v in levels["values"])
    excess = max(p["largest"] / p["bound"] for found in plateaus.values() for p in found)
    return [
        Criterion(f"SGD above {config.blow_up:g}x its first loss by step 5, runs of {n} (steps {sorted(set(at))})",
                  sgd, f">= {math.ceil(0.9 * n)}", sgd >= 0.9 * n),
        Criterion(f"Muon blows up, runs of {n}", muon, "0", muon == 0),
        Criterion("Muon's test accuracy", show(muon_accuracy), ">= 0.93", muon_accuracy["mean"] >= 0.93),
        Criterion("quadratic, constant eta: plateau goes as eta^2, worst seed", slope, "|slope - 2| <= 0.05",
                  slope <= 0.05),
        Criterion("quadratic: largest f over the bound max(f0, (eta r L)^2/8mu + eta^2 r L/2)", excess, "<= 1",
                  excess <= 1),
        Criterion(f"orthogonalization is needed: every other normalised arm blows up ({n} runs each)",
                  ", ".join(f"{arm} {count}" for arm, count in others.items()), f"all {n}",
                  all(count == n for count in others.values()), "falsifier", central=False),
        Criterion(f"Muon is stable at any lr: blow-ups on [0, 1] digits at lr >= 3 (at lr 1: {small} of {n})", own,
                  "0", own == 0, "falsifier", central=False),
        Criterion(f"SGD also blows up within 5 steps from torch's default initialisation, runs of {n}", default,
                  f">= {math.ceil(0.9 * n)}", default >= 0.9 * n, "reading", central=False),
    ]  # fmt: skip
