"""The predictions of `muon-dist plan` against real engines: layouts, bytes and collectives, on 2 to 4 ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.traffic import BATCH, Traffic

pytest.importorskip("deepspeed")

import deepspeed

import muon_dist
from muon_dist.exchange.schedule import bucket_elements
from muon_dist.optim.rules.choice import check_options
from muon_dist.ownership import assign_owners
from muon_dist.planner.devices import DEVICES
from muon_dist.planner.estimate import BETWEEN, INSIDE, Exchange, buckets_of, exchange_of
from muon_dist.planner.model import Settings, Workload, describe_model
from muon_dist.planner.placement import place
from muon_dist.planner.plan import Plan, make_plan
from tests.adapters.deepspeed_ranks import MODELS, SEQUENCE, VOCABULARY, Case, backward, ds_config, make_model
from tests.adapters.test_fsdp2 import make_mesh, shard

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(300)]

SETTINGS = Settings(ns_dtype=torch.float32, bucket_mb=256.0, low_precision=False)
KINDS = {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3"}


def workload(model: str) -> Workload:
    settings = {**MODELS[model], "max_position_embeddings": 32}
    return describe_model(model, settings, vocabulary=VOCABULARY, sequence_length=SEQUENCE)


def predicted(model: str, kind: str, world: int, per_node: int, settings: Settings = SETTINGS) -> Exchange:
    """The exchange, computed as in `make_plan`."""
    layout = place(workload(model), settings, kind, world, per_node).layout
    plan = assign_owners(layout)
    buckets = buckets_of(plan, bucket_elements(int(settings.bucket_mb * 2**20)), settings.overlap)
    gathers = 1 + len(settings.rule.sends)
    return exchange_of(plan, buckets, per_node=per_node, gather_bytes=4, scatter_bytes=4, gathers=gathers)


def _engine(case: Case) -> tuple[Any, muon_dist.Muon]:
    deepspeed.init_distributed("gloo", verbose=False)
    model, world = make_model(case.model), dist.get_world_size()
    groups = muon_dist.param_groups(model, lr=case.lr, partitions=world if case.stage in (1, 2) else None)
    optimizer = muon_dist.Muon(groups, ns_dtype=torch.float32, bucket_mb=SETTINGS.bucket_mb)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(case, world))
    return engine, optimizer


def _counted(traffic: Traffic, optimizer: muon_dist.Muon, exchanges: tuple[str, ...]) -> dict[str, Any]:
    assert optimizer.plan is not None
    return {
        "layout": optimizer.plan.layout,
        "owners": optimizer.plan.owners,
        "received": sum(traffic.received[name] for name in exchanges),
        "sent": traffic.sent[BATCH],
        "calls": sum(traffic.calls[name] for name in exchanges),
        "others": sum(v for name, v in traffic.received.items() if name not in exchanges),
    }


def _under_deepspeed(cases: list[Case]) -> list[dict[str, Any]]:
    found = []
    for case in cases:
        engine, optimizer = _engine(case)
        backward(engine, 0, case.accumulation)
        engine.step()
        with Traffic() as traffic:
            backward(engine, 1, case.accumulation)
            engine.step()
        exchanges = ("broadcast",) if case.stage == 0 else (BATCH,)
        found.append(_counted(traffic, optimizer, exchanges))
        engine.destroy()
    return found


def check(rows: list[dict[str, Any]], model: str, kind: str, per_node: int, settings: Settings = SETTINGS) -> None:
    """Layout and owners equal those of the run, and so do each rank's bytes and collectives."""
    world = len(rows)
    made = place(workload(model), SETTINGS, kind, world, per_node)
    exchange = predicted(model, kind, world, per_node, settings)
    for rank, row in enumerate(rows):
        assert row["layout"] == made.layout, kind
        assert row["owners"] == assign_owners(made.layout).owners
        assert row["calls"] == exchange.collectives
        if kind not in ("ddp", "hsdp"):
            assert row["received"] == exchange.received[:, rank].sum(), (kind, rank)
            assert row["sent"] == exchange.sent[:, rank].sum(), (kind, rank)
    # For a broadcast the counter uses, on each rank, the mean of the received bytes over the ranks.
    assert sum(row["received"] for row in rows) == pytest.approx(exchange.received.sum(), rel=1e-12)


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, [Case(3), Case(2, model="mixtral")]),
        (4, [Case(0), Case(1), Case(2, accumulation=2), Case(3, model="gpt2")]),
    ],
)
def test_deepspeed_moves_what_was_predicted(world, cases):
    by_rank = run_ranks(_under_deepspeed, world, cases, timeout=200.0)
    for i, case in enumerate(cases):
        rows = [found[i] for found in by_rank]
        check(rows, case.model, KINDS[case.stage], world)
        if case.stage < 3:  # stage 3 gathers no more often than predicted
            settings = Settings(low_precision=False, accumulation=case.accumulation)
            plan = a_plan(case.model, KINDS[case.stage], world, settings)
            flags = 200  # norms, and which gradients exist
            padding = 3 * 2 * world * 4
            assert 0 <= rows[0]["others"] - sum(plan.moved["AdamW"]) <= flags + padding, (case, rows[0]["others"])


def a_plan(model: str, kind: str, world: int, settings: Settings) -> Plan:
    return make_plan(workload(model), settings, DEVICES["cpu"], layout=kind, nodes=1, per_node=world)


def _under_fsdp2(shape: tuple[int, ...], cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [_of_rule(shape, case) for case in cases]


def _of_rule(shape: tuple[int, ...], case: dict[str, Any]) -> dict[str, Any]:
    model = make_model("llama")
    shard(model, make_mesh(shape))
    optimizer = muon_dist.Muon(muon_dist.param_groups(model, lr=0.02), bucket_mb=SETTINGS.bucket_mb, **case)
    for step in range(2):
        tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens).loss.backward()
        with Traffic() as traffic:
            optimizer.step()
    return _counted(traffic, optimizer, (BATCH, "broadcast"))


@pytest.mark.parametrize("shape", [pytest.param((3,), marks=pytest.mark.slow), (2, 2)])
def test_fsdp2_moves_what_was_predicted(shape):
    world = torch.Size(shape).numel()
    cases: list[dict[str, Any]] = [{"rule": "muon", "rule_options": {part: value}} for part, value in
             (("cautious", True), ("row_floor", 0.4), ("momentum_at_owner", True))]  # fmt: skip
    cases += [{"rule": "soap_muon"}, {"rule": "soap_muon", "rule_options": {"momentum_at_owner": True}}]
    found = run_ranks(_under_fsdp2, world, shape, cases)
    for number, case in enumerate(cases):
        settings = replace(SETTINGS, rule=check_options({"scale": "none", "nesterov": True, **case}))
        assert len(settings.rule.sends) == (case == {"rule": "soap_muon"})
        rows = [of_rank[number] for of_rank in found]
        check(rows, "llama", "fsdp2" if len(shape) == 1 else "hsdp", shape[-1], settings)


@pytest.mark.parametrize("kind", ["zero2", "zero3", "fsdp2", "hsdp"])
def test_links_by_hand(kind):
    """Every message of a step, one by one, sorted by whether its two ends share a node."""
    world, per_node = 6, 3
    plan = assign_owners(place(workload("mixtral"), SETTINGS, kind, world, per_node).layout)
    exchange = predicted("mixtral", kind, world, per_node)
    received = [[0] * world, [0] * world]
    for m, owner, sources in zip(plan.layout.matrices, plan.owners, plan.sources, strict=True):
        messages = [(f.rank, owner, f.length) for f in sources] + [(owner, f.rank, f.length) for f in m.fragments]
        for sender, receiver, elements in messages:
            if sender != receiver:
                received[BETWEEN if sender // per_node != receiver // per_node else INSIDE][receiver] += 4 * elements
    assert exchange.received.tolist() == received


def test_hsdp_gathers_inside_the_node():
    """Two copies of the model, each on a node: updates are sent between them, momentum is not."""
    world, per_node = 6, 3
    plan = assign_owners(place(workload("llama"), SETTINGS, "hsdp", world, per_node).layout)
    assert {owner // per_node for owner in plan.owners} == {0, 1}
    for owner, sources in zip(plan.owners, plan.sources, strict=True):
        assert {f.rank // per_node for f in sources} == {owner // per_node}
    buckets = buckets_of(plan, 10**9, overlap=False)
    gathers = exchange_of(plan, buckets, per_node=per_node, gather_bytes=4, scatter_bytes=0)
    scatters = exchange_of(plan, buckets, per_node=per_node, gather_bytes=0, scatter_bytes=4)
    assert gathers.received[BETWEEN].sum() == 0 < gathers.received[INSIDE].sum()
    assert scatters.received[BETWEEN].sum() == 4 * plan.layout.numel  # each update once to the other node


def test_broadcasts_enter_each_node_once():
    world, per_node = 8, 2
    exchange = predicted("llama", "ddp", world, per_node)
    numel = workload("llama").muon_elements
    assert exchange.received.sum() == pytest.approx(4 * numel * (world - 1))
    assert exchange.received[BETWEEN].sum() == pytest.approx(4 * numel * (world // per_node - 1))
    assert exchange.sent.sum(axis=1) == pytest.approx(exchange.received.sum(axis=1))
