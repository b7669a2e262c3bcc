"""The only collectives on the hot path."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from muon_dist.errors import MuonDistError, PeerError, PlanMismatchError
from muon_dist.exchange.progress import Progress, place
from muon_dist.ownership import digest, first_difference

_TAG = 0x4D75  # of messages between two ranks, so that none of somebody else's is taken for them
# Words in the RuntimeError that gloo or NCCL raises when a message fails, in lower case.
_OF_THE_NETWORK = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")
# Words in the error of a failed kernel or driver call. NCCL repeats such an error under its own name.
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


class Message:
    """What is on its way between the ranks; `wait` before anything of it is read or written.

    On CUDA the collective runs on a stream of its own, and `wait` makes the current stream wait, not the process.
    """

    def __init__(self, received: torch.Tensor, works: Sequence[Any], sent: torch.Tensor) -> None:
        self._received = received
        self._works = works
        self._sent: torch.Tensor | None = sent  # alive until it has left

    def wait(self) -> torch.Tensor:
        """What has arrived, in the order of the ranks."""
        for work in self._works:
            work.wait()
        self._sent = None
        return self._received

    def parts(self) -> Iterator[torch.Tensor]:
        """The same in parts that follow each other; here one."""
        yield self.wait()


class Broadcasts:
    """Every rank of a column sends one tensor to all others, in their order, as many at a time as there is room for.

    Not all at once, because what all send together is the whole model's updates, which no rank has room for.
    """

    def __init__(self, transport: Transport, send: torch.Tensor, counts: Sequence[int], room: int) -> None:
        self._transport = transport
        self._send = send
        self._own = transport.column_ranks.index(transport.rank)
        self._turns = deque((place, n) for place, n in enumerate(counts) if n)
        self._under_way: deque[tuple[torch.Tensor, Any]] = deque()
        self._room = room
        self._start()

    def _start(self) -> None:
        """As many as fit beside those under way, at least one; counted alike on all ranks, so all start the same."""
        while self._turns and (not self._under_way or self._turns[0][1] <= self._room):
            place, count = self._turns.popleft()
            self._room -= count
            data = self._send if place == self._own else self._send.new_empty(count)
            column = self._transport.column
            self._under_way.append((data, dist.broadcast(data, group_src=place, group=column, async_op=True)))
            self._transport.collectives += 1

    def parts(self) -> Iterator[torch.Tensor]:
        """What each of the others sends, in their order; to be used before the next is asked for."""
        while self._under_way:
            data, work = self._under_way.popleft()
            work.wait()
            if data is not self._send:
                yield data
            self._room += data.numel()
            del data
            self._start()


class Transport:
    """Collectives over one process group; none at all when it has one rank.

    Args:
        group: a process group, or None for a single process.
        device: where tensors that travel must be.
        progress: what is told of each operation; a new one by default.
        column: ranks of `group` among which this rank broadcasts; all by default.

    Attributes:
        bytes_sent: payload that this rank has sent to other ranks by `all_to_all` and `broadcast` since the start.
        collectives: calls made, of any kind.
        progress: what this rank is doing.
        column_ranks: the ranks of `column` in its order, as numbered in `group`.
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
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1
        self.column = column if column is not None else group
        self.column_ranks = list(range(self.world_size))
        if column is not None and group is not None:
            self.column_ranks = [dist.get_group_rank(group, r) for r in dist.get_process_group_ranks(column)]
        self.bytes_sent = 0
        self.collectives = 0
        self.progress = progress if progress is not None else Progress()

    @contextmanager
    def named_failures(self) -> Iterator[None]:
        """A message that fails inside raises PeerError with operation, bucket and step, which backends leave out.

        An error of this rank's own device is raised as it is: no other rank is to blame for it.
        """
        try:
            yield
        except RuntimeError as error:
            if not is_network_error(error):
                raise
            p = self.progress
            raise PeerError(
                f"rank {self.rank} of {self.world_size}: {place(p.operation, p.bucket, p.step)} failed: {error}. "
                "Another rank has ended, or the network is down: look for the first error of the other ranks"
            ) from error

    def all_to_all(self, send: torch.Tensor, sends: list[int], receives: list[int]) -> Message:
        """Start to exchange runs of a flat tensor: `sends[r]` elements to rank r, `receives[r]` from it, by rank."""
        received = send.new_empty(sum(receives))
        self.bytes_sent += send.numel() * send.element_size()
        self.collectives += 1
        if self.device.type == "cpu":
            return Message(received, self._receives_first(send, sends, received, receives), send)
        work = dist.all_to_all_single(received, send, receives, sends, group=self.group, async_op=True)
        return Message(received, [work], send)

    def _receives_first(
        self, send: torch.Tensor, sends: list[int], received: torch.Tensor, receives: list[int]
    ) -> Sequence[Any]:
        """The exchange as messages between pairs of ranks, what is to be received announced before anything is sent.

        gloo's own all-to-all announces it after: behind the megabytes that this rank sends, so that a link carries
        first one direction and then the other.
        """
        ways = ((dist.irecv, received.split(receives)), (dist.isend, send.split(sends)))
        messages = [
            dist.P2POp(operation, part, group=self.group, group_peer=peer, tag=_TAG)
            for operation, parts in ways
            for peer, part in enumerate(parts)
            if part.numel()
        ]
        return dist.batch_isend_irecv(messages) if messages else ()

    def broadcast(self, send: torch.Tensor, counts: Sequence[int], room: int) -> Broadcasts:
        """Start to send the flat tensor `send` to the others of the column, each of which does so as well.

        What does not fit into `room` is sent while the parts are taken, by all ranks in the same order; nothing is
        copied on the way.

        Args:
            counts: elements that each rank of the column sends, in their order.
            room: elements that may be under way.
        """
        self.bytes_sent += (len(self.column_ranks) - 1) * send.numel() * send.element_size()
        return Broadcasts(self, send, counts, room)

    def highest(self, values: torch.Tensor) -> list[int]:
        """Elementwise maximum of a small uint8 tensor over all ranks; one small collective, and the one transfer."""
        if self.world_size > 1:
            self.progress.enter("gradient flags")
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
            self.collectives += 1
        return [int(v) for v in values.tolist()]

    def gather_objects(self, value: Any) -> list[Any]:
        """The (picklable) value of every rank, in rank order; for messages, not for the hot path."""
        if self.world_size == 1:
            return [value]
        every: list[Any] = [None] * self.world_size
        dist.all_gather_object(every, value, group=self.group)
        return every

    def require_equal(self, what: str, fields: list[tuple[str, object]] | None, problem: BaseException | None) -> None:
        """Compare `fields` on all ranks by their digest, before anything is exchanged on the strength of them.

        A rank that could not compute its fields passes the `problem`; then every rank raises instead of waiting.

        Raises:
            PlanMismatchError: names the first differing field and each rank's value, or the rank that failed.
        """
        if self.world_size == 1:
            if problem is not None:
                raise problem
            return
        self.progress.enter(what)
        own = bytes(32) if fields is None else digest(fields)
        sent = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(self.device)
        every = [torch.empty_like(sent) for _ in range(self.world_size)]
        dist.all_gather(every, sent, group=self.group)
        digests = [bytes(d.tolist()) for d in every]
        if problem is not None:
            raise problem
        failed = [r for r, d in enumerate(digests) if d == bytes(32)]
        if failed:
            raise PlanMismatchError(f"rank {failed[0]} could not make its {what}; its own message says why")
        if len(set(digests)) > 1:
            gathered = self.gather_objects(fields)
            raise PlanMismatchError(
                f"the ranks do not hold the same {what}: {first_difference(dict(enumerate(gathered)))}. "
                "Start every rank with the same model, configuration and package versions."
            )
