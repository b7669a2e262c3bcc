"""E8, a tiny GPT on characters: every method at its own best step, iteration counts, and spectra that are not flat."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from muon_dist.data.corpus import Source, documents
from muon_dist.errors import DataError
from muon_dist.experiments.networks import TinyGPT, seeded
from muon_dist.experiments.result import Criterion, result, show, summary
from muon_dist.experiments.training import LABELS, Kind, MatrixOptimizer, Rule, train

TITLE = "Tiny GPT: controls and iteration counts"
CLAIM = "Flattening the whole spectrum, not only its top, is what makes Muon faster; few iterations are enough."


@dataclass(frozen=True)
class Config:
    """Sizes of E8; the defaults are the full profile.

    ``grids``: the learning rates tried for each arm, on the first ``tuning_seeds`` seeds; the best one then runs on
    all seeds.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seeds: int = 1
    grids: tuple[tuple[Kind, tuple[float, ...]], ...] = (
        ("muon", (0.01, 0.02, 0.03, 0.06, 0.1)),
        ("random", (0.01, 0.02, 0.03, 0.06, 0.1)),
        ("spectral", (0.015, 0.03, 0.06, 0.12, 0.25, 0.5)),
        ("nsgd", (0.005, 0.01, 0.02, 0.04, 0.08, 0.15)),
        ("adam", (0.001, 0.003, 0.006, 0.012, 0.025)),
        ("flat_adam", (0.01, 0.02, 0.03, 0.06, 0.1)),
        ("sgd", (0.1, 0.3, 1.0, 3.0, 10.0)),
    )
    ablation_lr: float = 0.03
    iteration_counts: tuple[int, ...] = (1, 2, 3, 5, 8)
    steps: int = 250
    batch: int = 16
    context: int = 64
    width: int = 48
    layers: int = 2
    other_lr: float = 0.003
    beta: float = 0.95
    characters: int = 1_000_000
    validation: int = 50_000
    capture_steps: tuple[int, ...] = (0, 30, 120, 249)


PROFILES = {
    "full": Config(),
    "quick": Config(
        seeds=(0, 1),
        # one step for each arm, the best of the full profile's grid: a grid costs ten times as much
        grids=(
            ("muon", (0.03,)),
            ("random", (0.03,)),
            ("spectral", (0.03,)),
            ("nsgd", (0.01,)),
            ("adam", (0.003,)),
            ("flat_adam", (0.03,)),
            ("sgd", (0.3,)),
        ),
        tuning_seeds=0,
        iteration_counts=(1, 5, 8),
        steps=150,
        batch=8,
        capture_steps=(0, 30, 149),
    ),
}


@dataclass(frozen=True)
class Text:
    """Character ids of the training and the validation text, and the size of the alphabet."""

    train: Tensor
    validation: Tensor
    alphabet: int


@functools.cache
def stdlib_text(characters: int, validation: int) -> Text:
    """The English of Python's standard library as character ids; characters seen fewer than 100 times become one.

    Raises DataError when the library holds too little text.
    """
    parts, total = [], 0
    for document in documents(Source(builtin="stdlib")):
        parts.append(document.data.decode("utf-8"))
        total += len(parts[-1])
        if total >= characters + validation:
            break
    text = "\n".join(parts)[: characters + validation]
    if len(text) < 4 * validation:
        raise DataError(f"the standard library's text has {len(text)} characters, E8 needs at least {4 * validation}")
    frequent = sorted(c for c in set(text) if text.count(c) >= 100)
    index = {c: i + 1 for i, c in enumerate(frequent)}
    ids = torch.tensor([index.get(c, 0) for c in text])
    # every 20th block of 1000 characters is held out: the files differ too much for one contiguous hold-out
    blocks = ids[: len(ids) // 1000 * 1000].view(-1, 1000)
    held_out = torch.arange(len(blocks)) % 20 == 19
    return Text(blocks[~held_out].flatten(), blocks[held_out].flatten()[:validation], len(frequent) + 1)


def text_batches(ids: Tensor, batch: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(context + 1)
    while True:
        starts = torch.randint(len(ids) - context - 1, (batch, 1), generator=generator)
        window = ids[starts + offsets]
        yield window[:, :-1], window[:, 1:]


@torch.no_grad()
def validation_loss(model: TinyGPT, ids: Tensor, context: int) -> float:
    """Mean cross-entropy in nats per character over consecutive windows."""
    count = (len(ids) - 1) // context
    x = ids[: count * context].view(count, context)
    y = ids[1 : count * context + 1].view(count, context)
    total = 0.0
    for a, b in zip(x.split(128), y.split(128), strict=True):
        total += float(F.cross_entropy(model(a).flatten(0, 1), b.flatten())) * len(a)
    return total / count


def train_gpt(config: Config, rule: Rule, seed: int, capture: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """One run: hidden matrices by ``rule``, everything else by the same AdamW in every arm, lr falling to zero.

    ``capture``: filled with the momentum of every matrix at ``config.capture_steps``, for the numerics study.
    """
    text = stdlib_text(config.characters, config.validation)
    model = seeded(lambda: TinyGPT(text.alphabet, config.context, config.width, config.layers), seed)
    assert isinstance(model, TinyGPT)
    optimizer = MatrixOptimizer(model.matrices(), rule, seed)
    others = torch.optim.AdamW(model.others(), lr=config.other_lr, betas=(0.9, 0.95), weight_decay=0.0)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    def after(step: int) -> bool:
        if capture is not None and step - 1 in config.capture_steps:
            for i, momentum in enumerate(optimizer.momentum):
                capture[f"step {step - 1} matrix {i}"] = momentum.clone()
        return False

    stream = text_batches(text.train, config.batch, config.context, seed)
    trace = train(loss_of, optimizer, stream, config.steps, decay=True, others=others, blow_up=10.0, after_step=after)
    done = trace.blown_up_at is None
    loss = validation_loss(model, text.validation, config.context) if done else float("inf")
    return {"loss": loss, "losses": trace.losses[:: max(1, config.steps // 50)]}


def tuned(config: Config, kind: Kind, grid: tuple[float, ...]) -> dict[str, Any]:
    """Validation loss of an arm at the best lr of its grid, over all seeds; the grid's losses beside it."""

    def rule(lr: float) -> Rule:
        return Rule(kind, lr, config.beta, nesterov=kind not in ("adam", "flat_adam"))

    tuning = config.seeds[: config.tuning_seeds]
    tried = {lr: [train_gpt(config, rule(lr), seed) for seed in tuning] for lr in grid}
    losses = {lr: sum(r["loss"] for r in runs) for lr, runs in tried.items()}
    best = min(grid, key=lambda lr: losses[lr])
    runs = tried[best] + [train_gpt(config, rule(best), seed) for seed in config.seeds[config.tuning_seeds :]]
    return {
        **summary(r["loss"] for r in runs),
        "lr": best,
        "grid": {f"{lr:g}": loss / len(tuning) for lr, loss in losses.items()} if tuning else {},
        "at_edge": len(grid) > 1 and best in (min(grid), max(grid)),
        "curves": [r["losses"] for r in runs],
    }


def ablation(config: Config) -> dict[str, Any]:
    """Muon at ``ablation_lr`` by number of Keller iterations, and with the exact polar factor."""
    rules = {
        f"k = {k}": Rule("muon", config.ablation_lr, config.beta, nesterov=True, steps=k)
        for k in config.iteration_counts
    }
    rules["exact"] = Rule("polar", config.ablation_lr, config.beta, nesterov=True)
    return {
        label: summary(train_gpt(config, rule, seed)["loss"] for seed in config.seeds) for label, rule in rules.items()
    }


def run(config: Config) -> dict[str, Any]:
    """Run E8; see docs/theory.md, "E8, a language model"."""
    arms: dict[str, dict[str, Any]] = {kind: tuned(config, kind, grid) for kind, grid in config.grids}
    counts = ablation(config)
    text = stdlib_text(config.characters, config.validation)
    edges = [LABELS[kind] for kind, arm in arms.items() if arm["at_edge"]]
    notes = [
        f"Text: {len(text.train)} training characters of Python's standard library, alphabet of {text.alphabet}; the "
        "text, and so the losses, change with the Python version.",
    ]
    if config.tuning_seeds:
        notes.append("Best step at the edge of its grid: " + (", ".join(edges) if edges else "no arm") + ".")
    else:
        notes.append("One learning rate an arm, the best that the full profile's grid found; not tuned again here.")
    return result("E8", TITLE, CLAIM, config, _criteria(arms, counts), {"arms": arms, "ablation": counts}, notes)


def _criteria(arms: dict[str, Any], counts: dict[str, Any]) -> list[Criterion]:
    muon = arms["muon"]["mean"]
    flat = ("muon", "random", "flat_adam")
    rivals = {kind: arm["mean"] for kind, arm in arms.items() if kind not in flat}
    best = min(rivals, key=lambda kind: rivals[kind])
    margin = rivals[best] - muon
    kaon = arms["random"]["mean"] - muon
    k1, k5, k8 = (counts[f"k = {k}"]["mean"] for k in (1, 5, 8))
    adam = arms["adam"]["mean"] - arms["flat_adam"]["mean"]
    return [
        Criterion(f"Muon ({show(arms['muon'], 4)}) below the best arm without flattening ({LABELS[best]}, "
                  f"{show(arms[best], 4)}), nats", margin, ">= 0.25", margin >= 0.25),
        Criterion("iterations: |loss(k = 5) - loss(k = 8)|, nats", abs(k5 - k8), "< 0.05", abs(k5 - k8) < 0.05),
        Criterion("iterations: loss(k = 1) - loss(k = 5), nats", k1 - k5, "> 0.15", k1 - k5 > 0.15),
        Criterion("ones are needed: random spectrum (Kaon) minus Muon, nats", kaon, "> 0.05", kaon > 0.05, "falsifier",
                  central=False),
        Criterion("flattening another method: AdamW minus flattened Adam, nats", adam, "> 0.05", adam > 0.05,
                  "reading", central=False),
    ]  # fmt: skip
