"""State that others replace, clear or add is what the next step and the next save use."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from muon_dist import Muon
from muon_dist.errors import CheckpointError, ConfigError
from muon_dist.optim.rules import RULES
from tests.distributed import run_ranks
from tests.optim.plain_rules import PlainRule
from tests.optim.test_muon import gradients
from tests.optim.test_rules import LAYOUTS, Run, Tensors, assert_close, plain


def moved_away_and_back(optimizer: Muon) -> None:
    """As offloading does: other tensors with the same values."""
    for entry in optimizer.state.values():
        for key, value in entry.items():
            entry[key] = value.detach().clone()


def new_dict(optimizer: Muon) -> None:
    state = optimizer.state
    optimizer.state = defaultdict(dict, {p: {k: v.clone() for k, v in of_p.items()} for p, of_p in state.items()})


def through_data(optimizer: Muon) -> None:
    for entry in optimizer.state.values():
        for value in entry.values():
            value.data = value.data.clone()


SAME: dict[str, Callable[[Muon], None]] = {f.__name__: f for f in (moved_away_and_back, new_dict, through_data)}


def cleared(optimizer: Muon) -> None:
    optimizer.state.clear()


def new_empty_dict(optimizer: Muon) -> None:
    optimizer.state = defaultdict(dict)


def entries_deleted(optimizer: Muon) -> None:
    for entry in optimizer.state.values():
        entry.clear()


def set_to_none(optimizer: Muon) -> None:
    for entry in optimizer.state.values():
        for key in entry:
            entry[key] = None


CLEAR: dict[str, Callable[[Muon], None]] = {
    f.__name__: f for f in (cleared, new_empty_dict, entries_deleted, set_to_none)
}


def undisturbed(layout: str) -> list[str]:
    """The rules under which other tensors of the same values, put there in each of the ways, change a bit."""
    wrong = []
    ways = SAME if not layout.startswith("fsdp2") else ("moved_away_and_back",)
    for rule in RULES:
        expected, run = Run(layout, rule), Run(layout, rule)
        for step in range(4):
            expected.step(gradients(step))
        run.step(gradients(0))
        for step, way in enumerate(ways, start=1):
            SAME[way](run.optimizer)
            run.step(gradients(step))
        for step in range(1 + len(ways), 4):
            run.step(gradients(step))
        wanted, found = expected.weights(), run.weights()
        wrong += [f"{rule} {n}" for n in wanted if not torch.equal(wanted[n], found[n])]
    return wrong


def layouts(*slow: str) -> list[Any]:
    """`LAYOUTS`; those of these names are slow tests."""
    return [pytest.param(*at, marks=pytest.mark.slow) if at[0] in slow else at for at in LAYOUTS]


@pytest.mark.each_choice
@pytest.mark.parametrize(("layout", "world"), layouts("fsdp2"))  # "fsdp2 and tp" does what FSDP2 alone does
def test_other_tensors_of_the_same_values_change_no_bit(layout: str, world: int) -> None:
    assert run_ranks(undisturbed, world, layout) == [[]] * world


def begun_again(layout: str) -> dict[str, Tensors]:
    found = {}
    for rule in RULES:
        for way in CLEAR if rule == "muon" else ("cleared",):
            run = Run(layout, rule)
            for step in range(4):
                if step == 2:
                    CLEAR[way](run.optimizer)
                run.step(gradients(step))
            found[f"{rule} {way}"] = run.weights()
    return found


@pytest.mark.each_choice
@pytest.mark.parametrize(("layout", "world"), layouts("fsdp2", "fsdp2 and tp"))
def test_cleared_state_begins_at_zero(layout: str, world: int) -> None:
    references = {}
    for rule in RULES:
        references[rule] = plain(rule, 2)
        references[rule].memory.clear()
        for step in range(2, 4):
            references[rule].step(gradients(step))
    for name, found in run_ranks(begun_again, world, layout)[0].items():
        assert_close(found, references[name.split()[0]].weights, 2e-5)


def given_momentum(layout: str, before: int) -> Tensors:
    """Momentum of ones is put in after `before` steps, on every rank; none of them bound at 0."""
    run = Run(layout, "muon")
    for step in range(before):
        run.step(gradients(step))
    for p in run.parameters.values() if layout != "flat" else [run.shard]:
        run.optimizer.state[p]["momentum_buffer"] = torch.ones_like(p)
    run.step(gradients(before))
    state = run.optimizer.state_dict()["state"]
    if run.world == 1:
        assert float(state[0]["momentum_buffer"].float().mean()) > 0.5
    run.step(gradients(before + 1))
    return run.weights()


@pytest.mark.each_choice
@pytest.mark.parametrize(
    ("layout", "world", "before"),
    [*((*at, 2) for at in LAYOUTS), *((*at, 0) for at in LAYOUTS if at[0] != "flat")],  # "flat" is bound when made
)
def test_momentum_that_is_put_there_is_used(layout: str, world: int, before: int) -> None:
    reference: PlainRule = plain("muon", before)
    names = {m.name: (m.rows, m.cols) for cut in reference.matrices.values() for m in cut}
    transposed = {m.name for cut in reference.matrices.values() for m in cut if m.transposed}
    for name, (rows, cols) in names.items():
        shape = (cols, rows) if name in transposed else (rows, cols)
        reference.memory[name] = {"momentum_buffer": torch.ones(shape, dtype=torch.float64)}
    for step in (before, before + 1):
        reference.step(gradients(step))
    assert_close(run_ranks(given_momentum, world, layout, before)[0], reference.weights, 2e-5)


def made(seed: int = 0) -> tuple[Muon, list[Any]]:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in [(6, 8), (4, 4), (3,)]]
    groups = [
        {"params": weights[:2], "param_names": ["a", "b"]},
        {"params": weights[2:], "param_names": ["bias"], "algorithm": "adamw"},
    ]
    return Muon(groups, lr=0.05), weights


def stepped(optimizer: Muon, weights: list[Any], *steps: int) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in weights:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(3, 3), "state of a was changed and cannot be used: momentum of a has 9 elements"),
        ([1.0], "state of a: momentum_buffer is a list: put a tensor"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(value: Any, words: str) -> None:
    optimizer, weights = made()
    stepped(optimizer, weights, 0)
    before = [p.detach().clone() for p in weights]
    optimizer.state[weights[0]]["momentum_buffer"] = value
    with pytest.raises(ConfigError, match=words):
        stepped(optimizer, weights, 1)
    assert all(torch.equal(p, q) for p, q in zip(weights, before, strict=True))


def test_a_save_holds_what_the_next_step_uses() -> None:
    optimizer, weights = made()
    stepped(optimizer, weights, 0, 1)
    optimizer.state.clear()
    saved = copy.deepcopy(optimizer.state_dict())
    twin, others = made()
    with torch.no_grad():
        for p, q in zip(others, weights, strict=True):
            p.copy_(q)
    twin.load_state_dict(saved)
    stepped(optimizer, weights, 2, 3)
    stepped(twin, others, 2, 3)
    assert all(torch.equal(p, q) for p, q in zip(weights, others, strict=True))


@pytest.mark.parametrize("bound", [False, True])
def test_loaded_state_may_be_replaced_before_the_next_step(bound: bool) -> None:
    first, weights = made()
    stepped(first, weights, 0, 1)
    saved = copy.deepcopy(first.state_dict())
    found = []
    for change in (False, True):
        optimizer, weights = made()
        if bound:
            stepped(optimizer, weights, 5)
        optimizer.load_state_dict(saved)
        if change:
            optimizer.state[weights[0]]["momentum_buffer"] = torch.zeros(6, 8)
            del optimizer.state[weights[1]]["momentum_buffer"]
        stepped(optimizer, weights, 2)
        found.append(optimizer.state[weights[0]]["momentum_buffer"].clone())
        if change:
            for p in weights[:2]:
                assert torch.allclose(optimizer.state[p]["momentum_buffer"], 0.05 * p.grad, atol=1e-6)
    assert not torch.equal(*found)


def test_hooks_see_momentum_and_what_they_return_is_used() -> None:
    optimizer, weights = made()
    stepped(optimizer, weights, 0, 1)
    seen: dict[str, Any] = {}

    def before_save(o: Muon) -> None:
        seen["before save"] = o.state[weights[0]]["momentum_buffer"].clone()

    def after_save(o: Muon, given: dict[str, Any]) -> dict[str, Any]:
        seen["after save"] = given["state"][0]["momentum_buffer"].clone()
        return {**given, "extra": 1}

    def before_load(o: Muon, given: dict[str, Any]) -> dict[str, Any]:
        given = copy.deepcopy(given)
        seen["before load"] = given["state"][0]["momentum_buffer"].clone()
        given["state"][0]["momentum_buffer"].mul_(2)
        return given

    def after_load(o: Muon) -> None:
        seen["after load"] = o.state[weights[0]]["momentum_buffer"].clone()

    optimizer.register_state_dict_pre_hook(before_save)
    optimizer.register_state_dict_post_hook(after_save)
    optimizer.register_load_state_dict_pre_hook(before_load)
    optimizer.register_load_state_dict_post_hook(after_load)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["extra"] == 1
    optimizer.load_state_dict(saved)
    momentum = saved["state"][0]["momentum_buffer"]
    assert momentum.any()
    assert all(torch.equal(seen[when], momentum) for when in ("before save", "after save", "before load"))
    assert torch.equal(seen["after load"], 2 * momentum)
    stepped(optimizer, weights, 2)
    expected = torch.lerp(2 * momentum, weights[0].grad, 0.05)
    assert torch.allclose(optimizer.state[weights[0]]["momentum_buffer"], expected, atol=1e-6)


def test_a_load_that_torch_refuses_changes_nothing() -> None:
    optimizer, weights = made()
    stepped(optimizer, weights, 0)
    before = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(before)
    saved["param_groups"][0]["params"].append(9)
    with pytest.raises((ValueError, CheckpointError)):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert torch.equal(before["state"][0]["momentum_buffer"], after["state"][0]["momentum_buffer"])


def resting_while_moved() -> bool:
    """A matrix at rest stays at rest when its momentum is carried away and back."""
    (a, one), (b, two) = made(), made()
    for step in range(12):
        for optimizer, weights in ((a, one), (b, two)):
            stepped(optimizer, weights, 0) if step == 0 else None
            for p in weights:
                p.grad.zero_()
            if step:
                optimizer.step()
        if step == 6:
            moved_away_and_back(b)
    return all(torch.equal(p, q) for p, q in zip(one, two, strict=True))


def test_rest_survives_offloading() -> None:
    assert resting_while_moved()
