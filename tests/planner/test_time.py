"""Predicted against measured time of the optimizer's step, on this machine.

A timing, so it needs an idle machine: `OMP_NUM_THREADS=1 python -m pytest -m slow -s tests/planner/test_time.py`
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import pytest
import torch

import muon_dist
from muon_dist.model import build_model
from muon_dist.planner import Settings, describe_model, make_plan, measured_device

LLAMA = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 64,
         "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}  # fmt: skip
SETTINGS = Settings(low_precision=False, ns_dtype=torch.float32, sequence_length=32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        LLAMA,
        {**LLAMA, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4},
        {**LLAMA, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 12},
    ],
    ids=["384", "512", "256"],
)
def test_the_step_takes_what_was_predicted_within_a_quarter(model, tmp_path, monkeypatch):
    monkeypatch.setenv("MUON_DIST_CACHE", str(tmp_path))
    torch.set_num_threads(1)
    workload = describe_model("llama", model, vocabulary=512, sequence_length=32)
    settings = replace(SETTINGS, bucket_mb=64.0)
    plan = make_plan(workload, settings, measured_device(), layout="ddp", nodes=1, per_node=1)
    parts = plan.seconds
    of_adamw = parts["AdamW's update"] - parts["AdamW's update of Muon's"]
    predicted = parts["Newton-Schulz"] + parts["momentum and update"] + of_adamw
    built = build_model(model, vocab_size=512, seed=0)
    optimizer = muon_dist.Muon(muon_dist.param_groups(built, lr=0.02), ns_dtype=torch.float32, bucket_mb=64.0)
    for p in built.parameters():
        p.grad = torch.randn_like(p)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    measured = statistics.median(times[2:])
    print(f"predicted {predicted * 1e3:.1f} ms, measured {measured * 1e3:.1f} ms, ratio {predicted / measured:.2f}")
    print({name: f"{value * 1e3:.1f} ms" for name, value in parts.items()})
    assert 0.75 <= predicted / measured <= 1.25
