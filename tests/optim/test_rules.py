"""Every update rule on every way of cutting weights, against the papers' formulas in fp64, and what it remembers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp  # 2 s that every forked rank would pay again
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from muon_dist import Muon, register_rule, register_scale, register_schedule
from muon_dist.bench.traffic import Traffic
from muon_dist.errors import CheckpointError, ConfigError
from muon_dist.optim import Binding
from muon_dist.optim.reference import plain_newton_schulz
from muon_dist.optim.rules import PARTS, RULES, MuonRule
from tests.distributed import RankFailure, run_ranks
from tests.optim.plain_rules import PlainRule
from tests.optim.test_distributed import flat_binding
from tests.optim.test_muon import CUTS, gradients, make_groups, make_parameters

LAYOUTS = [("copies", 1), ("copies", 3), ("flat", 1), ("flat", 3), ("fsdp2", 3), ("fsdp2 and tp", 4)]
STEPS, SAVED, TOLERANCE = 4, 2, 2e-5
"""SAVED: the steps before a save. SOAP, with a frequency of 2, turns its basis after it."""
OF_TP = {"square": 1, "tall": 0, "wide": 1, "row": 1, "column": 0, "experts": 2, "heads": 1, "fused": 0}
"""The axis that tensor parallelism cuts."""
Tensors = dict[str, torch.Tensor]
PARTS_ALONE: dict[str, dict[str, Any]] = {
    "cautious": {"rule_options": {"cautious": True}, "weight_decay": 5.0},
    "row_floor": {"rule_options": {"row_floor": 0.5}},
    "radial_brake": {"rule_options": {"radial_brake": 0.3}, "weight_decay": 0.0, "lr": 0.2},
    "muoneq": {"rule_options": {"muoneq": True}},
    "muon_plus": {"rule_options": {"muon_plus": True}},
    "momentum_at_owner": {"rule_options": {"momentum_at_owner": True}},
}
ALL_PARTS = {"cautious": True, "row_floor": 0.5, "radial_brake": 0.3, "muoneq": True, "muon_plus": True}
AT_OWNER = {"momentum_at_owner": True}
Case = tuple[str, dict[str, Any]]
"""A rule and its other options."""
CASES: dict[str, Case] = {
    **{rule: (rule, {}) for rule in RULES},
    **{part: ("muon", options) for part, options in PARTS_ALONE.items()},
    **{
        f"{rule} with parts": (rule, {"rule_options": ALL_PARTS | AT_OWNER, "lr": 0.2, "scale": "unit_rms"})
        for rule in ("muon", "normuon", "adamuon")
    },
    "soap_muon with parts": ("soap_muon", {"rule_options": {"frequency": 2, **ALL_PARTS, **AT_OWNER}}),
    "hyperball with parts": ("hyperball", {"rule_options": {"muoneq": True, "muon_plus": True, **AT_OWNER}}),
    "namo with parts": ("namo", {"rule_options": {**ALL_PARTS, "row_floor": 0.1}, "lr": 0.2}),
    "without look-ahead": ("muon", {"rule_options": AT_OWNER, "nesterov": False}),
}
WITH_MEMORY: dict[str, Case] = {
    **{rule: (rule, {}) for rule in RULES if rule != "muon"},
    "momentum_at_owner": ("muon", {"rule_options": AT_OWNER}),
    "soap_muon with momentum_at_owner": ("soap_muon", {"rule_options": {"frequency": 2, **AT_OWNER}}),
}


def options_of(rule: str) -> dict[str, Any]:
    decay = {} if rule == "hyperball" else {"weight_decay": 0.1}
    often = {"rule_options": {"frequency": 2}} if rule == "soap_muon" else {}
    return {"lr": 0.02, "rule": rule, **decay, **often}


class Held(torch.nn.Module):
    """The parameters of the tests in a module, for `fully_shard`."""

    def __init__(self) -> None:
        super().__init__()
        for name, p in make_parameters().items():
            self.register_parameter(name, p)

    def cut(self, mesh: Any) -> None:
        """Tensor parallelism over `mesh`."""
        for name, p in make_parameters().items():
            cut = distribute_tensor(p.detach(), mesh, [Shard(OF_TP[name])])
            self.register_parameter(name, torch.nn.Parameter(cut))


class Run:
    """Weights cut by a layout on this rank, under one rule.

    Attributes:
        buckets of 0.01 MiB, so that a step has several.
    """

    def __init__(self, layout: str, rule: str, **options: Any) -> None:
        self.layout, self.rank, self.world = layout, dist.get_rank(), dist.get_world_size()
        self.model = Held()
        if layout == "fsdp2":
            fully_shard(self.model, mesh=init_device_mesh("cpu", (self.world,)))
        if layout == "fsdp2 and tp":
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
            self.model.cut(mesh["tp"])
            fully_shard(self.model, mesh=mesh["dp"])
        self.parameters: dict[str, Any] = dict(self.model.named_parameters())
        groups = make_groups(self.parameters)
        self.optimizer = Muon(groups, bucket_mb=0.01, **{**options_of(rule), **options})
        if layout == "flat":
            flat, self.shard, self.cuts = flat_binding(self.parameters, self.rank, self.world, whole_numbers=False)
            self.optimizer.param_groups[0]["params"] = [self.shard]
            self.optimizer.bind(Binding(flat, (self.shard,), dist.group.WORLD, torch.device("cpu")), {0: 0})

    def step(self, grads: Tensors) -> None:
        if self.layout == "flat":
            whole = torch.cat([g.reshape(-1) for g in grads.values()])
            self.shard.grad = whole[self.cuts[self.rank] : self.cuts[self.rank + 1]].clone()
        for name, p in self.parameters.items() if self.layout != "flat" else ():
            p.grad = grads[name].clone()
            if self.layout.startswith("fsdp2"):
                whole = [Replicate()] * p.device_mesh.ndim
                given = DTensor.from_local(p.grad, p.device_mesh, whole, run_check=False)
                p.grad = given.redistribute(placements=p.placements)
        self.optimizer.step()

    def take_weights(self, other: Run) -> None:
        """Copy the weights of another run of the same layout."""
        with torch.no_grad():
            if self.layout == "flat":
                self.shard.copy_(other.shard)
            for p, q in zip(self.parameters.values(), other.parameters.values(), strict=True):
                p.copy_(q)

    def weights(self) -> Tensors:
        if self.layout.startswith("fsdp2"):
            return {n: p.full_tensor().detach() for n, p in self.parameters.items()}
        if self.layout == "copies":
            return {n: p.detach().clone() for n, p in self.parameters.items()}
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, self.shard.detach())
        flat, found = torch.cat(parts), {}
        for name, p in self.parameters.items():
            found[name], flat = flat[: p.numel()].view(p.shape), flat[p.numel() :]
        return found


def assert_close(found: Tensors, expected: Tensors, tolerance: float) -> None:
    for name, wanted in expected.items():
        error = float((found[name].double() - wanted).norm() / wanted.norm())
        assert error <= tolerance, (name, error)


def plain(rule: str, steps: int, **options: Any) -> PlainRule:
    chosen = {"weight_decay": 0.0, **options_of(rule), **options}
    reference = PlainRule(dict(make_parameters()), CUTS, **{**chosen, **chosen.pop("rule_options", {})})
    for step in range(steps):
        reference.step(gradients(step))
    return reference


def train(layout: str, rule: str, options: dict[str, Any]) -> tuple[Tensors, int]:
    run = Run(layout, rule, **options)
    for step in range(STEPS):
        run.step(gradients(step))
    return run.weights(), run.optimizer.orthogonalized


def train_all(layout: str, cases: Sequence[str]) -> dict[str, tuple[Tensors, int]]:
    return {case: train(layout, *CASES[case]) for case in cases}


AT_OWNERS_TOO = ("muon", "momentum_at_owner")
FEWER = {
    "fsdp2": tuple(dict.fromkeys((*RULES, *AT_OWNERS_TOO))),
    "fsdp2 and tp": (*AT_OWNERS_TOO, *(case for case in CASES if case.endswith("with parts"))),
}
"""The cases of `.ci/run` under layouts that take long: together all rules, alone and with all parts."""


@pytest.mark.parametrize(
    ("layout", "world", "cases"),
    [
        *((*at, FEWER.get(at[0], tuple(CASES))) for at in (("copies", 1), ("flat", 3), *LAYOUTS[-2:])),
        *(pytest.param(*at, tuple(CASES), marks=pytest.mark.slow) for at in LAYOUTS),
    ],
    ids=lambda v: "" if isinstance(v, tuple) else None,
)
def test_every_rule_is_the_formula_of_its_paper(layout, world, cases):
    """2e-5 of the weights; on the layouts together, and each the same as on one rank."""
    results = run_ranks(train_all, world, layout, cases)
    for case in cases:
        rule, options = CASES[case]
        expected = plain(rule, STEPS, **options).weights
        for of_rank in results:
            assert_close(of_rank[case][0], expected, TOLERANCE)
        assert sum(of_rank[case][1] for of_rank in results) == STEPS * (5 + 4 + 4 + 3), case
    for of_rank in results:  # where momentum is kept changes no bit
        assert all(torch.equal(w, of_rank["muon"][0][n]) for n, w in of_rank["momentum_at_owner"][0].items())


def alone(rule: str, options: dict[str, Any]) -> Tensors:
    """Weights after some steps in this process."""
    parameters = make_parameters()
    optimizer = Muon(make_groups(parameters), **{**options_of(rule), **options})
    for step in range(STEPS):
        for name, g in gradients(step).items():
            parameters[name].grad = g
        optimizer.step()
    return {n: p.detach() for n, p in parameters.items()}


def way(found: Tensors, expected: Tensors) -> float:
    """The largest difference of two runs, as a share of the way of a weight."""
    start = make_parameters()
    return max(
        float((found[n].double() - w).norm() / (w - start[n].detach().double()).norm()) for n, w in expected.items()
    )


@pytest.mark.each_choice
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("rule", ["muon", "adamuon"])
def test_a_part_is_its_formula_and_changes_something(rule, part):
    options = PARTS_ALONE[part]
    expected = plain(rule, STEPS, **options).weights
    assert way(alone(rule, options), expected) <= TOLERANCE
    without = plain(rule, STEPS, **{**options, "rule_options": {}}).weights
    # All rows of a matrix of signs have one norm, and adamuon sets the norm. The place of momentum changes nothing.
    nothing = part == "momentum_at_owner" or (rule == "adamuon" and part in ("muoneq", "muon_plus"))
    assert (way(without, expected) > 0.01) != nothing


@pytest.mark.parametrize("scale", ["match_rms_adamw", "spectral", "unit_rms", "none"])
def test_a_scale_goes_by_what_a_matrix_computes(scale):
    """`fused` is stored (in, out)."""
    assert way(alone("muon", {"scale": scale}), plain("muon", STEPS, scale=scale).weights) <= TOLERANCE


def test_own_rows_are_the_iteration():
    rows = [[2.0, -1.5, 0.5]] * 12

    def iterated(x: torch.Tensor) -> torch.Tensor:
        return plain_newton_schulz(x, schedule=rows)

    expected = plain("muon", STEPS, orthogonalize=iterated).weights
    assert way(alone("muon", {"ns_schedule": rows}), expected) <= TOLERANCE
    assert way(alone("muon", {}), expected) > 0.01


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("normuon", {"rule_options": {"beta2": 0.5, "eps": 1e-3}, "momentum": 0.8, "scale": "none"}),
        ("namo", {"rule_options": {"mu2": 0.5, "eps": 10.0}, "momentum": 0.8, "scale": "match_rms_adamw"}),
        ("hyperball", {"momentum": 0.5}),
        ("adamuon", {"rule_options": {"beta2": 0.5, "eps": 0.1}, "momentum": 0.8, "scale": "none"}),
        ("soap_muon", {"rule_options": {"beta2": 0.5, "frequency": 1}, "momentum": 0.8, "nesterov": False}),
    ],
)
def test_options_of_a_rule_have_the_meaning_of_its_paper(rule, options):
    (weights, _), *_ = run_ranks(train, 2, "flat", rule, options)
    assert_close(weights, plain(rule, STEPS, **options).weights, TOLERANCE)


# What a rule remembers ----------------------------------------------------------------------------------------------


def all_saved_and_loaded(layout: str, how: str) -> dict[str, tuple[bool, bool]]:
    return {name: saved_and_loaded(layout, case, how) for name, case in WITH_MEMORY.items()}


def saved_and_loaded(layout: str, case: Case, how: str) -> tuple[bool, bool]:
    """Train, save, train on; a new run loads and trains on: same bits? And was there memory of the rule?"""
    first, second = (Run(layout, case[0], **case[1]) for _ in range(2))
    for step in range(SAVED):
        first.step(gradients(step))
    second.step(gradients(77))  # memory of its own, to be overwritten
    if how == "own":
        state = copy.deepcopy(first.optimizer.state_dict())
        second.optimizer.load_state_dict(state)
    elif how == "full":
        given = [copy.deepcopy(first.optimizer.full_state_dict())]
        dist.broadcast_object_list(given)
        state = given[0]
        second.optimizer.load_state_dict(state)
    else:
        state = copy.deepcopy(get_optimizer_state_dict(first.model, first.optimizer))
        set_optimizer_state_dict(second.model, second.optimizer, state)
    second.take_weights(first)
    for step in range(SAVED, STEPS):
        for run in (first, second):
            run.step(gradients(step))
    keys = {key.partition(":")[0] for entry in first.optimizer.state.values() for key in entry}
    after, again = first.weights(), second.weights()
    return all(torch.equal(after[n], again[n]) for n in after), bool(keys - {"momentum_buffer"})


@pytest.mark.each_choice
@pytest.mark.parametrize(
    ("layout", "world", "how"),
    [("copies", 1, "own"), ("copies", 3, "own"), ("copies", 3, "full"), ("flat", 3, "own"), ("fsdp2", 3, "own"),
     pytest.param("fsdp2", 3, "dcp", marks=pytest.mark.slow)],  # and test_torchs_checkpoints_reshard...
)  # fmt: skip
def test_a_state_dict_brings_back_what_a_rule_remembers(layout, world, how):
    results = run_ranks(all_saved_and_loaded, world, layout, how)
    for rule in WITH_MEMORY:
        assert all(of_rank[rule][0] for of_rank in results), rule
        assert any(of_rank[rule][1] for of_rank in results), rule


def full_of(case: Case, steps: int) -> tuple[dict[str, Any], Tensors]:
    run = Run("copies", case[0], **case[1])
    for step in range(steps):
        run.step(gradients(step))
    return run.optimizer.full_state_dict(), run.weights()


def full_of_all() -> dict[str, tuple[dict[str, Any], Tensors]]:
    return {name: full_of(case, SAVED) for name, case in WITH_MEMORY.items()}


def continued(case: Case, state: dict[str, Any], weights: Tensors) -> Tensors:
    run = Run("copies", case[0], **case[1])
    run.optimizer.load_state_dict(copy.deepcopy(state))
    with torch.no_grad():
        for n, p in run.parameters.items():
            p.copy_(weights[n])
    for step in range(SAVED, STEPS):
        run.step(gradients(step))
    return run.weights()


def all_continued(saved: dict[str, tuple[dict[str, Any], Tensors]]) -> dict[str, Tensors]:
    return {name: continued(WITH_MEMORY[name], *of_case) for name, of_case in saved.items()}


@pytest.mark.parametrize(("before", "after"), [pytest.param(1, 3, marks=pytest.mark.slow), (3, 2)])
def test_a_full_state_dict_loads_on_any_number_of_ranks(before, after):
    saved, *_ = run_ranks(full_of_all, before)
    for found in run_ranks(all_continued, after, saved):
        for name, (rule, options) in WITH_MEMORY.items():
            assert_close(found[name], plain(rule, STEPS, **options).weights, TOLERANCE)


def written_by_dcp(layout: str, folder: str) -> None:
    for name, (rule, options) in WITH_MEMORY.items():
        run = Run(layout, rule, **options)
        for step in range(SAVED):
            run.step(gradients(step))
        state = {"weights": run.model.state_dict(), "optimizer": get_optimizer_state_dict(run.model, run.optimizer)}
        dcp.save(state, checkpoint_id=f"{folder}/{name}")


def read_by_dcp(layout: str, folder: str) -> dict[str, Tensors]:
    found = {}
    for name, (rule, options) in WITH_MEMORY.items():
        run = Run(layout, rule, **options)
        run.optimizer.bound_runtime()
        state = {"weights": run.model.state_dict(), "optimizer": get_optimizer_state_dict(run.model, run.optimizer)}
        dcp.load(state, checkpoint_id=f"{folder}/{name}")
        set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"])
        for step in range(SAVED, STEPS):
            run.step(gradients(step))
        found[name] = run.weights()
    return found


def test_torchs_checkpoints_reshard_what_a_rule_remembers(tmp_path):
    run_ranks(written_by_dcp, 3, "fsdp2", str(tmp_path))
    for found in run_ranks(read_by_dcp, 4, "fsdp2 and tp", str(tmp_path)):
        for name, (rule, options) in WITH_MEMORY.items():
            assert_close(found[name], plain(rule, STEPS, **options).weights, TOLERANCE)


# At rest ------------------------------------------------------------------------------------------------------------


def all_at_rest(layout: str) -> list[str]:
    """The cases in which weights whose gradients were always zero have moved; without decay."""
    return [case for case, of_case in CASES.items() if not at_rest(layout, *of_case)]


def at_rest(layout: str, rule: str, options: dict[str, Any]) -> bool:
    run = Run(layout, rule, **{**options, **({} if rule == "hyperball" else {"weight_decay": 0.0})})
    before = run.weights()
    for _ in range(3):
        run.step({n: torch.zeros_like(g) for n, g in gradients(0).items()})
    after = run.weights()
    return all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize(
    ("layout", "world"),
    [("flat", 3), *(pytest.param(*at, marks=pytest.mark.slow) for at in (("copies", 2), ("fsdp2", 3)))],
)
def test_zero_gradients_change_nothing(layout, world):
    assert run_ranks(all_at_rest, world, layout) == [[]] * world


@pytest.mark.parametrize("rule", ["muon", "normuon"])
def test_the_decay_of_16_bit_weights_rounds_the_product_alone(rule):
    """Not the factor first: .998 would be .9961, and the decay twice what was asked for."""
    weight = torch.nn.Parameter(torch.randn(50, 24).bfloat16())
    wanted = (weight.detach().double() * (1 - 0.02 * 0.1)).bfloat16()
    optimizer = Muon([weight], lr=0.02, weight_decay=0.1, rule=rule)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, wanted)


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "normoun"}, "rule 'normoun' is unknown.*normuon"),
        ({"rule": "normuon", "rule_options": {"beta": 0.9}}, r"no option 'beta' \(did you mean beta2"),
        ({"rule": "muon", "rule_options": {"eps": 0.9}}, "rule 'muon' has no option 'eps'.*none"),
        ({"rule": "normuon", "rule_options": {"beta2": 1.0}}, "beta2 is 1.0"),
        ({"rule": "normuon", "rule_options": {"eps": 0.0}}, "eps is 0.0"),
        ({"rule": "normuon", "rule_options": {"beta2": "0.9"}}, "beta2.*must be a number"),
        ({"rule": "normuon", "rule_options": {"beta2": float("nan")}}, "beta2 is nan"),
        ({"rule": "normuon", "rule_options": [0.9]}, "rule_options is"),
        ({"rule": "namo", "nesterov": True}, "nesterov.*namo.*no nesterov"),
        ({"rule": "namo", "rule_options": {"mu2": -1}}, "mu2 is -1"),
        ({"rule": "namo", "rule_options": {"mu1": 0.9}}, "rule 'namo': 'mu1' is called momentum here"),
        ({"rule": "hyperball", "scale": "match_rms_adamw"}, "scale.*hyperball.*no scale"),
        ({"rule": "hyperball", "weight_decay": 0.1}, "weight_decay.*hyperball.*no weight_decay"),
        ({"rule": "hyperball", "rule_options": {"cautious": True}}, "hyperball.*no cautious.*no weight decay"),
        ({"rule": "hyperball", "rule_options": {"radial_brake": 0.5}}, "hyperball.*no radial_brake"),
        ({"rule": "muon", "rule_options": {"cautius": True}}, r"no option 'cautius' \(did you mean cautious"),
        ({"rule": "namo", "rule_options": AT_OWNER}, "namo.*no momentum_at_owner: it needs norms of the momentum"),
        ({"rule": "muon", "rule_options": {"cautious": 0.5}}, "cautious.*True or False"),
        ({"rule": "muon", "rule_options": {"row_floor": True}}, "row_floor.*must be a number"),
        ({"rule": "muon", "rule_options": {"radial_brake": 1.5}}, r"radial_brake.*\[0, 1\]"),
        ({"rule": "adamuon", "rule_options": {"eps": 0.0}}, "eps is 0.0"),
        ({"rule": "soap_muon", "rule_options": {"frequency": 2.5}}, "frequency is 2.5: it must be a whole number"),
        ({"ns_schedule": []}, "ns_schedule is an empty list"),
        ({"ns_schedule": [[1.0, 2.0]]}, r"ns_schedule\[0\] is \[1.0, 2.0\]: give three finite numbers"),
        ({"ns_schedule": [[1.5, -0.5, 0.0], [9.0, 9.0, 9.0]]}, r"ns_schedule\[1\].*grows without bound"),
        ({"ns_schedule": [[1.5, -0.5, 0.0]] * 3, "ns_steps": 7}, "ns_steps=7 does not fit"),
    ],
)
def test_what_a_rule_does_not_have_is_refused_by_name(options, words):
    with pytest.raises(ConfigError, match=words):
        Muon([torch.nn.Parameter(torch.ones(2, 2))], **options)
    with pytest.raises(ConfigError, match=words):
        Muon([{"params": [torch.nn.Parameter(torch.ones(2, 2))], **options}])


def test_a_group_may_have_another_rule_than_the_optimizer():
    """An option of the optimizer is meant for groups of its rule; another rule has its own defaults."""
    weights = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(3)]
    groups = [{"params": weights[:1]}, {"params": weights[1:2], "rule": "namo"},
              {"params": weights[2:], "rule": "hyperball", "lr": 0.5}]  # fmt: skip
    optimizer = Muon(groups, lr=0.1, weight_decay=0.3, nesterov=True, scale="spectral")
    muon, namo, hyperball = optimizer.param_groups
    assert (muon["scale"], muon["nesterov"], muon["weight_decay"], muon.get("rule")) == ("spectral", True, 0.3, None)
    assert (namo["scale"], namo["nesterov"], namo["rule_options"]) == ("none", False, {"mu2": 0.99, "eps": 1e-8})
    assert (hyperball["scale"], hyperball["weight_decay"], hyperball["lr"]) == ("none", 0.0, 0.5)


def test_hyperball_refuses_a_weight_that_would_stay_zero():
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = Muon([{"params": [weight], "param_names": ["head.weight"]}], rule="hyperball")
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ConfigError, match=r"head\.weight is zero"):
        optimizer.step()


def test_a_state_of_another_rule_is_refused_before_anything_changes():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    other, optimizer = Muon([weight], rule="normuon"), Muon([weight])
    weight.grad = torch.randn(2, 3)
    other.step()
    optimizer.step()
    kept = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ConfigError, match="rule 'normuon'"):
        optimizer.load_state_dict(other.state_dict())
    assert torch.equal(kept["state"][0]["momentum_buffer"], optimizer.state[weight]["momentum_buffer"])


@pytest.mark.parametrize("saved", [{}, {"rule_options": AT_OWNER}])
def test_a_state_with_momentum_in_another_place_is_refused(saved):
    weight = torch.nn.Parameter(torch.ones(2, 3))
    weight.grad = torch.randn(2, 3)
    before = Muon([weight], **saved)
    before.step()
    optimizer = Muon([weight], **({} if saved else {"rule_options": AT_OWNER}))
    with pytest.raises(ConfigError, match=f"momentum_at_owner: {'false' if not saved else 'true'}"):
        optimizer.load_state_dict(before.state_dict())


def bytes_of_a_step(options: dict[str, Any]) -> tuple[int, Tensors]:
    """Sent by this rank in the last of 3 steps of bfloat16 weights with masters under FSDP2, and these."""
    torch.manual_seed(0)
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(48, 32)) for _ in range(6)]).to(torch.bfloat16)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = Muon(list(model.parameters()), lr=0.02, master_weights=True, **options)
    for step in range(3):
        for n, p in enumerate(model.parameters()):
            torch.manual_seed(100 * step + n)
            p.grad = distribute_tensor(torch.randn(48, 32).bfloat16(), p.device_mesh, p.placements)
        with Traffic() as traffic:
            optimizer.step()
    masters = {str(n): optimizer.master_weights()[p] for n, p in enumerate(model.parameters())}
    return traffic.total_sent, {n: m.full_tensor() for n, m in masters.items()}


def bytes_of_steps() -> list[tuple[int, Tensors]]:
    cases = ({}, {"rule_options": AT_OWNER}, {"wire_dtype": torch.bfloat16}, {"rule": "soap_muon"},
             {"rule": "soap_muon", "rule_options": AT_OWNER})  # fmt: skip
    return [bytes_of_a_step(options) for options in cases]


def test_gradients_in_16_bits_are_sent_as_they_are():
    """Half the bytes of the gather, none of the bits; rounded momentum saves as much, and changes the weights."""
    found = run_ranks(bytes_of_steps, 2)
    momentum, gradients_, rounded, soap, soap_at_owner = (sum(of_rank[n][0] for of_rank in found) for n in range(5))
    way = 6 * 48 * 32 // 2  # elements that go to their owner, or back
    few = 100  # votes and norms
    assert (momentum, gradients_, rounded) == pytest.approx((8 * way, 6 * way, 4 * way), rel=0, abs=few)
    assert (soap, soap_at_owner) == pytest.approx((12 * way, 6 * way), rel=0, abs=few)
    for weights in found:
        same = [all(torch.equal(w, weights[n][1][k]) for k, w in weights[m][1].items())
                for n, m in ((0, 1), (0, 2), (3, 4))]  # fmt: skip
        assert same == [True, False, True]


def test_a_state_without_the_memory_of_the_rule_is_refused():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = Muon([weight], rule="namo")
    weight.grad = torch.randn(2, 3)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][0]["gradient_steps"]
    with pytest.raises(CheckpointError, match="gradient_steps"):
        optimizer.load_state_dict(state)


def unequal(options: list[dict[str, Any]]) -> None:
    run = Run("copies", "normuon", **options[dist.get_rank()])
    run.step(gradients(0))


def test_ranks_with_other_options_of_a_rule_are_told():
    with pytest.raises(RankFailure, match="rule"):
        run_ranks(unequal, 2, [{}, {"rule_options": {"beta2": 0.9}}])


# From outside -------------------------------------------------------------------------------------------------------


def example_of_the_docs() -> str:
    """The Python of docs/rules.md under "Your own"."""
    text = (Path(__file__).parents[2] / "docs" / "rules.md").read_text()
    return text.split("## Your own")[1].split("```python\n")[1].split("```")[0]


def own_rule(layout: str) -> Tensors:
    exec(compile(example_of_the_docs(), "docs/rules.md", "exec"), {"__name__": "example"})
    run = Run(layout, "averaged", scale="quarter", ns_schedule="gentle", rule_options={"beta": 0.8, "cautious": True})
    for step in range(STEPS):
        run.step(gradients(step))
        run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    return run.weights()


def test_the_example_of_a_rule_of_ones_own_is_exact_on_every_layout():
    one, *_ = run_ranks(own_rule, 1, "copies")
    for layout, world in (("flat", 3), ("fsdp2", 2)):
        for found in run_ranks(own_rule, world, layout):
            assert_close(found, {n: w.double() for n, w in one.items()}, 1e-6)


def test_a_misspelled_method_or_memory_of_a_rule_is_refused():
    """It would train as Muon, and nothing would say so."""

    class Method(MuonRule):
        name = "method"

        def directon(self, owned: Any, group: Any) -> None: ...

    class Memory(MuonRule):
        name = "memory"
        owner_memori: ClassVar[Any] = {"a": lambda matrix: 1}

    for rule, words in ((Method(), "'directon'; did you mean 'direction'"), (Memory(), "did you mean 'owner_memory'")):
        with pytest.raises(ConfigError, match=words):
            register_rule(rule)


def test_names_that_are_taken_are_refused():
    class Other(MuonRule):
        name = "normuon"

    class Memory(MuonRule):
        name = "other"
        owner_memory: ClassVar[Any] = {"exp_avg": lambda matrix: 1}

    for rule, words in ((Other(), "'normuon' exists already"), (Memory(), "'exp_avg' in its memory is taken")):
        with pytest.raises(ConfigError, match=words):
            register_rule(rule)
    with pytest.raises(ConfigError, match="exists already"):
        register_scale("spectral", lambda out, fan_in: 1.0)
    with pytest.raises(ConfigError, match="exists already"):
        register_schedule("keller", [[1.5, -0.5, 0.0]])
