"""Update rules and the training loop against closed forms and torch's own optimizers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from muon_dist.experiments.networks import Digits, TiedRNN, TinyGPT, batches, cnn, depthwise_cnn, digits, mlp, seeded
from muon_dist.experiments.training import MatrixOptimizer, Rule, direction, random_spectrum, train
from muon_dist.numerics import newton_schulz, polar_factor


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(seed: int = 0) -> torch.Tensor:
    return torch.randn(5, 8, generator=generator(seed))


def test_directions():
    g = matrix()
    assert direction(Rule("sgd", 1.0), g, generator()) is g
    nsgd = direction(Rule("nsgd", 1.0), g, generator())
    assert float(nsgd.norm()) == pytest.approx(5**0.5)
    spectral = direction(Rule("spectral", 1.0), g, generator())
    assert float(torch.linalg.matrix_norm(spectral, 2)) == pytest.approx(1.0)
    for x in (nsgd, spectral):
        assert float((x * g).sum() / (x.norm() * g.norm())) == pytest.approx(1.0)
    muon = direction(Rule("muon", 1.0, steps=3, schedule="cubic"), g, generator())
    torch.testing.assert_close(muon, newton_schulz(g, 3, "cubic"))
    torch.testing.assert_close(direction(Rule("polar", 1.0), g, generator()), polar_factor(g))
    with pytest.raises(ValueError, match="adam"):
        direction(Rule("adam", 1.0), g, generator())


def test_random_spectrum_keeps_the_vectors_and_the_norm():
    g = matrix()
    x = random_spectrum(g, generator())
    assert float(x.norm()) == pytest.approx(5**0.5, rel=1e-5)
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    core = u.T @ x @ vt.T
    torch.testing.assert_close(core, torch.diag(core.diag()), atol=1e-5, rtol=0)
    assert (core.diag() > 0).all() and core.diag().std() > 0.1


@pytest.mark.parametrize("kind", ["sgd", "nsgd", "spectral", "muon", "polar", "random"])
def test_zero_gradient_moves_nothing(kind):
    x = direction(Rule(kind, 1.0), torch.zeros(3, 4), generator())
    assert torch.equal(x, torch.zeros(3, 4))


def run_steps(rule: Rule, steps: int = 6, shape: tuple[int, ...] = (4, 6)) -> torch.Tensor:
    p = nn.Parameter(torch.randn(shape, generator=generator()))
    optimizer = MatrixOptimizer([p], rule)
    for t in range(steps):
        p.grad = torch.randn(shape, generator=generator(10 + t))
        optimizer.step(rule.lr)
    return p.detach()


def test_adam_is_torch_adamw():
    p = nn.Parameter(torch.randn(4, 6, generator=generator()))
    reference = torch.optim.AdamW([p], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for t in range(6):
        p.grad = torch.randn(4, 6, generator=generator(10 + t))
        reference.step()
    torch.testing.assert_close(run_steps(Rule("adam", 0.01, beta=0.9)), p.detach())


def test_momentum_is_an_average_with_nesterov_lookahead():
    beta = 0.8
    p0 = torch.randn(4, 6, generator=generator())
    g0, g1 = (torch.randn(4, 6, generator=generator(10 + t)) for t in range(2))
    m0 = (1 - beta) * g0
    m1 = beta * m0 + (1 - beta) * g1
    torch.testing.assert_close(run_steps(Rule("sgd", 0.1, beta), 2), p0 - 0.1 * (m0 + m1))
    looked = [(1 - beta) * g + beta * m for g, m in ((g0, m0), (g1, m1))]
    torch.testing.assert_close(run_steps(Rule("sgd", 0.1, beta, nesterov=True), 2), p0 - 0.1 * sum(looked))


def test_convolution_is_a_matrix_of_its_outputs():
    flat = run_steps(Rule("muon", 0.1), shape=(4, 18))
    p = nn.Parameter(torch.randn((4, 18), generator=generator()).view(4, 2, 3, 3).clone())
    optimizer = MatrixOptimizer([p], Rule("muon", 0.1))
    for t in range(6):
        p.grad = torch.randn((4, 18), generator=generator(10 + t)).view(4, 2, 3, 3)
        optimizer.step(0.1)
    torch.testing.assert_close(p.detach().flatten(1), flat)


def quadratic_stream():
    while True:
        yield torch.eye(3), torch.zeros(3, 3)


def test_training_loop_follows_gradient_descent_and_its_decay():
    w = nn.Parameter(torch.ones(3, 3))

    def loss(x, y):
        return 0.5 * (x @ w - y).square().sum()

    trace = train(loss, MatrixOptimizer([w], Rule("sgd", 0.5)), quadratic_stream(), 3)
    torch.testing.assert_close(w.detach(), torch.full((3, 3), 0.125))
    assert trace.losses == pytest.approx([4.5, 4.5 / 4, 4.5 / 16]) and trace.blown_up_at is None
    with torch.no_grad():
        w.fill_(1.0)
    train(loss, MatrixOptimizer([w], Rule("sgd", 0.5)), quadratic_stream(), 2, decay=True)
    torch.testing.assert_close(w.detach(), torch.full((3, 3), 0.5 * 0.75))  # factors 1 and 1/2


def test_blow_up_stops_the_run_and_says_when():
    w = nn.Parameter(torch.ones(3, 3))
    trace = train(
        lambda x, y: 0.5 * (x @ w - y).square().sum(),
        MatrixOptimizer([w], Rule("sgd", 3.0)),
        quadratic_stream(),
        50,
        blow_up=10.0,
    )
    assert trace.blown_up_at == 2 and len(trace.losses) == 3  # |1 - 3| = 2: the loss grows by 4 a step
    trace = train(lambda x, y: (x @ w).sum() * math.nan, MatrixOptimizer([w], Rule("sgd", 1.0)), quadratic_stream(), 5)
    assert trace.blown_up_at == 0


def test_after_step_ends_the_run():
    w = nn.Parameter(torch.ones(3, 3))
    seen = []
    train(
        lambda x, y: (x @ w).square().sum(),
        MatrixOptimizer([w], Rule("sgd", 0.01)),
        quadratic_stream(),
        50,
        after_step=lambda t: bool(seen.append(t)) or t == 4,
    )
    assert seen == [1, 2, 3, 4]


def test_digits_are_split_and_scaled():
    plain, large, centred = digits(0), digits(0, 16.0), digits(0, 16.0, centred=True)
    assert isinstance(plain, Digits) and len(plain.x) + len(plain.test_x) == 1797
    assert float(plain.x.max()) == 1.0 and float(large.x.max()) == 16.0
    assert float(centred.x.mean(0).abs().max()) < 1e-4
    assert not torch.equal(digits(1).y, plain.y)


def test_batches_are_seeded_and_cover_an_epoch():
    x, y = torch.arange(10.0)[:, None], torch.arange(10)
    first = [next(s)[1].tolist() for s in [batches(x, y, 3, 0)] for _ in range(3)]
    again = [next(s)[1].tolist() for s in [batches(x, y, 3, 0)] for _ in range(3)]
    assert first == again and len({i for b in first for i in b}) == 9
    assert first != [next(s)[1].tolist() for s in [batches(x, y, 3, 1)] for _ in range(3)]


@pytest.mark.parametrize("build", [mlp, cnn, depthwise_cnn, TiedRNN])
def test_networks_have_matrices_only_and_no_global_seed(build):
    state = torch.random.get_rng_state()
    model = seeded(build, 0)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.ndim >= 2 for p in model.parameters())
    assert model(torch.rand(3, 64)).shape == (3, 10)


def test_tiny_gpt_is_causal_and_splits_its_parameters():
    model = seeded(lambda: TinyGPT(11, 8, 16, 2), 0)
    ids = torch.randint(11, (2, 8), generator=generator())
    changed = ids.clone()
    changed[:, 5] = (ids[:, 5] + 1) % 11
    difference = (model(ids) - model(changed)).detach().abs().amax((0, 2))
    assert float(difference[:5].max()) == 0.0 and float(difference[5:].min()) > 0.0
    taken = {id(p) for p in model.matrices()} | {id(p) for p in model.others()}
    assert taken == {id(p) for p in model.parameters()}
    assert not {id(p) for p in model.matrices()} & {id(p) for p in model.others()}
