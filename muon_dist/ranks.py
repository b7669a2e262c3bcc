"""Processes that agree on every outcome, so that none continues where another failed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.distributed as dist

from muon_dist.errors import MuonDistError
from muon_dist.failures import known

T = TypeVar("T")
R = TypeVar("R", bound="Ranks")


@dataclass
class _Outcome:
    """The outcome of work on one rank, as it is sent: a value, or type and text of an error."""

    value: Any = None
    kind: type[MuonDistError] | None = None
    text: str = ""


class Ranks:
    """The ranks of a process group, or a single process. For small and rare messages: values are pickled.

    One instance serves one thread at a time.

    Args:
        group: None for a single process.
        device: of this rank. A process group that has NCCL alone sends values through the current CUDA device, which
            must be the rank's own; by default it is left as it is.

    Attributes:
        failure: the type in which an error that is not one of ours is raised. None: the rank that had it raises it as
            it is, the others a MuonDistError.
    """

    failure: ClassVar[type[MuonDistError] | None] = None

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> None:
        self.group = group
        self.device = device
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1

    @classmethod
    def of_the_run(cls: type[R], timeout: float | None = None) -> R:
        """All ranks of the default process group, over a gloo group of their own; a collective.

        timeout: seconds that a rank waits for the others, by default torch's.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        wait = timedelta(seconds=timeout) if timeout is not None else None
        return cls(dist.new_group(backend="gloo", timeout=wait))

    def gather(self, value: T) -> list[T]:
        """The (picklable) values of all ranks, in rank order, on every rank; a barrier too."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        own = self.device if self.device is not None and self.device.type == "cuda" else None
        with torch.cuda.device(own) if own is not None else contextlib.nullcontext():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def everywhere(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank; this rank's result, which does not travel.

        Raises:
            MuonDistError: on every rank, when it failed on any. A rank on which it failed raises its own error, the
                others that of the first such rank, which they name. `reported_elsewhere` is True on all ranks but one.
        """
        return cast(T, self._agreed(work, here=True, keep=False)[self.rank].value)

    def first(self, work: Callable[[], T]) -> T:
        """Run `work` on the first rank while the others wait; its (picklable) result on all.

        Raises as `everywhere`.
        """
        return cast(T, self._agreed(work, here=self.rank == 0, keep=True)[0].value)

    def first_of_each_node(self, work: Callable[[], Any], local_rank: int) -> None:
        """Run `work` on the first rank, then on the first process of every other node. Raises as `everywhere`.

        With a shared file system the later ones find everything done; without one, each node does its own.

        Args:
            work: what to do; its result is dropped.
            local_rank: this process's number on its node.
        """
        self._agreed(work, here=self.rank == 0, keep=False)
        self._agreed(work, here=self.rank != 0 and local_rank == 0, keep=False)

    def _agreed(self, work: Callable[[], Any], here: bool, keep: bool) -> list[_Outcome]:
        """The outcomes of all ranks, of which those work that say so `here`; without their values unless `keep`."""
        own, error = _Outcome(), None
        if here:
            own, error = self._try(work)
        outcomes = self.gather(own if keep else _Outcome(None, own.kind, own.text))
        failed = [r for r, outcome in enumerate(outcomes) if outcome.kind is not None]
        if error is not None:
            said = any((outcomes[r].kind, outcomes[r].text) == (own.kind, own.text) for r in failed if r < self.rank)
            self._raise_own(error, own, said)
        if failed:
            outcome = outcomes[failed[0]]
            assert outcome.kind is not None
            heard = outcome.kind(f"rank {failed[0]}: {outcome.text}")
            heard.reported_elsewhere = True
            raise heard
        outcomes[self.rank] = own
        return outcomes

    def _try(self, work: Callable[[], Any]) -> tuple[_Outcome, Exception | None]:
        try:
            return _Outcome(work()), None
        except MuonDistError as error:
            return _Outcome(kind=type(error), text=str(error)), error
        except Exception as error:
            named = known(error) if self.failure is None else None
            if named is not None:
                named.__cause__ = error
                return _Outcome(kind=type(named), text=str(named)), named
            return _Outcome(kind=self.failure or MuonDistError, text=f"{type(error).__name__}: {error}"), error

    def _raise_own(self, error: Exception, own: _Outcome, said: bool) -> None:
        """Raise the error of this rank; `said`: a rank before it reports the same."""
        if isinstance(error, MuonDistError):
            error.reported_elsewhere = said
            raise error
        if self.failure is None:
            raise error
        raised = self.failure(f"rank {self.rank}: {own.text}" if self.size > 1 else own.text)
        raised.reported_elsewhere = said
        raise raised from error
