"""All collectives of an optimizer step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from muon_dist.errors import MuonDistError, PeerError, PlanMismatchError
from muon_dist.exchange.progress import Progress, place
from muon_dist.layout import Block, view
from muon_dist.ownership import digest, first_difference
from muon_dist.ranks import Ranks

_TAG = 0x4D75  # tag of our messages, so that they never match those of another library
# Words (in lower case) in the RuntimeError that gloo or NCCL raises if a message fails.
_OF_THE_NETWORK = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")
# Words in the error of a failed kernel or driver call. NCCL may report such an error as its own.
_OF_THE_DEVICE = ("cuda error", "cuda kernel errors", "device-side assert", "unhandled cuda error", "hip error")
_OF_THE_DEVICE_LIBRARIES = ("cublas_status", "cudnn_status", "cusolver_status", "cusparse_status", "cufft_status")


def is_device_error(error: BaseException) -> bool:
    """Whether the accelerator itself failed: out of memory, a failed kernel, a device-side assertion.

    Such an error is asynchronous. It surfaces in the first call that waits for the device, which is often a
    collective, but no other rank has caused it.
    """
    if isinstance(error, (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))):
        return True
    text = str(error).lower()
    return any(words in text for words in (*_OF_THE_DEVICE, *_OF_THE_DEVICE_LIBRARIES))


def is_network_error(error: BaseException) -> bool:
    """Whether a message between ranks failed: a peer has ended, or the network is down."""
    if not isinstance(error, RuntimeError) or isinstance(error, MuonDistError) or is_device_error(error):
        return False
    return isinstance(error, dist.DistError) or any(words in str(error).lower() for words in _OF_THE_NETWORK)


class Region:
    """Flat memory that is allocated only while it is used; its views are made once and stay valid.

    Set `allocated` to True or False to allocate or free the memory. After allocation the content is undefined; while
    freed, no view may be used. A new region is allocated, so that views can be made.

    Attributes:
        numel: number of elements.
        flat: the whole region, (numel,).
    """

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        self.numel = numel
        self.flat = torch.empty(numel, dtype=dtype, device=device)
        self._storage = self.flat.untyped_storage()
        self._bytes = numel * dtype.itemsize

    def run(self, start: int, length: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The run `[start, start + length)`, as a tensor of `shape`."""
        return self.flat.narrow(0, start, length).view(shape)

    def block(self, block: Block, shape: tuple[int, ...]) -> torch.Tensor:
        """A block, as a tensor of `shape`."""
        if block.rows == 1:
            return self.run(block.start, block.cols, shape)
        return view(self.flat, block).view(shape)

    @property
    def allocated(self) -> bool:
        """Whether the memory is allocated."""
        return self._storage.nbytes() == self._bytes

    @allocated.setter
    def allocated(self, wanted: bool) -> None:
        self._storage.resize_(self._bytes if wanted else 0)


class Broadcasts:
    """Broadcasts within a replica group: every rank sends one tensor to all other ranks, in group order.

    The number of pending broadcasts is limited, because all of them together need the memory of the whole model's
    updates. The next ones start while `arrived` is iterated, in the same order on all ranks.

    Args:
        transport: the transport of the group.
        sent: the flat tensor that this rank sends.
        counts: elements that each rank of the replica group sends, in group order.
        memory: memory for each other rank's tensor, by its index in the replica group.
        room: largest number of elements in pending broadcasts.
    """

    def __init__(
        self, transport: Transport, sent: torch.Tensor, counts: Sequence[int], memory: Mapping[int, Region], room: int
    ) -> None:
        transport.bytes_sent += (len(transport.column_ranks) - 1) * sent.numel() * sent.element_size()
        self._transport = transport
        self._sent = sent
        self._memory = memory
        self._counts = counts
        self._turns = deque(place for place, n in enumerate(counts) if n)
        self._under_way: deque[tuple[int, Any]] = deque()
        self._room = room
        self._start()

    def _start(self) -> None:
        """Start as many broadcasts as `room` allows, at least one; the same ones on all ranks."""
        while self._turns and (not self._under_way or self._counts[self._turns[0]] <= self._room):
            place = self._turns.popleft()
            self._room -= self._counts[place]
            data = self._sent
            if place in self._memory:
                self._memory[place].allocated = True
                data = self._memory[place].flat
            column = self._transport.column
            self._under_way.append((place, dist.broadcast(data, group_src=place, group=column, async_op=True)))
            self._transport.collectives += 1

    def arrived(self) -> Iterator[int]:
        """The indices of the other ranks in order, each when its tensor has arrived. Frees the memory of an index when
        the iteration continues."""
        while self._under_way:
            place, work = self._under_way.popleft()
            work.wait()
            if place in self._memory:
                yield place
                self._memory[place].allocated = False
            self._room += self._counts[place]
            if self._turns:
                self._start()


class Transport:
    """The collectives of one process group. With one rank it sends nothing.

    Args:
        group: a process group, or None for a single process.
        device: device of all tensors that are sent.
        progress: records each operation; a new one by default.
        column: the replica group of this rank, a part of `group`, for broadcasts; all ranks by default.

    Attributes:
        bytes_sent: payload that this rank has sent to other ranks by `all_to_all` and `broadcast` since the start.
        collectives: number of calls of any kind.
        progress: the current operation of this rank.
        ranks: small and rare messages between the ranks of the group.
        column_ranks: the ranks of `column` in its order, as numbered in `group`.
        in_pairs: True: `all_to_all` sends one message per pair of ranks, which is faster over gloo. False: it calls
            the backend's all-to-all, which is faster on accelerators. Chosen by device; equal on all ranks.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        progress: Progress | None = None,
        column: dist.ProcessGroup | None = None,
    ) -> None:
        self.group = group
        self.device = device
        self.ranks = Ranks(group, device)
        self.rank, self.world_size = self.ranks.rank, self.ranks.size
        self.column = column if column is not None else group
        self.column_ranks = list(range(self.world_size))
        if column is not None and group is not None:
            self.column_ranks = [dist.get_group_rank(group, r) for r in dist.get_process_group_ranks(column)]
        self.in_pairs = device.type == "cpu"
        self.bytes_sent = 0
        self.collectives = 0
        self.progress = progress if progress is not None else Progress()

    def named(self, error: RuntimeError) -> PeerError | None:
        """The error to raise instead of `error`; it adds operation, bucket and step, which backends do not report.

        None if no message has failed, also for an error of this rank's device, which no other rank has caused.
        """
        if not is_network_error(error):
            return None
        p = self.progress
        return PeerError(
            f"rank {self.rank} of {self.world_size}: {place(p.operation, p.bucket, p.step)} failed: {error}. "
            "Another rank has ended, or the network is down: look for the first error of the other ranks"
        )

    def all_to_all(
        self, sent: torch.Tensor, sends: list[int], received: torch.Tensor, receives: list[int]
    ) -> Sequence[Any]:
        """Start an exchange of flat tensors: `sends[r]` elements to rank r and `receives[r]` from it, in rank order.

        Wait for all returned works before you use either tensor. On CUDA, `wait` blocks the current stream, not the
        process.
        """
        self.bytes_sent += sent.numel() * sent.element_size()
        self.collectives += 1
        if not self.in_pairs:
            return [dist.all_to_all_single(received, sent, receives, sends, group=self.group, async_op=True)]
        # gloo's all-to-all posts receives after it has queued megabytes of sends, so a link is used in one direction
        # at a time. Here all receives are posted before the first send.
        messages = []
        for operation, parts in ((dist.irecv, received.split(receives)), (dist.isend, sent.split(sends))):
            for peer, part in enumerate(parts):
                if part.numel():
                    messages.append(dist.P2POp(operation, part, group=self.group, group_peer=peer, tag=_TAG))
        return dist.batch_isend_irecv(messages) if messages else ()

    def highest(self, values: torch.Tensor, words: torch.Tensor | None = None) -> tuple[list[int], bool]:
        """Elementwise maximum of a small uint8 tensor over all ranks, and whether `words` (int64) are equal on all.

        One small collective, and one transfer to the host.
        """
        if self.world_size == 1:
            return values.tolist(), True
        count = len(values)
        if words is not None:
            # ~x falls as x rises, so one maximum of x and ~x gives the largest and the smallest value of each byte.
            evidence = words.view(torch.uint8)
            values = torch.cat([values, evidence, evidence.bitwise_not()])
        self.progress.enter("gradient flags")
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        self.collectives += 1
        found: list[int] = values.tolist()
        half = (len(found) - count) // 2
        high, low = found[count : count + half], found[count + half :]
        return found[:count], all(a + b == 255 for a, b in zip(high, low, strict=True))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum of a small tensor over all ranks, in place."""
        if self.world_size > 1:
            self.progress.enter("norms")
            dist.all_reduce(values, group=self.group)
            self.collectives += 1
        return values

    def require_equal(self, what: str, fields: Sequence[tuple[str, object]]) -> None:
        """Check that `fields` are equal on all ranks, by a digest.

        Raises:
            PlanMismatchError: names the first different field and each rank's value.
        """
        if self.world_size == 1:
            return
        self.progress.enter(what)
        if len(set(self.ranks.gather(digest(fields)))) > 1:
            every = self.ranks.gather(fields)
            raise PlanMismatchError(
                f"the ranks do not hold the same {what}: {first_difference(dict(enumerate(every)))}. "
                "Start every rank with the same model, configuration and package versions."
            )
