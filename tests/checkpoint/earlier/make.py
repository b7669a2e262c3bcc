"""Checkpoints as commit e03e19f wrote them, before update rules and blocks, with the truth about what they hold.

They were made in a worktree of that commit, and are not to be made again:

    git worktree add /tmp/base e03e19f
    cd /tmp/base && PYTHONPATH=/tmp/base python HERE/make.py HERE/files.tar.gz
"""

from __future__ import annotations

import os
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import deepspeed
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from muon_dist import Muon, param_groups
from muon_dist.adapters import deepspeed_state, module_state
from muon_dist.bench.ranks import run_ranks
from muon_dist.checkpoint import Contents, Ranks, Saver
from muon_dist.routing import SplitRule

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
WORLD, STEP = 2, 3
OURS = ("ddp", "zero3", "fsdp2")


class Net(nn.Module):
    """Under AdamW an embedding, a bias and an output head; under Muon a matrix cut into heads, and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.heads = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6, bias=False)
        self.lm_head = nn.Linear(6, 11, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        logits = self.lm_head(hidden + self.down(torch.tanh(self.heads(hidden))))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def tokens(step: int) -> torch.Tensor:
    return torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(step))


class Run:
    """The net under a layout; every rank uses the same samples."""

    def __init__(self, layout: str) -> None:
        self.layout, self.engine = layout, None
        self.model: Any = Net()
        if layout == "fsdp2":
            fully_shard(self.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        splits = [SplitRule(r"heads\.weight", heads=2)]
        groups = param_groups(self.model, lr=0.02, weight_decay=0.1, splits=splits)
        self.optimizer = Muon(groups, ns_dtype=torch.float32)
        if layout.startswith("zero"):
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29571")
            deepspeed.init_distributed("gloo", verbose=False)
            zero = {"stage": int(layout[-1])}
            if zero["stage"] == 3:
                zero["stage3_param_persistence_threshold"] = 0
            config = {
                "train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False, "zero_optimization": zero,
            }  # fmt: skip
            self.engine, *_ = deepspeed.initialize(model=self.model, optimizer=self.optimizer, config=config)

    def step(self, number: int) -> None:
        if self.engine is not None:
            self.engine.backward(self.engine(tokens(number)))
            self.engine.step()
            return
        self.model(tokens(number)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def holding(self, source: Any = None) -> Any:
        if self.engine is not None:
            return deepspeed_state.holding(self.engine, source=source)
        return module_state.holding(self.model, self.optimizer, dist.get_world_size(), source=source)


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a run without DeepSpeed."""
    parts = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return {n: p.detach().clone() for n, p in parts.items()}


def ours(layout: str, folder: str) -> None:
    run = Run(layout)
    for step in range(STEP):
        run.step(step)
    held = run.holding()
    Saver(f"{folder}/{layout}", Ranks(dist.group.WORLD)).save(held.pieces, Contents(STEP, held.layout))


def torchs(layout: str, folder: str) -> None:
    """`full_state_dict` of copies, and torch.distributed.checkpoint of FSDP2."""
    run = Run(layout)
    for step in range(STEP):
        run.step(step)
    if layout == "ddp":
        full = run.optimizer.full_state_dict()
        if dist.get_rank() == 0:
            torch.save({"weights": whole(run.model), "optimizer": full}, f"{folder}/full.pt")
        return
    state = {"weights": run.model.state_dict(), "optimizer": get_optimizer_state_dict(run.model, run.optimizer)}
    dcp.save(state, checkpoint_id=f"{folder}/dcp")


def deepspeeds(layout: str, folder: str) -> None:
    run = Run(layout)
    for step in range(STEP):
        run.step(step)
    assert run.engine is not None
    run.engine.save_checkpoint(f"{folder}/deepspeed", tag="three")


def truth(folder: str) -> None:
    """One process: weights and momentum when the checkpoints were made, and the weights three steps later."""
    run = Run("ddp")
    for step in range(STEP):
        run.step(step)
    names = {id(p): n for n, p in run.model.named_parameters()}
    momentum = {names[id(p)]: s["momentum_buffer"].clone() for p, s in run.optimizer.state.items() if len(s) == 1}
    saved = {"weights": whole(run.model), "momentum": momentum}
    for step in range(STEP, 2 * STEP):
        run.step(step)
    torch.save({**saved, "later": whole(run.model)}, f"{folder}/truth.pt")


def main(archive: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _write(folder)
        for script in Path(folder).rglob("*.py"):  # DeepSpeed's own, which it puts beside its files
            script.unlink()
        with tarfile.open(archive, "w:gz") as file:
            file.add(folder, "")


def _write(folder: str) -> None:
    for layout in OURS:
        run_ranks(ours, WORLD, layout, folder)
    for layout in ("ddp", "fsdp2"):
        run_ranks(torchs, WORLD, layout, folder)
    run_ranks(deepspeeds, WORLD, "zero2", folder)
    run_ranks(truth, 1, folder)


if __name__ == "__main__":
    main(sys.argv[1])
