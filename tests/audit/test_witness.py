"""`muon_dist.witness` on one process: what it says of right optimizers, and of each known mistake."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import muon_dist
from muon_dist.audit.convention import named
from muon_dist.bench.conformance_cases import make_model
from muon_dist.errors import ConfigError, InexactError
from muon_dist.optim.reference import plain_newton_schulz


class Net(nn.Module):
    """Three hidden matrices of three shapes between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.up = nn.Linear(32, 64, bias=False)
        self.down = nn.Linear(64, 32, bias=False)
        self.square = nn.Linear(32, 32, bias=False)
        self.head = nn.Linear(32, 40, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.table(x)
        h = h + self.square(h)
        return self.head(h + self.down(torch.relu(self.up(h))))


class Plain(torch.optim.Optimizer):
    """Muon as in the field, with a switch for each mistake."""

    def __init__(self, params: Any, **options: Any) -> None:
        self.mistake = options.pop("mistake", "")
        defaults = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "use_muon": True}
        super().__init__(params, {**defaults, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                nesterov = group["nesterov"] and self.mistake != "nesterov"
                u = p.grad.lerp(m, group["momentum"]) if nesterov else m
                lr, decay = group["lr"], 0.0 if self.mistake == "no_decay" else group["weight_decay"]
                if self.mistake == "rate":
                    lr = 0.3 * lr
                if self.mistake == "by_blocks":
                    o = torch.cat([plain_newton_schulz(part) for part in u.chunk(2)])
                elif self.mistake == "no_momentum":
                    o = plain_newton_schulz(p.grad)
                elif self.mistake == "sgd":
                    o = 20 * u
                else:
                    o = plain_newton_schulz(u)
                if self.mistake == "length" and p.size(0) == 64:
                    o = 0.5 * o
                if self.mistake == "sign":
                    o = -o
                p.mul_(1 - lr * decay).sub_(lr * max(1.0, p.size(0) / p.size(1)) ** 0.5 * o)


Loop = Callable[[Net, Any, int], None]


def hidden(model: Net) -> list[nn.Parameter]:
    return [model.up.weight, model.down.weight, model.square.weight]


def backward(model: Net, seed: int) -> None:
    x = torch.randint(0, 40, (16, 12), generator=torch.Generator().manual_seed(seed))
    nn.functional.cross_entropy(model(x).flatten(0, 1), x.roll(1, 1).flatten()).backward()


def train(make: Callable[[Net], Any], steps: int = 5, before: Loop | None = None, **options: Any) -> Any:
    torch.manual_seed(1)
    model = Net()
    optimizer = make(model)
    found = muon_dist.witness(optimizer, model=model, **options)
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step)
        if before is not None:
            before(model, optimizer, step)
        optimizer.step()
    found.close()
    return found


def causes(found: Any) -> set[str]:
    return {f.cause for f in found.findings}


@pytest.mark.parametrize("options", [{}, {"scale": "spectral"}, {"nesterov": False}, {"ns_schedule": "polar_express"}])
def test_ours_is_right(options: dict[str, Any]) -> None:
    found = train(lambda m: muon_dist.Muon(muon_dist.param_groups(m, lr=0.02), ns_dtype=torch.float32, **options))
    assert not found.findings and not found.choices and len(found.seen) == 15
    assert max(s.difference.error for s in found.seen) < 1e-4


@pytest.mark.parametrize("options", [{}, {"adjust_lr_fn": "match_rms_adamw"}, {"nesterov": False}])
def test_torchs_is_right_and_its_precision_a_choice(options: dict[str, Any]) -> None:
    found = train(lambda m: torch.optim.Muon(hidden(m), lr=0.02, **options))
    assert not found.findings
    assert "precision" in {c.cause for c in found.choices}
    assert 0.005 < max(s.noise for s in found.seen) < 0.1
    assert "Newton-Schulz runs in bf16" in found.table()


def test_a_plain_loop_is_right_and_its_factor_found_out() -> None:
    found = train(lambda m: Plain(hidden(m)))
    assert not found.findings
    assert {c.sentence for c in found.choices} == {"factor of the shape: spectral"}


def test_other_coefficients_are_a_choice() -> None:
    found = train(lambda m: muon_dist.Muon(muon_dist.param_groups(m, lr=0.02), ns_schedule="you",
                                           ns_dtype=torch.float32), ns_schedule="keller")  # fmt: skip
    assert not found.findings
    assert "coefficients: you" in {c.sentence for c in found.choices}


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        ("nesterov", "nesterov off"),
        ("no_decay", "decay missing: 0.002"),
        ("rate", "rate 0.006, asked 0.02"),
        ("no_momentum", "the momentum is not used"),
        ("sgd", "this matrix is trained by SGD, not Muon"),
        ("length", "0.5 times the length"),
        ("sign", "wrong way"),
    ],
)
def test_each_mistake_is_named(mistake: str, sentence: str) -> None:
    found = train(lambda m: Plain(hidden(m), mistake=mistake), scale="spectral")
    assert causes(found) == {mistake}, found.table()
    assert all(sentence in f.sentence for f in found.findings), found.table()
    if mistake == "length":
        assert {f.matrix for f in found.findings} == {"up.weight"}


def test_blocks_are_a_choice_unless_they_are_shards() -> None:
    found = train(lambda m: Plain(hidden(m), mistake="by_blocks"), scale="spectral")
    assert not found.findings
    assert "orthogonalized by 2 blocks of rows, such as heads" in {c.sentence for c in found.choices}
    pieces = {n: (half, half) for n, half in (("up.weight", 32), ("down.weight", 16), ("square.weight", 16))}
    asked = train(lambda m: Plain(hidden(m), mistake="by_blocks"), scale="none", pieces=pieces, matrices=["square.*"])
    assert not asked.findings and not asked.choices, asked.table()


def test_adamw_in_place_of_muon_and_the_reverse() -> None:
    found = train(lambda m: torch.optim.AdamW(m.parameters(), lr=0.02, betas=(0.9, 0.95)))
    assert causes(found) == {"adamw"} and len(found.findings) == 3
    assert not train(lambda m: torch.optim.AdamW(m.parameters(), lr=0.02), rule="adamw").findings
    found = train(lambda m: Plain(m.parameters(), use_muon=False), rule="adamw", matrices=["up.weight"])
    assert causes(found) == {"muon"}


def test_a_rate_that_the_caller_did_not_ask_for() -> None:
    found = train(lambda m: Plain(hidden(m), lr=0.003), lr=0.01)
    assert {f.sentence for f in found.findings} == {"rate 0.003, asked 0.01"}


def test_a_zero_gradient_keeps_moving_torchs_weight_and_not_ours() -> None:
    def still(model: Net, optimizer: Any, step: int) -> None:
        if step >= 2:
            model.square.weight.grad.zero_()

    theirs = train(lambda m: torch.optim.Muon(hidden(m), lr=0.02), 7, still, matrices=["square.*"])
    assert causes(theirs) == {"zero_gradient"}
    ours = train(lambda m: muon_dist.Muon(muon_dist.param_groups(m, lr=0.02)), 7, still, matrices=["square.*"])
    assert not ours.findings


def test_a_load_that_keeps_the_momentum_is_stale_and_one_that_forgets_it_lost() -> None:
    def loading(kind: str) -> Loop:
        saved: list[Any] = []

        def before(model: Net, optimizer: Any, step: int) -> None:
            if step == 3:
                saved.extend([copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())])
            if step == 6:
                model.load_state_dict(saved[0])
                if kind == "right":
                    optimizer.load_state_dict(saved[1])
                if kind == "momentum_reset":
                    optimizer.state.clear()

        return before

    for kind in ("right", "momentum_stale", "momentum_reset"):
        found = train(lambda m: Plain(hidden(m)), 8, loading(kind))
        assert causes(found) == (set() if kind == "right" else {kind}), (kind, found.table())


def test_a_finding_raises_on_request_and_arguments_are_checked() -> None:
    with pytest.raises(InexactError, match="nesterov off"):
        train(lambda m: Plain(hidden(m), mistake="nesterov"), on_finding="raise")
    found = train(lambda m: Plain(hidden(m), mistake="nesterov"))
    with pytest.raises(InexactError, match=r"up\.weight: .*nesterov off"):
        found.check()
    optimizer = Plain(hidden(Net()))
    for wrong in ({"rule": "lion"}, {"learning_rate": 1.0}, {"matrices": ["absent"]}, {"on_finding": "stop"}):
        with pytest.raises(ConfigError):
            muon_dist.witness(optimizer, model=Net(), **wrong)


def test_rotation_judges_new_matrices_once_their_momentum_is_known() -> None:
    found = train(lambda m: Plain(hidden(m), momentum=0.5), 40, matrices=1, rotate=18, seed=1)
    assert not found.findings and len({s.matrix for s in found.seen}) > 1, found.followed
    with pytest.raises(ConfigError, match="rotate=3"):
        train(lambda m: Plain(hidden(m)), 5, matrices=1, rotate=3)


def test_known_iterations_are_what_they_are_called() -> None:
    x = torch.randn(12, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name in ("keller", "you", "aol", "polar_express"):
        torch.testing.assert_close(named(name)(x), plain_newton_schulz(x, 5, name))


def test_a_trainer_is_followed_from_its_first_step(tmp_path: Path) -> None:
    """The stock Trainer makes its optimizer when training begins; the witness finds AdamW in Muon's place."""
    model = make_model()
    rows = [{"input_ids": (t := torch.arange(i, i + 12) % 64), "labels": t} for i in range(12)]
    args = TrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True,
                             save_strategy="no", learning_rate=1e-3, lr_scheduler_type="constant")  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    found = muon_dist.witness(trainer, matrices=2)
    trainer.train()
    assert found.steps == 3 and causes(found) == {"adamw"}, found.table()
    ours = Trainer(model=make_model(), args=args, train_dataset=rows,
                   optimizer_cls_and_kwargs=muon_dist.for_trainer(args, ns_dtype=torch.float32))  # fmt: skip
    found = muon_dist.witness(ours, matrices=2)
    ours.train()
    assert found.steps == 3 and not found.findings, found.table()
