"""torch's own harness for optimizers with ours registered: `torch.testing._internal.common_optimizers`.

torch does not ship the tests that go with it (test/test_optim.py), so they are written here, after the properties that
they state. `COUNTS` at the end keeps the sum from shrinking unseen.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import (
    ConstantLR,
    ExponentialLR,
    LinearLR,
    PolynomialLR,
    ReduceLROnPlateau,
    StepLR,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
)

from muon_dist import Muon
from muon_dist.errors import ConfigError, RoutingError

CPU, FP32 = torch.device("cpu"), torch.float32
OTHERWISE = ("1-element", "ordered collections")
"""Words of errors for which Muon has its own: a rate of two elements; a set, which torch 2.15 takes with a warning."""


def inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    options: dict[str, dict[str, Any]] = {
        "default": {},
        "non-default lr": {"lr": 0.01},
        "Tensor lr": {"lr": torch.tensor(0.001)},
        "weight_decay": {"weight_decay": 0.2},
        "no weight_decay": {"weight_decay": 0.0},
        "momentum": {"momentum": 0.8},
        "no nesterov": {"nesterov": False},
        "ns_steps": {"ns_steps": 6},
        "polar_express": {"ns_schedule": "polar_express"},
        "spectral scale": {"scale": "spectral", "lr": 0.01},
        "bf16 iteration": {"ns_dtype": torch.bfloat16},
        "Tensor betas": {"betas": (torch.tensor(0.9), torch.tensor(0.99))},
        "normuon": {"rule": "normuon"},
        "hyperball": {"rule": "hyperball", "weight_decay": 0.0, "lr": 0.01},
        "namo": {"rule": "namo", "lr": 0.01},
    }
    return [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in options.items()]


def errors(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    def bad(params: Any, kwargs: dict[str, Any], desc: str, kind: type[Exception], words: str) -> ErrorOptimizerInput:
        return ErrorOptimizerInput(OptimizerInput(params, kwargs, desc), error_type=kind, error_regex=words)

    def one(*shape: int, dtype: Any = dtype) -> Parameter:
        return Parameter(torch.rand(shape, dtype=dtype))

    return [
        *(e for e in get_error_inputs_for_all_optims(device, dtype) if not any(w in e.error_regex for w in OTHERWISE)),
        bad({one(2, 2), one(2, 2)}, {}, "a set", ConfigError, "params is a set, whose order differs"),
        bad([{"params": {one(2, 2)}}], {}, "a set in a group", ConfigError, r"params\[0\]\['params'\] is a set"),
        bad([one(2, 2)], {"lr": torch.tensor([0.1, 0.1])}, "lr of two elements", ConfigError, "lr is .*a number"),
        bad([one(2, 2)], {"lr": -1.0}, "negative lr", ConfigError, "lr is -1.0: it must be at least 0"),
        bad([one(2, 2)], {"weight_decay": -1.0}, "negative decay", ConfigError, "weight_decay is -1.0"),
        bad([one(2, 2)], {"momentum": 1.0}, "momentum of 1", ConfigError, "momentum is 1.0"),
        bad([one(2, 2)], {"ns_steps": 0}, "no steps", ConfigError, "steps"),
        bad([one(3)], {}, "a vector", RoutingError, "only matrices can be orthogonalized"),
        bad([one(2, 3, dtype=torch.complex64)], {}, "complex", RoutingError, "only real floating-point"),
    ]


INFO = OptimizerInfo(
    Muon,
    optim_inputs_func=inputs,
    optim_error_inputs_func=errors,
    scheduler_inputs=(
        [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
        [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4)],
        [lambda opt: ConstantLR(opt, factor=0.4, total_iters=4)],
        [lambda opt: PolynomialLR(opt, power=0.9, total_iters=4)],
        [lambda opt: StepLR(opt, gamma=0.9, step_size=10), lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4)],
        [lambda opt: StepLR(opt, gamma=0.9, step_size=10), lambda opt: ReduceLROnPlateau(opt)],
        [lambda opt: ExponentialLR(opt, gamma=0.99), lambda opt: ReduceLROnPlateau(opt)],
    ),
    supported_impls=(),
    not_og_supported_flags=(),
)
QUICK = ("default", "Tensor lr", "bf16 iteration", "Tensor betas", "normuon", "namo")
"""Options that CI tries; the others are slow."""
INPUTS = [
    pytest.param(i, id=i.desc, marks=() if i.desc in QUICK else pytest.mark.slow)
    for i in _get_optim_inputs_including_global_cliquey_kwargs(CPU, FP32, INFO)
]
every = pytest.mark.parametrize("given", INPUTS)


def options(given: OptimizerInput) -> dict[str, Any]:
    return copy.deepcopy(given.kwargs)


def weights(dtype: torch.dtype = FP32, seed: int = 0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(s, generator=generator).to(dtype)) for s in ((6, 8), (3, 4, 5), (7,), (0,))]


def groups(of: list[Parameter]) -> list[dict[str, Any]]:
    return [{"params": of[:2]}, {"params": of[2:], "algorithm": "adamw"}]


def made(given: OptimizerInput, of: list[Parameter]) -> Muon:
    return Muon(groups(of), **options(given))


def stepped(optimizer: Muon, of: list[Parameter], steps: Iterator[int] | range, layout: Any = lambda g: g) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in of:
            p.grad = layout(torch.randn(p.shape, generator=generator).to(p.dtype))
        optimizer.step()


def same(one: list[Parameter], two: list[Parameter]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one, two, strict=True))


def transposed(g: torch.Tensor) -> torch.Tensor:
    return g.mT.contiguous().mT if g.ndim >= 2 else torch.stack([g, g], -1)[..., 0]


@pytest.mark.parametrize("given", [pytest.param(e, id=e.optimizer_error_input.desc) for e in errors(CPU, FP32)])
def test_errors(given: ErrorOptimizerInput) -> None:
    what = given.optimizer_error_input
    params = what.params if what.params is not None else [Parameter(torch.rand(2, 2))]
    assert given.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    if issubclass(given.error_type, Warning):
        with pytest.warns(given.error_type, match=given.error_regex):
            Muon(params, **what.kwargs)
    else:
        with pytest.raises(given.error_type, match=given.error_regex):
            Muon(params, **what.kwargs)


@pytest.mark.parametrize(
    ("given", "schedulers"),
    [
        *(pytest.param(p.values[0], 0, id=str(p.id)) for p in INPUTS),
        *(pytest.param(INPUTS[0].values[0], n, id=f"schedulers {n}") for n in range(1, len(INFO.scheduler_inputs))),
    ],
)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.each_choice
def test_forloop_goes_right_direction(given: OptimizerInput, schedulers: int, contiguous: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weight, bias, data = Parameter(random(10, 5)), Parameter(random(10)), random(5)
    if not contiguous:
        weight, bias = Parameter(random(10, 5, 2)[..., 0]), Parameter(random(10, 2)[..., 0])
        assert not weight.is_contiguous()
    optimizer = Muon([{"params": [weight]}, {"params": [bias], "algorithm": "adamw"}], **options(given))
    chosen = [make(optimizer) for make in INFO.scheduler_inputs[schedulers]]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(data) + bias).pow(2).sum()
        loss.backward()
        return loss.detach()

    first = float(closure())
    for _ in range(20):
        loss = float(optimizer.step(closure))
        for scheduler in chosen:
            scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    assert float(closure()) < first


@every
def test_lr_of_a_group(given: OptimizerInput) -> None:
    """A group's own rate is used, and no other's: with zero and no decay its parameters stay."""
    a, b = weights(), weights(seed=1)
    kept = [p.detach().clone() for p in b]
    still = [{**g, "lr": 0.0} for g in groups(b)]
    optimizer = Muon([*groups(a), *still], **{**options(given), "weight_decay": 0.0})
    alone = weights()
    other = Muon(groups(alone), **{**options(given), "weight_decay": 0.0})
    stepped(optimizer, [*a, *b], range(3))
    stepped(other, alone, range(3))
    assert all(torch.allclose(p, q, rtol=1e-6, atol=0) for p, q in zip(b, kept, strict=True))
    assert same(a, alone)


@pytest.mark.parametrize("group", [0, 1])
def test_weight_decay_of_a_group(group: int) -> None:
    """With zero gradients a group shrinks by 1 - lr * decay a step, and one without decay stays."""
    a = weights()
    before = [p.detach().clone() for p in a]
    of = groups(a)
    of[1 - group]["weight_decay"] = 0.0
    optimizer = Muon(of, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        for p in a:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for index, (p, q) in enumerate(zip(a, before, strict=True)):
        factor = 0.95**3 if (index >= 2) == bool(group) else 1.0
        assert torch.allclose(p, q * factor, rtol=1e-5)


@every
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.each_choice
def test_rates_as_numbers_and_as_tensors(given: OptimizerInput, tensor: bool) -> None:
    a, b = weights(), weights()
    rates = {"lr": 0.01, "momentum": 0.9}
    one = Muon(groups(a), **{**options(given), **rates})
    as_tensors = {k: torch.tensor(v, dtype=torch.float64) if tensor else v for k, v in rates.items()}
    two = Muon(groups(b), **{**options(given), **as_tensors})
    stepped(one, a, range(3))
    stepped(two, b, range(3))
    assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-6) for p, q in zip(a, b, strict=True))


def test_a_tensor_rate_changed_in_place_counts() -> None:
    a, b = weights(), weights()
    rate = torch.tensor(0.1)
    one, two = Muon(groups(a), lr=rate), Muon(groups(b), lr=float(rate))
    stepped(one, a, range(2))
    stepped(two, b, range(2))
    rate.fill_(0.02)
    for group in two.param_groups:
        group["lr"] = float(rate)
    stepped(one, a, range(2, 4))
    stepped(two, b, range(2, 4))
    assert same(a, b)


@every
@pytest.mark.parametrize("parameters", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.each_choice
def test_strides_change_nothing(given: OptimizerInput, parameters: bool, gradients: bool) -> None:
    a, b = weights(), weights()
    if parameters:
        b = [Parameter(transposed(p.detach())) for p in b]
    one, two = made(given, a), made(given, b)
    stepped(one, a, range(3))
    stepped(two, b, range(3), transposed if gradients else lambda g: g)
    assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-6) for p, q in zip(a, b, strict=True))


@every
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.each_choice
def test_state_dict_round_trip(given: OptimizerInput, how: str) -> None:
    a, b = weights(), weights()
    one = made(given, a)
    stepped(one, a, range(3))
    with torch.no_grad():
        for p, q in zip(b, a, strict=True):
            p.copy_(q)
    two = made(given, b)
    state = one.state_dict()
    if how == "pickle":
        state = pickle.loads(pickle.dumps(state))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    two.load_state_dict(copy.deepcopy(state))
    stepped(one, a, range(3, 6))
    stepped(two, b, range(3, 6))
    assert same(a, b)
    kept = copy.deepcopy(two.state_dict())
    stepped(one, a, range(6, 7))  # neither touches the other
    after = two.state_dict()
    for key, entry in kept["state"].items():
        assert all(torch.equal(value, after["state"][key][name]) for name, value in entry.items())


@every
def test_a_state_dict_with_and_without_names(given: OptimizerInput) -> None:
    a, b = weights(), weights()
    named = [{**g, "param_names": [f"group{i}.param{j}" for j in range(2)]} for i, g in enumerate(groups(a))]
    one, two = Muon(named, **options(given)), made(given, b)
    stepped(one, a, range(2))
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    with torch.no_grad():
        for p, q in zip(b, a, strict=True):
            p.copy_(q)
    stepped(one, a, range(2, 4))
    stepped(two, b, range(2, 4))
    assert same(a, b)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.each_choice
def test_a_state_of_another_dtype_loads(given: OptimizerInput, dtype: torch.dtype) -> None:
    """Momentum stays fp32; AdamW's moments take the dtype of their parameter, as torch does it."""
    a, b = weights(), weights(dtype)
    one, two = made(given, a), made(given, b)
    stepped(one, a, range(2))
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert two.state[b[0]]["momentum_buffer"].dtype == FP32
    assert torch.equal(two.state[b[0]]["momentum_buffer"], one.state[a[0]]["momentum_buffer"])
    assert two.state[b[2]]["exp_avg"].dtype == dtype and two.state[b[2]]["step"].dtype == FP32
    stepped(two, b, range(2, 4))
    assert all(p.dtype == dtype and torch.isfinite(p).all() for p in b)


@every
def test_deepcopy_goes_on_alike(given: OptimizerInput) -> None:
    a = weights()
    one = made(given, a)
    stepped(one, a, range(2))
    two = copy.deepcopy(one)
    b = [p for group in two.param_groups for p in group["params"]]
    stepped(one, a, range(2, 4))
    stepped(two, b, range(2, 4))
    assert same(a, b)


@every
def test_without_gradients_nothing_moves(given: OptimizerInput) -> None:
    a = weights()
    before = [p.detach().clone() for p in a]
    optimizer = made(given, a)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(a, before, strict=True))
    a[0].grad = torch.randn(6, 8)
    optimizer.step()
    assert not torch.equal(a[0], before[0])
    assert all(torch.equal(p, q) for p, q in zip(a[1:], before[1:], strict=True))


@every
def test_a_missing_gradient_leaves_the_others_alone(given: OptimizerInput) -> None:
    """Each parameter goes as if it were alone, whatever the others lack: unfrozen and frozen in mid-run."""
    a = weights()
    optimizer = made(given, a)
    present = [(True, True, True), (True, False, True), (False, True, False), (True, True, True)]
    for step, given_now in enumerate(present):
        for i, (p, there) in enumerate(zip(a, given_now, strict=False)):
            generator = torch.Generator().manual_seed(100 + 10 * i + step)
            p.grad = torch.randn(p.shape, generator=generator) if there else None
            p.requires_grad_(there)
        optimizer.step()
    for i in range(3):
        (b,) = [weights()[i]]
        extra = Parameter(torch.randn(2, 2))  # an optimizer has at least one Muon group
        only = {"params": [b], "algorithm": "adamw" if i == 2 else "muon"}
        alone = Muon([only, {"params": [extra]}], **options(given))
        for step, given_now in enumerate(present):
            if given_now[i]:
                b.grad = torch.randn(b.shape, generator=torch.Generator().manual_seed(100 + 10 * i + step))
                alone.step()
        assert torch.equal(a[i], b)


def test_zero_elements_only() -> None:
    empty = [Parameter(torch.zeros(0, 3)), Parameter(torch.zeros(4, 0))]
    optimizer = Muon(empty)
    stepped(optimizer, empty, range(2))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    stepped(optimizer, empty, range(2))


@every
def test_zero_elements_beside_others(given: OptimizerInput) -> None:
    a, b, empty = weights(), weights(), Parameter(torch.zeros(0, 3))
    one, two = made(given, a), Muon([{"params": [b[0], empty, b[1]]}, groups(b)[1]], **options(given))
    stepped(one, a, range(2))
    for step in range(2):
        stepped_gradients(b, step)
        empty.grad = torch.zeros(0, 3)
        two.step()
    assert same(a, b)


def stepped_gradients(of: list[Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in of:
        p.grad = torch.randn(p.shape, generator=generator)


@every
def test_hooks_of_the_step(given: OptimizerInput) -> None:
    a = weights()
    optimizer = made(given, a)
    seen: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("before")),
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("after")),
        register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append("all before")),
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append("all after")),
    ]
    stepped(optimizer, a, range(1))
    for handle in handles:
        handle.remove()
    stepped(optimizer, a, range(1))
    assert seen == ["all before", "before", "after", "all after"]


def test_a_profile_names_the_step() -> None:
    a = weights()
    optimizer = Muon(groups(a))
    stepped(optimizer, a, range(1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        stepped(optimizer, a, range(1))
    assert "Optimizer.step#Muon.step" in {event.key for event in found.key_averages()}


@every
def test_zero_grad_and_repr(given: OptimizerInput) -> None:
    a = weights()
    optimizer = made(given, a)
    for p in a:
        p.grad = torch.ones_like(p)
    optimizer.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in a if p.grad is not None) and a[0].grad is not None
    optimizer.zero_grad()
    assert all(p.grad is None for p in a)
    assert "Parameter Group 1" in repr(optimizer) and "algorithm: adamw" in repr(optimizer)


@every
def test_defaults_changed_later_touch_no_group(given: OptimizerInput) -> None:
    a, b = weights(), weights()
    one, two = made(given, a), made(given, b)
    two.defaults["lr"] = two.defaults["momentum"] = 0.5
    stepped(one, a, range(2))
    stepped(two, b, range(2))
    assert same(a, b)


def test_old_pickles_of_defaults_and_generators_of_parameters() -> None:
    """Parameters may come from a generator, with names, or as one tensor in a dict."""
    model = torch.nn.Linear(4, 6, bias=False)
    for params in (model.parameters(), model.named_parameters(), [{"params": model.weight}]):
        optimizer = Muon(params)
        assert optimizer.param_groups[0]["params"][0] is model.weight
    assert Muon(model.named_parameters()).specs[0][0].name == "weight"


def test_no_reference_is_left_behind() -> None:
    a = weights()
    optimizer = Muon(groups(a))
    stepped(optimizer, a, range(2))
    dead = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert dead() is None


def test_under_grad_mode_no_graph_is_kept() -> None:
    a = weights()
    optimizer = Muon(groups(a))
    with torch.enable_grad():
        stepped(optimizer, a, range(2))
    held = [value for entry in optimizer.state.values() for value in entry.values()]
    assert all(not t.requires_grad and t.grad_fn is None for t in held)
    assert all(p.is_leaf and p.requires_grad for p in a)


COUNTS = {"configurations": len(INPUTS), "errors": len(errors(CPU, FP32)), "schedulers": len(INFO.scheduler_inputs)}


def test_as_much_is_tried_as_before() -> None:
    assert COUNTS == {"configurations": 15, "errors": 14, "schedulers": 7}
