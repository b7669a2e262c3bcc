"""The amount of code that one 64 x 64 matrix passes in a step.

    python -m tests.trip            # counts under DDP, FSDP2 and flat slices as of ZeRO, on 2 ranks
    python -m tests.trip --calls    # and the functions, in the order of their calls

Counted are functions that are written with `def` in muon_dist, on rank 0, in the third step: when the plan is made and
the program compiled. A return is a call into a file that was left before.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # 2 s that every forked rank would pay again
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import muon_dist
from muon_dist.layout import FlatGroup, PlacedParameter, cut_parameter, flat_layout
from muon_dist.optim import Binding, Muon
from tests.distributed import run_ranks

ROOT = str(Path(muon_dist.__file__).parent)
SIDE, STEPS = 64, 3


@dataclass(frozen=True)
class Trip:
    """The calls of a step: (file in muon_dist, qualified name), in order."""

    calls: list[tuple[str, str]]

    @property
    def functions(self) -> int:
        return len(set(self.calls))

    @property
    def files(self) -> int:
        return len({file for file, _ in self.calls})

    @property
    def returns(self) -> int:
        seen: set[str] = set()
        last, count = "", 0
        for file, _ in self.calls:
            count += file != last and file in seen
            seen.add(file)
            last = file
        return count


def follow(optimizer: torch.optim.Optimizer) -> Trip:
    """Makes a step and writes down which functions it calls."""
    calls: list[tuple[str, str]] = []

    def look(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(ROOT) and not code.co_name.startswith("<"):
            owner = frame.f_locals.get("self")
            name = code.co_name if owner is None else f"{type(owner).__name__}.{code.co_name}"
            calls.append((code.co_filename[len(ROOT) + 1 :], name))

    sys.setprofile(look)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    return Trip(calls)


def ddp() -> Trip:
    weight = torch.nn.Parameter(torch.ones(SIDE, SIDE))
    return _third(Muon([weight], lr=0.02), weight)


def fsdp2() -> Trip:
    module = torch.nn.Linear(SIDE, SIDE, bias=False)
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return _third(Muon([module.weight], lr=0.02), module.weight)


def zero() -> Trip:
    world, numel = dist.get_world_size(), SIDE * SIDE
    optimizer = Muon([torch.nn.Parameter(torch.ones(SIDE, SIDE))], lr=0.02)
    name = optimizer.specs[0][0].name
    placed = PlacedParameter(name, numel, 0, cut_parameter(name, (SIDE, SIDE)))
    shard = torch.nn.Parameter(torch.ones(numel // world))
    optimizer.param_groups[0]["params"] = [shard]
    layout = flat_layout([FlatGroup((placed,), numel // world)], world)
    optimizer.bind(Binding(layout, (shard,), dist.group.WORLD, torch.device("cpu")), {0: 0})
    return _third(optimizer, shard)


def _third(optimizer: Muon, parameter: Any) -> Trip:
    for _ in range(STEPS):
        parameter.grad = torch.ones_like(parameter)
        trip = follow(optimizer)
    return trip


LAYOUTS = {"DDP": ddp, "FSDP2": fsdp2, "ZeRO": zero}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.trip", description=__doc__)
    parser.add_argument("--calls", action="store_true", help="print the functions as well")
    given = parser.parse_args()
    print("| layout | calls | functions | files | returns |\n|---|---|---|---|---|")
    trips = {name: run_ranks(step, 2)[0] for name, step in LAYOUTS.items()}
    for name, trip in trips.items():
        print(f"| {name} | {len(trip.calls)} | {trip.functions} | {trip.files} | {trip.returns} |")
    for name, trip in trips.items() if given.calls else ():
        print(f"\n{name}\n" + "\n".join(f"  {file}: {function}" for file, function in trip.calls))


if __name__ == "__main__":
    main()
