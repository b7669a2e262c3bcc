"""What the measures cost: seconds of a round against seconds of a training step, both of one run on two ranks."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from muon_dist.adapters.factory import MuonFactory
from muon_dist.model import build_model
from tests.distributed import run_ranks


def measure(settings: dict, tokens: int, batch: int) -> tuple[float, float, int]:
    """Median seconds of a round of all matrices owned here, median seconds of a step without it, and the matrices."""
    torch.manual_seed(dist.get_rank())
    model = build_model(settings, vocab_size=4096, seed=0, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    optimizer = MuonFactory()(model, lr=0.01, print_routing=False, diagnostics={"every": 1, "budget": 1.0})
    diagnostics = optimizer.diagnostics
    assert diagnostics is not None
    rounds, steps = [], []
    for _ in range(6):
        ids = torch.randint(0, 4096, (batch, tokens))
        began, before = time.perf_counter(), diagnostics.seconds
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        rounds.append(diagnostics.seconds - before)
        steps.append(time.perf_counter() - began - rounds[-1])
    return statistics.median(rounds[2:]), statistics.median(steps[2:]), len(diagnostics.latest)


@pytest.mark.slow
def test_within_two_percent_at_100_steps(root: Path) -> None:
    config = yaml.safe_load((root / "configs" / "quickstart.yaml").read_text())
    batch = config["trainer"]["per_device_train_batch_size"]
    results = run_ranks(measure, 2, config["model"], config["data"]["sequence_length"], batch, timeout=200)
    assert sum(matrices for _, _, matrices in results) == 35
    for rank, (of_round, of_step, matrices) in enumerate(results):
        share = of_round / of_step / 100
        print(f"rank {rank}: {matrices} matrices, {of_round:.3f} s a round, {of_step:.3f} s a step: {share:.2%}")
        assert share < 0.02
