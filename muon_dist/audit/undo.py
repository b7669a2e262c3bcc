"""A step that can be undone."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from muon_dist.optim.adamw import AdamWork
from muon_dist.optim.runtime import Runtime, Work


class Undo:
    """Copies of all tensors that a step changes on this rank: parameters, momentum, state of rules and AdamW."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._rest: list[Callable[[], object]] = []

    @torch.no_grad()
    def keep(
        self,
        runtime: Runtime,
        work: dict[int, Work],
        adamw: dict[int, list[AdamWork]],
        state: MutableMapping[Tensor, dict[str, Any]],
    ) -> None:
        """Copy all state before a step, or before each call if a framework steps its groups in several calls."""
        memory = runtime.memory
        tensors = [w.parameter for w in work.values()] + [runtime.resting]
        tensors += [runtime.momentum[b] for b in work if b in runtime.momentum]
        tensors += [number for b in work for number in memory.numbers[b].values()]
        tensors += [kept for of_name in memory.owners.values() for kept in of_name.values()]
        for parameter, part, _ in (item for of_group in adamw.values() for item in of_group):
            tensors.append(part)
            kept = {key: value for key, value in state[parameter].items() if isinstance(value, Tensor)}
            tensors += kept.values()
            if "exp_avg" not in kept:
                self._rest.append(partial(_drop, state[parameter]))
        self._kept += [(tensor, tensor.detach().clone()) for tensor in tensors]
        self._rest.append(partial(runtime.unmoved.update, set(runtime.unmoved)))
        self._rest.append(partial(memory.started.intersection_update, set(memory.started)))

    @torch.no_grad()
    def restore(self) -> None:
        """Restore all state from the copy, bit for bit."""
        for tensor, kept in self._kept:
            tensor.detach().copy_(kept)
        for rest in self._rest:
            rest()


def _drop(state: dict[str, Any]) -> None:
    for key in ("step", "exp_avg", "exp_avg_sq"):
        state.pop(key, None)
