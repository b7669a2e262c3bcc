"""16-bit weights: fp32 masters, stochastic rounding, or a warning that plain rounding loses updates."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from muon_dist.errors import ConfigError
from muon_dist.optim.adamw import adamw_state
from muon_dist.optim.binding import Binding
from muon_dist.optim.options import Options
from muon_dist.optim.rounding import AdamWRounding, is_narrow, is_rounded, rows_within

MASTER = "master_weight"
"""Key of a 16-bit parameter's fp32 master in the optimizer's state."""
MOMENTS = ("exp_avg", "exp_avg_sq")
State = MutableMapping[Tensor, dict[str, Any]]
_CHUNK = 2**22


class MasterWeights:
    """fp32 masters of 16-bit parameters: a step updates the masters and rounds them into the parameters.

    A master is stored in the optimizer's `state` under `MASTER`, on the device and with the sharding of its parameter.
    If other code changes elements of the parameter between steps (a load, an average of weights), the master takes
    these values.

    Args:
        state: returns the optimizer's state; called every time, because a load replaces it.
        local: returns this rank's part of a parameter or of its master.
    """

    def __init__(self, state: Callable[[], State], local: Callable[[Tensor], Tensor]) -> None:
        self._state = state
        self._local = local
        self._opened: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def of(self, parameter: Tensor) -> Tensor:
        """The master of a 16-bit parameter as the state stores it; created if it is missing."""
        state = self._state()[parameter]
        kept = state.get(MASTER)
        if kept is None or kept.dtype != torch.float32 or kept.device != parameter.device:
            kept = (parameter if kept is None else kept).detach().to(parameter.device, torch.float32)
            state[MASTER] = kept
        return kept

    @torch.no_grad()
    def open(self, parameter: Tensor, part: Tensor) -> Tensor:
        """The tensor that a step updates: `part`, this rank's part of `parameter`, if it is fp32; else its master."""
        if not is_narrow(parameter):
            return part
        master = self._local(self.of(parameter))
        chunks = [(master, part)]
        if master.numel() > _CHUNK:
            rows = rows_within(master, _CHUNK)
            chunks = list(zip(master.split(rows), part.split(rows), strict=True))
        for m, w in chunks:
            m.copy_(torch.where(w == m.to(w.dtype), m, w))
        self._opened.append((part, master))
        return master

    @torch.no_grad()
    def close(self) -> None:
        """Round the opened masters into their parameters."""
        if self._opened:
            parts, masters = zip(*self._opened, strict=True)
            torch._foreach_copy_(list(parts), list(masters))
            self._opened = []


def prepare(
    options: Options, named: Sequence[tuple[str, Tensor, str]], state: Callable[[], State], binding: Binding, rank: int
) -> tuple[MasterWeights | None, AdamWRounding | None]:
    """The masters or the rounding that the options ask for; warns on rank 0 if 16-bit parameters have neither.

    Args:
        named: name, tensor and algorithm of every parameter. The name of a tensor that a framework made is arbitrary.
        rank: rank in the binding's process group.

    Raises:
        ConfigError: stochastic rounding does not support the dtype of a parameter.
    """
    narrow = [(name, p) for name, p, _ in named if is_narrow(p)]
    for _, p, algorithm in named if options.master_weights or options.stochastic_rounding else ():
        # Create all of it now: torch.distributed.checkpoint loads only entries that the state already has.
        if is_narrow(p) and algorithm == "adamw" and "exp_avg" not in state().get(p, {}):
            state()[p].update(adamw_state(p, torch.float32))
    if options.master_weights:
        masters = MasterWeights(state, binding.local)
        for _, p in narrow:
            masters.of(p)
        return masters, None
    if options.stochastic_rounding:
        for name, p in narrow:
            if not is_rounded(p):
                raise ConfigError(
                    f"stochastic_rounding rounds to bfloat16, but {name} is {p.dtype}: use master_weights=True"
                )
        names = {id(p): name for name, p, _ in named}
        return None, AdamWRounding(options.rounding_seed, lambda p: names[id(p)], binding.fragments)
    if narrow and rank == 0:
        name, p = narrow[0]
        warnings.warn(
            f"{len(narrow)} of {len(named)} parameters are {p.dtype}, such as {name}, and a step rounds them to the "
            "nearest: changes below 1/512 of a weight are lost, also weight decay. Pass master_weights=True (4 bytes "
            "per element) or stochastic_rounding=True (no extra memory under Muon). See docs/low-precision.md",
            RuntimeWarning,
            stacklevel=4,
        )
    return None, None


def wide_state(
    options: Options, state_dict: Mapping[str, Any], parameters: Sequence[Tensor]
) -> dict[Tensor, dict[str, Tensor]]:
    """Copies of the saved fp32 state of each 16-bit parameter, which torch's own loading would cast to 16 bits.

    Empty without `master_weights` and `stochastic_rounding`.
    """
    if not (options.master_weights or options.stochastic_rounding):
        return {}
    wanted = (*MOMENTS, MASTER) if options.master_weights else MOMENTS
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    by_key, found = dict(zip(keys, parameters, strict=True)), {}
    for key, entry in state_dict["state"].items():
        parameter = by_key.get(key)
        if parameter is not None and is_narrow(parameter):
            kept = {name: entry[name] for name in wanted if isinstance(entry.get(name), Tensor)}
            found[parameter] = {n: v.detach().to(parameter.device, torch.float32, copy=True) for n, v in kept.items()}
    return found
