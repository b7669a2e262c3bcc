"""Faults that are put into a real optimizer on purpose, and what the audit says of each.

    python -m tests.audit_faults            # a table: found when, named how
    python -m tests.audit_faults NAME ...   # some of them

Every fault is put into the code that runs, on one rank or on all, from the third step on. An audit of every step
must find it within two rotations over the matrices, and name stage and cause. The list is in `tests.audit_fault_list`.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from muon_dist.audit.auditor import Audit
from muon_dist.audit.chain import Chain
from muon_dist.optim import Muon
from tests.audit_fault_list import FAULTS, WORLD, Fault, rate_at
from tests.distributed import run_ranks

FIRST = 3
SHAPES = ((24, 16), (24, 16), (16, 40), (32, 32))
STEPS = FIRST - 1 + 2 * len(SHAPES)


@dataclass(frozen=True)
class Seen:
    """What was found: step and first line with an alarm (None without), and how many lines have one."""

    step: int | None
    line: dict[str, Any] | None
    alarms: int


def _built(fault: Fault) -> tuple[list[torch.nn.Parameter], list[dict[str, Any]]]:
    """Parameters and their groups."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape) * 0.2 for shape in SHAPES] + [torch.randn(n) for n in (40, 9)]
    parameters = [torch.nn.Parameter(_placed(t.to(fault.dtype), fault)) for t in tensors]
    muon = {"params": parameters[:-2], "algorithm": "muon", **fault.group}
    return parameters, [muon, {"params": parameters[-2:], "algorithm": "adamw"}]


def _placed(tensor: torch.Tensor, fault: Fault) -> torch.Tensor:
    if not fault.mesh:
        return tensor
    placements = [Replicate()] * (len(fault.mesh) - 1) + [Shard(0)]
    return distribute_tensor(tensor, init_device_mesh("cpu", fault.mesh), placements)


NONE = Fault("none", "", "")


def watched(
    fault: Fault = NONE, steps: int = STEPS, **options: Any
) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    """All lines of a run, and its last weights; on each rank. With a fault from step `FIRST` on, until an alarm."""
    parameters, groups = _built(fault)
    audit = Audit({"every": 1, **options})
    optimizer = Muon(groups, lr=rate_at(0), weight_decay=0.1, audit=audit, **fault.optimizer)
    lines: list[dict[str, Any]] = []
    kept = {"weights": [p.detach().clone() for p in parameters], "parameters": parameters}
    right = Chain.append
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            patch.object(Chain, "append", lambda self, record: lines.append(right(self, record)) or lines[-1])
        )
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for step in range(1, steps + 1):
            if step == FIRST and fault.change is not None:
                stack.enter_context(fault.change(optimizer))
            if step == FIRST and fault.between is not None:
                fault.between(optimizer, kept)
            for n, p in enumerate(parameters):
                gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(97 * step + n))
                p.grad = _placed(gradient.to(fault.dtype), fault)
            for group, factor in zip(optimizer.param_groups, (1.0, 0.3), strict=True):
                group["lr"] = factor * rate_at(step)
            optimizer.step()
            if fault is not NONE and any(line.get("alarms") for line in lines):
                break  # on all ranks: they know the same
    return lines, [p.detach() for p in parameters]


def seen(lines: Sequence[dict[str, Any]]) -> Seen:
    bad = [line for line in lines if line.get("alarms")]
    return Seen(bad[0]["step"], bad[0], len(bad)) if bad else Seen(None, None, 0)


def seen_of(fault: Fault) -> Seen:
    """On each rank: what was found of one fault."""
    torch.set_num_threads(1)
    return seen(watched(fault)[0])


def all_of(names: Sequence[str]) -> dict[str, Seen]:
    """On each rank: what was found of each fault, and of none."""
    torch.set_num_threads(1)
    found = {"none": seen(watched()[0])}
    for fault in FAULTS:
        if not names or fault.name in names:
            found[fault.name] = seen(watched(fault)[0])
    return found


def named(fault: Fault, result: Seen) -> bool:
    """Whether a fault was found in time, with the right stage and cause in the first alarm of its line."""
    if result.step is None or result.line is None:
        return False
    first = result.line["alarms"][0]
    known = bool({*fault.cause.split(" or ")} & {*first["causes"]})
    return result.step <= STEPS and first["stage"] == fault.stage and known and _names_ranks(fault, first)


def _names_ranks(fault: Fault, alarm: dict[str, Any]) -> bool:
    return not fault.ranks or fault.ranks == tuple(alarm["ranks"])


def main() -> int:
    found = run_ranks(all_of, WORLD, sys.argv[1:])[0]
    print(f"without a fault: {found['none'].alarms} alarms in {STEPS} audited steps")
    print("| fault | found after steps | named | as |\n|---|---|---|---|")
    right = 0
    for fault in FAULTS:
        if fault.name not in found:
            continue
        result, ok = found[fault.name], named(fault, found[fault.name])
        right += ok
        said = result.line["alarms"][0] if result.line else {"stage": "", "sentence": "nothing"}
        after = "" if result.step is None else result.step - FIRST + 1
        print(f"| {fault.name} | {after} | {'right' if ok else 'WRONG'} | {said['stage']}: {said['sentence']} |")
    print(f"{right} of {len(found) - 1} found and named rightly")
    return 0 if right == len(found) - 1 and not found["none"].alarms else 1


if __name__ == "__main__":
    sys.exit(main())
