"""DeepSpeed's sequence parallelism (Ulysses) and hpZ, the secondary partition of ZeRO-3: exact without a word.

Under Ulysses the ranks of a sequence-parallel group share one batch and each holds a part of its tokens; ZeRO
partitions over all ranks as without it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks

pytest.importorskip("deepspeed")

from tests.adapters.deepspeed_ranks import (
    GLOBAL_BATCH,
    SEQUENCE,
    Case,
    Truth,
    batch,
    ds_config,
    full_gradient,
    make_engine,
    make_model,
    make_muon,
    master,
    model_config,
    momentum_error,
    run_cases,
    whole_model,
)

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(600)]

SP = 2


def _engine(case: Case) -> tuple[Any, Any]:
    """(engine with sequence parallelism, our optimizer)"""
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers import AutoModelForCausalLM

    deepspeed.init_distributed("gloo", verbose=False)
    state = make_model(case.model).state_dict()
    model = AutoModelForCausalLM.from_config(model_config(case.model), attn_implementation="sdpa")
    model.load_state_dict(state)
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation="sdpa",
        sequence_parallel_size=SP,
        micro_batch_size=GLOBAL_BATCH * SP // dist.get_world_size(),
        seq_length_is_variable=True,
    )
    optimizer = make_muon(model, case)
    config = ds_config(case, dist.get_world_size() // SP)
    engine, *_ = deepspeed.initialize(model=model.train(), optimizer=optimizer, config=config, mpu=mpu)
    return engine, optimizer


def _backward(engine: Any, step: int) -> None:
    """One micro-batch: this rank's part of the tokens of its group's samples, of the mean over all of them."""
    import deepspeed.runtime.sequence_parallel.parallel_state_sp as mpu

    copies = dist.get_world_size() // SP
    samples = batch(step)[: GLOBAL_BATCH - GLOBAL_BATCH % copies].chunk(copies)[dist.get_rank() // SP]
    labels = torch.nn.functional.pad(samples[:, 1:], (0, 1), value=-100)
    length, at = SEQUENCE // SP, mpu.get_sequence_parallel_rank()
    own = slice(at * length, (at + 1) * length)
    positions = torch.arange(SEQUENCE).expand_as(samples)
    logits = engine(input_ids=samples[:, own], position_ids=positions[:, own]).logits
    wanted = labels[:, own].reshape(-1)
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), wanted, reduction="sum")
    engine.backward(total * SP / (samples.shape[0] * (SEQUENCE - 1)))


def _alone(model: torch.nn.Module, truth: Truth, step: int) -> dict[str, torch.Tensor]:
    """Gradients of one process over the whole batch at the weights of `truth`."""
    copies = dist.get_world_size() // SP
    samples = batch(step)[: GLOBAL_BATCH - GLOBAL_BATCH % copies]
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(truth.weights[name])
    model.zero_grad()
    model(input_ids=samples, labels=samples).loss.backward()
    return {name: p.grad.clone() for name, p in parameters.items()}


def _sequence(case: Case) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    engine, optimizer = _engine(case)
    start = master(engine, optimizer)
    truth, alone = Truth(start, optimizer), Truth(start, optimizer)
    lone = AutoModelForCausalLM.from_config(model_config(case.model), attn_implementation="eager")
    calls = []
    for step in range(case.steps):
        _backward(engine, step)
        gradients = {n: full_gradient(engine, p) for n, p in engine.module.named_parameters()}
        before = optimizer.orthogonalized
        engine.step()
        calls.append(optimizer.orthogonalized - before)
        truth.step(gradients)
        alone.step(_alone(lone, alone, step))
    found = master(engine, optimizer)
    result = {
        "same_gradients": truth.error(found, start)[0],
        "alone": alone.error(found, start)[1],
        "momentum": momentum_error(engine, truth),
        "calls": calls,
        "matrices": len(optimizer.plan.layout.matrices),
        "ranks": optimizer.plan.layout.world_size,
    }
    engine.destroy()
    return result


# The gradients of attention over two ranks differ from those of one process in their last bits, which AdamW blows up.
ALONE = 1e-4


@pytest.mark.parametrize(
    ("world", "stage"),
    [(2, 0), pytest.param(4, 1, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow), (4, 3)],
)
def test_sequence_parallelism_equals_the_single_process_truth(world: int, stage: int) -> None:
    """One group of two ranks, or two groups, whose four ranks share the work."""
    case = Case(stage, steps=4, config={"sequence_parallel_size": SP})
    results = run_ranks(_sequence, world, case, timeout=120)
    for r in results:
        assert r["ranks"] == world
        assert r["same_gradients"] < 1e-5 and r["alone"] < ALONE, r
        assert r["momentum"] is None or r["momentum"] < 1e-5, r
    assert [sum(c) for c in zip(*(r["calls"] for r in results), strict=True)] == [results[0]["matrices"]] * case.steps


def _trained(case: Case) -> dict[str, torch.Tensor]:
    from tests.adapters.deepspeed_ranks import backward

    engine, _ = make_engine(case)
    for step in range(case.steps):
        backward(engine, step, 1)
        engine.step()
    found = whole_model(engine)
    engine.destroy()
    return found


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_secondary_partition_changes_no_bit(world: int) -> None:
    """`zero_hpz_partition_size` keeps a second copy of the weights for the forward pass, and moves no master."""
    plain, secondary = Case(3, steps=3), Case(3, steps=3, zero={"zero_hpz_partition_size": 2})
    one, two = (run_ranks(_trained, world, case, timeout=120)[0] for case in (plain, secondary))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_secondary_partition_equals_the_single_process_truth() -> None:
    [[result], *_] = run_ranks(run_cases, 4, [Case(3, zero={"zero_hpz_partition_size": 2})], timeout=120)
    assert result.same_gradients < 1e-5 and result.single_process < 1e-5 and result.momentum < 1e-5
