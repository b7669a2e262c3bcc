"""A loss that jumps: found against the losses before it, by the same numbers on every rank."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from muon_dist.defaults import SPIKE_SIGMAS, SPIKE_WINDOW
from muon_dist.errors import ConfigError

_PATIENCE = 5


class SpikeDetector:
    """Says whether a loss lies more than `sigmas` standard deviations above the mean of the last `window` losses.

    The rule and its defaults are those of OLMo-core's SkipStepOptimizer (window 128, 6 sigma, judged from half a
    window on), but for three things: only a rise is a spike; a spike does not enter the window, or one would hide the
    next; and five in a row are taken for the new level (another mixture of data), with which the window starts again.
    A loss that is not finite is left to the check of the gradients.
    """

    def __init__(self, window: int = SPIKE_WINDOW, sigmas: float = SPIKE_SIGMAS) -> None:
        if window < 4:
            raise ConfigError(f"the window of the spike guard is {window}: it must be at least 4")
        if not sigmas > 0:
            raise ConfigError(f"the threshold of the spike guard is {sigmas} sigmas: it must be above 0")
        self.window, self.sigmas = window, sigmas
        self.in_a_row = 0
        self._losses: deque[float] = deque(maxlen=window)

    def state_dict(self) -> dict[str, Any]:
        """State with which a resumed run makes the same decisions."""
        return {"losses": list(self._losses), "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the window of a saved run; of a longer one the newest losses."""
        self._losses = deque((float(v) for v in state["losses"]), maxlen=self.window)
        self.in_a_row = int(state["in_a_row"])

    def limit(self) -> float | None:
        """Above which the next loss is a spike; None while the window is less than half full."""
        n = len(self._losses)
        if n < max(2, self.window // 2):
            return None
        mean = math.fsum(self._losses) / n
        variance = math.fsum((v - mean) ** 2 for v in self._losses) / (n - 1)
        return mean + self.sigmas * math.sqrt(variance)

    def is_spike(self, loss: float) -> bool:
        """Judge `loss`, the mean over all ranks, and take it into the window unless it is a spike."""
        if not math.isfinite(loss):
            return False
        limit = self.limit()
        if limit is not None and loss > limit:
            self.in_a_row += 1
            if self.in_a_row < _PATIENCE:
                return True
            self._losses.clear()
        self.in_a_row = 0
        self._losses.append(loss)
        return False
