"""Detects loss spikes: compares a loss with earlier losses, with the same result on every rank."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from muon_dist.defaults import SPIKE_SIGMAS, SPIKE_WINDOW
from muon_dist.errors import ConfigError

_PATIENCE = 5


class SpikeDetector:
    """Detects a loss more than `sigmas` standard deviations above the mean of the last `window` losses.

    Rule and defaults come from OLMo-core's SkipStepOptimizer (window 128, 6 sigma, active from half a window on), with
    three changes. Only a rise is a spike. A spike does not enter the window, because it would hide the next one. Five
    spikes in a row are a new level (such as another mixture of data): the window starts again with them. A loss that
    is not finite is ignored, because the check of the gradients handles it.
    """

    def __init__(self, window: int = SPIKE_WINDOW, sigmas: float = SPIKE_SIGMAS) -> None:
        if window < 4:
            raise ConfigError(f"the window of the spike guard is {window}: it must be at least 4")
        if not sigmas > 0:
            raise ConfigError(f"the threshold of the spike guard is {sigmas} sigma: it must be above 0")
        self.window, self.sigmas = window, sigmas
        self.in_a_row = 0
        self._losses: deque[float] = deque(maxlen=window)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, so that a resumed run makes the same decisions."""
        return {"losses": list(self._losses), "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the window of a saved run; if it is longer, only its newest losses."""
        self._losses = deque((float(v) for v in state["losses"]), maxlen=self.window)
        self.in_a_row = int(state["in_a_row"])

    def limit(self) -> float | None:
        """The next loss is a spike if it is above this; None while the window is less than half full."""
        n = len(self._losses)
        if n < max(2, self.window // 2):
            return None
        mean = math.fsum(self._losses) / n
        variance = math.fsum((v - mean) ** 2 for v in self._losses) / (n - 1)
        return mean + self.sigmas * math.sqrt(variance)

    def is_spike(self, loss: float) -> bool:
        """Whether `loss`, the mean over all ranks, is a spike. Adds it to the window if it is not."""
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
