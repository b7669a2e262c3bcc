"""The vote of a step, and the rank that is slow time after time."""

from __future__ import annotations

import random
import time

import torch
import torch.distributed as dist

from muon_dist.guards.vote import StepVote, Stopwatch, StragglerReport
from tests.distributed import run_ranks


def vote() -> list:
    rank = dist.get_rank()
    voting = StepVote(dist.group.WORLD, torch.device("cpu"))
    assert voting.result() is None
    voting.work.start()
    time.sleep(0.05 * rank)
    voting.cast(torch.tensor(float(rank), requires_grad=True), stop=12 if rank == 2 else 0)
    first = voting.result()
    voting.work.start()
    voting.cast(1.5)
    return [first, voting.result(), voting.result()]


def test_every_rank_hears_the_same() -> None:
    results = run_ranks(vote, 4)
    assert all(r == results[0] for r in results)
    first, second, third = results[0]
    assert (first.loss, first.stop) == (1.5, {2: 12})
    assert first.busy[3] - first.busy[0] > 0.1
    assert (second.loss, second.stop, third) == (1.5, {}, None)


def test_time_in_which_others_may_be_waited_for_does_not_count() -> None:
    work = Stopwatch(torch.device("cpu"))
    began = time.perf_counter()
    work.start()
    work.pause()
    waited = time.perf_counter()
    time.sleep(0.2)
    work.pause()
    waited = time.perf_counter() - waited
    work.resume()
    work.resume()
    time.sleep(0.1)
    own = work.seconds()
    assert 0.1 <= own <= time.perf_counter() - began - waited
    again = time.perf_counter()
    work.start()
    assert work.seconds() <= time.perf_counter() - again


def test_alone() -> None:
    voting = StepVote(None, torch.device("cpu"))
    voting.cast(2.0, stop=15)
    ballot = voting.result()
    assert ballot is not None and (ballot.loss, ballot.stop, len(ballot.busy)) == (2.0, {0: 15}, 1)


def test_a_straggler_is_named_within_twenty_steps() -> None:
    noise = random.Random(0)
    report = StragglerReport(4)
    steps = [tuple(0.3 + noise.expovariate(20) + (0.2 if r == 2 else 0.0) for r in range(4)) for _ in range(20)]
    messages = [text for busy in steps if (text := report.add(busy)) is not None]
    assert len(messages) == 1 and messages[0].startswith("rank 2 is slow: 0.5")


def test_no_false_alarm() -> None:
    for seed in range(50):
        noise = random.Random(seed)
        report = StragglerReport(4)
        for step in range(200):
            busy = [0.05 + noise.expovariate(10) for _ in range(4)]
            busy[step % 4] += 0.5 * (step % 7 == 0)  # now and then somebody is late
            assert report.add(tuple(busy)) is None


def test_small_constant_differences_are_no_alarm() -> None:
    report = StragglerReport(2, seconds=0.1)
    assert all(report.add((0.010, 0.060)) is None for _ in range(40))
    report = StragglerReport(3, seconds=0.1)
    assert all(report.add((10.0, 10.2, 10.0)) is None for _ in range(40))
    assert StragglerReport(1).add((3.0,)) is None
