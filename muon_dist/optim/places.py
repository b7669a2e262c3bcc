"""Positions of fragments in the memory of the exchange: in messages and in the owners' stacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from muon_dist.exchange.readers import Listing, Part, Shape
from muon_dist.exchange.transport import Region
from muon_dist.optim.program import Envelope, Views


def sent_of(envelope: Envelope | None) -> Region | None:
    """The memory of the sent messages; None if nothing is sent."""
    return envelope.sent if envelope is not None else None


def received_of(envelope: Envelope | None) -> Region | None:
    """The memory of the received messages; None if nothing is received."""
    return envelope.received if envelope is not None else None


def key(part: Part) -> tuple[int, int]:
    """A key that identifies a fragment among all fragments of one rank."""
    return part[0], part[1].block.start


def _shape(part: Part, listing: Listing | None) -> Shape:
    """The shape of a fragment's view: the shape of the listing's view, or (rows, columns) without a listing."""
    block = part[1].block
    return (block.rows, block.cols) if listing is None else listing.shapes[listing.numbers([part])[0]]


def in_message(region: Region | None, listing: Listing | None) -> Callable[[list[Part]], Views]:
    """Function that returns views of fragments stored end to end in a message."""

    def views(parts: list[Part]) -> Views:
        found: Views = []
        at = 0
        for part in parts:
            assert region is not None
            found.append(region.run(at, part[1].length, _shape(part, listing)))
            at += part[1].length
        return found

    return views


def in_stacks(region: Region, parts: list[Part], starts: Mapping[int, int], listing: Listing | None) -> Views:
    """Views of fragments inside the stacks."""
    return [region.block(part[1].block.moved(starts[part[0]]), _shape(part, listing)) for part in parts]


def one_run(views: Views) -> Tensor | None:
    """All views as one flat tensor, if they follow each other without a gap; else None."""
    at = views[0].storage_offset()
    for v in views:
        if not v.is_contiguous() or v.storage_offset() != at:
            return None
        at += v.numel()
    start = views[0].storage_offset()
    return views[0].as_strided((at - start,), (1,), start)


def laid_out(region: Region | None, like: Views) -> Views:
    """Views with the shapes of `like`, end to end in `region`; then frees the region's memory."""
    if region is None:
        return []
    views: Views = []
    at = 0
    for v in like:
        views.append(region.run(at, v.numel(), tuple(v.shape)))
        at += v.numel()
    region.allocated = False
    return views
