"""Whether a step may be taken: decided by all ranks together, before anything is touched.

A bad step is left out whole. Multiplying its update by zero would not do: 0 x NaN is NaN, and momentum would keep it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from muon_dist.errors import ConfigError, NonFiniteError
from muon_dist.exchange.transport import Transport
from muon_dist.optim.binding import Group, ParameterSpec

ABSENT, FINITE, NOT_FINITE = 0, 1, 2
_NAMED = 3  # parameters named in a message, for each rank


class StepGuard:
    """Decides about each optimizer step, once, also where a framework makes one step of many calls.

    max_nonfinite: so many steps in a row with a gradient that is NaN or infinite end the run.

    Attributes:
        veto: asked at the start of each step; True leaves it out. The same answer on every rank is up to the caller.
        skipped: steps left out for a gradient that was not finite, since the start.
        vetoed: steps left out by `veto`, since the start.
        in_a_row: steps left out for their gradients since the last good one.
        applied: False when the current step is left out.
        begins: True in the first call of a step.
    """

    def __init__(self, max_nonfinite: int) -> None:
        if max_nonfinite < 1:
            raise ConfigError(f"max_nonfinite is {max_nonfinite}: it must be at least 1")
        self.max_nonfinite = max_nonfinite
        self.veto: Callable[[], bool] | None = None
        self.skipped = self.vetoed = self.in_a_row = 0
        self.applied = self.begins = True
        self._seen: set[int] = set()

    def state_dict(self) -> dict[str, int]:
        """What a resumed run must know."""
        return {"skipped": self.skipped, "vetoed": self.vetoed, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the counters of a saved run over."""
        self.skipped, self.vetoed = int(state["skipped"]), int(state["vetoed"])
        self.in_a_row = int(state["in_a_row"])

    def allows(
        self,
        transport: Transport,
        parameters: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
        names: Callable[[], list[str]],
        *,
        agreed: bool | None,
        complete: bool,
    ) -> list[bool] | None:
        """Which of `parameters` have a gradient on some rank; None when the step is to be left out. A collective.

        Args:
            parameters: of this call, the same on every rank; a parameter seen again begins a new step.
            gradients: this rank's part of the gradient of each.
            names: of the parameters, asked for a message only.
            agreed: whether all gradients of the step are finite, where the framework has found out for all ranks.
            complete: every rank has the same gradients present, so they need not be compared.

        Raises:
            NonFiniteError: on all ranks, after `max_nonfinite` bad steps in a row; names ranks and parameters.
        """
        keys = {id(p) for p in parameters}
        self.begins = not self._seen or bool(self._seen & keys)
        self._seen = keys if self.begins else self._seen | keys
        if self.begins:
            self.applied = not (self.veto is not None and self.veto())
            self.vetoed += not self.applied
            if agreed is not None and self.applied:
                norm = "the gradient norm over all parameters, as the framework took it, on every rank"
                self._count(transport, agreed, lambda: norm)
        if not self.applied:
            return None
        if self.begins and agreed is None:
            found = transport.highest(states(gradients, transport.device))
            if NOT_FINITE not in found:
                self.in_a_row = 0
            elif not self._look_closer(transport, gradients, names):  # on all ranks alike
                return None
        elif complete:
            return [g is not None for g in gradients]
        else:
            flags = torch.tensor([g is not None for g in gradients], dtype=torch.uint8, device=transport.device)
            found = transport.highest(flags)
        return [v > ABSENT for v in found]

    def _look_closer(
        self, transport: Transport, gradients: Sequence[torch.Tensor | None], names: Callable[[], list[str]]
    ) -> bool:
        """Whether all gradients are finite on all ranks, by their elements: a norm may have overflowed."""
        exact = states(gradients, transport.device, exact=True)
        own = [int(v) for v in exact.tolist()]
        found = transport.highest(exact)
        self._count(transport, NOT_FINITE not in found, lambda: where(transport, own, names()))
        return self.applied

    def _count(self, transport: Transport, good: bool, what: Callable[[], str]) -> None:
        self.applied = good
        if good:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        text = what()
        if self.in_a_row >= self.max_nonfinite:
            raise NonFiniteError(
                f"gradients were NaN or infinite in {self.in_a_row} optimizer steps in a row (max_nonfinite): {text}. "
                "Nothing was changed by those steps. Lower the learning rate, or look at the data of these steps"
            )
        if transport.rank == 0:
            warnings.warn(
                f"optimizer step left out ({self.in_a_row} in a row): NaN or infinite: {text}. Parameters and state "
                "are unchanged",
                RuntimeWarning,
                stacklevel=4,
            )


def _ends_are_finite(g: torch.Tensor) -> torch.Tensor:
    if g.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=g.device)
    return torch.isfinite(g.amax()) & torch.isfinite(g.amin())


@torch.no_grad()
def states(gradients: Sequence[torch.Tensor | None], device: torch.device, *, exact: bool = False) -> torch.Tensor:
    """ABSENT, FINITE or NOT_FINITE for each gradient, as uint8 on `device`; one pass over the elements.

    By the norm in fp32, which is not finite if an element is not. It may overflow (elements beyond 1e19): `exact`
    looks at the elements, at several times the cost.
    """
    found = [g.coalesce().values() if g.is_sparse else g for g in gradients if g is not None]
    places = [i for i, g in enumerate(gradients) if g is not None]
    out = torch.zeros(len(gradients), dtype=torch.uint8, device=device)
    if not found:
        return out
    if exact:
        good = torch.stack([torch.isfinite(g).all().to(device) for g in found])
    elif any(g.device.type == "cpu" and g.dtype.itemsize == 2 for g in found):
        # On a CPU the norm in fp32 first copies the whole gradient; the ends of its range take a third of the time.
        good = torch.stack([_ends_are_finite(g).to(device) for g in found])
    elif all(g.dtype == found[0].dtype and g.device == found[0].device for g in found):
        good = torch.isfinite(torch.stack(list(torch._foreach_norm(found, 2, dtype=torch.float32))))
    else:
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32).to(device) for g in found]
        good = torch.isfinite(torch.stack(norms))
    values = torch.where(good.to(device), FINITE, NOT_FINITE).to(torch.uint8)
    if len(places) == len(gradients):
        return values
    out[torch.tensor(places, device=device)] = values
    return out


def where(transport: Transport, own: Sequence[int], names: Sequence[str]) -> str:
    """ "h.0.weight on rank 2", from what every rank found; a collective."""
    bad = [name for name, state in zip(names, own, strict=True) if state == NOT_FINITE]
    every = transport.ranks.gather(bad)
    holders: dict[str, list[int]] = {}
    for rank, found in enumerate(every):
        for name in found:
            holders.setdefault(name, []).append(rank)
    parts = []
    for name, ranks in list(holders.items())[:_NAMED]:
        if len(ranks) == transport.world_size > 1:
            parts.append(f"{name} on all {len(ranks)} ranks (averaged before it was looked at)")
        else:
            parts.append(f"{name} on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}")
    more = len(holders) - len(parts)
    return "; ".join(parts) + (f"; and {more} more parameters" if more else "")


def parameter_names(
    groups: Sequence[Group], specs: Sequence[Sequence[ParameterSpec]], group_of: Sequence[int]
) -> list[str]:
    """For messages, of stepped tensors by their group: FQNs, or the group's name where a framework flattened it."""
    names: list[str] = []
    for index in dict.fromkeys(group_of):
        count = group_of.count(index)
        if count == len(specs[index]):
            names += [s.name for s in specs[index]]
        else:
            names += [f"group '{groups[index].get('name', index)}'"] * count
    return names
