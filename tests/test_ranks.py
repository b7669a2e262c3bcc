"""Ranks agree on every outcome: no rank waits for a failed one, and one rank reports the error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from muon_dist.checkpoint import Ranks as CheckpointRanks
from muon_dist.errors import CheckpointError, DataError, MuonDistError
from muon_dist.ranks import Ranks
from tests.distributed import run_ranks

TEXT = "a.txt: byte 7 is not UTF-8"


def heard(call: Callable[[], Any]) -> tuple[str, str, bool]:
    try:
        return "", str(call()), False
    except MuonDistError as error:
        return type(error).__name__, str(error), error.reported_elsewhere
    except Exception as error:
        return type(error).__name__, str(error), False


def fail(ranks: Ranks, failing: list[int], error: Exception) -> int:
    if ranks.rank in failing:
        raise error
    return ranks.rank


def _first() -> tuple[int, list[int]]:
    ranks, calls = Ranks.of_the_run(), []
    value = ranks.first(lambda: calls.append(ranks.rank) or 40 + ranks.rank)
    return value, calls


def test_first_runs_on_the_first_rank_alone() -> None:
    assert run_ranks(_first, 3) == [(40, [0]), (40, []), (40, [])]


def _first_fails() -> tuple[str, str, bool]:
    ranks = Ranks.of_the_run()
    return heard(lambda: ranks.first(lambda: fail(ranks, [0], DataError(TEXT))))


def test_an_error_on_the_first_rank_reaches_all_and_is_reported_once() -> None:
    others = ("DataError", f"rank 0: {TEXT}", True)
    assert run_ranks(_first_fails, 3) == [("DataError", TEXT, False), others, others]


def _everywhere(failing: list[int], error: Exception, kind: type[Ranks]) -> tuple[str, str, bool]:
    ranks = kind.of_the_run()
    return heard(lambda: ranks.everywhere(lambda: fail(ranks, failing, error)))


def test_everywhere_agrees_on_failure() -> None:
    assert [value for _, value, _ in run_ranks(_everywhere, 3, [], DataError(), Ranks)] == ["0", "1", "2"]
    assert run_ranks(_everywhere, 3, [1, 2], DataError(TEXT), Ranks) == [
        ("DataError", f"rank 1: {TEXT}", True), ("DataError", TEXT, False), ("DataError", TEXT, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "own", "told"), [(Ranks, "OSError", "MuonDistError"), (CheckpointRanks, *[CheckpointError.__name__] * 2)]
)
def test_an_error_that_is_not_ours_reaches_all(kind: type[Ranks], own: str, told: str) -> None:
    (at_zero, text_at_zero, quiet), (at_one, text_at_one, _) = run_ranks(_everywhere, 2, [1], OSError("full"), kind)
    assert (at_zero, text_at_zero, quiet) == (told, "rank 1: OSError: full", True)
    assert (at_one, text_at_one) == (own, "full" if kind is Ranks else "rank 1: OSError: full")


def _values_that_do_not_travel() -> bool:
    ranks = Ranks(dist.group.WORLD)
    return callable(ranks.everywhere(lambda: lambda: 1))  # a function cannot be pickled


def test_results_of_everywhere_stay_where_they_are() -> None:
    assert run_ranks(_values_that_do_not_travel, 2) == [True, True]


def _nodes(local_ranks: list[int], failing: list[int]) -> tuple[list[int], tuple[str, str, bool]]:
    ranks, calls = Ranks.of_the_run(), []

    def work() -> None:
        calls.append(ranks.rank)
        fail(ranks, failing, DataError("disk full"))

    return calls, heard(lambda: ranks.first_of_each_node(work, local_ranks[ranks.rank]))


def test_each_node_does_its_own_once() -> None:
    """Two nodes of two processes."""
    assert [calls for calls, _ in run_ranks(_nodes, 4, [0, 1, 0, 1], [])] == [[0], [], [2], []]


def test_an_error_on_another_node_reaches_all() -> None:
    (_, first), (_, second) = run_ranks(_nodes, 2, [0, 0], [1])
    assert first == ("DataError", "rank 1: disk full", True) and second == ("DataError", "disk full", False)
