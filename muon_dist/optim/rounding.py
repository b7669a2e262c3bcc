"""Stochastic rounding of fp32 results to bfloat16 weights, equal bit for bit under every layout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muon_dist.checkpoint.piece import shaped
from muon_dist.exchange.readers import Listing
from muon_dist.layout import Block, Fragment

Place = tuple[int, Block]
"""The 64-bit key of a tensor's random numbers, and the block of elements in the whole flattened tensor."""

_ON_CPU, _ON_DEVICE = 2**17, 2**22
"""Elements that are widened to fp32 and rounded at a time: few enough for a CPU's cache, enough to keep a GPU busy."""


def key(seed: int, name: str, step: int, write: int = 0) -> int:
    """The key of the random numbers for one rounding of a tensor.

    Args:
        seed: seed of the run.
        name: name of the whole matrix or parameter.
        step: number of its steps so far, this step included.
        write: index of the rounding within the step.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{write}/{name}".encode(), digest_size=8).digest(), "little")


def _int32(value: int) -> int:
    """`value` modulo 2^32 as a signed number."""
    return (value + 2**31) % 2**32 - 2**31


def _xor_shift(x: Tensor, bits: int) -> None:
    """x ^= x >> bits, with zeros shifted in. An int32 shift copies the sign bit, so a mask clears these bits."""
    x.bitwise_xor_((x >> bits).bitwise_and_(2 ** (32 - bits) - 1))


def random_bits(places: Sequence[Place], device: torch.device) -> Tensor:
    """16 random bits for each element of `places`, one place after another, as int32 in [0, 65536).

    A hash of key and element index, modulo 2^32, so that every device computes the same bits. The multipliers are
    those of lowbias32 (https://github.com/skeeto/hash-prospector). The result is the highest bits of the last product,
    because every bit of its factor affects them. One half of the key enters before each of the two rounds, so that no
    two tensors or steps share a sequence of numbers.
    """
    sizes = [block.numel for _, block in places]
    x = torch.arange(sum(sizes), dtype=torch.int32, device=device)
    parts, first, second, at = list(x.split(sizes)), [], [], 0
    for (number, block), part in zip(places, parts, strict=True):
        first.append(_int32(block.start - at + number))
        second.append(_int32(number >> 32))
        if block.rows > 1 and block.stride != block.cols:
            gaps = torch.arange(block.rows, dtype=torch.int32, device=device).mul_(_int32(block.stride - block.cols))
            part.view(block.rows, block.cols).add_(gaps.unsqueeze(1))
        at += block.numel
    torch._foreach_add_(parts, first)
    _xor_shift(x, 16)
    x.mul_(_int32(0x7FEB352D))
    _xor_shift(x, 15)
    torch._foreach_add_(parts, second)
    x.mul_(_int32(0x846CA68B))
    return (x >> 16).bitwise_and_(0xFFFF)


def round_stochastically(wide: Tensor, places: Sequence[Place]) -> None:
    """Round flat fp32 `wide` (n,) in place to bfloat16 values.

    x between its bfloat16 neighbours a < b becomes b with probability (x - a) / (b - a), else a: the mean is x. A
    bfloat16 value does not change, nor do infinities and NaN.
    """
    # For either sign, a float's bits as an integer grow with its magnitude; bfloat16 keeps the upper 16 of the 32.
    bits = random_bits(places, wide.device).add_(wide.view(torch.int32)).bitwise_and_(-0x10000)
    # NaN on a GPU is 0x7FFFFFFF: the addition would turn it into -0.
    wide.copy_(torch.where(torch.isnan(wide), wide, bits.view(torch.float32)))


def rows_within(tensor: Tensor, elements: int) -> int:
    """Largest number of rows of the first axis with at most `elements` elements; at least one."""
    return max(1, elements * len(tensor) // max(tensor.numel(), 1)) if tensor.dim() else 1


def _chunks(weight: Tensor, block: Block, elements: int) -> Iterator[tuple[slice, Block]]:
    """Slices of a fragment's first axis, of about `elements` each, and their blocks in the whole tensor."""
    if weight.numel() <= elements or weight.dim() == 0:
        yield slice(None), block
        return
    rows, length = rows_within(weight, elements), weight.numel() // len(weight)
    for first in range(0, len(weight), rows):
        count = min(rows, len(weight) - first)
        if block.rows == 1:
            yield slice(first, first + count), Block.run(block.start + first * length, count * length)
        elif block.rows == len(weight):
            start = block.start + first * block.stride
            yield slice(first, first + count), Block.of(start, count, block.cols, block.stride)
        else:
            yield slice(None), block
            return


def is_narrow(parameter: Tensor) -> bool:
    """Whether a parameter's dtype is narrower than fp32, so that rounding loses small updates."""
    return parameter.is_floating_point() and parameter.dtype.itemsize < 4


def is_rounded(weight: Tensor) -> bool:
    """Whether this tensor is rounded stochastically; wider tensors are updated directly."""
    return weight.dtype == torch.bfloat16


@dataclass(frozen=True)
class Opened:
    """Some weights in fp32. Changes of `wide` are rounded into the weights when the next weights are opened.

    Attributes:
        wide: one fp32 tensor per entry of `members`; the weight itself if it is not rounded.
        members: positions in the list of weights.
        slices: the part of each member's first axis that `wide` holds.
    """

    wide: list[Tensor]
    members: list[int]
    slices: list[slice]


def opened(weights: Sequence[Tensor], places: Sequence[Place], elements: int | None = None) -> Iterator[Opened]:
    """`weights` in parts of about `elements`: fp32 copies of bfloat16 weights; changes are rounded back.

    Args:
        weights: views of fragments, of any shape.
        places: key and elements of each weight.
        elements: by default chosen for the device.
    """
    as_they_are = [n for n, w in enumerate(weights) if not is_rounded(w)]
    if as_they_are:
        yield Opened([weights[n] for n in as_they_are], as_they_are, [slice(None)] * len(as_they_are))
    part: list[tuple[int, slice, Tensor, Place]] = []
    taken = 0
    for n, (weight, (number, block)) in enumerate(zip(weights, places, strict=True)):
        if not is_rounded(weight) or not weight.numel():
            continue
        most = elements or (_ON_CPU if weight.device.type == "cpu" else _ON_DEVICE)
        for rows, chunk in _chunks(weight, block, most):
            if part and (taken + chunk.numel > most or part[0][2].device != weight.device):
                yield from _rounded(part)
                part, taken = [], 0
            part.append((n, rows, weight[rows] if weight.dim() else weight, (number, chunk)))
            taken += chunk.numel
    if part:
        yield from _rounded(part)


def _rounded(part: list[tuple[int, slice, Tensor, Place]]) -> Iterator[Opened]:
    narrow = [weight for _, _, weight, _ in part]
    flat = torch.empty(sum(w.numel() for w in narrow), dtype=torch.float32, device=narrow[0].device)
    pieces = flat.split([w.numel() for w in narrow])
    wide = [piece.view(w.shape) for piece, w in zip(pieces, narrow, strict=True)]
    torch._foreach_copy_(wide, narrow)
    yield Opened(wide, [n for n, *_ in part], [rows for _, rows, *_ in part])
    round_stochastically(flat, [place for *_, place in part])
    torch._foreach_copy_(narrow, wide)


@dataclass(frozen=True)
class MuonRounding:
    """How Muon's groups write their weights in one step.

    Attributes:
        seed: seed of the random numbers.
        listing: the numbered fragments of this step.
        names: names of all matrices.
        steps: by rounded matrix, the number of its steps so far, this step included.
    """

    seed: int
    listing: Listing
    names: Sequence[str]
    steps: Mapping[int, int]

    def opened(self, numbers: Sequence[int], weights: Sequence[Tensor], write: int = 0) -> Iterator[Opened]:
        """Open the fragments `numbers`, whose views are `weights`, in fp32. `write`: see `key`."""
        chosen = [(self.listing.matrices[n], self.listing.blocks[n]) for n in numbers]
        keys = {i: key(self.seed, self.names[i], self.steps.get(i, 0), write) for i, _ in chosen}
        return opened(weights, [(keys[i], block) for i, block in chosen])


@dataclass(frozen=True)
class AdamWRounding:
    """How AdamW's groups write their weights.

    Attributes:
        seed: seed of the random numbers.
        name: returns the name of a parameter.
        fragments: returns this rank's fragments of a parameter, from its name and tensor.
    """

    seed: int
    name: Callable[[Tensor], str]
    fragments: Callable[[str, Tensor], Sequence[Fragment]]

    def write(self, parameter: Tensor, part: Tensor, wide: Tensor, step: int) -> None:
        """Round the result of AdamW's `step`-th step into `part`, this rank's part of `parameter`.

        wide: the result in fp32, in the shape of `part`.
        """
        if not is_rounded(part):
            return
        name = self.name(parameter)
        held = [f for f in self.fragments(name, parameter) if f.length]
        number = key(self.seed, name, step)
        weights = [_view(part, f) for f in held]
        results = [_view(wide, f) for f in held]
        for some in opened(weights, [(number, f.block) for f in held]):
            of_members = zip(some.members, some.slices, strict=True)
            torch._foreach_copy_(some.wide, [results[n][rows] for n, rows in of_members])


def _view(tensor: Tensor, fragment: Fragment) -> Tensor:
    """The live view of a fragment. A tensor that is not contiguous is one fragment, and is returned itself."""
    return shaped(tensor, fragment.local) if tensor.is_contiguous() else tensor.detach()
