"""A model with given gradients: its loss is the sum of its parameters times its inputs.

So the real DDP, FSDP2 and DeepSpeed average, shard, accumulate and clip, and one process can compute the right result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from muon_dist.fuzz.case import EXPERTS, FROZEN, Case, Parameter

Tensors = dict[str, torch.Tensor]
TIED = "_again"
_SIZES = (1.0, 0.125, 8.0)
"""Gradients differ in size between steps, so that clipping changes the momentum."""


def _generator(*numbers: int) -> torch.Generator:
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**61 - 1)
    return torch.Generator().manual_seed(seed)


def start(case: Case) -> Tensors:
    """The weights of a case before its first step, by FQN, in fp32; values of the case's dtype."""
    drawn = {p.fqn: 0.5 * torch.randn(p.shape, generator=_generator(case.seed, i)) for i, p in _numbered(case)}
    return {fqn: w.to(getattr(torch, case.dtype)).float() for fqn, w in drawn.items()}


def _numbered(case: Case) -> Iterator[tuple[int, Parameter]]:
    """Parameters with their numbers, which do not change if other parameters are left out."""
    for p in case.parameters:
        yield int.from_bytes(p.name.encode(), "little"), p


def sample(case: Case, step: int, number: int) -> Tensors:
    """The inputs of sample `number` of a step, by FQN; they are the gradients of that sample's loss."""
    found = {}
    for i, p in _numbered(case):
        if p.kind == FROZEN or (step, p.name) in case.missing:
            continue
        given = torch.randn(p.shape, generator=_generator(case.seed, i, step + 1, number))
        if case.exact:
            given = (3 * given).round().clamp(-7, 7)
        given = _SIZES[(case.seed + step) % 3] * given
        for at, name, matrix in case.zero:
            if (at, name) == (step, p.name):
                (given if matrix < 0 else p.matrices(given)[matrix]).zero_()
        found[p.fqn] = given
    return found


class Weight(nn.Module):
    """One parameter in a module like `nn.Linear`, which AutoTP replaces."""

    bias = None

    def __init__(self, value: torch.Tensor, dtype: torch.dtype, trained: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(value.to(dtype, copy=True), requires_grad=trained)

    def forward(self, fed: torch.Tensor) -> torch.Tensor:
        return product(self.weight, fed)


@dataclass(frozen=True)
class Use:
    """One use of a module by a layer.

    Attributes:
        fqn: name of its weight in the whole model. path: path of the module in the layer. key, expert: the input, or
            the expert's part of it along the first axis. part: selects from the input this rank's part of the weight.
    """

    fqn: str
    path: str
    key: str
    expert: int | None = None
    part: Callable[[torch.Tensor], torch.Tensor] | None = None

    def fed(self, fed: Mapping[str, torch.Tensor]) -> torch.Tensor:
        given = fed[self.key] if self.expert is None else fed[self.key][self.expert]
        return given if self.part is None else self.part(given)


class Layer(nn.Module):
    """The parameters of one module.

    Attributes:
        uses: changed by a wrapper that replaces modules.
    """

    def __init__(self, parameters: list[Parameter], weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.uses: list[Use] = []
        for p in parameters:
            made = [Weight(value, dtype, p.kind != FROZEN) for value in pieces(p, weights[p.fqn])]
            self.add_module(p.name, _listed(made) if p.listed else made[0])
            of_layer = f"layers.{p.layer}."
            for i, fqn in enumerate(p.fqns):
                path = fqn.removeprefix(of_layer).removesuffix(".weight")
                self.uses.append(Use(fqn, path, p.fqn, i if p.listed else None))
            if p.tied:
                self.add_module(p.name + TIED, again := Weight(weights[p.fqn], dtype, True))
                again.weight = made[0].weight
                self.uses.append(Use(p.fqn, p.name + TIED, p.fqn))

    def forward(self, fed: Mapping[str, torch.Tensor]) -> torch.Tensor:
        terms = [torch.zeros(())]
        for use in self.uses:
            if use.key in fed:
                module: Any = self.get_submodule(use.path)
                given = use.fed(fed)
                # A module of AutoTP multiplies in another way.
                terms.append(module(given) if isinstance(module, Weight) else product(module.weight, given))
        return torch.stack(terms).sum()


def pieces(p: Parameter, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The parts of a whole tensor in the model's parameters, in the order of `Parameter.fqns`."""
    return list(tensor) if p.listed else [tensor]


def _listed(experts: list[Weight]) -> nn.Module:
    """The experts under the names that a DeepSpeed MoE layer gives them."""
    found: nn.Module = nn.ModuleList(experts)
    for name in reversed(EXPERTS.split(".")):
        found = nn.ModuleDict({name: found})
    return found


def product(parameter: Any, fed: torch.Tensor) -> torch.Tensor:
    if isinstance(parameter, DTensor):  # its gradient is this rank's part, and so is the sum
        mesh = parameter.device_mesh
        whole = DTensor.from_local(fed, mesh, [Replicate()] * mesh.ndim, run_check=False)
        fed = whole.redistribute(placements=parameter.placements).to_local()
        parameter = parameter.to_local()
    return (parameter * fed.to(parameter.dtype)).sum(dtype=torch.float32)


class Model(nn.Module):
    """The model of a case with given weights, by FQN."""

    def __init__(self, case: Case, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        count = 1 + max(p.layer for p in case.parameters)
        dtype = getattr(torch, case.dtype)
        by_layer = ([p for p in case.parameters if p.layer == i] for i in range(count))
        self.layers = nn.ModuleList(Layer(of_layer, weights, dtype) for of_layer in by_layer)

    def forward(self, **fed: torch.Tensor) -> torch.Tensor:  # by name, because AutoTP compares names over its ranks
        return torch.stack([layer(fed) for layer in self.layers]).sum()


def named(model: Any) -> dict[str, Any]:
    """This rank's parameters by their FQN in the whole model; tied ones once. model: without a wrapper."""
    return {use.fqn: layer.get_submodule(use.path).weight for layer in model.layers for use in layer.uses}
