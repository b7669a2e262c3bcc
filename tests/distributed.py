"""Gloo ranks for tests: forked for one call, or kept from call to call while they are as good as new."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Collection
from typing import Any

from muon_dist.bench import ranks
from muon_dist.bench.ranks import RankFailure
from tests.kept_ranks import KEPT_AT_MOST, KeptRanks

# A time-out ends what hangs. No test needs it to pass, so it is long enough for a machine that does other work.
PATIENCE = 240.0
KEPT_PATIENCE = 120.0
"""Seconds for kept ranks; a test has 300 in all."""

PATCHING = frozenset({"monkeypatch", "capfd", "capsys", "caplog", "recwarn"})
"""Fixtures that change this process for one test: ranks that were forked earlier would not see it."""

_kept = KeptRanks()
_may_keep = False


def begin_test(fixtures: Collection[str], markers: Collection[str]) -> None:
    """Decide whether the next test may use kept ranks.

    Args:
        fixtures: names of the test's fixtures.
        markers: names of its markers. DeepSpeed keeps state for the whole process, so its tests fork their own ranks.
    """
    global _may_keep
    _may_keep = not PATCHING & set(fixtures) and "deepspeed" not in markers


def end_tests() -> None:
    """End the kept ranks."""
    _kept.close()


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = PATIENCE, fresh: bool = False
) -> list[Any]:
    """`muon_dist.bench.ranks.run_ranks` with at least `PATIENCE` seconds for each collective and for the whole.

    Kept ranks run `fn` if the test allows it (`begin_test`) and if `fn` and `args` can be pickled. What the ranks
    begin with is the same as after a fork: environment, working folder, random state, and a process group of this
    call's own.

    Args:
        fresh: fork ranks for this call alone. For what measures the memory or the first use of a process.
    """
    timeout = max(timeout, PATIENCE)
    if _may_keep and not fresh and world_size <= KEPT_AT_MOST and os.getpid() == _kept.owner:
        try:
            pickle.dumps((fn, args))
        except (pickle.PicklingError, AttributeError, TypeError):
            pass  # a function inside a function: only a fork can take it along
        else:
            if _kept.suits(fn):
                try:
                    return _kept.run(fn, world_size, args, KEPT_PATIENCE)
                except RankFailure as failure:
                    if "no result within" not in str(failure) or "Traceback" in str(failure):
                        raise
                # What a rank still holds of an earlier call may make it hang. A fault of `fn` hangs fresh ranks too.
                warnings.warn(f"{fn.__qualname__} hung on kept ranks, and runs again on fresh ones", stacklevel=2)
                _kept.close()
    return ranks.run_ranks(fn, world_size, *args, timeout=timeout)


__all__ = ["RankFailure", "begin_test", "end_tests", "run_ranks"]
