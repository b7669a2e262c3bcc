"""Another rule between two steps: as a new optimizer that is given the momentum of the old one, under every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed")

from muon_dist import Muon, param_groups
from muon_dist.errors import ConfigError
from muon_dist.optim.rule_change import RuleSettings, change_rule, rule_settings
from tests.adapters.deepspeed_ranks import make_model
from tests.checkpoint.layouts import RATE, Run
from tests.distributed import run_ranks

AFTER: dict[str, dict[str, Any]] = {
    "normuon": {"rule": "normuon", "rule_options": {"beta2": 0.9}},
    "hyperball": {"rule": "hyperball"},
    "momentum": {"momentum": 0.5, "nesterov": False, "ns_steps": 4},
}

KEPT = ("momentum_buffer", "exp_avg", "exp_avg_sq", "step")


def settings_of(muon: dict[str, Any]) -> RuleSettings:
    """Those of an optimizer that is made with `muon`."""
    return rule_settings(Muon(param_groups(make_model("llama")), lr=RATE, **muon))


def stepped(layout: str, name: str, back: bool) -> list[float]:
    """Losses of two steps by Muon, two by another rule, and with `back` two by Muon again."""
    run = Run(layout)
    losses = [run.step(0), run.step(1)]
    first = rule_settings(run.optimizer)
    change_rule(run.optimizer, settings_of(AFTER[name]))
    losses += [run.step(2), run.step(3)]
    if back:
        change_rule(run.optimizer, first)
        losses += [run.step(4), run.step(5)]
    return losses


def by_hand(name: str) -> list[float]:
    """The same on one rank: a new optimizer each time, with the state of momentum and AdamW put into it."""
    run = Run("ddp")
    losses = [run.step(0), run.step(1)]
    for number, muon in enumerate((AFTER[name], {})):
        old = run.optimizer
        run.optimizer = Run("ddp", muon=muon).optimizer
        new_groups, old_groups = run.optimizer.param_groups, old.param_groups
        for new, before in zip(new_groups, old_groups, strict=True):
            new["params"][:] = before["params"]
            for p in before["params"]:
                kept = {
                    k: v.clone()
                    for k, v in old.state[p].items()
                    if k in ("momentum_buffer", "exp_avg", "exp_avg_sq", "step")
                }
                run.optimizer.state[p].update(kept)
        losses += [run.step(2 + 2 * number), run.step(3 + 2 * number)]
    return losses


def all_stepped(layout: str) -> dict[str, list[float]]:
    return {name: stepped(layout, name, back=True) for name in AFTER}


def all_by_hand() -> dict[str, list[float]]:
    return {name: by_hand(name) for name in AFTER}


@pytest.fixture(scope="module")
def alone() -> dict[str, list[float]]:
    """The losses of one process."""
    return dict(run_ranks(all_stepped, 1, "ddp")[0])


def test_it_is_a_new_optimizer_with_the_old_momentum(alone: dict[str, list[float]]) -> None:
    assert run_ranks(all_by_hand, 1)[0] == alone


@pytest.mark.deepspeed
@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "zero1", pytest.param("zero3", marks=pytest.mark.slow)])
def test_every_layout_changes_alike(layout: str, alone: dict[str, list[float]]) -> None:
    found = run_ranks(all_stepped, 2, layout)[0]
    for name, losses in alone.items():
        assert found[name] == pytest.approx(losses, abs=2e-5), name


def test_the_same_rule_keeps_its_memory_and_another_drops_it() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 6))
    optimizer = Muon([weight], lr=0.1, rule="normuon")
    other = Muon([torch.nn.Parameter(torch.randn(8, 6))], rule="normuon", rule_options={"beta2": 0.5}, momentum=0.8)
    weight.grad = torch.randn(8, 6)
    optimizer.step()
    kept = {key: value.clone() for key, value in optimizer.state[weight].items()}
    assert len(kept) == 2
    change_rule(optimizer, rule_settings(other))
    assert (optimizer.param_groups[0]["rule_options"]["beta2"], optimizer.param_groups[0]["lr"]) == (0.5, 0.1)
    assert all(torch.equal(optimizer.state[weight][key], value) for key, value in kept.items())
    change_rule(optimizer, rule_settings(Muon([torch.nn.Parameter(torch.randn(8, 6))])))
    assert [*optimizer.state[weight]] == ["momentum_buffer"] and "rule" not in optimizer.param_groups[0]
    optimizer.step()


def test_other_groups_are_refused() -> None:
    first, second = ([{"params": [torch.nn.Parameter(torch.randn(4, 4))], "algorithm": kind} for kind in kinds]
                     for kinds in (("muon", "adamw"), ("muon", "muon")))  # fmt: skip
    with pytest.raises(ConfigError, match="other parameter groups"):
        change_rule(Muon(first), rule_settings(Muon(second)))
