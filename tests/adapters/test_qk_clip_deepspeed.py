"""QK-clip inside DeepSpeed's engines: the flat shards of ZeRO 1 to 3, which cut heads and rows, and stage 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks

pytest.importorskip("deepspeed")

import deepspeed

from muon_dist.adapters.hf.attention import attach
from tests.adapters.deepspeed_ranks import Case, ds_config, master
from tests.adapters.plain_qk_clip import STEPS, batch, labels_in, loss_of, make_model, plain_weights
from tests.adapters.test_qk_clip import TOLERANCE, make_muon, shared_of

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(600)]


def engines(cases: list[Case], wanted: dict[str, torch.Tensor]) -> list[tuple[float, bool]]:
    """For each case the distance of the fp32 weights from plain ones, and whether the 16-bit weights are these,
    rounded."""
    deepspeed.init_distributed("gloo", verbose=False)
    world, rank, found = dist.get_world_size(), dist.get_rank(), []
    for case in cases:
        model: Any = make_model("qwen2")
        optimizer = make_muon(model)
        attach(model, optimizer, threshold=2.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(case, world))
        for step in range(STEPS):
            loss = loss_of(engine, shared_of(rank, world, step), labels_in(batch(step))) * world
            engine.backward(loss)
            engine.step()
        weights = master(engine, optimizer)
        distance = max(float((weights[n].double() - wanted[n]).abs().max()) for n in wanted)
        rounded = True
        for name, p in engine.module.named_parameters():
            if case.stage < 3 and case.dtype != "fp32":
                rounded &= torch.equal(p, weights[name].to(p.dtype))
        found.append((distance, rounded))
    return found


def test_flat_shards() -> None:
    cases = [Case(stage=stage) for stage in (0, 1, 2, 3)]
    wanted = plain_weights("qwen2", 2.0)[0]
    for found in run_ranks(engines, 3, cases, wanted):
        assert max(distance for distance, _ in found) < TOLERANCE, found


def test_16_bit_weights_are_the_scaled_masters() -> None:
    cases = [Case(stage=stage, dtype="bf16") for stage in (0, 1)]
    wanted = plain_weights("qwen2", 2.0)[0]
    for found in run_ranks(engines, 2, cases, wanted):
        assert all(rounded and distance < 0.5 for distance, rounded in found), found
