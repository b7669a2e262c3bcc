"""The order of samples: a pure function of (seed, position), for any number of ranks."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from muon_dist.data.sampler import BLOCK, MixtureSampler, permute, quotas

from .refusal import refused


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097, 65536, 100_003])
def test_permute_is_a_permutation(size: int) -> None:
    index = np.arange(size, dtype=np.int64)
    for epoch in range(3):
        assert np.array_equal(np.sort(permute(index, size, 1, 2, epoch)), index)


def test_permute_reaches_huge_sizes_at_once() -> None:
    size = 10**15
    index = np.array([0, 1, 2, size // 2, size - 1])
    image = permute(index, size, 7)
    assert len(set(image.tolist())) == 5 and 0 <= image.min() and image.max() < size
    assert image.tolist() == [int(permute(index[k : k + 1], size, 7)[0]) for k in range(5)]


@pytest.mark.parametrize("size", [2, 3, 5, 12, 64])
def test_permute_is_uniform(size: int) -> None:
    """Over many keys every sample is equally often at every place: chi-square within 5 standard deviations."""
    keys = 4000
    index = np.tile(np.arange(size, dtype=np.int64), keys)
    image = permute(index, size, 3, np.repeat(np.arange(keys, dtype=np.int64), size))
    counts = np.bincount(index * size + image, minlength=size * size)
    free = (size - 1) ** 2
    statistic = float(((counts - keys / size) ** 2 / (keys / size)).sum())
    assert abs(statistic - free) < 5 * (2 * free) ** 0.5


def test_neighbours_are_unrelated() -> None:
    image = permute(np.arange(100_000, dtype=np.int64), 100_000, 0)
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(image, np.arange(100_000))[0, 1]) < 0.02


def test_one_source_visits_every_sample_once_an_epoch() -> None:
    order = list(MixtureSampler([777], seed=5, total=3 * 777))
    epochs = [order[k * 777 : (k + 1) * 777] for k in range(3)]
    assert all(sorted(epoch) == list(range(777)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(777))


def test_seeds_differ_and_default_total_is_one_pass() -> None:
    assert list(MixtureSampler([500], seed=0)) != list(MixtureSampler([500], seed=1))
    assert sorted(MixtureSampler([500], seed=2)) == list(range(500))
    assert len(MixtureSampler([500, 20], [1, 1], seed=2, consumed=20)) == 500


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.7, 0.2, 0.1], [5, 1, 0.001], [1, 99, 1]])
def test_weights_are_kept_evenly_and_epochs_do_not_repeat(weights: list[float]) -> None:
    lengths = [311, 97, 1000]
    total = 2 * BLOCK + 1234
    sampler = MixtureSampler(lengths, weights, seed=3, total=total)
    order = np.array(list(sampler))
    starts = np.cumsum([0, *lengths])
    source = np.searchsorted(starts, order, side="right") - 1
    share = np.array(quotas(weights)) / BLOCK
    for k, length in enumerate(lengths):
        drawn = np.cumsum(source == k)
        error = np.abs(drawn - share[k] * np.arange(1, total + 1))
        assert error.max() <= 2  # at every prefix, not only on average
        mine = (order[source == k] - starts[k]).tolist()
        for first in range(0, len(mine) - length + 1, length):
            assert sorted(mine[first : first + length]) == list(range(length))
    assert [sampler.at(s) for s in (0, 1, BLOCK - 1, BLOCK, total - 1)] == [
        (int(source[s]), int(order[s] - starts[source[s]])) for s in (0, 1, BLOCK - 1, BLOCK, total - 1)
    ]


@pytest.mark.parametrize("weights", [[1], [1, 3], [1e-9, 1], [1, 1, 1], [0.333, 0.333, 0.334], [1e-9] * 50 + [1]])
def test_quotas_fill_the_block(weights: list[float]) -> None:
    counts = quotas(weights)
    assert sum(counts) == BLOCK and min(counts) >= 1
    exact = np.array(weights) / sum(weights) * BLOCK
    assert np.all(np.abs(np.array(counts) - exact) < 1 + (exact < 1).sum())


def step_sets(world: int, per_rank: int, accumulation: int, consumed: int = 0) -> list[Counter[int]]:
    """The samples of every optimizer step over all ranks, dealt out as accelerate does."""
    ranks = []
    for rank in range(world):
        sampler = MixtureSampler([300, 41], [3, 1], seed=9, consumed=consumed, total=480)
        ranks.append(list(BatchSamplerShard(BatchSampler(sampler, per_rank, drop_last=False), world, rank)))
    assert len({len(batches) for batches in ranks}) == 1
    steps = len(ranks[0]) // accumulation
    return [
        Counter(s for batches in ranks for batch in batches[k * accumulation : (k + 1) * accumulation] for s in batch)
        for k in range(steps)
    ]


def test_a_step_takes_the_same_samples_for_any_number_of_ranks() -> None:
    """Global batch 24."""
    one = step_sets(1, 24, 1)
    assert len(one) == 20 and sum(map(len, one)) >= 300
    for world, per_rank, accumulation in [
        (1, 6, 4),
        (2, 12, 1),
        (2, 3, 4),
        (3, 8, 1),
        (3, 4, 2),
        (4, 6, 1),
        (4, 3, 2),
    ]:
        assert step_sets(world, per_rank, accumulation) == one


def test_resume_repeats_and_misses_nothing_at_another_number_of_ranks() -> None:
    one = step_sets(1, 24, 1)
    for step in range(20):
        for world, per_rank, accumulation in [(1, 24, 1), (2, 6, 2), (3, 8, 1), (4, 6, 1)]:
            assert step_sets(world, per_rank, accumulation, consumed=24 * step) == one[step:]


def test_resume_across_blocks() -> None:
    total = 2 * BLOCK + 77
    whole = list(MixtureSampler([100, 7], [2, 1], seed=1, total=total))
    assert len(whole) == total
    for consumed in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, total - 1, total):
        sampler = MixtureSampler([100, 7], [2, 1], seed=1, total=total)
        sampler.set_consumed(consumed)
        assert len(sampler) == total - consumed and list(sampler) == whole[consumed:]


def test_order_is_the_same_in_another_process() -> None:
    program = (
        "from muon_dist.data.sampler import MixtureSampler; s = MixtureSampler([1000, 30], [3, 1], seed=4, total=500);"
        "print(s.digest(), *s)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    sampler = MixtureSampler([1000, 30], [3, 1], seed=4, total=500)
    assert out == [sampler.digest(), *map(str, sampler)]
    for other in (
        MixtureSampler([1000, 30], [3, 1], seed=5, total=500),
        MixtureSampler([1000, 31], [3, 1], seed=4, total=500),
        MixtureSampler([1000, 30], [2, 1], seed=4, total=500),
    ):
        assert other.digest() != sampler.digest()
    assert MixtureSampler([1000, 30], [6, 2], seed=4, consumed=7).digest() == sampler.digest()


def test_refusals() -> None:
    with refused("at least one sample", "[3, 0]"):
        MixtureSampler([3, 0], seed=0)
    with refused("at least one sample", "[]"):
        MixtureSampler([], seed=0)
    with refused("1 weights for 2 sources"):
        MixtureSampler([3, 4], [1], seed=0)
    with refused("positive", "-1.0"):
        MixtureSampler([3, 4], [1, -1], seed=0)
    with refused("consumed: 9", "8 samples"):
        MixtureSampler([3, 5], seed=0, consumed=9)
