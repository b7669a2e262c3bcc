"""What the hosts of test_hosts.py run until one is cut off: Muon's own exchanges, and the watchdog.

    python -m tests.launch.cut_off FOLDER TIMEOUT

A rank writes the number of its steps to FOLDER/steps.RANK.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from muon_dist.guards.watchdog import Watchdog, default_store
from muon_dist.optim import Muon


def main(folder: Path, timeout: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=2 * timeout))
    rank, world = dist.get_rank(), dist.get_world_size()
    parameters = [torch.nn.Parameter(torch.ones(16, 16)) for _ in range(2 * world)]
    optimizer = Muon([{"params": parameters}])
    with Watchdog(optimizer.progress, default_store(), rank, world, timeout=timeout):
        for step in range(100_000):
            for p in parameters:
                p.grad = torch.full_like(p, 1.0 + step)
            optimizer.step()
            (folder / f"steps.{rank}").write_text(str(step))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
