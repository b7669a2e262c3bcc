"""A matrix whose gradient is exactly zero comes to rest, and one with any other gradient keeps its bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist

from muon_dist import Muon
from muon_dist.optim.rules import RULES
from muon_dist.optim.state import RESTING
from tests.distributed import run_ranks
from tests.optim.plain_rules import PlainRule
from tests.optim.test_muon import CUTS, gradients, make_parameters
from tests.optim.test_rules import Run, Tensors, assert_close, options_of

MOMENTUM = 0.95
LAYOUTS = [("copies", 1), ("copies", 2), ("flat", 3), ("fsdp2", 3)]


def silent(step: int, names: tuple[str, ...] | None = None) -> Tensors:
    """Gradients. Those of `names` are zero; by default all are."""
    return {n: torch.zeros_like(g) if names is None or n in names else g for n, g in gradients(step).items()}


@pytest.mark.parametrize(
    ("rule", "scale"), [*((rule, 1.0) for rule in RULES), ("muon", 1e-6), ("muon", 1e6), ("soap_muon", 1e-6)]
)
def test_a_matrix_that_learns_nothing_more_moves_at_most_four_times_its_norm(rule: str, scale: float) -> None:
    """lr 1e-3 without decay, 20 steps with gradients, then without until 50 in a row have moved nothing.

    Before, it moved for 1,000 steps and its norm grew to 9.7 times.
    """
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 64) * 0.02)
    options = {} if rule == "hyperball" else {"weight_decay": 0.0}
    optimizer = Muon([weight], lr=1e-3, rule=rule, **options)
    for _ in range(20):
        weight.grad = torch.randn_like(weight) * scale
        optimizer.step()
    before = weight.detach().clone()
    moved, still = 0.0, 0
    for _ in range(1000):
        last = weight.detach().clone()
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        moved += float((weight.detach() - last).norm())
        still = still + 1 if torch.equal(weight, last) else 0
        if still == 50:
            break
    assert moved <= 4 * float(before.norm())
    assert still == 50, "it still moves"


def stopped(layout: str, rule: str) -> Tensors:
    """4 steps with gradients, 5 in which two parameters have none, 2 with gradients again."""
    run = Run(layout, rule)
    for step in range(11):
        run.step(silent(step, tuple(gradients(0))[::2]) if 4 <= step < 9 else gradients(step))
    return run.weights()


def expected(rule: str) -> Tensors:
    """By the formula: while gradients are zero the update is mu^k of a whole one; NAMO's is small by itself."""
    chosen = {"weight_decay": 0.0, **options_of(rule)}
    reference = PlainRule(dict(make_parameters()), CUTS, **chosen)
    rate = reference.lr
    for step in range(11):
        grads = gradients(step)
        if not 4 <= step < 9:
            reference.step(grads)
            continue
        names = tuple(grads)[::2]
        reference.step({n: g for n, g in grads.items() if n not in names})
        k = step - 3
        if rule == "namo":
            reference.step({n: torch.zeros_like(grads[n]) for n in names})
            continue
        decay = 1 - rate * reference.weight_decay
        before = {n: reference.weights[n].clone() for n in names}
        reference.step({n: torch.zeros_like(grads[n]) for n in names})
        for n in names:
            if rule == "hyperball":
                continue
            whole = reference.weights[n] - before[n] * decay
            reference.weights[n].copy_(before[n] * decay + whole * MOMENTUM**k)
    return reference.weights


@pytest.mark.each_choice
@pytest.mark.parametrize("rule", ["muon", "normuon", "namo"])
@pytest.mark.parametrize(("layout", "world"), LAYOUTS)
def test_the_update_shrinks_with_the_momentum_and_is_whole_again_at_once(layout: str, world: int, rule: str) -> None:
    for found in run_ranks(stopped, world, layout, rule):
        assert_close(found, expected(rule), 2e-5)


def heads_apart(layout: str) -> bool:
    """One expert without tokens for 5 steps: the others have the bits of a run in which it never was silent."""
    both = []
    for quiet in (False, True):
        run = Run(layout, "muon")
        for step in range(6):
            grads = gradients(step)
            if quiet and step:
                grads["experts"][1] = 0.0
            run.step(grads)
        both.append(run.weights())
    loud, still = both
    others = all(torch.equal(loud[n], still[n]) for n in loud if n != "experts")
    return others and torch.equal(loud["experts"][[0, 2, 3]], still["experts"][[0, 2, 3]])


@pytest.mark.parametrize(("layout", "world"), LAYOUTS)
def test_a_silent_expert_leaves_the_others_alone(layout: str, world: int) -> None:
    assert all(run_ranks(heads_apart, world, layout))


def one_element(scale: float) -> bool:
    """A gradient that is zero but for one of the smallest numbers is no zero gradient."""
    runs = []
    for value in (0.0, 1e-45):
        weight = torch.nn.Parameter(torch.eye(8))
        optimizer = Muon([weight], lr=0.1, process_group=None)
        weight.grad = torch.ones(8, 8) * scale
        optimizer.step()
        weight.grad = torch.zeros(8, 8)
        weight.grad[3, 3] = value
        before = weight.detach().clone()
        optimizer.step()
        runs.append(float((weight.detach() - before * (1 - 0.1 * 0.1)).norm()))
    return runs[0] < 0.96 * runs[1]


def test_any_gradient_makes_a_whole_update() -> None:
    assert one_element(1.0) and one_element(1e-30)


# What it needs to know is kept --------------------------------------------------------------------------------------


def resumed(layout: str, how: str) -> bool:
    first, second = Run(layout, "muon"), Run(layout, "muon")
    names = tuple(gradients(0))[::2]
    for step in range(6):
        first.step(silent(step, names) if step > 1 else gradients(step))
    state: Any = copy.deepcopy(first.optimizer.state_dict())
    if how == "full":
        given = [copy.deepcopy(first.optimizer.full_state_dict())]
        dist.broadcast_object_list(given)
        (state,) = given
    second.optimizer.load_state_dict(state)
    second.take_weights(first)
    for step in range(6, 9):
        for run in (first, second):
            run.step(silent(step, names))
    after, again = first.weights(), second.weights()
    return all(torch.equal(after[n], again[n]) for n in after)


@pytest.mark.parametrize(
    ("layout", "world", "how"), [("copies", 1, "own"), ("copies", 2, "full"), ("flat", 3, "own"), ("fsdp2", 3, "own")]
)
def test_a_state_dict_knows_how_long(layout: str, world: int, how: str) -> None:
    assert all(run_ranks(resumed, world, layout, how))


def test_the_state_has_no_new_key_while_all_gradients_live() -> None:
    weight = torch.nn.Parameter(torch.eye(4))
    optimizer = Muon([weight])
    for value, kept in ((1.0, False), (0.0, True), (1.0, False)):
        weight.grad = torch.full((4, 4), value)
        optimizer.step()
        assert (RESTING in optimizer.state_dict()["state"][0]) == kept
