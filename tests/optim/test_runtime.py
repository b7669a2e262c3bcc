"""The step as a pipeline: where it stands, what overlaps, what it keeps alive, what travels."""

from __future__ import annotations

import torch
import torch.distributed as dist

from muon_dist.layout import PlacedParameter, cut_parameter, per_parameter_layout
from muon_dist.optim import Binding, Muon
from tests.distributed import run_ranks
from tests.optim.test_distributed import make_flat
from tests.optim.test_muon import gradients


def steps_and_phases() -> tuple[int, list[tuple[str, int | None]]]:
    """One step of flat shards in buckets of 0.02 MiB: what `Progress` went through."""
    optimizer, shard, cuts = make_flat(0.02)
    rank = dist.get_rank()
    whole = torch.cat([g.reshape(-1) for g in gradients(0).values()])
    shard.grad = whole[cuts[rank] : cuts[rank + 1]].clone()
    seen: list[tuple[str, int | None]] = []
    progress = optimizer.runtime.transport.progress
    progress.listeners.append(lambda p: seen.append((p.operation, p.bucket)))
    optimizer.step()
    return progress.step, seen


def test_progress_names_every_phase_and_bucket_and_counts_the_step():
    for step, seen in run_ranks(steps_and_phases, 2):
        assert step == 1
        assert [operation for operation, bucket in seen if bucket is None][-3:] == ["adamw", "momentum", "idle"]
        buckets = max(bucket for _, bucket in seen if bucket is not None) + 1
        assert buckets > 1
        for operation in ("gather", "orthogonalize", "scatter", "update"):
            # with overlap a rank turns to the messages of a bucket twice: it sends, and it waits
            assert list(dict.fromkeys(b for name, b in seen if name == operation)) == list(range(buckets)), operation


def test_progress_of_a_phased_layout_counts_only_the_last_phase():
    """Under ZeRO-3 each sub-group is stepped by a call of its own; together they are one optimizer step."""
    shards = [torch.nn.Parameter(torch.ones(32)) for _ in range(2)]
    parameters = [torch.nn.Parameter(torch.ones(4, 8)) for _ in range(2)]
    optimizer = Muon([{"params": parameters, "param_names": ["a", "b"]}], lr=0.1)
    placed = [[PlacedParameter(n, 32, 0, cut_parameter(n, (4, 8)))] for n in ("a", "b")]
    layout = per_parameter_layout(placed, 1)
    optimizer.bind(Binding(layout, tuple(shards), None, torch.device("cpu")), {0: 0, 1: 0})
    counted = []
    for shard in shards:
        optimizer.param_groups[0]["params"] = [shard]
        shard.grad = torch.ones_like(shard)
        optimizer.step()
        counted.append(optimizer.runtime.transport.progress.step)
    assert counted == [0, 1]
