"""One interface to every optimizer under every sharding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import muon_dist.optim.muon as ours
from muon_dist.bench.cases import LR, NS_DTYPES, Case
from muon_dist.optim.groups import param_groups

OURS, ADAMW = "muon-dist", "AdamW"


@dataclass(frozen=True)
class Built:
    """Optimizers that together step a model.

    Attributes:
        optimizers: stepped one after another.
        calls: matrices orthogonalized by this process so far.
        scale: the update's factor, of `update_scale`.
    """

    optimizers: Sequence[torch.optim.Optimizer]
    calls: Callable[[], int]
    scale: str


Builder = Callable[[nn.Module, Case], Built]
"""Makes the optimizers for a model whose parameters are already wrapped by the framework."""


class Side(ABC):
    """One optimizer on one model under one sharding, stepped in turn with others in the same process.

    Attributes:
        works_in_backward: some of the optimizer's work may be done by `backward`.
        scale: the update's factor, of `update_scale`.
    """

    works_in_backward = False
    scale = "match_rms_adamw"

    @abstractmethod
    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Forward, with gradients cleared before."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Backward, with the framework's own reduction of gradients."""

    @abstractmethod
    def step(self) -> None:
        """The optimizer's step."""

    @abstractmethod
    def calls(self) -> int:
        """Matrices orthogonalized by this process so far."""

    @abstractmethod
    def give(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """From now on use these full gradients, by FQN, instead of backward's; {}: use backward's."""

    @abstractmethod
    def whole(self, name: str) -> torch.Tensor:
        """The fp32 weight of that FQN; a collective."""

    @abstractmethod
    def momentum_bytes(self) -> int:
        """Bytes of Muon's momentum on this rank."""

    def close(self) -> None:  # noqa: B027  (most have nothing to release)
        """Release the framework's resources."""


def momentum_bytes(optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Bytes of this rank's part of all `momentum_buffer`s."""
    total = 0
    for optimizer in optimizers:
        for state in optimizer.state.values():
            buffer = state.get("momentum_buffer")
            if isinstance(buffer, torch.Tensor):
                local = buffer.to_local() if hasattr(buffer, "to_local") else buffer
                total += local.numel() * local.element_size()
    return total


class PlainSide(Side):
    """Frameworks that leave `p.grad` to the optimizer: DDP, FSDP2.

    Args:
        called: the module that is called, either the wrapper or the model itself. model: the model, whose parameter
            names are used. built: its optimizers.
    """

    def __init__(self, called: nn.Module, model: nn.Module, built: Built) -> None:
        self.called = called
        self.parameters: dict[str, Any] = dict(model.named_parameters())
        self.built = built
        self.scale = built.scale
        self._given: Mapping[str, torch.Tensor] = {}

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        for optimizer in self.built.optimizers:
            optimizer.zero_grad()
        return self.called(input_ids=tokens, labels=tokens).loss

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        for name, gradient in self._given.items():
            self.replace(self.parameters[name], gradient)

    def step(self) -> None:
        for optimizer in self.built.optimizers:
            optimizer.step()

    def calls(self) -> int:
        return self.built.calls()

    def give(self, gradients: Mapping[str, torch.Tensor]) -> None:
        self._given = gradients

    def replace(self, parameter: Any, gradient: torch.Tensor) -> None:
        """Replace this rank's part of the parameter's gradient by its part of a full gradient."""
        parameter.grad.copy_(gradient)

    def whole(self, name: str) -> torch.Tensor:
        return self.parameters[name].detach()

    def momentum_bytes(self) -> int:
        return momentum_bytes(self.built.optimizers)


def build_ours(model: nn.Module, case: Case) -> Built:
    """muon_dist.Muon."""
    groups = param_groups(model, lr=LR, weight_decay=0.0)
    optimizer = ours.Muon(groups, ns_dtype=NS_DTYPES[case.ns_dtype])
    return Built([optimizer], lambda: optimizer.orthogonalized, "match_rms_adamw")


def build_adamw(model: nn.Module, case: Case) -> Built:
    """torch.optim.AdamW, fused: the fastest AdamW for the same tensors."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    return Built([optimizer], lambda: 0, "none")


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(Muon's parameters, the others), by our routing."""
    muon: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for group in param_groups(model):
        (muon if group["algorithm"] == "muon" else others).extend(group["params"])
    return muon, others


class Calls:
    """Replaces a function of another package and counts the matrices that it orthogonalizes."""

    def __init__(self, module: Any, name: str) -> None:
        self.count = 0
        original = getattr(module, name)

        def counted(matrix: Any, *args: Any, **kwargs: Any) -> Any:
            shape = matrix.shape
            self.count += shape[0] if len(shape) == 3 else 1
            return original(matrix, *args, **kwargs)

        setattr(module, name, counted)

    def __call__(self) -> int:
        return self.count


def on_mesh(device: str) -> Any:
    """A one-dimensional mesh of all ranks' devices."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device, (dist.get_world_size(),))
