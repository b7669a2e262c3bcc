"""Counts the payload of every collective that a process makes, whoever calls it."""

from __future__ import annotations

from collections import Counter
from types import TracebackType
from typing import Any

import torch.distributed as dist


def _nbytes(*tensors: Any) -> int:
    total = 0
    for t in tensors:
        total += _nbytes(*t) if isinstance(t, (list, tuple)) else t.numel() * t.element_size()
    return total


class Traffic:
    """While entered, sums what this rank receives from the others, by collective, in bytes.

    At the level of `dist.ProcessGroup`, below torch.distributed and deepspeed.comm. Of a reduction or gather, what a
    ring receives: (W - 1) / W of the whole, twice for an all-reduce; of an all-to-all and a point-to-point message,
    exactly what arrives. `sent["all_to_all_single"]` is what this rank sends to others there.
    """

    def __init__(self) -> None:
        self.received: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._originals: dict[str, Any] = {}

    @property
    def total(self) -> float:
        return sum(self.received.values())

    def clear(self) -> None:
        for counter in (self.received, self.sent, self.calls):
            counter.clear()

    def _count(self, name: str, group: Any, args: tuple[Any, ...]) -> None:
        world, rank = group.size(), group.rank()
        share = (world - 1) / world
        self.calls[name] += 1
        if name in ("allreduce", "allreduce_coalesced"):
            self.received[name] += 2 * share * _nbytes(args[0])
        elif name in ("_allgather_base", "all_gather_single", "allgather", "all_gather_single_coalesced"):
            self.received[name] += share * _nbytes(args[0])  # the output
        elif name in ("_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_single_coalesced"):
            self.received[name] += share * _nbytes(args[1])  # the input
        elif name == "reduce_scatter":
            self.received[name] += share * _nbytes(args[1])
        elif name in ("all_to_all_single", "alltoall_base"):
            output, given, receives, sends = args[:4]
            keep_in = receives[rank] if receives else output.numel() // world
            keep_out = sends[rank] if sends else given.numel() // world
            self.received[name] += (output.numel() - keep_in) * output.element_size()
            self.sent[name] += (given.numel() - keep_out) * given.element_size()
        elif name in ("broadcast", "reduce"):
            self.received[name] += share * _nbytes(args[0])
        elif name in ("recv", "recv_anysource"):
            self.received[name] += _nbytes(args[0])
        elif name != "send":
            raise NotImplementedError(f"a collective that is not counted: {name}")

    NAMES = (
        "allreduce", "allreduce_coalesced", "_allgather_base", "all_gather_single", "allgather",
        "all_gather_single_coalesced", "allgather_coalesced", "allgather_into_tensor_coalesced",
        "_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_single_coalesced",
        "reduce_scatter_tensor_coalesced", "reduce_scatter", "all_to_all_single", "alltoall_base", "alltoall",
        "broadcast", "reduce", "gather", "scatter", "send", "recv", "recv_anysource",
    )  # fmt: skip

    def __enter__(self) -> Traffic:
        for name in self.NAMES:
            original = getattr(dist.ProcessGroup, name)
            self._originals[name] = vars(dist.ProcessGroup)[name]  # the descriptor, to put back

            def counted(group: Any, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
                self._count(_name, group, args)
                return _original(group, *args, **kwargs)

            setattr(dist.ProcessGroup, name, counted)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name, original in self._originals.items():
            setattr(dist.ProcessGroup, name, original)
