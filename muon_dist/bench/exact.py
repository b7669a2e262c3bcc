"""The exact update: the right weights after the same gradients, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from muon_dist.bench.cases import LR, MOMENTUM, make_model, tokens
from muon_dist.layout import cut_parameter
from muon_dist.numerics import newton_schulz
from muon_dist.optim.binding import update_scale
from muon_dist.optim.groups import param_groups

STEPS = 2  # the second step is the first in which momentum matters
SCALES = ("match_rms_adamw", "spectral")


@dataclass(frozen=True)
class Exact:
    """Inputs and the exact result.

    Attributes:
        gradients: of each step, by FQN: real gradients of the model, with values that are exact in bf16. All ranks use
            the same gradients, so their mean is exact too.
        start: weights before the first step.
        moved: by scale and FQN, fp64 change of the weight over all steps, without weight decay.
    """

    gradients: tuple[Mapping[str, torch.Tensor], ...]
    start: Mapping[str, torch.Tensor]
    moved: Mapping[str, Mapping[str, torch.Tensor]]

    def error(self, scale: str, whole: Callable[[str], torch.Tensor]) -> float:
        """Relative Frobenius error of the change of all compared weights as one vector; `whole` may be collective."""
        wrong, size = 0.0, 0.0
        for name, wanted in self.moved[scale].items():
            found = whole(name).to(wanted.device).double() - self.start[name].double()
            wrong += (found - wanted).square().sum().item()
            size += wanted.square().sum().item()
        return (wrong / size) ** 0.5


def muon_names(model: nn.Module) -> list[str]:
    """FQNs of the parameters that go to Muon."""
    return next(g["param_names"] for g in param_groups(model) if g["algorithm"] == "muon")


def make_exact(model_name: str, layers: int | None, device: str = "cpu") -> Exact:
    """Gradients of `STEPS` batches, and the exact change of the matrices of the first `layers` layers (None: all)."""
    model = make_model(model_name, device)
    weights = dict(model.named_parameters())
    names = [n for n in muon_names(model) if layers is None or any(f"layers.{i}." in n for i in range(layers))]
    gradients = []
    for step in range(STEPS):
        batch = tokens(model_name, 31 + step, (4, 64)).to(device)
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        gradients.append({n: weights[n].grad.bfloat16().float() for n in names})  # type: ignore[union-attr]
    start = {n: weights[n].detach().clone() for n in names}
    moved: dict[str, dict[str, torch.Tensor]] = {scale: {} for scale in SCALES}
    for n in names:
        (matrix,) = cut_parameter(n, tuple(start[n].shape))
        momentum = torch.zeros_like(start[n], dtype=torch.float64)
        total = torch.zeros_like(momentum)
        for given in gradients:  # the rule of `optim.reference`, which keeps momentum in fp32
            gradient = given[n].double()
            momentum.lerp_(gradient, 1 - MOMENTUM)
            total += newton_schulz(gradient.lerp(momentum, MOMENTUM), dtype=torch.float64)
        for scale in SCALES:
            moved[scale][n] = -LR * update_scale(scale, matrix) * total
    return Exact(tuple(gradients), start, moved)
