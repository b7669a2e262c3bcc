"""Forked gloo ranks for tests, with timeouts that are long enough for a busy machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from muon_dist.bench import ranks
from muon_dist.bench.ranks import RankFailure

PATIENCE = 240.0
"""Seconds. The timeout ends hanging ranks; no test needs it to pass."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = PATIENCE) -> list[Any]:
    """`muon_dist.bench.ranks.run_ranks` with at least `PATIENCE` seconds for each collective and for the whole.

    Ranks are forked for each call. Ranks that stay between calls, and are compared with what they were, took more CPU
    time (0.18 against 0.10 s for 2 ranks that do nothing, 0.24 against 0.20 s for 4).
    """
    return ranks.run_ranks(fn, world_size, *args, timeout=max(timeout, PATIENCE))


__all__ = ["RankFailure", "run_ranks"]
