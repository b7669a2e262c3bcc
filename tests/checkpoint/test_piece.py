"""Blocks, and who writes what."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

from muon_dist.checkpoint import Piece, to_write
from muon_dist.checkpoint.piece import whole
from muon_dist.layout import Block


def elements(block: Block) -> list[int]:
    return [block.start + i * block.stride + j for i in range(block.rows) for j in range(block.cols)]


def some_blocks(rows: int, cols: int, rng: random.Random, count: int) -> list[Block]:
    found = []
    for _ in range(count):
        if rng.random() < 0.5:
            first = rng.randrange(rows * cols)
            found.append(Block.run(first, rng.randint(1, rows * cols - first)))
        else:
            top, left = rng.randrange(rows), rng.randrange(cols)
            height, width = rng.randint(1, rows - top), rng.randint(1, cols - left)
            found.append(Block.of(top * cols + left, height, width, cols))
    return found


def test_common_is_the_intersection() -> None:
    rng = random.Random(0)
    for rows, cols in product((1, 3, 5), (1, 4, 7)):
        blocks = some_blocks(rows, cols, rng, 24)
        for a, b in product(blocks, blocks):
            parts = a.common(b)
            got = [e for part in parts for e in elements(part)]
            assert sorted(got) == sorted(set(elements(a)) & set(elements(b))), (a, b, parts)


def test_common_of_cuts_along_different_axes() -> None:
    a, b = Block.of(4, 2, 6, 12), Block.of(1, 3, 2, 4)
    got = [e for part in a.common(b) for e in elements(part)]
    assert sorted(got) == sorted(set(elements(a)) & set(elements(b)))


def piece_of(block: Block, source: torch.Tensor) -> Piece:
    flat = source.view(-1)
    if block.rows == 1:
        return Piece("w", "weight", tuple(source.shape), block, flat[block.start : block.stop])
    view = flat.as_strided((block.rows, block.cols), (block.stride, 1), block.start)
    return Piece("w", "weight", tuple(source.shape), block, view)


def test_parts_are_live_views_of_the_right_elements() -> None:
    rng = random.Random(1)
    source = torch.arange(35.0).view(5, 7)
    for a in some_blocks(5, 7, rng, 20):
        for b in some_blocks(5, 7, rng, 20):
            for part in a.common(b):
                found = piece_of(a, source).part(part)
                assert found.reshape(-1).tolist() == elements(part)
                assert found.numel() == 0 or found.data_ptr() == source.data_ptr() + 4 * part.start


def test_a_piece_outside_of_its_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="outside of a tensor"):
        Piece("w", "weight", (2, 3), Block.run(4, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="a view of"):
        Piece("w", "weight", (2, 3), Block.run(0, 4), torch.zeros(3))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_copies_are_written_once_and_in_equal_shares(world: int) -> None:
    everyone = tuple(range(world))
    tensors = {"a": torch.arange(10.0), "b": torch.arange(7.0) + 100, "c": torch.arange(1.0)}
    written: dict[str, list[int]] = {name: [] for name in tensors}
    sizes = []
    for rank in range(world):
        pieces = [p for n, t in tensors.items() for p in whole(n, "weight", tuple(t.shape), t, everyone)]
        mine = to_write(pieces, rank)
        sizes.append(sum(p.block.numel for p in mine))
        for p in mine:
            assert torch.equal(p.tensor, tensors[p.name][p.offset : p.block.stop])
            written[p.name] += elements(p.block)
    assert written == {n: list(range(t.numel())) for n, t in tensors.items()}
    assert max(sizes) <= -(-18 // world)
