"""A first comparison of the update rules: a small Llama on the quickstart's corpus, each rule at its own best rate.

    python -m tests.optim.compare_rules RESULTS.jsonl          # all arms, one core; adds to the file what it lacks
    python -m tests.optim.compare_rules RESULTS.jsonl muon     # one arm
    python -m tests.optim.compare_rules RESULTS.jsonl --table  # what the file holds

Corpus: the English text of Python's standard library, by character; every 20th block of 1000 characters is held out.
All arms of a seed have the same initial weights and the same batches. Embedding, head and norms are AdamW's at one
rate. The best rate is searched on the first seed, by factors of two, until both neighbours of the best were worse.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from muon_dist import Muon, param_groups
from muon_dist.experiments.e8_tiny_gpt import stdlib_text, text_batches
from muon_dist.optim.rules import PARTS, RULES
from muon_dist.routing import route

SEEDS = (0, 1, 2)
STEPS, WARMUP, BATCH, CONTEXT = 200, 20, 8, 128
WIDTH, LAYERS, HEADS = 64, 2, 4
CHARACTERS, VALIDATION = 1_900_000, 80_000
ADAMW_RATE, WEIGHT_DECAY = 0.006, 0.1
FIRST_RATE = {"hyperball": 0.02, "adamw": 0.006}
"""Where the search of an arm begins; 0.02 for the others."""
ON: dict[str, Any] = {"row_floor": 0.3825, "radial_brake": 0.5}
ARMS: dict[str, dict[str, Any]] = {
    **{rule: {"rule": rule} for rule in RULES},
    **{f"muon, {part}": {"rule_options": {part: ON.get(part, True)}} for part in PARTS},
    "adamw": {},
}


def optimizer_of(model: LlamaForCausalLM, arm: str, rate: float) -> torch.optim.Optimizer:
    """The arm's optimizer; `adamw` has all parameters under AdamW at `rate`."""
    if arm == "adamw":
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    decay = 0.0 if arm == "hyperball" else WEIGHT_DECAY
    groups = param_groups(model, lr=rate, adamw_lr=ADAMW_RATE, weight_decay=decay, table=route(model))
    return Muon(groups, **ARMS[arm])


def loss_of(model: LlamaForCausalLM, x: Tensor, y: Tensor) -> Tensor:
    logits = model(input_ids=x, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def trained(arm: str, rate: float, seed: int) -> float:
    """Loss on the held-out text after one run, in nats per character; infinite if the run diverged."""
    text = stdlib_text(CHARACTERS, VALIDATION)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=text.alphabet,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
    )
    model = LlamaForCausalLM(config)
    optimizer = optimizer_of(model, arm, rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * t / STEPS))
    )
    batches = text_batches(text.train, BATCH, CONTEXT, seed)
    for _ in range(STEPS):
        loss = loss_of(model, *next(batches))
        if not torch.isfinite(loss):
            return math.inf
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return validation_loss(model, text.validation)


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, ids: Tensor) -> float:
    count = (len(ids) - 1) // CONTEXT
    x, y = (ids[i : count * CONTEXT + i].view(count, CONTEXT) for i in (0, 1))
    parts = zip(x.split(64), y.split(64), strict=True)
    return sum(float(loss_of(model, a, b)) * len(a) for a, b in parts) / count


class Results:
    """The runs in a file, one line each; a run that is not there is made and added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.losses = {(r["arm"], r["rate"], r["seed"]): float(r["loss"]) for r in map(json.loads, lines)}

    def loss(self, arm: str, rate: float, seed: int) -> float:
        key = arm, rate, seed
        if key not in self.losses:
            begin = time.perf_counter()
            self.losses[key] = trained(*key)
            seconds = round(time.perf_counter() - begin, 1)
            line = {"arm": arm, "rate": rate, "seed": seed, "loss": self.losses[key], "seconds": seconds}
            with self.path.open("a") as file:
                print(json.dumps(line), file=file)
        return self.losses[key]

    def best_rate(self, arm: str) -> float:
        """Search on the first seed until both neighbours of the best rate were worse."""
        best = FIRST_RATE.get(arm, 0.02)
        while True:
            tried = {rate: self.loss(arm, rate, SEEDS[0]) for rate in (best, best * 2, best / 2)}
            if min(tried.values()) == tried[best]:
                return best
            best = min(tried, key=lambda rate: tried[rate])

    def arm(self, arm: str) -> tuple[float, list[float]]:
        """(best rate, loss of each seed)."""
        rate = self.best_rate(arm)
        return rate, [self.loss(arm, rate, seed) for seed in SEEDS]


def table(results: Results, arms: list[str]) -> Iterator[str]:
    """Rows of Markdown, the best first.

    Runs of a seed have weights and batches in common, so they are compared seed by seed. A tie: the mean difference is
    not larger than the spread of the differences.
    """
    found = {arm: results.arm(arm) for arm in arms}
    muon = found["muon"][1]
    yield "| rule or part | best rate | loss, mean | lowest to highest | minus Muon's, mean | lowest to highest | |"
    yield "|---|---|---|---|---|---|---|"
    for arm, (rate, losses) in sorted(found.items(), key=lambda item: sum(item[1][1])):
        differences = [loss - of_muon for loss, of_muon in zip(losses, muon, strict=True)]
        mean, spread = sum(differences) / len(SEEDS), max(differences) - min(differences)
        verdict = "" if arm == "muon" else "tie" if abs(mean) <= spread else "better" if mean < 0 else "worse"
        yield (
            f"| `{arm}` | {rate:g} | {sum(losses) / len(SEEDS):.3f} | {min(losses):.3f} to {max(losses):.3f} | "
            f"{mean:+.3f} | {min(differences):+.3f} to {max(differences):+.3f} | {verdict} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("arms", nargs="*", default=[], metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(arguments.results)
    if not arguments.table:
        for arm in arguments.arms or ARMS:
            print(arm, *results.arm(arm), flush=True)
    if arguments.table or not arguments.arms:
        print(*table(results, [arm for arm in ARMS if any(arm == of for of, _, _ in results.losses)]), sep="\n")


if __name__ == "__main__":
    main()
