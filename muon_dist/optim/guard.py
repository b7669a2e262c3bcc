"""Whether to make a step: all ranks decide together, before anything changes.

A step with a bad gradient is skipped as a whole. Its update cannot be multiplied by zero instead: 0 x NaN is NaN, and
momentum would keep the NaN.
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
"""States of a gradient on one rank; the maximum over all ranks decides. ZERO: every element is exactly zero."""
_NAMED = 3  # parameters named in a message


@dataclass(frozen=True)
class Split:
    """The fragments of a buffer with several matrices, so that its gradient is checked matrix by matrix.

    Attributes:
        reader: reads this rank's fragments from the gradient.
        slots: per fragment, the index of its matrix in `matrices`.
        matrices: the matrices of the buffer, equal on all ranks.
    """

    reader: Reader
    slots: Sequence[int]
    matrices: Sequence[int]


@dataclass(frozen=True)
class Allowed:
    """The result of the check, if the step may be made.

    Attributes:
        present: per parameter, whether some rank has a gradient.
        zero: matrices whose gradient is exactly zero on all ranks.
        alike: False if rates, or norms of gradients that should be equal, differ between ranks.
    """

    present: Sequence[bool]
    zero: Set[int]
    alike: bool = True


class StepGuard:
    """Decides once per optimizer step whether it is made, even if a framework splits a step into several calls.

    max_nonfinite: number of steps in a row with NaN or infinite gradients after which the run fails.

    Attributes:
        veto: called at the start of each step; True skips the step. It must return the same on every rank.
        skipped: steps skipped because of NaN or infinite gradients, since the start.
        vetoed: steps skipped by `veto`, since the start.
        in_a_row: steps skipped because of NaN or infinite gradients, since the last good step.
        applied: False while the current step is skipped.
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
        """Restore the counters of a saved run."""
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
        """The gradients that the step may use; None if the step is skipped. A collective.

        Args:
            parameters: the parameters of this call, the same on every rank. A repeated parameter starts a new step.
            gradients: this rank's part of each parameter's gradient; None where it has none.
            names: returns the parameters' names; called only for a message.
            agreed: whether all gradients of the step are finite, if the framework has checked this on all ranks;
                else None.
            complete: gradients are present for the same parameters on all ranks, so this is not compared.
            matrices: per parameter, its matrix, a `Split` if it has several, or None under AdamW.
            copies: every rank has equal gradients; their norms, computed for the check anyway, are compared.
            rates: rates of the parameter groups; compared between ranks.

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
                norm = "the gradient norm over all parameters, computed by the framework, on every rank"
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
        """Whether all elements of all gradients are finite on all ranks: a norm may only have overflowed."""
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
                "These steps changed nothing. Lower the learning rate, or look at the data of these steps"
            )
        if transport.rank == 0:
            warnings.warn(
                f"optimizer step skipped ({self.in_a_row} in a row): NaN or infinite: {text}. Parameters and state "
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
    """Per gradient, or per matrix if a gradient has several: ABSENT, ZERO, FINITE or NOT_FINITE, uint8 on `device`.

    One pass over the elements. On a CPU the fp32 norm decides: it is not finite if an element is not. It may also
    overflow (elements above 1e19): `exact` checks the elements instead, which costs several times as much.

    The second result is the sum of the norms, (1,) in fp64: equal on ranks with equal gradients.
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
        # The largest magnitude cannot overflow; on an accelerator it costs the same as any other norm.
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

    If a norm is zero, the elements are checked too: squares of tiny elements underflow to zero.
    """
    found: list[int] = []
    narrow = any(g.dtype.itemsize == 2 for g in gradients)
    if exact:
        norms = [0.0 if bool(torch.isfinite(g).all()) else float("nan") for g in gradients]
    elif narrow:  # the fp32 norm would copy the whole gradient; minimum and maximum take a third of the time
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
    """Text that names the bad parameters of all ranks, such as "h.0.weight on rank 2"; a collective."""
    bad = [name for name, state in zip(names, own, strict=True) if state == NOT_FINITE]
    every = transport.ranks.gather(bad)
    holders: dict[str, list[int]] = {}
    for rank, found in enumerate(every):
        for name in found:
            holders.setdefault(name, []).append(rank)
    parts = []
    for name, ranks in list(holders.items())[:_NAMED]:
        if len(ranks) == transport.world_size > 1:
            parts.append(f"{name} on all {len(ranks)} ranks (averaged before it was checked)")
        else:
            parts.append(f"{name} on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}")
    more = len(holders) - len(parts)
    return "; ".join(parts) + (f"; and {more} more parameters" if more else "")


def parameter_names(
    groups: Sequence[Group], specs: Sequence[Sequence[ParameterSpec]], group_of: Sequence[int]
) -> list[str]:
    """Names of the stepped tensors for messages: FQNs, or the group's name if a framework has flattened the group."""
    names: list[str] = []
    for index in dict.fromkeys(group_of):
        count = group_of.count(index)
        if count == len(specs[index]):
            names += [s.name for s in specs[index]]
        else:
            names += [f"group '{groups[index].get('name', index)}'"] * count
    return names
