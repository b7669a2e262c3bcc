"""Follows some elements of the next audited tensors from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from muon_dist.layout import view
from muon_dist.optim.adamw import AdamWork
from muon_dist.optim.binding import Binding
from muon_dist.optim.runtime import Runtime, Work

_SIDE = 8
"""Largest number of rows, and of columns, followed per matrix on each rank."""
Samples = dict[str, Tensor]
"""Followed elements by tensor: "momentum" and "weight", or "moments" and "steps" of AdamW."""


@dataclass(frozen=True)
class Changed:
    """The tensors that other code changed between two steps.

    Attributes:
        of: names of the changed tensors in `Samples`.
        resumed: whether the run was resumed between these steps.
    """

    of: frozenset[str] = frozenset()
    resumed: bool = False


@dataclass
class Track:
    """One followed tensor. number: number of the tensor; -1: none yet."""

    number: int = -1
    _left: Samples | None = None
    _gaps: Samples = field(default_factory=dict)
    _resumed: bool = False

    def forget(self, name: str | None = None) -> None:
        """Drop the samples of this name, or all: other code has written these tensors."""
        if name is None:
            self._left, self._gaps, self._resumed = None, {}, False
        elif self._left is not None:
            self._left.pop(name, None)

    def before(self, now: Samples) -> None:
        """Compare with the recorded samples; called at the beginning of a step."""
        left = self._left or {}
        if {name: t.shape for name, t in now.items() if name in left} != {name: t.shape for name, t in left.items()}:
            return
        for name, kept in left.items():
            gap = (now[name].float() - kept.to(now[name].device)).abs().amax()
            self._gaps[name] = gap.maximum(self._gaps[name]) if name in self._gaps else gap

    def after(self, number: int, now: Samples | None) -> None:
        """Record samples at the end of a step. number: the next audited tensor. now: None if not in this call."""
        if number != self.number:
            self.forget()
            self.number = number
        if now is not None:
            self._left = {name: t.detach().float().clone() for name, t in now.items()}

    def changed(self) -> Changed:
        """The tensors that were changed since the last call of this method."""
        found = frozenset(name for name, gap in self._gaps.items() if float(gap) != 0.0)
        self._gaps = {}
        return Changed(found, self._resumed)

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number, "left": self._left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.forget()
        self.number, left = int(state["number"]), state["left"]
        self._left = None if left is None else {name: t.clone() for name, t in left.items()}
        self._resumed = True


class Follow:
    """Compares momentum, weight and AdamW's moments at the beginning of a step with their values after the last step.

    It does not make the host wait and sends nothing: `changed` is called only in an audited step.

    Attributes:
        matrix, parameter: the next audited Muon matrix and AdamW parameter.
    """

    def __init__(self) -> None:
        self.matrix, self.parameter = Track(), Track()

    def forget(self) -> None:
        """Drop all samples, after a load of the state."""
        self.matrix.forget()
        self.parameter.forget()

    def state_dict(self) -> dict[str, Any]:
        """The samples of this rank, with which a resumed run compares its state."""
        return {"matrix": self.matrix.state_dict(), "parameter": self.parameter.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare the next step with the momentum, weight and moments of the saved run."""
        for name, track in (("matrix", self.matrix), ("parameter", self.parameter)):
            if name in state:
                track.load_state_dict(state[name])


def of_matrix(runtime: Runtime, work: Mapping[int, Work], number: int) -> Samples | None:
    """Samples of a Muon matrix; None if it is not in this call."""
    if number < 0:
        return None
    held = runtime.plan.layout.matrices[number]
    if held.buffer not in work:
        return None
    found: Samples = {}
    momentum = [v for m, _, v in runtime.momentum_pieces(held.buffer) if m == held.matrix]
    if momentum:
        found["momentum"] = momentum[0]
    parameter, fragments = work[held.buffer].parameter.detach(), held.on(runtime.transport.rank)
    if len(fragments) and parameter.is_contiguous():
        found["weight"] = view(parameter, fragments[0].local)
    return {name: t[:: -(-t.size(0) // _SIDE), :: -(-t.size(1) // _SIDE)] for name, t in found.items() if t.numel()}


def of_parameter(
    binding: Binding, adamw: Mapping[int, Sequence[AdamWork]], state: Mapping[Tensor, Any], parameter: Tensor | None
) -> Samples | None:
    """Samples of an AdamW parameter; None if it is not in this call."""
    if parameter is None or not any(p is parameter for items in adamw.values() for p, _, _ in items):
        return None
    kept = state.get(parameter, {})
    if "exp_avg" not in kept or not (flat := binding.local(kept["exp_avg"]).detach().reshape(-1)).numel():
        return {}
    return {"moments": flat[:: -(-flat.numel() // _SIDE**2)], "steps": kept["step"].reshape(1)}
