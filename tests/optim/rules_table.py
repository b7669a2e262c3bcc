"""What each rule and part costs beside Muon: state, messages, time, memory.

    python -m tests.optim.rules_table    # FSDP2, 2 forked gloo ranks, matrices of 256 x 256 and 1024 x 256

State: bytes beside Muon's momentum, both ranks. Sent: bytes of a step, both ranks. Time: of the CPU, in the best step
of the slower rank. Peak: the most that a step allocates at a time, of the rank with more.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # 2 s that every forked rank would pay again
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muon_dist import Muon
from muon_dist.bench.memory import peak_bytes
from muon_dist.bench.traffic import Traffic
from muon_dist.optim.rules import PARTS, RULES
from tests.distributed import run_ranks

SHAPES = [(256, 256)] * 8 + [(1024, 256)] * 4
STEPS = 5
ON: dict[str, Any] = {"row_floor": 0.3825, "radial_brake": 0.5}
CASES: dict[str, dict[str, Any]] = {
    **{rule: {"rule": rule} for rule in RULES},
    **{f"muon, {part}": {"rule_options": {part: ON.get(part, True)}} for part in PARTS},
    "soap_muon, momentum_at_owner": {"rule": "soap_muon", "rule_options": {"momentum_at_owner": True}},
}


def measured(options: dict[str, Any]) -> tuple[int, float, float, int]:
    """(state, sent, seconds, peak) of this rank."""
    torch.manual_seed(0)
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES])
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = Muon([{"params": list(model.parameters())}], lr=0.01, bucket_mb=4.0, **options)
    seconds: list[float] = []

    def step() -> None:
        for p in model.parameters():
            p.grad = 0.1 + p.detach()
        dist.barrier()
        begin = time.process_time()
        optimizer.step()
        seconds.append(time.process_time() - begin)

    for _ in range(STEPS):
        step()
    with Traffic() as traffic:
        step()
    sent, best = traffic.total_sent, min(seconds[1:])
    for p in model.parameters():
        p.grad = 0.1 + p.detach()
    peak = peak_bytes(optimizer.step)
    runtime = optimizer.runtime
    assert runtime is not None
    kept = [t for of_name in runtime.memory.owners.values() for t in of_name.values()]
    kept += [t for of_buffer in runtime.memory.numbers.values() for t in of_buffer.values()]
    kept += runtime.momentum.values()
    state = sum(t.numel() * t.element_size() for t in kept)
    return state, sent, best, peak


def main() -> None:
    print("| rule or part | state beside momentum | sent in a step | CPU time | peak |\n|---|---|---|---|---|")
    muon: tuple[float, float, int] = (1.0, 1.0, 0)
    for case, options in CASES.items():
        of_ranks = run_ranks(measured, 2, options)
        state, sent = sum(r[0] for r in of_ranks), sum(r[1] for r in of_ranks)
        slowest, peak = max(r[2] for r in of_ranks), max(r[3] for r in of_ranks)
        if case == "muon":
            muon = sent, slowest, state
        print(
            f"| `{case}` | {(state - muon[2]) / 1e6:.2f} MB | {sent / 1e6:.2f} MB ({sent / muon[0]:.2f}) | "
            f"{slowest * 1e3:.0f} ms ({slowest / muon[1]:.2f}) | {peak / 1e6:.0f} MB |"
        )


if __name__ == "__main__":
    main()
