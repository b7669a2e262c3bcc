"""Bytes of every collective of a step, counted below torch.distributed, against the plan and against AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.traffic import BATCH, Traffic

pytest.importorskip("deepspeed")

import deepspeed

from muon_dist.exchange.schedule import bytes_sent, make_buckets
from tests.adapters.deepspeed_ranks import Case, backward, ds_config, make_engine, make_model

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(600)]


def _count(case: Case) -> dict[str, Any]:
    """One step of Muon and one of torch's AdamW under the same configuration."""
    engine, optimizer = make_engine(case)
    measured = _one_step(engine, case)
    runtime = optimizer.runtime
    assert runtime is not None
    plan, rank = runtime.plan, dist.get_rank()
    phases = plan.layout.phases or (tuple(range(len(runtime.binding.buffers))),)
    element = 4 if case.muon.get("wire_dtype") is None else 2
    predicted = 0
    for phase in phases:
        chosen = [i for i, m in enumerate(plan.layout.matrices) if m.buffer in phase]
        buckets = make_buckets(plan, chosen, 2**26)
        predicted += bytes_sent(plan, buckets, rank, element, element, copies=dist.get_world_size())
    moved = sum(
        (m.matrix.numel - m.held(owner)) * element + sum(f.length for f in m.fragments if f.rank != owner) * element
        for m, owner in zip(plan.layout.matrices, plan.owners, strict=True)
    )
    engine.destroy()
    # Stage 0 broadcasts, and what a rank sends of a broadcast depends on the backend: counted is what its owner
    # starts, in each of two equal steps.
    own = {"broadcast"} if case.stage == 0 else {BATCH}
    others = {k: v for k, v in measured.received.items() if k not in own}
    return {
        "sent": runtime.transport.bytes_sent / 2 if case.stage == 0 else measured.sent[BATCH],
        "received": sum(measured.received[k] for k in own),
        "predicted": predicted,
        "moved": moved,
        "numel": plan.layout.numel,
        "parameters": sum(len(specs) for specs in optimizer.specs),
        "matrices": len(plan.layout.matrices),
        "others": others,
        "adamw": dict(_adamw_step(case).received),
    }


def _one_step(engine: Any, case: Case) -> Traffic:
    backward(engine, 0, case.accumulation)
    engine.step()  # plans, and compares the plan's digest
    with Traffic() as traffic:
        backward(engine, 1, case.accumulation)
        engine.step()
    return traffic


def _adamw_step(case: Case) -> Traffic:
    model = make_model(case.model)
    import muon_dist

    groups = [{"params": g["params"]} for g in muon_dist.param_groups(model, lr=case.lr)]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups), config=ds_config(case, dist.get_world_size())
    )
    traffic = _one_step(engine, case)
    engine.destroy()
    return traffic


def _count_all(cases: list[Case]) -> list[dict[str, Any]]:
    return [_count(case) for case in cases]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_equal_the_plan_and_only_moved_fragments_are_extra(world):
    bf16 = {"wire_dtype": torch.bfloat16}
    cases = [
        Case(0), Case(1), Case(2, "bf16"), Case(3), Case(3, "bf16", 4, muon=bf16), Case(1, "bf16", 4, muon=bf16),
    ]  # fmt: skip
    by_rank = run_ranks(_count_all, world, cases, timeout=300.0)
    for i, case in enumerate(cases):
        rows = [results[i] for results in by_rank]
        for row in rows:
            assert row["sent"] == row["predicted"], (case, row)
            # Every other collective is AdamW's own, but for the bytes by which the ranks agree on which gradients
            # exist (stage 0) and which are zero: one for a parameter of AdamW's, one for a matrix of Muon's.
            # Beside the flags two words of 8 bytes of the rates, and two of the norms where gradients are copies.
            own = row["parameters"] + 32 if case.stage == 0 else row["matrices"] + 16
            flags = 2 * (world - 1) / world * own
            assert sum(row["others"].values()) == sum(row["adamw"].values()) + flags, (case, row)
        extra = sum(row["sent"] for row in rows)
        numel, k = rows[0]["numel"], (world - 1) / world
        if case.stage == 0:
            assert extra == numel * (world - 1) * 4  # a broadcast of each update, no gather
            assert sum(row["received"] for row in rows) == pytest.approx(extra, rel=1e-12)
        else:
            assert extra == rows[0]["moved"]
        if case.stage == 3 and case.muon:
            # peers.md: 4Pk/N bytes per rank and step; a slice may be one element shorter than the others
            assert extra / world <= 4 * numel * k / world * 1.02, (extra / world, 4 * numel * k / world)
            assert extra > 0.9 * 4 * numel * k
        if case.stage == 1 and case.muon:
            assert extra < 4 * numel * k / 3  # matrices that lie whole on a rank move nothing
