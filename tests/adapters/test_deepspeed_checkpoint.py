"""Save and resume through the engine at the same world size: continuing exactly, with the state before or after the
first step."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from muon_dist.adapters import deepspeed_state
from muon_dist.checkpoint import Contents, Ranks, Saver, load, open_checkpoint
from tests.distributed import RankFailure, run_ranks

pytest.importorskip("deepspeed")

import muon_dist
from tests.adapters.deepspeed_ranks import Case, backward, make_engine, whole_model

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(600)]

BF16_OPTIMIZER = {"data_types": {"grad_accum_dtype": "fp32"}}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
CASES = [
    Case(0),
    Case(0, "bf16"),
    Case(1),
    Case(1, "bf16", config=BF16_OPTIMIZER),
    Case(2, zero={"round_robin_gradients": True}),
    Case(2, "bf16", zero=OFFLOAD),
    Case(3, "bf16", zero={"sub_group_size": 400}),
    Case(3, zero=OFFLOAD),
]


def _steps(engine: Any, case: Case, first: int, last: int) -> None:
    for step in range(first, last):
        backward(engine, step, case.accumulation)
        engine.step()


def _state(optimizer: Any) -> list[torch.Tensor]:
    """Every state tensor of this rank, in the order of the groups."""
    runtime = optimizer.runtime
    held = [runtime.momentum[b] for b in sorted(runtime.momentum)]
    held += [t for numbers in runtime.memory.numbers.values() for t in numbers.values()]
    held += [t for of_name in runtime.memory.owners.values() for t in of_name.values()]
    buffers = {id(b) for b in runtime.binding.buffers}
    for p, state in optimizer.state.items():
        if id(p) not in buffers:
            held += [state["exp_avg"], state["exp_avg_sq"], state["step"]]
    return [t.clone() for t in held]


def _resume(case: Case, folder: str, after_a_step: bool) -> None:
    engine, optimizer = make_engine(case)
    _steps(engine, case, 0, 2)
    engine.save_checkpoint(folder, tag="two")
    saved = _state(optimizer)
    _steps(engine, case, 2, 4)
    wanted, wanted_state = whole_model(engine), _state(optimizer)
    engine.destroy()

    resumed, again = make_engine(case)
    if after_a_step:
        _steps(resumed, case, 7, 8)
    resumed.load_checkpoint(folder, tag="two")
    if not after_a_step:
        assert again.runtime is None, "the load must precede the plan"
        muon_dist.attach(resumed)
    assert all(torch.equal(a, b) for a, b in zip(saved, _state(again), strict=True))
    _steps(resumed, case, 2, 4)
    found = whole_model(resumed)
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert all(torch.equal(a, b) for a, b in zip(wanted_state, _state(again), strict=True))
    resumed.destroy()


def _resume_all(cases: list[Case], folder: str, after_a_step: bool) -> None:
    for i, case in enumerate(cases):
        _resume(case, f"{folder}/{i}", after_a_step)


@pytest.mark.parametrize(
    "after_a_step",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["before_the_first_step", "into_a_stepped_engine"],
)
def test_resume_continues_exactly(tmp_path, after_a_step):
    cases = CASES[1::2] if after_a_step else CASES
    run_ranks(_resume_all, 2, cases, str(tmp_path), after_a_step, timeout=400.0)


RULES = ["normuon", "hyperball", "namo"]


def _of_rule(rule: str) -> list[Case]:
    muon = {"rule": rule}
    return [Case(0, muon=muon), Case(1, muon=muon), Case(2, "bf16", muon=muon),
            Case(3, "bf16", zero={"sub_group_size": 400}, muon=muon)]  # fmt: skip


def test_resume_brings_back_what_a_rule_remembers(tmp_path):
    """Every rule at one stage and the stages in turn; `test_every_rule_at_every_stage` is the product."""
    cases = [_of_rule(rule)[stage] for stage, rule in enumerate([*RULES, RULES[0]])]
    run_ranks(_resume_all, 2, cases, str(tmp_path), False, timeout=400.0)
    cases = [_of_rule(rule)[stage] for stage, rule in ((1, "namo"), (3, "hyperball"))]
    run_ranks(_resume_all, 2, cases, str(tmp_path), True, timeout=400.0)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_at_every_stage(tmp_path, rule):
    cases = _of_rule(rule)
    run_ranks(_resume_all, 2, cases, str(tmp_path), False, timeout=400.0)
    run_ranks(_resume_all, 2, cases[1:2] + cases[3:], str(tmp_path), True, timeout=400.0)


@pytest.mark.fp16
def test_resume_in_fp16_continues_exactly(tmp_path):
    run_ranks(_resume, 2, Case(2, "fp16", zero={"round_robin_gradients": True}), str(tmp_path), False)


def _save_before_the_first_step(case: Case, folder: str) -> None:
    engine, _ = make_engine(case)
    engine.save_checkpoint(folder, tag="zero")
    _steps(engine, case, 0, 2)
    wanted = whole_model(engine)
    engine.destroy()
    resumed, _ = make_engine(case)
    resumed.load_checkpoint(folder, tag="zero")
    _steps(resumed, case, 0, 2)
    found = whole_model(resumed)
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("case", [Case(0, "bf16"), Case(2), Case(3)], ids=lambda c: f"stage{c.stage}")
def test_a_checkpoint_before_the_first_step(tmp_path, case):
    run_ranks(_save_before_the_first_step, 2, case, str(tmp_path))


def _stage0_loses_nothing(folder: str) -> int:
    """What is on disk at stage 0 holds the momentum of every matrix, though rank 0 owns only its share."""
    engine, optimizer = make_engine(Case(0, "bf16", attach=True))
    _steps(engine, Case(0), 0, 2)
    engine.save_checkpoint(folder, tag="two")
    dist.barrier()
    saved = torch.load(Path(folder) / "two" / "mp_rank_00_model_states.pt", weights_only=False, map_location="cpu")
    state = saved["optimizer"]["optimizer_state_dict"]["state"]
    found = sum(entry["momentum_buffer"].numel() for entry in state.values() if "momentum_buffer" in entry)
    assert found == optimizer.runtime.plan.layout.numel
    return sum(m.numel() for m in optimizer.runtime.momentum.values())


def test_stage_0_saves_momentum_that_rank_0_does_not_hold(tmp_path):
    held = run_ranks(_stage0_loses_nothing, 2, str(tmp_path))
    assert min(held) > 0


def _everywhere_at_stage_0(dtype: str, folder: str) -> None:
    """`momentum_everywhere`: DeepSpeed's own save, without our hook, and ours, both go on exactly."""
    case = Case(0, dtype, attach=True, muon={"momentum_everywhere": True})
    engine, optimizer = make_engine(case)
    _steps(engine, case, 0, 2)
    del (optimizer if engine.optimizer is optimizer else engine.optimizer).checkpoint_event_prologue
    engine.save_checkpoint(folder, tag="two")
    ranks = Ranks.of_the_run()
    held = deepspeed_state.holding(engine)
    Saver(f"{folder}/ours", ranks).save(held.pieces, Contents(2, held.layout))
    _steps(engine, case, 2, 4)
    wanted = whole_model(engine)
    engine.destroy()
    for ours in (False, True):
        resumed, _ = make_engine(case)
        if ours:
            source = open_checkpoint(f"{folder}/ours/checkpoint-2", ranks)
            load(source, deepspeed_state.holding(resumed, source=source), ranks)
        else:
            resumed.load_checkpoint(folder, tag="two")
        _steps(resumed, case, 2, 4)
        found = whole_model(resumed)
        resumed.destroy()
        assert all(torch.equal(found[n], wanted[n]) for n in wanted), ours


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_momentum_everywhere_at_stage_0_needs_no_hook(tmp_path, dtype):
    run_ranks(_everywhere_at_stage_0, 2, dtype, str(tmp_path))


def _lost_momentum(folder: str) -> None:
    """A state dict of rank 0 alone, as a framework without the hook would save it."""
    case = Case(0, attach=True)
    engine, optimizer = make_engine(case)
    _steps(engine, case, 0, 1)
    del optimizer.checkpoint_event_prologue
    engine.save_checkpoint(folder, tag="one")
    engine.destroy()
    resumed, _ = make_engine(case)
    resumed.load_checkpoint(folder, tag="one")


def test_momentum_of_one_rank_alone_is_an_error_never_a_restart(tmp_path):
    with pytest.raises(RankFailure, match=r"CheckpointError: .*(one rank's part|saved by another)"):
        run_ranks(_lost_momentum, 2, str(tmp_path))


def _another_world(folder: str) -> None:
    case = Case(1)
    engine, _ = make_engine(case)
    if dist.get_world_size() == 2:
        _steps(engine, case, 0, 1)
        engine.save_checkpoint(folder, tag="one")
    else:
        engine.load_checkpoint(folder, tag="one")


def test_another_world_size_is_an_error(tmp_path):
    run_ranks(_another_world, 2, str(tmp_path))
    with pytest.raises(RankFailure, match="world size of 2"):
        run_ranks(_another_world, 1, str(tmp_path))
    shutil.rmtree(tmp_path)
