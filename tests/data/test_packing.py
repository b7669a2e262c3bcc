"""Documents in samples: kept apart, and whole if they fit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from muon_dist.data.dataset import MixtureDataset, TokenDataset
from muon_dist.data.packing import IGNORED, best_fit
from muon_dist.data.sampler import MixtureSampler

from .refusal import refused
from .test_preparation import stream


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Rooms of the bins of Best-Fit Decreasing, item by item."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [(room, number) for number, room in enumerate(rooms) if room >= length]
        number = min(fits)[1] if fits else len(rooms)
        rooms += [] if fits else [capacity]
        rooms[number] -= length
    return rooms


@pytest.mark.parametrize("seed", range(20))
def test_items_are_packed_as_one_by_one(seed: int) -> None:
    random = np.random.default_rng(seed)
    capacity = int(random.integers(2, 60))
    lengths = random.integers(1, capacity + 1, int(random.integers(0, 300)))
    bins, used = best_fit(lengths, capacity)
    loads = np.bincount(bins, weights=lengths, minlength=used).astype(int)
    assert sorted(capacity - loads) == sorted(plain_best_fit(lengths.tolist(), capacity))


def documents(prepared: Path) -> list[list[int]]:
    ids, ends = stream(prepared / "00-topics" / "train")
    stops = [0, *ends[:, 0].tolist()]
    return [ids[a:b].tolist() for a, b in pairwise(stops)]


def pieces(sample: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each piece of a sample, padding too, cut where positions begin again."""
    starts = torch.nonzero(sample["position_ids"] == 0).flatten().tolist()
    stops = [*starts[1:], len(sample["input_ids"])]
    for a, b in zip(starts, stops, strict=True):
        assert sample["position_ids"][a:b].tolist() == list(range(b - a))
    return [
        (sample["input_ids"][a:b].tolist(), sample["labels"][a:b].tolist()) for a, b in zip(starts, stops, strict=True)
    ]


def test_masked_samples_are_the_stream_and_know_its_documents(prepared: Path) -> None:
    masked = TokenDataset(prepared, "train", 200, packing="document_mask")
    plain = TokenDataset(prepared, "train", 200)
    assert len(masked) == len(plain)
    ends = stream(prepared / "00-topics" / "train")[1][:, 0].tolist()
    for index in range(len(masked)):
        sample = masked[index]
        assert torch.equal(sample["input_ids"], plain[index]["input_ids"])
        inside = [end - 200 * index for end in ends if 200 * index < end < 200 * (index + 1)]
        first = [0, *inside]
        assert torch.nonzero(sample["position_ids"] == 0).flatten().tolist() == first
        expected = sample["input_ids"].clone()
        expected[first] = IGNORED
        assert torch.equal(sample["labels"], expected)


@pytest.mark.parametrize("length", [300, 2000])
def test_best_fit_cuts_no_document_that_fits_and_loses_none(prepared: Path, length: int) -> None:
    dataset = TokenDataset(prepared, "train", length, packing="best_fit")
    found = []
    for index in range(len(dataset)):
        sample, size = dataset[index], dataset.tokens_in(index)
        assert set(sample["labels"][size:].tolist()) <= {IGNORED}
        kept = {name: value[:size] for name, value in sample.items()}
        for ids, labels in pieces(kept):
            assert labels == [IGNORED, *ids[1:]]
            found.append(ids)
    expected = []
    for document in documents(prepared):
        expected += [document[start : start + length] for start in range(0, len(document), length)]
    assert sorted(found) == sorted(expected)
    mixture = MixtureDataset([dataset])
    assert mixture.padding == pytest.approx(1 - dataset.index.tokens / (len(dataset) * length))
    assert mixture.padding < 0.1


def test_an_unknown_packing_is_named(prepared: Path) -> None:
    with refused("data.packing", "greedy", "best_fit"):
        TokenDataset(prepared, "train", 64, packing="greedy")


def test_draws_go_on_and_weight_zero_is_not_drawn() -> None:
    whole = list(MixtureSampler([50, 70], [1, 1], seed=3, total=400))
    first = MixtureSampler([50, 70], [1, 1], seed=3, total=20_000)
    drawn = first.drawn(20_000)
    later = MixtureSampler([50, 70], [1, 1], seed=3, total=100, drawn=drawn)
    flat = list(MixtureSampler([50, 70], [1, 1], seed=3, total=20_100))[20_000:]
    assert drawn == [10_000, 10_000] and sorted(later) == sorted(flat) and later.digest() != first.digest()
    assert first.drawn(100) == [sum(i < 50 for i in whole[:100]), sum(i >= 50 for i in whole[:100])]
    assert all(index >= 50 for index in MixtureSampler([50, 70], [0, 1], seed=3, total=500))
