"""A model whose gradients are given: its loss is the sum of its parameters times what it is fed.

So the real DDP, FSDP2 and DeepSpeed average, shard, accumulate and clip, and one process knows what must come out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from muon_dist.fuzz.case import FROZEN, Case, Parameter

Tensors = dict[str, torch.Tensor]
TIED = "_again"
_SIZES = (1.0, 0.125, 8.0)
"""Gradients differ in size between steps, so that clipping changes what momentum is made of."""


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
    """Parameters with numbers that do not change when others are left out."""
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


class Layer(nn.Module):
    """Parameters that one module holds."""

    def __init__(self, parameters: list[Parameter], weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.fqns = {p.name: p.fqn for p in parameters}
        self.tied = {p.name for p in parameters if p.tied}
        for p in parameters:
            made = nn.Parameter(weights[p.fqn].to(dtype, copy=True), requires_grad=p.kind != FROZEN)
            self.register_parameter(p.name, made)
            if p.tied:
                self.register_parameter(p.name + TIED, made)

    def forward(self, fed: Mapping[str, torch.Tensor]) -> torch.Tensor:
        terms = [torch.zeros(())]
        for name, fqn in self.fqns.items():
            if fqn in fed:
                terms += [_product(getattr(self, name), fed[fqn])]
                terms += [_product(getattr(self, name + TIED), fed[fqn])] if name in self.tied else []
        return torch.stack(terms).sum()


def _product(parameter: Any, fed: torch.Tensor) -> torch.Tensor:
    if isinstance(parameter, DTensor):  # this rank's part of the sum is enough: its gradient is this rank's part
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

    def forward(self, fed: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([layer(fed) for layer in self.layers]).sum()


def named(case: Case, model: nn.Module) -> dict[str, Any]:
    """The parameters by FQN, whatever is wrapped around the model; tied ones once."""
    found = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    return {p.fqn: found[p.fqn] for p in case.parameters}
