"""Forked gloo ranks for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from muon_dist.bench import ranks
from muon_dist.bench.ranks import RankFailure

# A time-out ends what hangs. No test needs it to pass, so it is long enough for a machine that does other work.
PATIENCE = 240.0


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = PATIENCE) -> list[Any]:
    """`muon_dist.bench.ranks.run_ranks` with at least `PATIENCE` seconds for each collective and for the whole."""
    return ranks.run_ranks(fn, world_size, *args, timeout=max(timeout, PATIENCE))


__all__ = ["RankFailure", "run_ranks"]
