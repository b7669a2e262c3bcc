"""How documents become samples of one length.

``concatenate``: samples are cut from the stream of all documents, and a token sees whatever comes before it in its
sample. ``document_mask``: the same cuts, but the positions of each document in a sample start at 0, so that attention
keeps documents apart. ``best_fit``: documents are kept apart too, and a document that fits into a sample is not cut:
Best-Fit Decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"); the rest of a sample is padding.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

PACKINGS = ("concatenate", "document_mask", "best_fit")
IGNORED = -100
"""Label of a token that is not predicted, as transformers has it."""

Int64 = npt.NDArray[np.int64]
Piece = tuple[int, int]
"""Tokens of one document: (first token in the stream, number)."""
Read = Callable[[int, int], Int64]


class Packing(Protocol):
    """Which tokens of a stream of documents are in which sample."""

    def __len__(self) -> int:
        """Number of samples."""

    def pieces(self, index: int) -> list[Piece]:
        """The pieces of documents in a sample, in order."""


class Concatenated:
    """Samples cut one after the other from the stream; a rest shorter than a sample is left out."""

    def __init__(self, tokens: int, sequence_length: int) -> None:
        self.samples, self.sequence_length = tokens // sequence_length, sequence_length

    def __len__(self) -> int:
        return self.samples

    def pieces(self, index: int) -> list[Piece]:
        """One piece, which may contain several documents."""
        return [(index * self.sequence_length, self.sequence_length)]


class Masked(Concatenated):
    """The samples of `Concatenated`, with their documents kept apart. ends: where each document ends, (documents,).

    They stay on disk: a search reads about thirty of them.
    """

    def __init__(self, ends: Int64, tokens: int, sequence_length: int) -> None:
        super().__init__(tokens, sequence_length)
        self._ends = ends

    def pieces(self, index: int) -> list[Piece]:
        """A piece of each document that has tokens in the sample."""
        start = index * self.sequence_length
        stop = start + self.sequence_length
        first = bisect_right(self._ends, start)
        cuts = [start]
        while cuts[-1] < stop:
            cuts.append(min(int(self._ends[first]), stop))
            first += 1
        return [(a, b - a) for a, b in pairwise(cuts)]


class BestFit:
    """A document that fits into a sample is not cut; whole samples are cut from a longer one, and its rest is packed.

    Takes 20 bytes of memory per document. Documents in a sample, and samples, are in the order of the stream.
    """

    def __init__(self, ends: Int64, sequence_length: int) -> None:
        ends = np.asarray(ends, dtype=np.int64)
        starts = np.concatenate([[0], ends[:-1]])
        full, rest = np.divmod(ends - starts, sequence_length)
        whole = np.repeat(starts, full) + sequence_length * _ranks(full)
        rests = np.flatnonzero(rest)
        bins, used = best_fit(rest[rests], sequence_length)
        piece_start = np.concatenate([whole, ends[rests] - rest[rests]])
        piece_length = np.concatenate([np.full(len(whole), sequence_length, dtype=np.int64), rest[rests]])
        piece_bin = np.concatenate([np.arange(used, used + len(whole), dtype=np.int64), bins])
        opening = np.full(used + len(whole), np.iinfo(np.int64).max)
        np.minimum.at(opening, piece_bin, piece_start)
        place = np.argsort(np.argsort(opening, kind="stable"), kind="stable")[piece_bin]
        order = np.lexsort((piece_start, place))
        self._starts, self._lengths = piece_start[order], piece_length[order].astype(np.int32)
        self._first = np.concatenate([[0], np.cumsum(np.bincount(place, minlength=len(opening)))])

    def __len__(self) -> int:
        return len(self._first) - 1

    def pieces(self, index: int) -> list[Piece]:
        """The documents of a sample, and cut pieces of longer ones."""
        chosen = slice(int(self._first[index]), int(self._first[index + 1]))
        return list(zip(self._starts[chosen].tolist(), self._lengths[chosen].tolist(), strict=True))


def best_fit(lengths: Int64, capacity: int) -> tuple[Int64, int]:
    """Best-Fit Decreasing: (bin of each item, number of bins); lengths (items,) from 1 to `capacity`.

    The longest item first, each into the bin with the least sufficient room. All items of one length are placed
    together: a bin with room k takes k // length of them in a row, because after the first item it still has the least
    room. So the time depends on the capacity, and almost not on the number of items.
    """
    assigned = np.empty(len(lengths), dtype=np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    bounds = np.flatnonzero(np.diff(lengths[by_length], prepend=-1, append=-1))
    rooms: list[int] = []  # the distinct amounts of room, ascending
    bins_with: dict[int, list[Int64]] = {}
    used = 0

    def put(room: int, bins: Int64) -> None:
        if room > 0 and len(bins):
            if room not in bins_with:
                insort(rooms, room)
            bins_with.setdefault(room, []).append(bins)

    for start, stop in pairwise(bounds):
        items = by_length[start:stop]
        length = int(lengths[items[0]])
        while len(items):
            at = bisect_left(rooms, length)
            if at == len(rooms):
                fresh = -(-len(items) // (capacity // length))
                put(capacity, np.arange(used, used + fresh, dtype=np.int64))
                used += fresh
            room = rooms.pop(at)
            bins = np.concatenate(bins_with.pop(room))
            each = room // length
            full, rest = min(len(bins), len(items) // each), 0
            if full < len(bins):
                rest = min(len(items) - full * each, each)
                put(room - rest * length, bins[full : full + 1])
                put(room, bins[full + 1 :])
            put(room - each * length, bins[:full])
            placed = full * each + rest
            assigned[items[:placed]] = np.repeat(bins[: full + 1], each)[:placed]
            items = items[placed:]
    return assigned, used


def packing(name: str, documents: Path, tokens: int, sequence_length: int) -> Packing:
    """The packing of a split. documents: its file with the ends of documents; tokens: number of tokens in its
    stream."""
    if name == "concatenate":
        return Concatenated(tokens, sequence_length)
    table = np.memmap(documents, dtype="<i8", mode="r").reshape(-1, 2)
    if name == "document_mask":
        return Masked(table[:, 0], tokens, sequence_length)
    return BestFit(table[:, 0], sequence_length)


def packed_sample(pieces: list[Piece], read: Read, sequence_length: int, fill: int) -> dict[str, torch.Tensor]:
    """A sample whose documents are kept apart: input_ids, labels and position_ids, int64 (sequence_length,).

    Positions start at 0 in each piece, and transformers masks attention by them. The first token of a piece has no
    label, so that no token is predicted from another document. The rest is `fill`, without labels.
    """
    ids = torch.full((sequence_length,), fill, dtype=torch.int64)
    labels = torch.full((sequence_length,), IGNORED, dtype=torch.int64)
    positions = torch.empty(sequence_length, dtype=torch.int64)
    at = 0
    for start, count in pieces:
        ids[at : at + count] = torch.from_numpy(read(start, count))
        labels[at + 1 : at + count] = ids[at + 1 : at + count]
        positions[at : at + count] = torch.arange(count)
        at += count
    positions[at:] = torch.arange(sequence_length - at)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def _ranks(counts: Int64) -> Int64:
    """0 .. count - 1 for each count, concatenated."""
    total = int(counts.sum())
    return np.arange(total, dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
