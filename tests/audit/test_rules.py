"""Every rule, part and scale is audited exactly: right steps raise no alarm, and wrong ones are named."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch

from muon_dist.audit.recompute import Hyperparameters
from muon_dist.optim import Muon
from muon_dist.optim.plain import DEFAULTS
from muon_dist.optim.rules import PARTS, RULES, MuonRule, register_rule
from tests.audit_sweep import Recorded
from tests.distributed import run_ranks

WORLD, STEPS = 3, 3
SHAPES = ((24, 16), (16, 40), (32, 32))
VALUES = {"cautious": True, "row_floor": 0.4, "radial_brake": 0.5, "muoneq": True, "muon_plus": True,
          "momentum_at_owner": True}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    **{rule: {"rule": rule} for rule in DEFAULTS},
    "soap_muon, frequency 2": {"rule": "soap_muon", "rule_options": {"frequency": 2}},
    **{part: {"rule_options": {part: value}} for part, value in VALUES.items()},
    **{f"adamuon, {p}": {"rule": "adamuon", "rule_options": {p: VALUES[p]}} for p in ("cautious", "muoneq")},
    "normuon, all": {"rule": "normuon", "scale": "spectral", "rule_options": VALUES},
    **{scale: {"scale": scale} for scale in ("spectral", "unit_rms", "none")},
    "soap_muon, momentum at the owner": {"rule": "soap_muon", "rule_options": {"momentum_at_owner": True}},
    "everywhere, momentum at the owner": {"rule_options": {"momentum_at_owner": True}, "momentum_everywhere": True},
    "everywhere": {"rule": "normuon", "momentum_everywhere": True},
    "soap_muon everywhere": {"rule": "soap_muon", "momentum_everywhere": True},
    **{f"{rule} in bfloat16": {"rule": rule, "ns_dtype": torch.bfloat16} for rule in DEFAULTS},
    "float64 messages": {"rule": "normuon", "wire_dtype": torch.float64},
    "low rank": {"rule": "soap_muon", "low": True},
    "low rank, cautious": {"rule": "adamuon", "low": True, "rule_options": {"cautious": True, "muoneq": True}},
}  # fmt: skip


SLOW = [name for name in CASES if any(word in name for word in ("bfloat16", "low rank", "everywhere", "messages"))]
QUICK = [name for name in CASES if name not in SLOW]


class Half(MuonRule):
    """A rule of a user: half of Muon's update."""

    name: ClassVar[str] = "half"

    def direction(self, owned: Any, group: Any) -> None:
        super().direction(owned, group)
        owned.stack.mul_(0.5)


class OwnMemory(Half):
    """... that remembers in its own way."""

    name: ClassVar[str] = "own_memory"

    def remember(self, momentum: list[torch.Tensor], gradients: list[torch.Tensor], group: Any) -> None:
        torch._foreach_copy_(momentum, gradients)


def made(case: dict[str, Any]) -> dict[str, Any]:
    """Lines of the audit and checksums of the weights, on this rank."""
    case = dict(case)
    low, wrong = case.pop("low", False), case.pop("wrong", None)
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(s) * 0.2) for s in SHAPES]
    rule = RULES[case.get("rule", "muon")]
    decay = 0.0 if "weight_decay" in rule.refused else 0.1
    group = {"params": parameters, "algorithm": "muon", "cuts": [None, {"transposed": True}, None]}
    keys = ("rule", "rule_options", "scale")
    group.update({key: case.pop(key) for key in keys if key in case})
    optimizer = Muon([group], lr=0.02, weight_decay=decay, audit={"every": 1, "matrices": 3}, **case)
    with Recorded() as found, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(STEPS):
            for n, p in enumerate(parameters):
                random = torch.Generator().manual_seed(31 * step + n)
                p.grad = torch.randn(p.shape, generator=random)
                if low:
                    p.grad = torch.outer(p.grad[:, 0], p.grad[0])
            with (
                patch.object(type(rule), "direction", _wrong(rule, wrong))
                if wrong and step == 2
                else warnings.catch_warnings()
            ):
                optimizer.step()
    return {"lines": found.audits, "weights": [p.detach().clone() for p in parameters]}


def _wrong(rule: MuonRule, factor: float) -> Any:
    right = type(rule).direction

    def direction(self: MuonRule, owned: Any, group: Any) -> None:
        right(self, owned, group)
        owned.stack.mul_(factor)

    return direction


def quick_cases() -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    for rule in (Half(), OwnMemory()):
        register_rule(rule)
    found = {name: made(CASES[name]) for name in QUICK}
    found |= {f"wrong {rule}": made({"rule": rule, "wrong": 1.2}) for rule in DEFAULTS if rule != "hyperball"}
    found |= {rule: made({"rule": rule}) for rule in ("half", "own_memory")}
    return found


def slow_cases() -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    return {name: made(CASES[name]) for name in SLOW}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(quick_cases, WORLD)


@pytest.fixture(scope="module")
def slow_ranks() -> list[dict[str, Any]]:
    return run_ranks(slow_cases, WORLD)


def is_right(every_rank: list[dict[str, Any]], case: str) -> None:
    """No alarm, all stages compared, and copies that are equal bit for bit.

    Where one rank had the owner's fp32 update and the others a rounded one, copies drifted apart.
    """
    lines = every_rank[0][case]["lines"]
    assert len(lines) == STEPS * len(SHAPES)
    assert not [line["alarms"] for line in lines if line["alarms"]]
    assert all(set(line["errors"]) == {"momentum", "direction", "weight"} and "only" not in line for line in lines)
    for other in every_rank[1:]:
        for a, b in zip(every_rank[0][case]["weights"], other[case]["weights"], strict=True):
            assert torch.equal(a, b)


def test_the_cases_have_every_rule_and_part():
    assert set(DEFAULTS) == set(RULES) and set(VALUES) == set(PARTS)


@pytest.mark.parametrize("case", QUICK)
def test_right_steps_raise_no_alarm(ranks: list[dict[str, Any]], case: str):
    is_right(ranks, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_right_steps_in_other_dtypes_and_layouts_raise_no_alarm(slow_ranks: list[dict[str, Any]], case: str):
    is_right(slow_ranks, case)


@pytest.mark.parametrize("rule", [rule for rule in DEFAULTS if rule != "hyperball"])
def test_a_wrong_length_is_found_under_every_rule(ranks: list[dict[str, Any]], rule: str):
    lines = ranks[0][f"wrong {rule}"]["lines"]
    alarms = [(line["step"], line["alarms"][0]) for line in lines if line["alarms"]]
    assert [step for step, _ in alarms] == [3] * len(SHAPES)
    assert all(abs(a["factor"] - 1.2) < 0.01 and "wrong_factor" in a["causes"] for _, a in alarms), alarms


def test_of_a_registered_rule_momentum_and_copies_are_compared(ranks: list[dict[str, Any]]):
    for rule, said, errors in (("half", "momentum and copies", {"momentum"}), ("own_memory", "copies", set())):
        for line in ranks[0][rule]["lines"]:
            assert set(line["errors"]) == errors and not line["alarms"]
            assert line["only"] == f"rule '{rule}' has no plain form: only {said} are compared"


def test_a_rule_is_known_by_its_plain_form():
    assert all(
        dataclasses.replace(Hyperparameters(), rule=rule).known for rule in (*RULES, "adamw") if rule in DEFAULTS
    )
    assert not Hyperparameters(rule="half").known
