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
        """This rank's part of the state: its momentum and its AdamW state. Local. See `full_state_dict`.

        Warns once (RuntimeWarning) if other ranks hold momentum that this part lacks, as under DDP.
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
        """The complete state, gathered to rank 0 of the process group; {} on other ranks. A collective.

        `load_state_dict` accepts it on any number of ranks.

        Raises:
            CheckpointError: the framework shards the parameters, and must save the state itself.
        """
        if self._runtime is not None:
            settle(self._runtime, self.state)
        local = super().state_dict()
        if self._runtime is None or self._runtime.transport.world_size == 1:
            return local
        return full_state(self._runtime, local, indexed_parameters(self))

    def gather_state(self) -> None:
        """Make `state_dict()` return `full_state_dict()` on rank 0 until `release_state`. A collective.

        For a framework that saves only rank 0's state dict: call this on all ranks before the save.
        """
        self._gathered = self.full_state_dict() or None

    def release_state(self) -> None:
        """Let `state_dict()` return this rank's part again."""
        self._gathered = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `full_state_dict()`, or this rank's own `state_dict()`. Call it on every rank.

        Before the first step the call is local; the ranks check the state when they make the plan. After the first
        step it is a collective. If one rank raises an error, all ranks raise it. Momentum stays fp32 for every dtype
        of parameters; each rank keeps its part. Load hooks see the momentum, and the state that they return is loaded.

        Raises:
            ConfigError: a group's algorithm or rule differs.
            CheckpointError: momentum of a matrix that this rank holds is missing (another rank's state_dict), or the
                parameters of a group are in another order.
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
        """The fp32 master of every 16-bit parameter, with `master_weights=True`; sharded as the parameter is.

        Before the first step, the first call makes the plan and is a collective.
        """
        if not self._options.master_weights:
            return {}
        self.bound_runtime()
        assert self._masters is not None
        return {p: self._masters.of(p) for p in indexed_parameters(self) if is_narrow(p)}

    def moment_dtype(self, parameter: torch.Tensor) -> torch.dtype:
        """The dtype of AdamW's moments: the parameter's, or fp32 if the step computes in fp32."""
        wide = self._options.master_weights or self._options.stochastic_rounding
        return torch.float32 if wide and is_narrow(parameter) else parameter.dtype

    def bound_runtime(self) -> Runtime:
        """The runtime. The first call makes the plan."""
        raise NotImplementedError

    def _named(self) -> list[tuple[str, torch.Tensor, str]]:
        """Clean FQN, tensor and algorithm of every stepped tensor. A tensor that a framework made has a number."""
        found = []
        for group, specs, algorithm in zip(self._groups, self.specs, self.algorithms, strict=True):
            known = len(specs) == len(group["params"])
            for n, p in enumerate(group["params"]):
                found.append((clean_name(specs[n].name) if known else f"{group.get('name')}.{n}", p, algorithm))
        return found
