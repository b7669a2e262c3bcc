"""`python -m tests.fuzz_mutations`: does the fuzzer find mistakes made on purpose? The table of docs/fuzz.md.

Each mutation changes our own code only in the forked ranks.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
import torch.distributed as dist

import muon_dist.adapters.fsdp2.storage as fsdp2_storage
import muon_dist.optim.compiler as compiler
import muon_dist.optim.rules.parts as parts
import muon_dist.optim.state as state
from muon_dist.fuzz.case import Case
from muon_dist.fuzz.judge import RIGHT, Judge
from muon_dist.fuzz.run import Report, fuzz
from muon_dist.optim.bucket_run import BucketRun
from muon_dist.optim.compiler import ProgramCompiler
from muon_dist.optim.rules.muon import HeldWeights, MuonRule
from muon_dist.optim.runtime import Runtime

LIMIT = 120.0
"""Seconds within which each must be found."""


def last_rank() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1 > 0


def swapped_owners() -> None:
    """The last rank takes the owners of two matrices for each other's."""
    original = Runtime.__init__

    def changed(self: Any, binding: Any, plan: Any, *args: Any, **kwargs: Any) -> None:
        owners = list(plan.owners)
        other = next((i for i, owner in enumerate(owners) if owner != owners[0]), None)
        if last_rank() and other is not None:
            owners[0], owners[other] = owners[other], owners[0]
            plan = replace(plan, owners=tuple(owners))
        original(self, binding, plan, *args, **kwargs)

    Runtime.__init__ = changed  # type: ignore[method-assign]


def dropped_copy() -> None:
    """The last rank leaves out the updates that others have sent."""
    original = BucketRun._apply

    def changed(self: Any, updates: Any) -> None:
        if not last_rank() or updates is self.program.own_updates:
            original(self, updates)

    BucketRun._apply = changed  # type: ignore[method-assign]


def stale_momentum() -> None:
    """`load_state_dict` leaves the momentum as it was."""
    state._adopt_momentum = lambda *args, **kwargs: None  # type: ignore[assignment]


def wrong_scale() -> None:
    """The scale of a matrix of fewer rows than columns is that of its rows."""
    original = compiler.update_scale

    def changed(kind: str, matrix: Any) -> float:
        right = original(kind, matrix)
        return 0.2 * matrix.rows**0.5 if kind == "match_rms_adamw" and matrix.rows < matrix.cols else right

    compiler.update_scale = changed  # type: ignore[attr-defined]


def skipped_clip() -> None:
    """Muon's gradients stay as DeepSpeed has clipped them."""
    from muon_dist.adapters.deepspeed.gradients import Clip

    Clip.__call__ = lambda self: 1.0  # type: ignore[method-assign]


def bucket_out_of_order() -> None:
    """The last rank takes its buckets in reverse."""
    original = ProgramCompiler.compile

    def changed(self: Any, *args: Any) -> Any:
        program = original(self, *args)
        return replace(program, buckets=program.buckets[::-1]) if last_rank() else program

    ProgramCompiler.compile = changed  # type: ignore[method-assign]


def momentum_decayed_twice() -> None:
    """Momentum is multiplied by its factor twice in each step."""
    original = MuonRule.remember

    def changed(self: Any, momentum: Any, gradients: Any, group: Any) -> None:
        torch._foreach_mul_(momentum, group["momentum"])
        original(self, momentum, gradients, group)

    MuonRule.remember = changed  # type: ignore[method-assign]


def missing_nesterov() -> None:
    """What is sent to the owners is the momentum alone."""
    MuonRule.send = lambda self, out, momentum, group: torch._foreach_copy_(out, momentum)  # type: ignore[method-assign]


def decay_skipped() -> None:
    """Weights that lie in columns of a larger tensor do not decay."""
    original = MuonRule.decay

    def changed(self: Any, held: HeldWeights, group: Any) -> None:
        kept = [i for i, w in enumerate(held.weights) if w.is_contiguous()]
        some = {name: [getattr(held, name)[i] for i in kept] for name in ("weights", "positions")}
        original(self, replace(held, **some), group)

    MuonRule.decay = changed  # type: ignore[method-assign]


def wrong_column_block() -> None:
    """Ranks with columns of a matrix are taken in reverse."""
    original = fsdp2_storage.sharded

    def changed(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        columns = any(cut is not None and cut[0] == len(found.shape) - 1 for cut in found.cuts)
        return replace(found, ranks=found.ranks[::-1]) if columns else found

    fsdp2_storage.sharded = changed  # type: ignore[assignment]


def stale_stack() -> None:
    """An owner orthogonalizes what the last place of its stack held in the step before."""
    original = BucketRun.stack
    before: dict[int, torch.Tensor] = {}

    def changed(self: Any) -> None:
        original(self)
        for s in self.program.stacks[-1:]:
            now = s.view[-1].clone()
            if id(self.program) in before:
                s.view[-1].copy_(before[id(self.program)])
            before[id(self.program)] = now

    BucketRun.stack = changed  # type: ignore[method-assign]


def other_rate() -> None:
    """The last rank's learning rate is 1% higher."""
    original = MuonRule.apply

    def changed(self: Any, weights: Any, updates: Any, rate: float) -> None:
        original(self, weights, updates, rate * 1.01 if last_rank() else rate)

    MuonRule.apply = changed  # type: ignore[method-assign]


def no_rest() -> None:
    """A matrix whose gradient is zero keeps its full update."""
    original = Runtime._begin

    def changed(self: Any, *args: Any) -> Any:
        step, *others = original(self, *args)
        return (replace(step, rest={}), *others)

    Runtime._begin = changed  # type: ignore[method-assign]


def unscaled_floor() -> None:
    """The part `row_floor` forgets the scale of the update."""
    parts.update_scale = lambda kind, matrix: 1.0  # type: ignore[attr-defined]


def careless_decay() -> None:
    """The part `cautious` decays every element."""
    parts.Cautious.decay = parts._Late.decay  # type: ignore[method-assign]


def repeated_row() -> None:
    """Of an own `ns_schedule` the first row is used in every iteration."""
    original = compiler.orthogonalizer

    def changed(rows: int, cols: int, device: Any, steps: int, schedule: Any, *args: Any, **kwargs: Any) -> Any:
        own = not isinstance(schedule, str) and schedule is not None
        return original(rows, cols, device, steps, [schedule[0]] * len(schedule) if own else schedule, *args, **kwargs)

    compiler.orthogonalizer = changed  # type: ignore[attr-defined]


def scale_of_a_part() -> None:
    """The scale of a matrix that is cut by columns is that of half its columns."""
    original, compile_all = compiler.update_scale, ProgramCompiler.compile
    cut: set[int] = set()

    def noted(self: Any, *args: Any) -> Any:
        for m in self.plan.layout.matrices:
            if any(f.block.cols < m.matrix.cols and f.block.rows == m.matrix.rows for f in m.fragments):
                cut.add(id(m.matrix))
        return compile_all(self, *args)

    def changed(kind: str, matrix: Any) -> float:
        out, inputs = matrix.fan
        part: Any = SimpleNamespace(fan=(out, max(1, inputs // 2)))
        return original(kind, part if id(matrix) in cut else matrix)

    ProgramCompiler.compile = noted  # type: ignore[method-assign]
    compiler.update_scale = changed  # type: ignore[attr-defined]


def experts_of_others() -> None:
    """Ranks of DTensors' expert parallelism are taken in reverse: an expert has the number of another."""
    original = fsdp2_storage.sharded

    def changed(name: str, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(name, tensor, *args, **kwargs)
        shared = "ep" in (tensor.device_mesh.mesh_dim_names or ())
        return replace(found, ranks=found.ranks[::-1]) if shared else found

    fsdp2_storage.sharded = changed  # type: ignore[assignment]


def experts_misnumbered() -> None:
    """The experts of DeepSpeed's MoE layers are numbered from the last rank of `ep` to the first."""
    from muon_dist.adapters.deepspeed import parallel

    original = parallel._experts

    def changed(engine: Any) -> Any:
        found = list(original(engine))
        last = max((experts.first for experts in found), default=0)
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, last)
        for experts in found:
            yield replace(experts, first=max(every) - experts.first)

    parallel._experts = changed


def shards_in_reverse() -> None:
    """What AutoTP leaves to its first rank is taken for the last's."""
    from muon_dist.layout import Shard

    original = Shard.cut.__func__  # type: ignore[attr-defined]

    def changed(cls: Any, shape: Any, axis: int, widths: Any, part: int) -> Any:
        even = all(len(set(of_sub)) == 1 for of_sub in widths)
        return original(cls, shape, axis, widths, len(widths[0]) - 1 - part if even else part)

    Shard.cut = classmethod(changed)  # type: ignore[assignment, method-assign]


ONLY = {"experts_of_others": "ep", "experts_misnumbered": "MoE", "shards_in_reverse": "AutoTP"}
"""The cases that are drawn for a mutation of what few cases have, as `muon-dist fuzz --only` takes them."""

MUTATIONS: tuple[Callable[[], None], ...] = (
    swapped_owners,
    dropped_copy,
    stale_momentum,
    wrong_scale,
    skipped_clip,
    bucket_out_of_order,
    momentum_decayed_twice,
    missing_nesterov,
    decay_skipped,
    wrong_column_block,
    stale_stack,
    other_rate,
    no_rest,
    unscaled_floor,
    careless_decay,
    repeated_row,
    scale_of_a_part,
    experts_of_others,
    experts_misnumbered,
    shards_in_reverse,
)


def find(mutation: Callable[[], None], seed: int, limit: float = LIMIT, shrink_seconds: float = 0.0) -> Report:
    """Fuzz with a mutation until it is found or the time is over."""
    return fuzz(
        limit, seed, lambda line: None, only=ONLY.get(mutation.__name__, ""), prepare=mutation, stop_at_first=True,
        shrink_seconds=shrink_seconds, patience=20.0,
    )  # fmt: skip


def is_right(case: Case) -> bool:
    """Whether the case is right without a mutation."""
    with Judge() as judge:
        return judge.run(case).kind == RIGHT


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 0 when each mutation was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_mutations", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of mutations; all unless given")
    chosen = parser.parse_args(arguments)
    print("| mutation | `--only` | seconds | cases |\n|---|---|---|---|", flush=True)
    lost = 0
    for mutation in MUTATIONS:
        if chosen.only and mutation.__name__ not in chosen.only:
            continue
        begun = time.monotonic()
        report = find(mutation, chosen.seed)
        taken = time.monotonic() - begun
        if not all(is_right(wrong.case) for wrong in report.wrong):
            raise AssertionError(f"wrong without a mutation too: {report.wrong[0].replay()}")
        lost += not report.wrong
        seconds = f"{taken:.0f}" if report.wrong else "not found"
        only = ONLY.get(mutation.__name__, "")
        print(f"| {mutation.__doc__} | {only} | {seconds} | {report.counts.total()} |", flush=True)
        if report.wrong:
            print(f"{report.wrong[0].outcome.message.splitlines()[-1][:150]}", file=sys.stderr, flush=True)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
