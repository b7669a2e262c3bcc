"""A gradient that is not finite in one shard: nothing changes in any, under FSDP2 (DeepSpeed's stages: see 8432)."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist

from tests.checkpoint.layouts import Run, batch
from tests.distributed import run_ranks


def poisoned() -> tuple[list[bool], list[bool], int]:
    warnings.simplefilter("ignore", RuntimeWarning)
    run = Run("fsdp2")
    unchanged, applied = [], []
    for step in range(5):
        tokens = batch(step).chunk(run.world)[run.rank]
        run.model(input_ids=tokens, labels=tokens).loss.backward()
        if step in (2, 3):
            # a Muon matrix on rank 1, then a vector on rank 0: each where the rank holds some of it
            held = [p for p in run.model.parameters() if p.to_local().numel() and p.dim() == (2 if step == 2 else 1)]
            if run.rank == 3 - step:
                held[-1].grad.to_local().view(-1)[0] = torch.inf
        before = [p.to_local().clone() for p in run.model.parameters()]
        state = [v.to_local().clone() if hasattr(v, "to_local") else v.clone() for v in tensors(run)]
        run.optimizer.step()
        run.optimizer.zero_grad()
        after = [p.to_local() for p in run.model.parameters()]
        now = [v.to_local() if hasattr(v, "to_local") else v for v in tensors(run)]
        same = len(state) == len(now) and all(
            torch.equal(a, b) for a, b in zip(before + state, after + now, strict=True)
        )
        unchanged.append(same)
        applied.append(run.optimizer.guard.applied)
    dist.barrier()
    return unchanged, applied, run.optimizer.guard.skipped


def tensors(run: Run) -> list[torch.Tensor]:
    """All state of the optimizer on this rank, in the order of the parameters."""
    return [
        v
        for p in run.model.parameters()
        for _, v in sorted(run.optimizer.state.get(p, {}).items())
        if torch.is_tensor(v)
    ]


def test_one_bad_shard_leaves_the_step_out_everywhere() -> None:
    for unchanged, applied, skipped in run_ranks(poisoned, 2, timeout=120):
        assert unchanged == [False, False, True, True, False]
        assert applied == [True, True, False, False, True]
        assert skipped == 2
