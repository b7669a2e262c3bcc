"""State dicts of `Muon`: saving and loading, for one rank and for all ranks."""

from __future__ import annotations

from typing import Any

import torch

from muon_dist.checkpoint.piece import clean_name
from muon_dist.optim.binding import Group, ParameterSpec
from muon_dist.optim.copies import load
from muon_dist.optim.gathered import full_state
from muon_dist.optim.low_precision import MasterWeights
from muon_dist.optim.options import Options
from muon_dist.optim.rounding import AdamWRounding, is_narrow
from muon_dist.optim.runtime import Runtime
from muon_dist.optim.state import PARTIAL, Loaded, indexed_parameters, partial_momentum, settle, warn_if_partial


class StateDicts(torch.optim.Optimizer):
    """The half of `Muon` that saves and loads."""

    specs: list[list[ParameterSpec]]
    algorithms: list[str]
    _options: Options
    _groups: list[Group]
    _gathered: dict[str, Any] | None = None
    _runtime: Runtime | None = None
    _copies_compared: bool = False
    _warned_of_partial_state: bool = False
    _loaded: dict[torch.Tensor, Loaded] | None = None
    _masters: MasterWeights | None = None
    _rounding: AdamWRounding | None = None

    def state_dict(self) -> dict[str, Any]:
        """This rank's part: its own momentum, and AdamW's state as kept here; local. See `full_state_dict`.

        A RuntimeWarning says once when this part lacks momentum that lies on other ranks, as under DDP.
        """
        if self._gathered is not None:
            return self._gathered
        runtime = self._runtime
        if runtime is None:
            return super().state_dict()
        settle(runtime, self.state)
        self._warned_of_partial_state = self._warned_of_partial_state or warn_if_partial(runtime, self.state)
        packed = super().state_dict()
        if partial := partial_momentum(runtime, indexed_parameters(self)):
            packed[PARTIAL] = partial
        return packed

    def full_state_dict(self) -> dict[str, Any]:
        """The state of a single process, gathered to rank 0 of the process group; a collective.

        Rank 0 gets a state_dict that `load_state_dict` takes on any number of ranks, others get {}.

        Raises:
            CheckpointError: the framework keeps the parameters in parts, and saves them itself.
        """
        if self._runtime is not None:
            settle(self._runtime, self.state)
        local = super().state_dict()
        if self._runtime is None or self._runtime.transport.world_size == 1:
            return local
        return full_state(self._runtime, local, indexed_parameters(self))

    def gather_state(self) -> None:
        """Make `state_dict()` return `full_state_dict()` on rank 0 until `release_state`. A collective.

        For a framework that saves the state dict of rank 0 only: its hook before a save, on all ranks.
        """
        self._gathered = self.full_state_dict() or None

    def release_state(self) -> None:
        """Let `state_dict()` be this rank's part again."""
        self._gathered = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `full_state_dict()`, or this rank's own `state_dict()`; on every rank.

        Before the first step it is local, and the ranks agree on it when they plan. After it, it is a collective. What
        one rank refuses all ranks refuse, with its message. Momentum is kept in fp32 whatever the parameters' dtype,
        and taken apart for this rank's plan. Load hooks see it, and what they return is loaded.

        Raises:
            ConfigError: a group's algorithm or rule differs.
            CheckpointError: momentum of a matrix that this rank holds is missing (another rank's state_dict), or the
                parameters of a group were in another order.
        """
        runtime = self._runtime
        if runtime is None:
            self._load(state_dict)
        else:
            runtime.transport.progress.enter("load_state_dict")
            runtime.transport.ranks.everywhere(lambda: self._load(state_dict))

    def _load(self, state_dict: dict[str, Any]) -> None:
        load(self, state_dict, super().load_state_dict)

    # 16-bit parameters ----------------------------------------------------------------------------------------------

    def master_weights(self) -> dict[torch.Tensor, torch.Tensor]:
        """The fp32 master of every 16-bit parameter, with `master_weights=True`; placed as its parameter is.

        The first call before the first step plans, and is a collective.
        """
        if not self._options.master_weights:
            return {}
        self.bound_runtime()
        assert self._masters is not None
        return {p: self._masters.of(p) for p in indexed_parameters(self) if is_narrow(p)}

    def moment_dtype(self, parameter: torch.Tensor) -> torch.dtype:
        """The dtype of AdamW's moments of a parameter: its own, or fp32 where the step computes in fp32."""
        wide = self._options.master_weights or self._options.stochastic_rounding
        return torch.float32 if wide and is_narrow(parameter) else parameter.dtype

    def bound_runtime(self) -> Runtime:
        """The runtime, planned now if it was not yet."""
        raise NotImplementedError

    def _named(self) -> list[tuple[str, torch.Tensor, str]]:
        """Clean FQN, tensor and algorithm of everything that is stepped; a number where a framework has made it."""
        found = []
        for group, specs, algorithm in zip(self._groups, self.specs, self.algorithms, strict=True):
            known = len(specs) == len(group["params"])
            for n, p in enumerate(group["params"]):
                found.append((clean_name(specs[n].name) if known else f"{group.get('name')}.{n}", p, algorithm))
        return found
