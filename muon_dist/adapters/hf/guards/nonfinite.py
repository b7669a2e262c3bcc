"""Guard against bad gradients: too many steps in a row with NaN or infinite gradients end the run."""

from __future__ import annotations

from typing import Any

from muon_dist.adapters.hf.guards.run import Guard, GuardedRun
from muon_dist.errors import NonFiniteError


class NonFiniteGuard(Guard):
    """Counts the steps that DeepSpeed skips without calling the optimizer: DeepSpeed itself would skip forever.

    `Muon` counts its own bad steps. In fp16 with a dynamic loss scale bad steps are normal, and not counted.

    most: number of bad steps in a row that ends the run.
    """

    def __init__(self, run: GuardedRun, most: int) -> None:
        super().__init__(run)
        self.most = most
        self.in_a_row = 0

    @property
    def found(self) -> bool:
        """Whether DeepSpeed or `Muon` skipped the last step because of NaN or infinity."""
        muon = self.run.muon
        return self.in_a_row > 0 or (muon is not None and muon.guard.in_a_row > 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wrapper = getattr(getattr(self.run.trainer, "deepspeed", None), "optimizer", None)
        dynamic = getattr(getattr(wrapper, "loss_scaler", None), "dynamic", False)
        if not getattr(wrapper, "overflow", False) or dynamic:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        if self.in_a_row >= self.most:
            raise NonFiniteError(
                f"gradients were NaN or infinite in {self.in_a_row} optimizer steps in a row (max_nonfinite), the "
                f"last one step {state.global_step}, by DeepSpeed's norm over all parameters on every rank. These "
                "steps changed nothing. Lower the learning rate, or look at the data"
            )
