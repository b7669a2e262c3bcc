"""Extents, and who writes what."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

from muon_dist.checkpoint import Extent, Piece, to_write
from muon_dist.checkpoint.piece import whole


def elements(extent: Extent) -> list[int]:
    return [extent.offset + i * extent.stride + j for i in range(extent.rows) for j in range(extent.cols)]


def some_extents(rows: int, cols: int, rng: random.Random, count: int) -> list[Extent]:
    found = []
    for _ in range(count):
        if rng.random() < 0.5:
            first = rng.randrange(rows * cols)
            found.append(Extent.run(first, rng.randint(1, rows * cols - first)))
        else:
            top, left = rng.randrange(rows), rng.randrange(cols)
            height, width = rng.randint(1, rows - top), rng.randint(1, cols - left)
            found.append(Extent.block(top * cols + left, height, width, cols))
    return found


def test_common_is_the_intersection() -> None:
    rng = random.Random(0)
    for rows, cols in product((1, 3, 5), (1, 4, 7)):
        extents = some_extents(rows, cols, rng, 24)
        for a, b in product(extents, extents):
            parts = a.common(b)
            got = [e for part in parts for e in elements(part)]
            assert sorted(got) == sorted(set(elements(a)) & set(elements(b))), (a, b, parts)


def test_common_of_cuts_along_different_axes() -> None:
    a, b = Extent.block(4, 2, 6, 12), Extent.block(1, 3, 2, 4)
    got = [e for part in a.common(b) for e in elements(part)]
    assert sorted(got) == sorted(set(elements(a)) & set(elements(b)))


def piece_of(extent: Extent, source: torch.Tensor) -> Piece:
    flat = source.view(-1)
    if extent.rows == 1:
        return Piece("w", "weight", tuple(source.shape), extent, flat[extent.offset : extent.stop])
    view = flat.as_strided((extent.rows, extent.cols), (extent.stride, 1), extent.offset)
    return Piece("w", "weight", tuple(source.shape), extent, view)


def test_parts_are_live_views_of_the_right_elements() -> None:
    rng = random.Random(1)
    source = torch.arange(35.0).view(5, 7)
    for a in some_extents(5, 7, rng, 20):
        for b in some_extents(5, 7, rng, 20):
            for part in a.common(b):
                found = piece_of(a, source).part(part)
                assert found.reshape(-1).tolist() == elements(part)
                assert found.numel() == 0 or found.data_ptr() == source.data_ptr() + 4 * part.offset


def test_a_piece_outside_of_its_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="outside of a tensor"):
        Piece("w", "weight", (2, 3), Extent.run(4, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="a view of"):
        Piece("w", "weight", (2, 3), Extent.run(0, 4), torch.zeros(3))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_copies_are_written_once_and_in_equal_shares(world: int) -> None:
    everyone = tuple(range(world))
    tensors = {"a": torch.arange(10.0), "b": torch.arange(7.0) + 100, "c": torch.arange(1.0)}
    written: dict[str, list[int]] = {name: [] for name in tensors}
    sizes = []
    for rank in range(world):
        pieces = [p for n, t in tensors.items() for p in whole(n, "weight", tuple(t.shape), t, everyone)]
        mine = to_write(pieces, rank)
        sizes.append(sum(p.extent.numel for p in mine))
        for p in mine:
            assert torch.equal(p.tensor, tensors[p.name][p.offset : p.extent.stop])
            written[p.name] += elements(p.extent)
    assert written == {n: list(range(t.numel())) for n, t in tensors.items()}
    assert max(sizes) <= -(-18 // world)
