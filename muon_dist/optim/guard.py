"""Whether a step may be taken: decided by all ranks together, before anything is touched.

A bad step is skipped whole. Multiplying its update by zero would not do: 0 x NaN is NaN, and momentum would keep it.
"""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch

from muon_dist.errors import ConfigError, NonFiniteError
from muon_dist.exchange.readers import Reader
from muon_dist.exchange.transport import Transport
from muon_dist.optim.binding import Group, ParameterSpec
from muon_dist.optim.program import index_on

ABSENT, ZERO, FINITE, NOT_FINITE = 0, 1, 2, 3
"""States of a gradient, by rank: over all ranks the highest counts. ZERO: every element is exactly zero."""
_NAMED = 3  # parameters named in a message, for each rank


@dataclass(frozen=True)
class Split:
    """How the gradient of a buffer with several matrices is looked at, matrix by matrix.

    Attributes:
        reader: of this rank's fragments in the gradient.
        slots: of each fragment, the place of its matrix among `matrices`.
        matrices: of the buffer, on all ranks the same.
    """

    reader: Reader
    slots: Sequence[int]
    matrices: Sequence[int]


@dataclass(frozen=True)
class Allowed:
    """The result of the check before a step that may be made.

    Attributes:
        present: whether each parameter has a gradient on some rank.
        zero: matrices of which the gradient is exactly zero on all ranks.
        alike: False if rates, or norms of gradients that should be copies, differ between ranks.
    """

    present: Sequence[bool]
    zero: Set[int]
    alike: bool = True


class StepGuard:
    """Decides about each optimizer step, once, also where a framework makes one step of many calls.

    max_nonfinite: so many steps in a row with a gradient that is NaN or infinite end the run.

    Attributes:
        veto: asked at the start of each step; True leaves it out. The same answer on every rank is up to the caller.
        skipped: steps left out for a gradient that was not finite, since the start.
        vetoed: steps left out by `veto`, since the start.
        in_a_row: steps left out for their gradients since the last good one.
        applied: False when the current step is skipped.
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
        """State for a resumed run."""
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
        matrices: Sequence[Split | int | None],
        copies: bool = False,
        rates: Sequence[float] = (),
    ) -> Allowed | None:
        """Which of `parameters` have a gradient on some rank; None when the step is to be left out. A collective.

        Args:
            parameters: of this call, the same on every rank; a parameter seen again begins a new step.
            gradients: this rank's part of the gradient of each.
            names: of the parameters, asked for a message only.
            agreed: whether all gradients of the step are finite, where the framework has found out for all ranks.
            complete: every rank has the same gradients present, so they need not be compared.
            matrices: of each parameter, its matrix, a `Split` if it has several, or None under AdamW.
            copies: every rank has the same gradients. Their norms, which are taken anyway, are compared.
            rates: of the parameter groups; compared.

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
        looks = self.begins and agreed is None
        if not looks and complete and all(m is None for m in matrices):
            return Allowed([g is not None for g in gradients], frozenset())
        flags, total = states(gradients, matrices, transport.device)
        words = torch.full((1,), crc32(struct.pack(f"{len(rates)}d", *rates)), device=transport.device)
        if copies:
            words = torch.cat([words, total.view(torch.int64)])
        found, alike = transport.highest(flags, words)
        if looks and NOT_FINITE not in found:
            self.in_a_row = 0
        elif looks and not self._look_closer(transport, gradients, matrices, names):  # on all ranks
            return None
        present, zero, at = [], set(), 0
        for m in matrices:
            of_parameter = m.matrices if isinstance(m, Split) else (m,)
            slots = found[at : at + len(of_parameter)]
            present.append(max(slots) > ABSENT)
            zero |= {i for i, state in zip(of_parameter, slots, strict=True) if i is not None and state == ZERO}
            at += len(slots)
        return Allowed(present, zero, alike)

    def _look_closer(
        self,
        transport: Transport,
        gradients: Sequence[torch.Tensor | None],
        matrices: Sequence[Split | int | None],
        names: Callable[[], list[str]],
    ) -> bool:
        """Whether all gradients are finite on all ranks, by their elements: a norm may have overflowed."""
        exact, _ = states(gradients, matrices, transport.device, exact=True)
        own = [int(v) for v in exact.tolist()]
        found, _ = transport.highest(exact)
        lengths = [len(m.matrices) if isinstance(m, Split) else 1 for m in matrices]

        def text() -> str:
            every = [n for n, length in zip(names(), lengths, strict=True) for _ in range(length)]
            return where(transport, own, every)

        self._count(transport, NOT_FINITE not in found, text)
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


@torch.no_grad()
def states(
    gradients: Sequence[torch.Tensor | None],
    matrices: Sequence[Split | int | None],
    device: torch.device,
    *,
    exact: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ABSENT, ZERO, FINITE or NOT_FINITE for each gradient or, where it has several matrices, for each of these.

    One pass over the elements, on `device` as uint8. On a CPU it goes by the norm in fp32, which is not finite if an
    element is not. It may overflow (elements beyond 1e19): `exact` looks at the elements, at several times the cost.

    The second result is the sum of the norms that were taken, one fp64 number: equal where the gradients are.
    """
    found: list[torch.Tensor] = []
    slots: list[int] = []
    count = 0
    for g, m in zip(gradients, matrices, strict=True):
        if isinstance(m, Split):
            if g is not None:
                found += m.reader.views(g)
                slots += [count + slot for slot in m.slots]
            count += len(m.matrices)
            continue
        if g is not None:
            dense = g.coalesce().values() if g.is_sparse else g
            found.append(torch.view_as_real(dense) if dense.is_complex() else dense)
            slots.append(count)
        count += 1
    if not found:
        return torch.zeros(count, dtype=torch.uint8, device=device), torch.zeros(1, dtype=torch.float64, device=device)
    if found[0].device.type == "cpu":
        values, total = (tensor.to(device) for tensor in _on_the_host(found, exact))
    else:
        # The largest magnitude is exact for all of it; on an accelerator it costs what any norm costs.
        alike = all(g.dtype == found[0].dtype and g.device == found[0].device for g in found)
        ends = torch._foreach_norm(found, torch.inf) if alike else [_largest(g) for g in found]
        largest = torch.stack([e.to(device) for e in ends] if not alike else list(ends)).to(device)
        values = torch.where(torch.isfinite(largest), torch.where(largest == 0, ZERO, FINITE), NOT_FINITE)
        values, total = values.to(torch.uint8), largest.sum(0, keepdim=True, dtype=torch.float64)
    if slots == list(range(count)):
        return values, total
    out = torch.zeros(count, dtype=torch.uint8, device=device)
    return out.scatter_reduce_(0, index_on(device, tuple(slots)), values, "amax"), total


def _largest(g: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(g, ord=torch.inf) if g.numel() else g.new_zeros(())


def _on_the_host(gradients: Sequence[torch.Tensor], exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The states of gradients on a CPU, and the sum of their norms.

    A norm of zero is looked at again: squares of tiny elements vanish.
    """
    found: list[int] = []
    narrow = any(g.dtype.itemsize == 2 for g in gradients)
    if exact:
        norms = [0.0 if bool(torch.isfinite(g).all()) else float("nan") for g in gradients]
    elif narrow:  # the norm in fp32 first copies the whole gradient; the ends of its range take a third of the time
        norms = [float(torch.maximum(g.amax(), -g.amin())) if g.numel() else 0.0 for g in gradients]
    elif all(g.dtype == gradients[0].dtype and g.device == gradients[0].device for g in gradients):
        dtype = torch.promote_types(gradients[0].dtype, torch.float32)
        norms = torch.stack(list(torch._foreach_norm(list(gradients), 2, dtype=dtype))).tolist()
    else:
        norms = [float(torch.linalg.vector_norm(g)) for g in gradients]
    for g, norm in zip(gradients, norms, strict=True):
        if not math.isfinite(norm):
            found.append(NOT_FINITE)
        else:
            found.append(FINITE if norm > 0 or bool(g.any()) else ZERO)
    return torch.tensor(found, dtype=torch.uint8), torch.tensor([sum(norms)], dtype=torch.float64)


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
