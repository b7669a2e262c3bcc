"""Counts the payload of every collective of a process, from any library."""

from __future__ import annotations

from collections import Counter, defaultdict
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

# Functions of torch.ops._c10d_functional -> the method of ProcessGroup that moves the same bytes. Their last argument
# is the group.
FUNCTIONAL = {
    "all_gather_into_tensor": "_allgather_base",
    "all_reduce": "allreduce",
    "reduce_scatter_tensor": "_reduce_scatter_base",
    "all_to_all_single": "all_to_all_single",
    "broadcast": "broadcast",
    "all_gather_into_tensor_coalesced": "_allgather_base",
    "all_reduce_coalesced": "allreduce",
    "reduce_scatter_tensor_coalesced": "_reduce_scatter_base",
}

BATCH = "batch_isend_irecv"


def _nbytes(*tensors: Any) -> int:
    total = 0
    for t in tensors:
        total += _nbytes(*t) if isinstance(t, (list, tuple)) else t.numel() * t.element_size()
    return total


class Traffic:
    """While entered, sums what this rank receives from the others and sends to them, by collective, in bytes.

    It counts calls of `dist.ProcessGroup`, which torch.distributed and deepspeed.comm use, and of DTensor's functional
    collectives. Calls from C++ are not seen: of DDP it sees only the messages of a communication hook in Python. A
    reduction, all-gather or broadcast counts as in a ring: (W - 1) / W of the whole, twice for an all-reduce. For a
    gather, scatter, all-to-all and point-to-point message the bytes of this rank are exact. `calls` counts
    collectives, a batch of point-to-point messages as one, under the name of `BATCH`; barriers are left out.
    """

    def __init__(self) -> None:
        self.received: defaultdict[str, float] = defaultdict(float)
        self.sent: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._originals: dict[str, Any] = {}
        self._functional: dict[str, Any] = {}
        self._batch: Any = None
        self._in_batch = False

    @property
    def total(self) -> float:
        """Bytes received."""
        return sum(self.received.values())

    @property
    def total_sent(self) -> float:
        """Bytes sent."""
        return sum(self.sent.values())

    @property
    def collectives(self) -> int:
        """Number of all calls."""
        return sum(self.calls.values())

    def clear(self) -> None:
        self.received.clear()
        self.sent.clear()
        self.calls.clear()

    def _count(self, name: str, group: Any, args: tuple[Any, ...]) -> None:
        received, sent = _moved(name, group.size(), group.rank(), args)
        name = BATCH if self._in_batch else name
        if not self._in_batch:
            self.calls[name] += 1
        self.received[name] += received
        self.sent[name] += sent

    NAMES = (
        "allreduce", "allreduce_coalesced", "_allgather_base", "all_gather_single", "allgather",
        "all_gather_single_coalesced", "allgather_coalesced", "allgather_into_tensor_coalesced",
        "_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_single_coalesced",
        "reduce_scatter_tensor_coalesced", "reduce_scatter", "all_to_all_single", "alltoall_base", "alltoall",
        "broadcast", "reduce", "gather", "scatter", "send", "recv", "recv_anysource",
    )  # fmt: skip

    def _counted_batch(self, messages: list[dist.P2POp]) -> list[Any]:
        self.calls[BATCH] += 1
        self._in_batch = True
        try:
            return self._batch(messages)
        finally:
            self._in_batch = False

    def __enter__(self) -> Traffic:
        self._batch = dist.batch_isend_irecv
        setattr(dist, BATCH, self._counted_batch)
        for name in self.NAMES:
            original = getattr(dist.ProcessGroup, name, None)
            if original is None:  # only in a newer torch
                continue
            self._originals[name] = vars(dist.ProcessGroup)[name]  # the descriptor, to restore it later

            def counted(group: Any, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
                self._count(_name, group, args)
                return _original(group, *args, **kwargs)

            setattr(dist.ProcessGroup, name, counted)
        for name in FUNCTIONAL:
            if not hasattr(torch.ops._c10d_functional, name):
                continue
            self._functional[name] = getattr(torch.ops._c10d_functional, name)
            setattr(torch.ops._c10d_functional, name, _Counted(self, name, self._functional[name]))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        setattr(dist, BATCH, self._batch)
        for name, original in self._originals.items():
            setattr(dist.ProcessGroup, name, original)
        for name, original in self._functional.items():
            setattr(torch.ops._c10d_functional, name, original)


class _Counted:
    """Replaces a functional collective, with its overloads."""

    def __init__(self, traffic: Traffic, name: str, original: Any) -> None:
        self._traffic, self._name, self._original = traffic, name, original

    def __call__(self, tensor: Any, *args: Any) -> Any:
        result = self._original(tensor, *args)
        group: Any = args[-1]
        named = isinstance(group, str)  # newer versions of torch have a type GroupName for it
        if named:
            group = _resolve_process_group(group)
        self._traffic._count(FUNCTIONAL[self._name], group, (result, tensor, *args[:-1]))
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def _moved(name: str, world: int, rank: int, args: tuple[Any, ...]) -> tuple[float, float]:
    """(bytes received, bytes sent) of one call with `args`, the tensors in the order of ProcessGroup's methods."""
    share = (world - 1) / world
    if name in ("allreduce", "allreduce_coalesced"):
        return (2 * share * _nbytes(args[0]),) * 2
    if name in ("_allgather_base", "all_gather_single", "allgather", "all_gather_single_coalesced"):
        return (share * _nbytes(args[0]),) * 2  # the output
    if name in ("_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_single_coalesced", "reduce_scatter"):
        return (share * _nbytes(args[1]),) * 2  # the input
    if name in ("broadcast", "reduce"):
        return (share * _nbytes(args[0]),) * 2
    if name in ("all_to_all_single", "alltoall_base"):
        output, given, receives, sends = args[:4]
        keep_in = receives[rank] if receives else output.numel() // world
        keep_out = sends[rank] if sends else given.numel() // world
        return (output.numel() - keep_in) * output.element_size(), (given.numel() - keep_out) * given.element_size()
    if name in ("gather", "scatter"):
        root = args[2].rootRank == rank
        whole = share * _nbytes(args[0] if name == "gather" else args[1])
        own = _nbytes(args[1] if name == "gather" else args[0])
        if name == "gather":
            return (whole, 0) if root else (0, own)
        return (0, whole) if root else (own, 0)
    if name in ("recv", "recv_anysource"):
        return _nbytes(args[0]), 0
    if name == "send":
        return 0, _nbytes(args[0])
    raise NotImplementedError(f"a collective that is not counted: {name}")
