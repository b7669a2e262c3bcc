"""Single process: the optimizer against the readable reference and against torch's own Muon."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from muon_dist.errors import ConfigError, LayoutError, RoutingError
from muon_dist.layout import cut_parameter
from muon_dist.optim import Muon, param_groups
from muon_dist.optim.reference import reference_step

SHAPES = {
    "square": (64, 64),
    "tall": (128, 32),
    "wide": (32, 128),
    "row": (1, 64),
    "column": (64, 1),
    "experts": (4, 24, 40),
    "heads": (48, 32),
    "fused": (32, 72),
}
CUTS = {"heads": {"heads": 4}, "fused": {"sizes": (24, 36, 12), "transposed": True}}


def make_parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()
    }


def make_groups(parameters: dict[str, torch.nn.Parameter], **options) -> list[dict]:
    return [
        {
            "params": list(parameters.values()),
            "param_names": list(parameters),
            "cuts": [CUTS.get(name) for name in parameters],
            **options,
        }
    ]


def gradients(step: int, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


class Reference:
    """The same parameters stepped by `reference_step`."""

    def __init__(self, **options) -> None:
        self.parameters = {n: p.detach().clone() for n, p in make_parameters().items()}
        self.momentum = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        self.options = options

    def step(self, grads: dict[str, torch.Tensor]) -> None:
        for name, p in self.parameters.items():
            if name in grads:
                matrices = cut_parameter(name, SHAPES[name], **CUTS.get(name, {}))
                reference_step(p, grads[name], self.momentum[name], matrices, **self.options)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, p in expected.items():
        error = (found[name].detach() - p).norm() / p.norm()
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.02},
        {"lr": 0.02, "nesterov": False, "momentum": 0.9, "weight_decay": 0.0},
        {"lr": 0.02, "scale": "spectral", "ns_schedule": "polar_express"},
        {"lr": 0.02, "scale": "none", "ns_steps": 3, "ns_schedule": "cubic"},
        {"lr": 0.02, "ns_dtype": torch.bfloat16},
    ],
)
def test_equals_reference(options):
    parameters = make_parameters()
    optimizer = Muon(make_groups(parameters), **options)
    reference = Reference(**{"weight_decay": 0.1, **options})
    for step in range(20):
        grads = gradients(step)
        for name, p in parameters.items():
            p.grad = grads[name].clone()
        optimizer.step()
        reference.step(grads)
    # bf16 rounds differently in a batch than alone; its own error is 2^-8
    assert_close(parameters, reference.parameters, 1e-6 if options.get("ns_dtype") is None else 1e-3)
    assert optimizer.orthogonalized == 20 * (5 + 4 + 4 + 3)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_equals_torch_muon_within_its_bf16(adjust):
    """torch.optim.Muon iterates in bf16 whatever the input, so the two agree to the error of that iteration."""
    ours, theirs = torch.randn(64, 96), None
    theirs = ours.clone()
    a, b = torch.nn.Parameter(ours), torch.nn.Parameter(theirs)
    mine = Muon([a], lr=0.01, scale={"original": "spectral"}.get(adjust, adjust), ns_dtype=torch.bfloat16)
    torchs = torch.optim.Muon([b], lr=0.01, adjust_lr_fn=adjust)
    start = a.detach().clone()
    for step in range(10):
        gradient = torch.randn(64, 96, generator=torch.Generator().manual_seed(step))
        a.grad, b.grad = gradient.clone(), gradient.clone()
        mine.step()
        torchs.step()
    assert torch.equal(mine.state[a]["momentum_buffer"], torchs.state[b]["momentum_buffer"])
    assert (a - b).norm() / (b - start).norm() < 0.02


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(20, 32), torch.nn.Linear(32, 32), torch.nn.LayerNorm(32), torch.nn.Linear(32, 20)
    )


def backward(m: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    tokens = torch.randint(0, 20, (4, 8), generator=torch.Generator().manual_seed(seed))
    loss = torch.nn.functional.cross_entropy(m(tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    return loss


def test_adamw_groups_equal_torch_adamw():
    ours, theirs = model(), model()
    optimizer = Muon(param_groups(ours, lr=0.01, weight_decay=0.1))
    names = {n for g in optimizer.param_groups if g["algorithm"] == "adamw" for n in g["param_names"]}
    decay = [p for n, p in theirs.named_parameters() if n in names and p.ndim > 1]
    rest = [p for n, p in theirs.named_parameters() if n in names and p.ndim == 1]
    torchs = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.95)
    )
    backward(ours)
    for (_, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        q.grad = p.grad.clone()
    optimizer.step()
    torchs.step()
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (name in names) == torch.equal(p, q), name


def test_closure_and_scheduler():
    m = model()
    optimizer = Muon(param_groups(m, lr=0.01, adamw_lr=0.003))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    start = [p.detach().clone() for p in m.parameters()]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return backward(m)

    first = optimizer.step(closure)
    scheduler.step()
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == {
        "muon": 0.005,
        "adamw": 0.0015,
        "adamw_no_decay": 0.0015,
    }
    assert optimizer.step(closure) < first
    assert all(not torch.equal(p, q) for p, q in zip(m.parameters(), start, strict=True))


def test_accumulated_gradients_are_one_update():
    once, accumulated = model(), model()
    for m, seeds in ((once, [0]), (accumulated, [0, 0, 0, 0])):
        optimizer = Muon(param_groups(m, lr=0.01))
        for seed in seeds:
            backward(m, seed)
        for p in m.parameters():
            p.grad /= len(seeds)
        optimizer.step()
        assert optimizer.orthogonalized == 1
    for p, q in zip(once.parameters(), accumulated.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_no_gradient_means_untouched_and_zero_gradient_means_decay_only():
    parameters = make_parameters()
    before = {n: p.detach().clone() for n, p in parameters.items()}
    optimizer = Muon(make_groups(parameters), lr=0.1, weight_decay=0.5)
    parameters["square"].grad = torch.zeros(64, 64)
    optimizer.step()
    assert torch.equal(parameters["square"], before["square"] * (1 - 0.1 * 0.5))
    assert all(torch.equal(parameters[n], before[n]) for n in SHAPES if n != "square")
    assert optimizer.orthogonalized == 1


def test_frozen_parameters_are_out_of_the_groups():
    m = model()
    m[1].weight.requires_grad_(False)
    with pytest.raises(RoutingError):
        param_groups(m)
    m.append(torch.nn.Linear(20, 12))
    names = [n for g in param_groups(m) for n in g["param_names"]]
    assert "1.weight" not in names and "4.weight" in names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_continues_exactly(dtype):
    """Momentum stays fp32 beside bf16 parameters; torch's own loading would round it."""
    a = make_parameters(dtype=dtype)
    first = Muon(make_groups(a), lr=0.02)

    def run(parameters: dict, optimizer: Muon, steps: range) -> None:
        for step in steps:
            for name, g in gradients(step).items():
                parameters[name].grad = g.to(dtype)
            optimizer.step()

    run(a, first, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert all(s["momentum_buffer"].dtype == torch.float32 for s in saved["state"].values())
    for stepped_before_load in (False, True):
        b = {n: torch.nn.Parameter(p.detach().clone()) for n, p in a.items()}
        second = Muon(make_groups(b), lr=0.5)
        if stepped_before_load:
            run(b, second, range(1))
            for n, p in b.items():
                p.data.copy_(a[n].data)
        second.load_state_dict(copy.deepcopy(saved))
        assert second.param_groups[0]["lr"] == 0.02
        c = {n: torch.nn.Parameter(p.detach().clone()) for n, p in a.items()}
        straight = copy.deepcopy(saved)
        third = Muon(make_groups(c), lr=0.02)
        third.load_state_dict(straight)
        third.load_state_dict(third.state_dict())  # the round trip of accelerate, before any step
        run(b, second, range(3, 6))
        run(c, third, range(3, 6))
        for n in SHAPES:
            assert torch.equal(b[n], c[n])
    run(a, first, range(3, 6))
    assert all(torch.equal(a[n], c[n]) for n in SHAPES)


def test_empty_state_round_trip_before_the_first_step():
    parameters = make_parameters()
    optimizer = Muon(make_groups(parameters))
    optimizer.load_state_dict(optimizer.state_dict())
    for n, g in gradients(0).items():
        parameters[n].grad = g
    optimizer.step()
    assert optimizer.orthogonalized == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0: it must be at least 0"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"scale": "big"}, "scale 'big' is unknown: use match_rms_adamw, spectral, unit_rms or none"),
        ({"ns_schedule": "kellr"}, "keller"),
        ({"ns_dtype": torch.int8}, "ns_dtype must be"),
        ({"bucket_mb": 0}, "bucket_mb is 0"),
        ({"owner_policy": "best"}, "owner_policy 'best' is unknown"),
        ({"process_group": "mine"}, "process_group 'mine' is unknown"),
        ({"wire_dtype": torch.int32}, "wire_dtype"),
    ],
)
def test_bad_options_name_the_key(options, message):
    p = torch.nn.Parameter(torch.randn(4, 4))
    p.grad = torch.randn(4, 4)
    with pytest.raises(ConfigError, match=message):
        Muon([p], **options).step()


def test_bad_groups():
    vector, matrix = torch.nn.Parameter(torch.randn(4)), torch.nn.Parameter(torch.randn(4, 4))
    with pytest.raises(RoutingError, match=r"norm.weight of shape \(4,\) is in a Muon group"):
        Muon([{"params": [vector], "param_names": ["norm.weight"]}])
    with pytest.raises(RoutingError, match="no parameter group has algorithm 'muon'"):
        Muon([{"params": [matrix], "algorithm": "adamw"}])
    with pytest.raises(ConfigError, match="algorithm 'sgd' is unknown"):
        Muon([{"params": [matrix], "algorithm": "sgd"}])
    with pytest.raises(ConfigError, match="betas"):
        Muon([{"params": [matrix]}, {"params": [vector], "algorithm": "adamw", "betas": (0.9, 1.0)}])
    with pytest.raises(LayoutError, match="3 heads do not divide"):
        Muon([{"params": [matrix], "cuts": [{"heads": 3}]}])


def test_replaced_parameters_are_an_error_not_sgd():
    matrix = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = Muon([{"params": [matrix], "param_names": ["w"]}])
    flat = torch.nn.Parameter(torch.randn(16))
    flat.grad = torch.randn(16)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(LayoutError, match=r"are not those that Muon was given.*attach"):
        optimizer.step()


def test_another_algorithm_in_the_saved_groups_is_refused():
    m = model()
    optimizer = Muon(param_groups(m))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["algorithm"] = "adamw"
    with pytest.raises(ConfigError, match="the saved groups are"):
        optimizer.load_state_dict(saved)
