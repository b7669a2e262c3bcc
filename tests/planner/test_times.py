"""Predicted against measured time of the optimizer's step, on this machine.

A timing, so nothing else should run: `OMP_NUM_THREADS=1 python -m pytest -m slow -s tests/planner/test_times.py`
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

import muon_dist
from muon_dist.model import build_model
from muon_dist.planner.devices import measured_device
from muon_dist.planner.model import Settings, describe_model
from muon_dist.planner.plan import make_plan

LLAMA = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 64}
SHAPES = [(256, 704, 4), (384, 1024, 2), (512, 1376, 1)]
SETTINGS = Settings(low_precision=False, ns_dtype=torch.float32, sequence_length=32, bucket_mb=64.0)
ROUNDS = 7


@pytest.mark.slow
@pytest.mark.parametrize(("hidden", "wide", "layers"), SHAPES)
def test_the_step_takes_what_was_predicted_within_a_quarter(hidden, wide, layers, tmp_path, monkeypatch):
    """Prediction and step take turns, so that both see the same machine."""
    torch.set_num_threads(1)
    model = {**LLAMA, "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers}
    workload = describe_model("llama", model, vocabulary=512, sequence_length=32)
    built = build_model(model, vocab_size=512, seed=0)
    optimizer = muon_dist.Muon(muon_dist.param_groups(built, lr=0.02), ns_dtype=torch.float32, bucket_mb=64.0)
    for p in built.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()  # plans
    ratios = []
    for i in range(ROUNDS):
        monkeypatch.setenv("MUON_DIST_CACHE", str(tmp_path / str(i)))  # measured again
        parts = make_plan(workload, SETTINGS, measured_device(), layout="ddp", nodes=1, per_node=1).seconds
        of_adamw = parts["AdamW's update"] - parts["AdamW's update of Muon's"]
        predicted = parts["Newton-Schulz"] + parts["momentum and update"] + of_adamw
        times = []
        for _ in range(3):
            start = time.perf_counter()
            optimizer.step()
            times.append(time.perf_counter() - start)
        ratios.append(predicted / statistics.median(times))
        print(
            f"{predicted * 1e3:.1f} ms predicted, {statistics.median(times) * 1e3:.1f} ms measured: {ratios[-1]:.2f}"
        )
    assert 0.75 <= statistics.median(ratios) <= 1.25
