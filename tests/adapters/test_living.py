"""The search for objects of frameworks."""

from __future__ import annotations

import gc

import pytest
import torch

from muon_dist.adapters.living import living
from tests.data.test_preparation import in_a_fork
from tests.distributed import run_ranks


class Kind:
    """Only this test makes objects of it."""


class Special(Kind):
    pass


def test_objects_of_a_class_and_of_its_subclasses_are_found() -> None:
    kept = [Kind(), Special()]
    assert set(living(Kind)) == set(kept) and living(Special) == kept[1:] and not living(torch.nn.Bilinear)


def test_what_is_frozen_is_found_if_asked_for_and_stays_frozen() -> None:
    def job() -> None:
        kept = Special()
        gc.freeze()
        later = Kind()
        assert living(Kind) == [later]
        assert {*living(Kind, frozen=True)} == {kept, later}
        assert living(Kind) == []

    assert in_a_fork(job) == (0, 0)


def orthogonalized_after_a_freeze() -> int:
    from tests.adapters.deepspeed_ranks import Case, backward, make_engine

    engine, optimizer = make_engine(Case(2))
    gc.freeze()  # as a program does after it has built its model, for shorter pauses
    backward(engine, 0, 1)
    engine.step()
    return optimizer.orthogonalized


@pytest.mark.deepspeed
def test_an_engine_is_found_after_a_freeze() -> None:
    assert all(count > 0 for count in run_ranks(orthogonalized_after_a_freeze, 2))
