"""Reads a followed matrix from any framework.

A source returns whole tensors: the weight before and after a step, and the gradient that the optimizer will use. It
only adds hooks to the step, and changes nothing. All ranks call it with the same arguments; reading is a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from muon_dist.audit.asked import is_muon_group
from muon_dist.audit.cause import Cause, Factor
from muon_dist.audit.memory import BASE
from muon_dist.checkpoint.piece import clean_name
from muon_dist.errors import FrameworkError

Names = Sequence[str]


@dataclass(frozen=True)
class Circumstances:
    """Facts that a framework reports about its last step.

    Attributes:
        applied: False if the step was skipped, for instance after an overflow.
        factors: numbers that may multiply an update by mistake.
        clip: coefficient of the gradient clip, 1 without a clip.
        scale: loss scale of this step; by mistake its gradients may have been divided by it twice.
    """

    applied: bool = True
    factors: tuple[Factor, ...] = ()
    clip: float = 1.0
    scale: float = 1.0


class Source(Protocol):
    """One framework's optimizer and parameters.

    Attributes:
        matrices: name -> stored shape of every two-dimensional trained parameter.
        claimed: names of the matrices that the optimizer's groups give to Muon.
        group: process group of the ranks that hold the same model; None without a group.
        gradient_eps: relative rounding difference between the gradient read here and the gradient of the optimizer.
    """

    @property
    def matrices(self) -> Mapping[str, tuple[int, int]]: ...

    @property
    def claimed(self) -> Sequence[str]: ...

    group: dist.ProcessGroup | None
    gradient_eps: float

    def listen(self, before: Callable[[Names], None], after: Callable[[Names], None]) -> None:
        """Call `before` and `after` around every step, with the names of the stepped matrices."""

    def follow(self, names: Names) -> None:
        """Start recording the data of these matrices."""

    def on_save(self, call: Callable[[], None]) -> None:
        """Call `call` whenever the optimizer's state is saved."""

    def gradients(self, name: str) -> dict[str, Tensor] | None:
        """Whole gradients by label of `audit.memory`, including "base"; None without a gradient."""

    def weight(self, name: str) -> Tensor:
        """A copy of the whole weight, in the best stored precision."""

    def weight_eps(self, name: str) -> float:
        """Machine epsilon of the precision of `weight`."""

    def options(self, name: str) -> Mapping[str, Any]:
        """The parameter group of a matrix."""

    def shards(self, name: str) -> tuple[int, ...]:
        """Possible numbers of ranks over which the framework or the optimizer shards the matrix."""

    def circumstances(self) -> Circumstances:
        """Facts about the last step."""

    def close(self) -> None:
        """Remove the hooks."""


def world_group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def size_of_group(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor, gathered if it is a DTensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def shared_factors(ranks: int, accumulation: int = 1, scale: float = 1.0) -> tuple[Factor, ...]:
    """Factors of mistakes with the world size, gradient accumulation and the loss scale."""
    found = []
    for value, what in ((ranks, f"the {ranks} ranks"), (accumulation, f"the {accumulation} micro-batches")):
        if value > 1:
            found.append(Factor(Cause("summed", f"multiplied by the number of {what}"), float(value)))
            found.append(Factor(Cause("divided", f"divided by the number of {what}"), 1.0 / value))
    if scale != 1.0:
        found.append(Factor(Cause("loss_scale", f"multiplied by the loss scale, {scale:.6g}"), scale))
        found.append(Factor(Cause("loss_scale", f"divided by the loss scale, {scale:.6g}"), 1.0 / scale))
    return tuple(found)


@dataclass
class TorchSource:
    """Source for torch optimizers: plain loops, DDP, and DTensors of FSDP2, HSDP or tensor parallelism.

    The gradient is `p.grad` at the beginning of the step, after clipping: the same tensor that the optimizer reads.
    """

    optimizers: Sequence[torch.optim.Optimizer]
    model: nn.Module | None = None
    clip: float | None = None
    gradient_eps: float = 0.0
    matrices: dict[str, tuple[int, int]] = field(default_factory=dict)
    claimed: list[str] = field(default_factory=list)
    _parameters: dict[str, Tensor] = field(default_factory=dict)
    _homes: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> optimizer, group
    _hooks: list[Any] = field(default_factory=list)
    _norm: float = 0.0

    def __post_init__(self) -> None:
        self.group = world_group()
        names = {id(p): clean_name(n) for n, p in self.model.named_parameters()} if self.model is not None else {}
        for i, optimizer in enumerate(self.optimizers):
            for j, group in enumerate(optimizer.param_groups):
                for k, p in enumerate(group["params"]):
                    if p.ndim != 2 or not p.requires_grad or p.numel() == 0:
                        continue
                    known = group.get("param_names")
                    name = names.get(id(p)) or (known[k] if known else f"optimizer {i}, group {j}, parameter {k}")
                    self.matrices[name] = (p.size(0), p.size(1))
                    self._parameters[name], self._homes[name] = p, (i, j)
                    if is_muon_group(group, type(optimizer).__name__):
                        self.claimed.append(name)
        if not self.matrices:
            raise FrameworkError(
                "the witness found no two-dimensional parameter in the optimizer's groups: it reads plain tensors and "
                "DTensors; under DeepSpeed give it the engine instead of the optimizer"
            )

    def listen(self, before: Callable[[Names], None], after: Callable[[Names], None]) -> None:
        for i, optimizer in enumerate(self.optimizers):
            own = [n for n, home in self._homes.items() if home[0] == i]

            def enter(*_: Any, own: list[str] = own) -> None:
                self._norm = self._gradient_norm()
                before(own)

            def leave(*_: Any, own: list[str] = own) -> None:
                after(own)

            self._hooks += [optimizer.register_step_pre_hook(enter), optimizer.register_step_post_hook(leave)]

    def follow(self, names: Names) -> None:
        """Do nothing: all gradients exist at the beginning of the step."""

    def on_save(self, call: Callable[[], None]) -> None:
        for optimizer in self.optimizers:
            self._hooks.append(optimizer.register_state_dict_pre_hook(lambda _: call()))

    def gradients(self, name: str) -> dict[str, Tensor] | None:
        gradient = self._parameters[name].grad
        return None if gradient is None else {BASE: whole(gradient).double()}

    def weight(self, name: str) -> Tensor:
        return whole(self._parameters[name]).double()

    def weight_eps(self, name: str) -> float:
        return torch.finfo(self._parameters[name].dtype).eps

    def options(self, name: str) -> Mapping[str, Any]:
        i, j = self._homes[name]
        return self.optimizers[i].param_groups[j]

    def shards(self, name: str) -> tuple[int, ...]:
        p = self._parameters[name]
        sizes = {size_of_group(self.group)}
        if isinstance(p, DTensor):
            sizes |= {p.device_mesh.size(d) for d, place in enumerate(p.placements) if place.is_shard()}
        return tuple(sorted(s for s in sizes if s > 1))

    def circumstances(self) -> Circumstances:
        factors = shared_factors(size_of_group(self.group))
        if self.clip is not None and self._norm > self.clip:
            cause = Cause("clipped_update", "clipped after orthogonalization")
            factors = (Factor(cause, self.clip / self._norm), *factors)
        return Circumstances(factors=factors)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _gradient_norm(self) -> float:
        """The norm of all gradients, if clipping is used."""
        if self.clip is None:
            return 0.0
        found = [p.grad for o in self.optimizers for g in o.param_groups for p in g["params"] if p.grad is not None]
        return float(torch.stack([whole(g.norm()).double() for g in found]).norm()) if found else 0.0
