"""The search for objects of frameworks."""

from __future__ import annotations

import gc

import pytest
import torch

import muon_dist
from muon_dist.adapters.living import living
from tests.distributed import RankFailure, run_ranks


class Kind:
    """Only this test makes objects of it."""


class Special(Kind):
    pass


def test_objects_of_a_class_and_of_its_subclasses_are_found() -> None:
    kept = [Kind(), Special()]
    assert set(living(Kind)) == set(kept) and living(Special) == kept[1:] and not living(torch.nn.Bilinear)


def steps_after_a_freeze(attach: bool) -> int:
    """Matrices that this rank orthogonalized in a step after the program has frozen what it has built."""
    from tests.adapters.deepspeed_ranks import Case, backward, make_engine

    engine, optimizer = make_engine(Case(2))
    gc.freeze()
    if attach:
        muon_dist.attach(engine)
    backward(engine, 0, 1)
    engine.step()
    return optimizer.orthogonalized


@pytest.mark.deepspeed
def test_a_frozen_engine_is_attached_or_asked_for() -> None:
    assert all(count > 0 for count in run_ranks(steps_after_a_freeze, 2, True))
    with pytest.raises(RankFailure, match=r"call muon_dist\.attach\(engine\).*gc\.freeze"):
        run_ranks(steps_after_a_freeze, 2, False)
