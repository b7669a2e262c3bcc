"""Ranks that exchange the outcome of each operation, so that no rank continues after another has failed."""

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
    """The outcome of work on one rank, in the form that is sent: a value, or type and text of an error."""

    value: Any = None
    kind: type[MuonDistError] | None = None
    text: str = ""


class Ranks:
    """The ranks of a process group, or a single process. Only for small and rare messages, because it pickles values.

    Only one thread at a time may use an instance.

    Args:
        group: the process group; None for a single process.
        device: this rank's device. A process group with only NCCL sends values through the current CUDA device, which
            must be this rank's device; None does not change the current device.

    Attributes:
        failure: type of error to raise for an error that is not ours. None: the rank with the error raises it
            unchanged, the others raise a MuonDistError.
    """

    failure: ClassVar[type[MuonDistError] | None] = None

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> None:
        self.group = group
        self.device = device
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1

    @classmethod
    def of_the_run(cls: type[R], timeout: float | None = None) -> R:
        """All ranks of the default process group, with a new gloo group; a collective.

        timeout: seconds that a rank waits for the others; None: torch's default.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        wait = timedelta(seconds=timeout) if timeout is not None else None
        return cls(dist.new_group(backend="gloo", timeout=wait))

    def gather(self, value: T) -> list[T]:
        """The (picklable) values of all ranks, in rank order, on every rank. Also a barrier."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        own = self.device if self.device is not None and self.device.type == "cuda" else None
        with torch.cuda.device(own) if own is not None else contextlib.nullcontext():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def everywhere(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank, and return this rank's result, which is not sent.

        Raises:
            MuonDistError: on every rank, if `work` failed on any rank. A failed rank raises its own error; the others
                raise the error of the first failed rank, and name it. `reported_elsewhere` is False on one rank only.
        """
        return cast(T, self._agreed(work, here=True, keep=False)[self.rank].value)

    def first(self, work: Callable[[], T]) -> T:
        """Run `work` on the first rank while the others wait; return its (picklable) result on all ranks.

        Raises as `everywhere` does.
        """
        return cast(T, self._agreed(work, here=self.rank == 0, keep=True)[0].value)

    def first_of_each_node(self, work: Callable[[], Any], local_rank: int) -> None:
        """Run `work` on the first rank, then on the first process of every other node. Raises as `everywhere` does.

        With a shared file system the other nodes find the work done; otherwise each node does it.

        Args:
            work: the work; its result is ignored.
            local_rank: index of this process on its node.
        """
        self._agreed(work, here=self.rank == 0, keep=False)
        self._agreed(work, here=self.rank != 0 and local_rank == 0, keep=False)

    def _agreed(self, work: Callable[[], Any], here: bool, keep: bool) -> list[_Outcome]:
        """Run `work` on ranks with `here`; return the outcomes of all ranks, with values only if `keep`."""
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
        """Raise the error of this rank. said: a lower rank reports the same error."""
        if isinstance(error, MuonDistError):
            error.reported_elsewhere = said
            raise error
        if self.failure is None:
            raise error
        raised = self.failure(f"rank {self.rank}: {own.text}" if self.size > 1 else own.text)
        raised.reported_elsewhere = said
        raise raised from error
