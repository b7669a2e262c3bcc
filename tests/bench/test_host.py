"""`muon-dist bench host`: the operations of a step stay few, and they are those of a real step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from typer.testing import CliRunner

from muon_dist import Muon, param_groups
from muon_dist.bench import host
from muon_dist.cli import app
from muon_dist.config import load_config
from muon_dist.planner.cli import routed, unpack
from tests.distributed import run_ranks

ROOT = Path(__file__).resolve().parents[2]
MOST = 900  # operations of Llama 7B on 64 ranks and more; 5,600 before the redesign
TINY = """\
name: tiny
tokenizer: {vocab_size: 61}
model: {model_type: llama, hidden_size: 24, intermediate_size: 50, num_hidden_layers: 2, num_attention_heads: 4,
  num_key_value_heads: 2}
optimizer:
  muon: {lr: 0.01, bucket_mb: 0.02, ns_dtype: float32}
  adamw: {lr: 0.003}
"""


@pytest.mark.parametrize(("layout", "ranks"), [("fsdp2", 64), pytest.param("fsdp2", 1024, marks=pytest.mark.slow)])
def test_a_step_of_a_large_model_is_few_operations(tmp_path, monkeypatch, layout, ranks):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "host.json"
    command = ["bench", "host", "--model", "llama-7b", "--layout", layout, "--ranks", str(ranks), "--json", str(file)]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert found["operations"] == sum(found["by_kind"].values()) <= MOST, found["by_kind"]
    assert 1 <= found["newton_schulz"]["matrices"] <= 224 / min(ranks, 224) + 2
    assert found["host_ms"] > 0


def counted(layout: str, path: str) -> dict[str, int]:
    """What a real step dispatches on rank 0."""
    config = load_config(Path(path))
    on_meta, table = routed(config)
    model: Any = type(on_meta)(on_meta.config)
    if layout == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = Muon(param_groups(model, table=table), lr=0.01, bucket_mb=0.02, ns_dtype=torch.float32)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.runtime.orthogonalize = lambda stack, group: None
    optimizer.runtime.transport.in_pairs = False
    with host._Counter() as counter:
        optimizer.step()
    return dict(counter.calls)


@pytest.mark.parametrize("layout", ["fsdp2", "ddp"])
def test_the_operations_are_those_of_a_real_step(tmp_path, layout):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    config = load_config(path)
    real = run_ranks(counted, 3, layout, str(path))[0]
    found = host.measure(*routed(config), *unpack(config), layout, 3, 0)["by_kind"]
    found["_foreach_lerp_"] -= found["_foreach_addcmul_"]  # AdamW's, which torch steps one by one on a CPU
    shared = ("_foreach_lerp_", "_foreach_copy_", "_foreach_norm", "stack")
    assert {kind: real.get(kind, 0) for kind in shared} == {kind: found.get(kind, 0) for kind in shared}
    views = ("view", "as_strided", "slice", "split", "split_with_sizes", "select")
    assert sum(real.get(kind, 0) for kind in views) <= 3  # the bits of the numbers that ranks compare
