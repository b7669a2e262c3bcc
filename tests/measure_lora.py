"""Where should the factors of LoRA go? Measured on a small real task.

python -m tests.measure_lora        # a few minutes on one core; prints the table of docs/routing.md

A byte-level Llama (128 wide, 2 layers) is trained on Python source of the standard library, then adapted to C (the
headers that come with Python) by LoRA of rank 8 on every matrix of its layers, everything else frozen. Each optimizer
is tried at several learning rates with one seed; the best rate is repeated with three seeds. The loss is that of C
that was held out.
"""

from __future__ import annotations

import copy
import math
import statistics
import sysconfig
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import muon_dist

RANK, LENGTH, BATCH, STEPS, BASE_STEPS = 8, 96, 8, 100, 200
RATES = (0.001, 0.003, 0.01, 0.03)
OPTIMIZERS = ("AdamW", "Muon")


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(RANK, base.in_features) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T * 2.0


def text(files: list[Path], limit: int) -> torch.Tensor:
    data = b"".join(f.read_bytes() for f in files)[:limit]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def batch(data: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(data) - LENGTH, (BATCH,), generator=generator).tolist()
    return torch.stack([data[s : s + LENGTH] for s in starts])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: torch.Tensor, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 20) * (1 - s / steps))
    for _ in range(steps):
        ids = batch(data, generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def loss(model: nn.Module, data: torch.Tensor) -> float:
    generator = torch.Generator().manual_seed(99)
    batches = [batch(data, generator) for _ in range(24)]
    return statistics.mean(float(model(input_ids=ids, labels=ids).loss) for ids in batches)


def base_model(data: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    train(model, muon_dist.Muon(muon_dist.param_groups(model, lr=0.01)), data, BASE_STEPS, seed=0)
    return model.requires_grad_(False)


def adapted(base: nn.Module, data: torch.Tensor, name: str, rate: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for attribute, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, attribute, Lora(child))
    if name == "AdamW":
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    else:
        optimizer = muon_dist.Muon(muon_dist.param_groups(model, lr=rate, weight_decay=0.0))
    train(model, optimizer, data, STEPS, seed)
    return model


def main() -> None:
    library, headers = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("include"))
    python = text(sorted(library.glob("*.py")), 3_000_000)
    c = text(sorted(headers.rglob("*.h")), 3_000_000)
    split = len(c) * 9 // 10
    base = base_model(python)
    print(f"C before: {loss(base, c[split:]):.3f} nats per byte", flush=True)
    print("| factors | " + " | ".join(f"{r}" for r in RATES) + " | best, 3 seeds |")
    for name in OPTIMIZERS:
        found = {rate: loss(adapted(base, c[:split], name, rate, 1), c[split:]) for rate in RATES}
        best = min(found, key=found.__getitem__)
        seeds = [found[best], *(loss(adapted(base, c[:split], name, best, s), c[split:]) for s in (2, 3))]
        cells = " | ".join(f"{value:.3f}" for value in found.values())
        print(f"| {name} | {cells} | {statistics.mean(seeds):.3f} +- {statistics.stdev(seeds):.3f} |", flush=True)


if __name__ == "__main__":
    main()
