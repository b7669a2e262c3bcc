"""Guard of copies: compares copies of parameters on several ranks bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from muon_dist.adapters.fsdp2.storage import is_sharded, local_part, replica_groups, reshard
from muon_dist.adapters.hf.guards.nonfinite import NonFiniteGuard
from muon_dist.adapters.hf.guards.run import Guard, GuardedRun
from muon_dist.guards.replicas import ReplicaCheck, check_everywhere


class ReplicaGuard(Guard):
    """Compares copies of parameters at an interval, before each save, and after a step with NaN or infinity.

    every: steps between two comparisons; 0: never, not even before saves.
    nonfinite: tells whether the last step was bad. One flipped exponent bit makes NaN on all ranks; only the copies
        show which rank caused it.
    """

    def __init__(self, run: GuardedRun, every: int, nonfinite: NonFiniteGuard) -> None:
        super().__init__(run)
        self.every, self.nonfinite = every, nonfinite
        self._checks: list[ReplicaCheck] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every <= 0:
            return
        ballot = self.run.ballot()
        saves = control.should_save or (ballot is not None and bool(ballot.stop))
        if saves or self.nonfinite.found or state.global_step % self.every == 0:
            self.run.progress.enter("replica check")
            self._compare(args.device)

    def _compare(self, device: torch.device) -> None:
        vote = self.run.vote
        if self._checks is None:
            self._checks = list(replica_checks(self.run.trainer.model, device))
            if not self._checks and vote is not None and vote.world_size > 1:
                self.run.say("guards.hash_every: no parameter has copies on several ranks, so nothing is compared")
        check_everywhere(self._checks, self.run.group)


def replica_checks(model: torch.nn.Module, device: torch.device) -> Iterator[ReplicaCheck]:
    """The comparisons for a data-parallel model: one per group of ranks that hold copies.

    It compares whole parameters over all ranks (DDP, ZeRO-0/1/2), or shards over their replica groups (HSDP). Under
    ZeRO-3 and plain FSDP2 there are no copies.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    reshard(model)
    whole: list[tuple[str, torch.Tensor]] = []
    shards: dict[tuple[int, ...], tuple[dist.ProcessGroup, list[tuple[str, torch.Tensor]]]] = {}
    for name, p in model.named_parameters():
        if is_sharded(p):
            for group in replica_groups(p):
                ranks = tuple(dist.get_process_group_ranks(group))
                shards.setdefault(ranks, (group, []))[1].append((name, local_part(p.detach())))
        elif not hasattr(p, "ds_tensor"):  # ZeRO-3 marks a partitioned parameter with `ds_tensor`
            whole.append((name, p.detach()))
    if whole:
        yield ReplicaCheck(whole, dist.group.WORLD, device)
    for group, named in shards.values():
        yield ReplicaCheck(named, group, device)
