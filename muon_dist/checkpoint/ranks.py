"""The ranks of a checkpoint: they agree on every outcome, so that none goes on where another failed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from muon_dist.errors import CheckpointError

T = TypeVar("T")


class Ranks:
    """A gloo process group, or a single process.

    One instance serves one thread at a time; a save in the background and a load use it one after another.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1

    @classmethod
    def of_the_run(cls, timeout: float | None = None) -> Ranks:
        """All ranks of the default process group, over a gloo group of their own; a collective.

        timeout: seconds that a rank waits for the others, by default torch's.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        wait = timedelta(seconds=timeout) if timeout is not None else None
        return cls(dist.new_group(backend="gloo", timeout=wait))

    def gather(self, value: T) -> list[T]:
        """The (picklable) values of all ranks, in rank order, on every rank; a barrier too."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def everywhere(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank; the results of all.

        Raises:
            CheckpointError: on every rank, with the first failing rank's message, when it failed on any.
        """
        value, problem, error = _outcome(work)
        outcomes = self.gather((value, problem))
        return [v for v, _ in self._checked(outcomes, error)]

    def first(self, work: Callable[[], T]) -> T:
        """Run `work` on the first rank alone; its result on all. Raises as `everywhere`."""
        value, problem, error = _outcome(work) if self.rank == 0 else (None, None, None)
        outcomes = self.gather((value, problem))
        return self._checked(outcomes, error)[0][0]

    def _checked(self, outcomes: list[Any], error: BaseException | None) -> list[Any]:
        for rank, (_, problem) in enumerate(outcomes):
            if problem is not None:
                where = f"rank {rank}: " if self.size > 1 else ""
                raised = CheckpointError(f"{where}{problem}")
                # one rank says it for all; the others end with the same code
                raised.reported_elsewhere = rank != self.rank  # type: ignore[attr-defined]
                raise raised from (error if rank == self.rank else None)
        return outcomes


def _outcome(work: Callable[[], T]) -> tuple[Any, str | None, BaseException | None]:
    try:
        return work(), None, None
    except CheckpointError as error:
        return None, str(error), error
    except Exception as error:
        return None, f"{type(error).__name__}: {error}", error
