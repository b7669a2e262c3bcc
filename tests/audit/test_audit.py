"""An audited optimizer: faults are found and named, right steps raise no alarm, and nothing else changes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # seconds that every forked rank would pay again

from muon_dist.audit.auditor import Audit
from muon_dist.audit.settings import AuditSettings, in_rotation, other_rank
from muon_dist.audit.tolerance import Precision, tolerance_of
from muon_dist.errors import AuditError, ConfigError
from muon_dist.optim import Muon
from tests.audit_fault_list import FAULTS, HSDP, WORLD, Fault
from tests.audit_faults import SHAPES, STEPS, all_of, named, seen_of, watched
from tests.audit_sweep import sweep
from tests.distributed import run_ranks

DECAY = next(f for f in FAULTS if f.name == "skipped decay")
QUICK = (
    "wrong factor everywhere", "bit flipped in the stack", "stale momentum after a load", "skipped decay",
    "doubled clip", "old rate", "swapped owner result", "dropped copy", "wrong beta", "Nesterov off on one rank",
    "half a matrix not updated", "sharded: factor on one rank", "AdamW: beta2",
)  # fmt: skip
"""The others take as long again, three times: they are marked slow."""
REST = tuple(f.name for f in FAULTS if f.name not in QUICK)


def everything() -> dict[str, Any]:
    """All that one group of ranks is asked for."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"faults": all_of(QUICK)}
    off = watched(every=10**6)[1]
    on = watched(every=1, matrices=2)[1]
    found["same"] = all(torch.equal(a, b) for a, b in zip(off, on, strict=True))
    found["undo"], found["stop"] = undone(), stopped()
    return found


def undone() -> dict[str, bool]:
    """A step with a fault, taken back, and the next ones as if it had not been."""
    fault = Fault("for one step", "decay", "skipped_decay", DECAY.change)
    parameters = [torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(1))) for s in SHAPES]
    parameters.append(torch.nn.Parameter(torch.ones(9)))
    groups = [
        {"params": parameters[:-1], "algorithm": "muon", "rule": "normuon"},
        {"params": parameters[-1:], "algorithm": "adamw"},
    ]
    optimizer = Muon(groups, lr=0.02, weight_decay=0.1, audit={"every": 1, "matrices": 4, "on_alarm": "undo"})

    def step(seed: int) -> None:
        for n, p in enumerate(parameters):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + n))
        optimizer.step()

    def state() -> list[torch.Tensor]:
        assert optimizer.runtime is not None
        tensors = [*parameters, *optimizer.runtime.momentum.values(), optimizer.runtime.resting]
        tensors += [kept for of_name in optimizer.runtime.memory.owners.values() for kept in of_name.values()]
        tensors += [v for v in optimizer.state[parameters[-1]].values() if isinstance(v, torch.Tensor)]
        return [t.detach().clone() for t in tensors]

    step(0)
    before = state()
    assert fault.change is not None and optimizer.audit is not None
    with fault.change(optimizer), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(100)
    after, taken = state(), optimizer.audit.undone
    step(200)
    moved = any(not torch.equal(a, b) for a, b in zip(state(), after, strict=True))
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return {"same": same, "taken": taken == 1, "goes on": moved and optimizer.audit.undone == 1}


def stopped() -> list[Any]:
    try:
        watched(DECAY, on_alarm="stop")
    except AuditError as error:
        return [str(error), error.exit_code, error.reported_elsewhere]
    return []


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(everything, WORLD)


@pytest.fixture(scope="module")
def rest() -> list[dict[str, Any]]:
    return run_ranks(all_of, WORLD, REST)


def is_named(found: list[dict[str, Any]], name: str) -> None:
    fault, result = next(f for f in FAULTS if f.name == name), found[0][name]
    assert named(fault, result), result
    assert all(of_rank[name] == result for of_rank in found), "all ranks know the same"


@pytest.mark.parametrize("name", QUICK)
def test_fault_is_found_and_named(ranks: list[dict[str, Any]], name: str):
    is_named([of_rank["faults"] for of_rank in ranks], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_each_other_fault_is_found_and_named(rest: list[dict[str, Any]], name: str):
    is_named(rest, name)


def test_copies_of_adamw_are_compared_under_hsdp():
    found = run_ranks(seen_of, 4, HSDP)
    assert all(named(HSDP, result) for result in found), found[0]
    assert any(2 in alarm["ranks"] or "not applied" in alarm["sentence"] for alarm in found[0].line["alarms"])


def test_no_fault_no_alarm(ranks: list[dict[str, Any]]):
    assert ranks[0]["faults"]["none"].alarms == 0 and STEPS == 10


def test_on_and_off_are_equal_bit_for_bit(ranks: list[dict[str, Any]]):
    assert all(of_rank["same"] for of_rank in ranks)


def test_a_step_is_taken_back(ranks: list[dict[str, Any]]):
    assert all(all(of_rank["undo"].values()) for of_rank in ranks), [of_rank["undo"] for of_rank in ranks]


def test_stop_has_an_exit_code(ranks: list[dict[str, Any]]):
    texts = [of_rank["stop"] for of_rank in ranks]
    assert "decay: weight decay was not applied" in texts[0][0] and texts[0][1] == 13
    assert [elsewhere for _, _, elsewhere in texts] == [False, True, True]


def test_right_steps_raise_no_alarm():
    """A few of `python -m tests.audit_sweep`; without engines, which take long to make."""
    found = sweep(60, 3, world_sizes=(2, 4), engines=False)
    assert not found.alarms and not found.failed, (found.alarms[:2], found.failed)
    assert found.audits.total() >= 60 and len(found.audits) >= 5


def test_a_rotation_visits_all_and_another_rank():
    for rotation in range(3):
        visited = [in_rotation(7, 5, 5 * rotation + n) for n in range(5)]
        assert sorted(index for index, _ in visited) == list(range(5)) and {r for _, r in visited} == {rotation}
    auditors = [other_rank(2, 4, 7, "name", rotation=r) for r in range(3)]
    assert sorted(auditors) == [0, 1, 3] and other_rank(0, 1, 7, rotation=0) == 0


def test_tolerances_grow_with_the_rounding():
    by_iteration = [
        tolerance_of(Precision(iteration=d)).direction for d in (torch.float32, torch.float16, torch.bfloat16)
    ]
    assert by_iteration == sorted(by_iteration)
    assert tolerance_of(Precision(weight=torch.bfloat16)).written > tolerance_of(Precision()).written
    assert (
        tolerance_of(Precision(), spread=0.1).direction > 0.4
        and tolerance_of(Precision(), wanted=0.2).direction == 0.2
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"every": 0}, "every is 0"),
        ({"matrices": True}, "matrices is True"),
        ({"on_alarm": "halt"}, "on_alarm is 'halt'"),
        ({"tolerance": -1.0}, "tolerance is -1"),
        ({"evry": 3}, "'evry' is unknown"),
    ],
)
def test_settings_are_checked(given: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        Audit(given)
    assert AuditSettings().every == 20
