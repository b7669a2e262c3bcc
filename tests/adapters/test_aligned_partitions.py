"""Slices of ZeRO-1/2 that begin between matrices: bytes of every collective before and after, on real engines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.traffic import BATCH, Traffic

pytest.importorskip("deepspeed")

import deepspeed
import torch

import muon_dist
from muon_dist.adapters.factory import MuonFactory
from muon_dist.errors import CheckpointError
from tests.adapters.deepspeed_ranks import Case, backward, ds_config, make_model

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(300)]


def _engine(case: Case, partitions: int | None) -> Any:
    deepspeed.init_distributed("gloo", verbose=False)
    model = make_model(case.model)
    groups = muon_dist.param_groups(model, lr=case.lr, partitions=partitions)
    optimizer = muon_dist.Muon(groups, ns_dtype=torch.float32)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(case, dist.get_world_size()))
    return engine


def _received(case: Case, partitions: int | None) -> dict[str, float]:
    """Bytes that this rank receives in a step, in all and for Muon alone, and the loss after it."""
    engine = _engine(case, partitions)
    backward(engine, 0, 1)
    engine.step()
    with Traffic() as traffic:
        backward(engine, 1, 1)
        engine.step()
    loss = backward(engine, 2, 1)
    found = {"all": traffic.total, "muon": traffic.received[BATCH], "loss": loss}
    engine.destroy()
    return found


def _both(cases: list[Case]) -> list[tuple[dict[str, float], dict[str, float]]]:
    return [(_received(case, None), _received(case, dist.get_world_size())) for case in cases]


ACCUMULATED = {"data_types": {"grad_accum_dtype": "fp32"}}  # BF16_Optimizer


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (3, [Case(1)]),
        (4, [Case(1, "bf16", config=ACCUMULATED)]),
        pytest.param(4, [Case(2), Case(2, model="mixtral")], marks=pytest.mark.slow),
    ],
)
def test_ordered_groups_cost_no_more_than_one_percent_over_adamw(world, cases):
    for case, *rows in zip(cases, *run_ranks(_both, world, cases, timeout=200.0), strict=True):
        before = sum(given["muon"] for given, _ in rows)
        after = sum(ordered["muon"] for _, ordered in rows)
        floor = sum(ordered["all"] - ordered["muon"] for _, ordered in rows)  # AdamW's, test_deepspeed_traffic.py
        assert after <= 0.01 * floor, (case, before, after, floor)
        assert after <= before
        if case.model == "llama":  # the given order is not free
            assert before > 8 * after
        for given, ordered in rows:
            assert ordered["all"] - ordered["muon"] == given["all"] - given["muon"]
            assert ordered["loss"] == pytest.approx(given["loss"], rel=5e-3 if case.dtype == "bf16" else 1e-5)


def _from_factory(stage: int, round_robin: bool) -> list[str]:
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    zero = {"stage": stage, "round_robin_gradients": round_robin}
    held = HfDeepSpeedConfig({"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1})
    optimizer = MuonFactory()(make_model("llama"), lr=0.02, print_routing=False)
    del held
    return list(optimizer.param_groups[0]["param_names"])


def _factory_orders() -> list[list[str]]:
    return [_from_factory(*arguments) for arguments in ((1, False), (2, False), (2, True), (3, False))]


def test_the_factory_orders_where_deepspeed_keeps_the_order():
    one, two, round_robin, three = run_ranks(_factory_orders, 4)[0]
    assert one == two != three == round_robin
    assert sorted(one) == sorted(three)


def _resume_in_another_order(folder: str) -> str:
    case = replace(Case(1), attach=False)
    engine = _engine(case, 4)
    backward(engine, 0, 1)
    engine.step()
    engine.save_checkpoint(folder)
    engine.destroy()
    engine = _engine(case, None)
    try:
        engine.load_checkpoint(folder)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_checkpoint_of_another_order_is_refused(tmp_path):
    """DeepSpeed keeps slices by position: loaded in another order they would be other parameters' without a word."""
    for message in run_ranks(_resume_in_another_order, 4, str(tmp_path), timeout=100.0):
        assert "in another order" in message and "partitions" in message
