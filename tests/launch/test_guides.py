"""The code of docs/migration.md beside what it replaces, and the exit codes of docs/troubleshooting.md."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import muon_dist
from muon_dist import errors
from muon_dist.numerics.newton_schulz import newton_schulz


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 24)
        self.wide = nn.Linear(24, 12, bias=False)
        self.tall = nn.Linear(12, 40)
        self.head = nn.Linear(40, 20, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.tall(torch.tanh(self.wide(self.embed(tokens))))))


def train(model: nn.Module, optimizers: list[Any], steps: int = 3) -> dict[str, torch.Tensor]:
    for step in range(steps):
        tokens = torch.randint(0, 20, (8, 6), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def model() -> Model:
    torch.manual_seed(0)
    return Model()


class Plain(torch.optim.Optimizer):
    """The formulas of the others as their sources have them: momentum, Nesterov, Newton-Schulz, factor, decay."""

    def __init__(
        self,
        params: Any,
        lr: float,
        wd: float,
        factor: Any,
        summed: bool,
        nesterov: bool = True,
        schedule: str = "keller",
    ) -> None:
        super().__init__(params, {})
        self.lr, self.wd, self.factor, self.summed = lr, wd, factor, summed
        self.nesterov, self.schedule = nesterov, schedule

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            held = self.state[p].setdefault("momentum", torch.zeros_like(p))
            if self.summed:
                held.mul_(0.95).add_(p.grad)
                update = p.grad + 0.95 * held if self.nesterov else held
            else:
                held.lerp_(p.grad, 0.05)
                update = p.grad.lerp(held, 0.95) if self.nesterov else held
            p.mul_(1 - self.lr * self.wd)
            p.sub_(self.lr * self.factor(*p.shape) * newton_schulz(update, 5, self.schedule, torch.float32))


def matrices(of: Model) -> list[torch.Tensor]:
    return [of.wide.weight, of.tall.weight]


def after(root: Path, name: str, of: Model) -> Any:
    """The optimizer that the page's code after `<!-- after: name -->` makes."""
    page = (root / "docs" / "migration.md").read_text()
    found = re.search(rf"<!-- after: {name} -->\n```python\n(.*?)```", page, re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {"model": of, "muon_dist": muon_dist}
    exec(found[1], names)
    return names["optimizer"]


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: Model, tolerance: float) -> None:
    """Whether the two moved the matrices to the same place, relative to how far they moved."""
    begun = dict(start.named_parameters())
    for name in ("wide.weight", "tall.weight"):
        moved = (expected[name] - begun[name]).norm()
        assert (found[name] - expected[name]).norm() < tolerance * moved, name


def test_instead_of_torch(root: Path) -> None:
    """1-3% apart: theirs iterates in bfloat16."""
    theirs, ours = model(), model()
    muon = torch.optim.Muon(matrices(theirs), lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    same(train(ours, [after(root, "torch", ours)]), train(theirs, [muon]), model(), 0.03)


@pytest.mark.parametrize(
    "name, plain",
    [
        ("moonlight", {"lr": 1e-3, "wd": 0.1, "factor": lambda m, n: 0.2 * math.sqrt(max(m, n)), "summed": True}),
        ("keller", {"lr": 0.02, "wd": 0.01, "factor": lambda m, n: max(1, m / n) ** 0.5, "summed": False}),
        (
            "dion",
            {"lr": 0.01, "wd": 0.01, "factor": lambda m, n: 0.2 * math.sqrt(max(m, n)), "summed": True,
             "nesterov": False, "schedule": "polar_express"},
        ),
    ],
)  # fmt: skip
def test_instead_of_the_others(root: Path, name: str, plain: dict[str, Any]) -> None:
    theirs, ours = model(), model()
    found = train(ours, [after(root, name, ours)], steps=1)
    # AdamW moves the others, so only the first step has the same gradients
    same(found, train(theirs, [Plain(matrices(theirs), **plain)], steps=1), model(), 1e-4)


def test_exit_codes_are_explained(root: Path) -> None:
    text = (root / "docs" / "troubleshooting.md").read_text()
    explained = {int(n) for row in re.findall(r"^\| ([\d, ]+) \|", text, re.MULTILINE) for n in row.split(",")}
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MuonDistError)
    ]
    assert {kind.exit_code for kind in kinds} - {1} == explained
