"""Saves and restores the learning rates of the parameter groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from muon_dist.errors import CheckpointError


class GroupRates:
    """State provider for the current learning rate of each parameter group.

    Other settings of the groups (momentum, weight decay) are not in checkpoints: the configuration of the resumed run
    decides. If it changes a learning rate, the whole schedule is scaled by the ratio.
    """

    def __init__(self, optimizer: Any, scheduler: Any, say: Callable[[str], None]) -> None:
        self._groups = optimizer.param_groups
        self._scheduler = scheduler
        self._say = say
        # rates of this run's configuration; loading the scheduler's state restores the old ones
        self._initial = [group.get("initial_lr") for group in self._groups]

    def state_dict(self) -> dict[str, Any]:
        """{"groups": [{"lr", "initial_lr", "algorithm"}, ...]}, in order."""
        return {
            "groups": [
                {
                    "lr": float(group["lr"]),
                    "initial_lr": None if initial is None else float(initial),
                    "algorithm": group.get("algorithm"),
                }
                for group, initial in zip(self._groups, self._initial, strict=True)
            ]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the rates. Call it after the scheduler's state was loaded.

        Raises:
            CheckpointError: the number of groups or their algorithms differ.
        """
        saved = state["groups"]
        was, now = [g["algorithm"] for g in saved], [g.get("algorithm") for g in self._groups]
        if was != now:
            raise CheckpointError(f"the checkpoint's parameter groups are {was}, this optimizer's are {now}")
        for index, (group, old, initial) in enumerate(zip(self._groups, saved, self._initial, strict=True)):
            factor = 1.0
            if initial is not None and old["initial_lr"] and float(initial) != old["initial_lr"]:
                factor = float(initial) / old["initial_lr"]
                self._say(f"learning rate of group {index} scaled by {factor:g}, because the configuration changed it")
                for name in ("base_lrs", "_last_lr"):
                    rates = getattr(self._scheduler, name, None)
                    if rates is not None and index < len(rates):
                        rates[index] *= factor
            group["lr"] = old["lr"] * factor
