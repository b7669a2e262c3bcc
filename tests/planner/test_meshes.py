"""Plans of meshes against models that transformers really shards: layouts, bytes and collectives on 4 ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DistributedConfig

from muon_dist import Muon, param_groups
from muon_dist.errors import ConfigError
from muon_dist.exchange.schedule import bucket_elements
from muon_dist.ownership import assign_owners
from muon_dist.planner.advice import advise
from muon_dist.planner.communication import bytes_by_axis
from muon_dist.planner.devices import DEVICES, GB
from muon_dist.planner.estimate import buckets_of, exchange_of
from muon_dist.planner.memory import activation_bytes
from muon_dist.planner.mesh import Mesh, make_mesh
from muon_dist.planner.model import Settings, Workload, describe_model
from muon_dist.planner.placement import held_bytes, place_on
from muon_dist.planner.plan import make_plan
from muon_dist.planner.search import every_mesh
from tests.adapters.test_meshes import MODELS, SIZES, saved
from tests.distributed import run_ranks
from tests.traffic import BATCH, Traffic

SETTINGS = Settings(ns_dtype=torch.float32, bucket_mb=256.0, low_precision=False)
BLOCK = {key: value for key, value in SIZES.items() if key not in ("vocab_size", "pad_token_id", "eos_token_id")}


def workload(name: str, **changes: Any) -> Workload:
    block = {"model_type": name, **BLOCK, **MODELS[name], **changes}
    return describe_model(name, block, vocabulary=64, sequence_length=16)


def _stepped(folder: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """What one step moved, the layout it ran on, and the parameters' elements on this rank."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(**sizes), dtype=torch.float32
    )
    optimizer = Muon(param_groups(model, lr=0.02), ns_dtype=torch.float32, bucket_mb=SETTINGS.bucket_mb)
    for step in range(2):
        tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens).loss.backward()
        with Traffic() as traffic:
            optimizer.step()
        optimizer.zero_grad()
    assert optimizer.plan is not None
    return {
        "layout": optimizer.plan.layout,
        "owners": optimizer.plan.owners,
        "received": traffic.received[BATCH] + traffic.received["broadcast"],
        "calls": traffic.calls[BATCH] + traffic.calls["broadcast"],
        "held": sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters()),
    }


@pytest.mark.parametrize(
    ("name", "mesh", "sizes"),
    [
        ("llama", ("fsdp2", {"tp": 2}), {"tp_size": 2, "fsdp_size": 2}),
        ("mixtral", ("hsdp", {"tp": 2, "dp_replicate": 2}), {"tp_size": 2, "dp_replicate_size": 2}),
        ("mixtral", ("fsdp2", {"tp": 2}), {"tp_size": 2, "fsdp_size": 2}),
        ("qwen3_moe", ("fsdp2", {"tp": 2, "ep": 4}), {"tp_size": 2, "fsdp_size": 2, "ep_size": 4}),
        ("qwen3_moe", ("hsdp", {"ep": 2, "dp_replicate": 2}), {"fsdp_size": 2, "dp_replicate_size": 2, "ep_size": 2}),
        ("phi3", ("fsdp2", {"tp": 2}), {"tp_size": 2, "fsdp_size": 2}),
    ],
)
def test_a_mesh_moves_what_was_planned(name: str, mesh: Any, sizes: dict[str, int], tmp_path: Path) -> None:
    rows = run_ranks(_stepped, 4, saved(name, tmp_path), sizes)
    kind, axes = mesh
    planned = make_mesh(kind, 4, 2, axes)
    placement = place_on(workload(name), SETTINGS, planned)
    owners = assign_owners(placement.layout)
    buckets = buckets_of(owners, bucket_elements(int(SETTINGS.bucket_mb * 2**20)), SETTINGS.overlap)
    exchange = exchange_of(owners, buckets, per_node=2, gather_bytes=4, scatter_bytes=4)
    for row in rows:
        assert row["layout"] == placement.layout
        assert row["owners"] == owners.owners
        assert row["calls"] == exchange.collectives
    received = [row["received"] for row in rows]
    assert sum(received) == pytest.approx(exchange.received.sum(), rel=1e-12) and sum(received) > 0
    if kind == "fsdp2":  # a broadcast is counted as its mean over the ranks
        assert received == exchange.received.sum(axis=0).tolist()
    assert max(row["held"] for row in rows) * 4 == held_bytes(workload(name), SETTINGS, planned).weights
