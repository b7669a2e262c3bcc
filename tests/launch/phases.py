"""What the hosts of test_hosts.py run: the same short trainings once in each phase, between which links change.

    python -m tests.launch.phases FOLDER PHASE...

Every rank trains under DDP and under ZeRO-2 and ZeRO-3 from the same start and writes FOLDER/PHASE.RANK.json with the
digests of the weights; it begins a phase when FOLDER/PHASE.go is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from muon_dist.train import distributed
from tests.adapters import deepspeed_ranks as ranks
from tests.adapters.deepspeed_ranks import Case

STEPS = 3


def digest(weights: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode() + weights[name].detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def ddp() -> dict[str, torch.Tensor]:
    """`STEPS` steps of the tiny Llama under DDP; the weights."""
    model = ranks.make_model("llama")
    optimizer = ranks.make_muon(model, Case(stage=0))
    wrapped = DistributedDataParallel(model)
    for step in range(STEPS):
        tokens = ranks.used(step).chunk(dist.get_world_size())[dist.get_rank()]
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


def zero(stage: int) -> dict[str, torch.Tensor]:
    """The same under ZeRO."""
    engine, optimizer = ranks.make_engine(Case(stage=stage))
    for step in range(STEPS):
        ranks.backward(engine, step, 1)
        engine.step()
    found = ranks.master(engine, optimizer)
    engine.destroy()
    return found


def main(folder: Path, phases: list[str]) -> None:
    torch.set_num_threads(1)
    distributed.start(60)
    for phase in phases:
        while not (folder / f"{phase}.go").exists():
            time.sleep(0.02)
        began = time.perf_counter()
        weights = {"ddp": ddp(), "zero2": zero(2), "zero3": zero(3)}
        apart = {
            name: max((found[n] - weights["ddp"][n]).abs().max().item() for n in found)
            for name, found in weights.items()
        }
        result = {
            "host": socket.gethostname(),
            "world": dist.get_world_size(),
            "digests": {name: digest(found) for name, found in weights.items()},
            "apart": apart,
            "seconds": time.perf_counter() - began,
        }
        part = folder / f"{phase}.{dist.get_rank()}.part"
        part.write_text(json.dumps(result))
        os.replace(part, part.with_suffix(".json"))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
