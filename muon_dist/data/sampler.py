"""The global order of samples: a pure function of (seed, position), the same for every number of ranks.

Position s of the order names a source and one of its samples. Two steps:

*Which source.* The order is cut into blocks of BLOCK positions; each source has a fixed whole number of places in a
block, by its weight (largest remainder), spread evenly over it (the j-th of q places near (j + u) / q of the block).
So the number of draws of a source before any position is known without history.

*Which sample.* The d-th draw of a source of n samples is sample ``permute(d mod n)`` of epoch ``d // n``; the
permutation is a Feistel network over the next power of four, followed until it falls below n ("cycle walking", Black
and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). Unlike ``torch.randperm`` it needs no memory (a thousand
million samples would take 8 GB per epoch), any position is reached at once, and the order is not tied to a torch
version.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from muon_dist.data.files import sha256_json
from muon_dist.errors import DataError

BLOCK = 10_000  # positions; a multiple of 100, so that weights in per cent are exact
_ROUNDS = 6  # Feistel: 4 rounds suffice for wide halves (Luby and Rackoff 1988); short halves get two more

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


def _mix(x: UInt64) -> UInt64:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014), elementwise modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(*parts: int | Int64) -> UInt64:
    """64-bit keys from whole numbers and arrays of them; shape (1,), or the (K,) of the arrays."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        number = part.astype(np.uint64) if isinstance(part, np.ndarray) else np.uint64(part % 2**64)
        key = _mix((key ^ number) + np.uint64(0x9E3779B97F4A7C15))
    return key


def permute(index: Int64, size: int, *key: int | Int64) -> Int64:
    """Images of ``index`` under the permutation of [0, size) for ``key``.

    Shapes: index (K,), values in [0, size); parts of the key are whole numbers or (K,); the result is (K,).
    """
    half = np.uint64(max(1, math.ceil((size - 1).bit_length() / 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [np.broadcast_to(_key(*key, number), index.shape) for number in range(_ROUNDS)]
    value = index.astype(np.uint64)
    walking = np.arange(len(value))
    while len(walking):
        left, right = value[walking] >> half, value[walking] & mask
        for round_keys in keys:
            left, right = right, left ^ (_mix(right ^ round_keys[walking]) & mask)
        value[walking] = (left << half) | right
        walking = walking[value[walking] >= size]
    return value.astype(np.int64)


def quotas(weights: Sequence[float]) -> list[int]:
    """Places of each source in a block of BLOCK positions, by largest remainder: at least one, but none for weight
    0."""
    total = math.fsum(weights)
    exact = [weight / total * BLOCK for weight in weights]
    counts = [max(1, int(share)) if share > 0 else 0 for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda k: (counts[k] - exact[k], k))
    for k in by_remainder[: max(0, BLOCK - sum(counts))]:
        counts[k] += 1
    while sum(counts) > BLOCK:  # the places that were rounded up to one are taken from the largest source
        counts[counts.index(max(counts))] -= 1
    return counts


class MixtureSampler(Sampler[int]):
    """Global order of the samples of one or several sources, as indices into the ``MixtureDataset`` of the same order.

    ``lengths`` are samples per source, ``weights`` their shares (default: the lengths, that is, one plain shuffle of
    everything in the long run); a source of weight 0 is not drawn. ``drawn`` samples of each source were drawn before
    position 0 (default: none). Yields positions ``consumed`` to ``total`` (default: the sum of lengths). No sample of
    a source comes twice before all of them came once; each epoch of a source has another permutation.

    The order does not depend on ranks: every rank builds the same sampler, and accelerate's ``BatchSamplerShard``
    deals its batches out in turn, so one optimizer step takes the same set of samples for any number of ranks as long
    as the global batch is the same. To resume, pass ``consumed = optimizer steps x global batch``, never a loader's
    own counter, which is ahead by its prefetch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        seed: int,
        consumed: int = 0,
        total: int | None = None,
        drawn: Sequence[int] | None = None,
    ) -> None:
        self.lengths = tuple(int(length) for length in lengths)
        self.weights = tuple(float(weight) for weight in (self.lengths if weights is None else weights))
        self.seed = seed
        self.total = sum(self.lengths) if total is None else total
        if not self.lengths or min(self.lengths) < 1:
            raise DataError(f"Every source needs at least one sample; the lengths are {list(self.lengths)}.")
        if len(self.weights) != len(self.lengths):
            raise DataError(f"{len(self.weights)} weights for {len(self.lengths)} sources.")
        if (
            len(self.lengths) > BLOCK
            or not all(math.isfinite(w) and w >= 0 for w in self.weights)
            or not any(self.weights)
        ):
            raise DataError(
                f"Weights must be positive numbers, or 0 but not all, at most {BLOCK} of them; they are "
                f"{list(self.weights)}."
            )
        self._quotas = quotas(self.weights)
        self._drawn = (0,) * len(self.lengths) if drawn is None else tuple(drawn)
        self._offsets = np.cumsum([0, *self.lengths[:-1]], dtype=np.int64)
        self.set_consumed(consumed)

    def set_consumed(self, consumed: int) -> None:
        """Start the next iteration at this position of the order."""
        if not 0 <= consumed <= self.total:
            raise DataError(f"consumed: {consumed} samples are outside the order of {self.total} samples.")
        self.consumed = consumed

    def __len__(self) -> int:
        return self.total - self.consumed

    def __iter__(self) -> Iterator[int]:
        position = self.consumed
        while position < self.total:
            block, first = divmod(position, BLOCK)
            last = min(BLOCK, self.total - block * BLOCK)
            yield from self._block(block)[first:last].tolist()
            position = block * BLOCK + last

    def at(self, position: int) -> tuple[int, int]:
        """(source, sample of the source) at a position of the order."""
        block, place = divmod(position, BLOCK)
        flat = int(self._block(block)[place])
        source = int(np.searchsorted(self._offsets, flat, side="right")) - 1
        return source, flat - int(self._offsets[source])

    def passes(self, position: int) -> list[float]:
        """Passes over each source up to `position`; a sample counts when it is drawn."""
        return [count / length for count, length in zip(self.drawn(position), self.lengths, strict=True)]

    def drawn(self, position: int) -> list[int]:
        """Samples drawn from each source up to `position`, including those drawn before position 0."""
        block, place = divmod(position, BLOCK)
        rest = np.searchsorted(self._offsets, self._block(block)[:place], side="right") - 1
        counts = np.bincount(rest, minlength=len(self.lengths))
        done = zip(self._drawn, self._quotas, counts, strict=True)
        return [before + block * quota + int(count) for before, quota, count in done]

    def digest(self) -> str:
        """Hash of everything that decides the order. A resumed run with another hash reads other samples: store and
        compare it."""
        order = {"lengths": self.lengths, "quotas": self._quotas, "seed": self.seed, "block": BLOCK, "version": 1}
        return sha256_json({**order, "drawn": self._drawn} if any(self._drawn) else order)

    def _block(self, block: int) -> Int64:
        """Flat indices of one block, shape (BLOCK,)."""
        places, flat = [], []
        for source, (quota, length) in enumerate(zip(self._quotas, self.lengths, strict=True)):
            shift = float(_key(self.seed, block, source)[0] >> np.uint64(11)) / 2**53
            places.append((np.arange(quota) + shift) / quota)
            first = self._drawn[source] + block * quota
            flat.append(self._draws(source, first, quota, length) + self._offsets[source])
        # stable: equal places are ordered by source, the same everywhere
        return np.concatenate(flat)[np.argsort(np.concatenate(places), kind="stable")]

    def _draws(self, source: int, first: int, count: int, length: int) -> Int64:
        """Samples of a source at its draws first .. first + count, shape (count,)."""
        draws = np.arange(first, first + count, dtype=np.int64)
        return permute(draws % length, length, self.seed, source, draws // length)
