"""The work of each rank for a case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from muon_dist.checkpoint import Contents, Ranks, Saver, checkpoint_name, load, open_checkpoint
from muon_dist.fuzz.case import CHECKPOINT, FSDP2, FULL, RELOAD, ZERO, Case, Resume, Setup
from muon_dist.fuzz.holders import Holder
from muon_dist.fuzz.model import Tensors, start

_FULL = "full.pt"


@dataclass(frozen=True)
class Found:
    """The tensors of a rank after the last step of a segment.

    Attributes:
        weights: whole, by FQN.
        orthogonalized: matrices orthogonalized on this rank.
    """

    weights: Tensors
    orthogonalized: int


def run_segment(text: str, number: int, folder: str) -> Found:
    """Run the steps of segment `number` of a case given as JSON; the state for the next segment is written to
    `folder`."""
    case = Case.from_json(text)
    setup, steps = case.segments()[number]
    resume = case.resume
    holder = resumed(case, setup, resume, Path(folder)) if number else hold(case, setup, start(case))
    done = 0
    for step in steps:
        if resume is not None and resume.how == RELOAD and step == resume.at:
            holder.check()
            done += holder.optimizer.orthogonalized
            holder = reloaded(holder)
        holder.step(step)
    if resume is not None and resume.how != RELOAD and number == 0:
        _leave(holder, resume, Path(folder))
    holder.check()
    found = Found(holder.whole(), done + holder.optimizer.orthogonalized)
    holder.close()
    return found


def hold(case: Case, setup: Setup, weights: Mapping[str, torch.Tensor]) -> Holder:
    if setup.framework == ZERO:
        from muon_dist.fuzz.engines import EngineHolder

        return EngineHolder(case, setup, weights)
    if setup.framework == FSDP2:
        from muon_dist.fuzz.meshes import MeshHolder

        return MeshHolder(case, setup, weights)
    return Holder(case, setup, weights)


def reloaded(before: Holder) -> Holder:
    """A new model and optimizer that load the `state_dict` of the old ones on the same ranks."""
    after = hold(before.case, before.setup, before.whole())
    after.optimizer.load_state_dict(before.optimizer.state_dict())
    return after


def _leave(holder: Holder, resume: Resume, folder: Path) -> None:
    if resume.how == CHECKPOINT:
        ranks = Ranks(dist.group.WORLD)
        held = holder.holding()
        Saver(str(folder), ranks).save(held.pieces, Contents(resume.at, held.layout))
        return
    state: Any = holder.optimizer.full_state_dict()
    weights = holder.whole()
    if dist.get_rank() == 0:
        torch.save({"optimizer": state, "weights": weights}, folder / _FULL)


def resumed(case: Case, setup: Setup, resume: Resume | None, folder: Path) -> Holder:
    """A holder that continues from the state of the first segment."""
    assert resume is not None
    if resume.how == FULL:
        saved = torch.load(folder / _FULL)
        holder = hold(case, setup, saved["weights"])
        holder.optimizer.load_state_dict(saved["optimizer"])
        return holder
    # Frozen parameters and all others get their values from the checkpoint only.
    holder = hold(case, setup, {name: w + 1.0 for name, w in start(case).items()})
    ranks = Ranks(dist.group.WORLD)
    checkpoint = open_checkpoint(folder / checkpoint_name(resume.at), ranks)
    load(checkpoint, holder.holding(checkpoint), ranks)
    return holder
