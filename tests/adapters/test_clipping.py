"""One rule of clipping under every framework: the same step, whichever of them clips."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("deepspeed")

import deepspeed
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import TrainingArguments

import muon_dist
from muon_dist import Muon, MuonTrainer
from tests.adapters.deepspeed_ranks import Case, ds_config, whole_model
from tests.distributed import run_ranks
from tests.optim.plain_rules import PlainRule

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(400)]

Tensors = dict[str, torch.Tensor]
BOUND, LR, DECAY = 0.5, 0.05, 0.1
SCALES = (1.0, 20.0, 0.05, 5.0)
"""Of the loss, step by step: the bound bites in some, so that momentum weighs steps otherwise where it is clipped."""
ALL, ADAMW = "all", "adamw"


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return {"loss": ((out - 1).square().mean(dim=1) * scale).mean()}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
    return [
        {
            "params": [p for p in named.values() if p.ndim == axes],
            "param_names": [n for n, p in named.items() if p.ndim == axes],
            "algorithm": algorithm,
        }
        for axes, algorithm in ((2, "muon"), (1, "adamw"))
    ]


def muon(model: nn.Module) -> Muon:
    return Muon(groups(model), lr=LR, weight_decay=DECAY, ns_dtype=torch.float32)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch of a step, and the scale of each sample's loss."""
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step)), torch.full((8,), SCALES[step])


def part(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return tuple(t.chunk(world)[rank] for t in batch(step))  # type: ignore[return-value]


def truth(rule: str) -> Tensors:
    """In fp64, by the papers' formulas; the bound is on the norm over all parameters."""
    model = Network().double()
    named = dict(model.named_parameters())
    matrices = {n: p for n, p in named.items() if p.ndim == 2}
    plain = PlainRule(matrices, {}, "muon", lr=LR, weight_decay=DECAY)
    vectors = [p for p in named.values() if p.ndim == 1]
    adamw = torch.optim.AdamW(vectors, lr=LR, betas=(0.9, 0.95), weight_decay=DECAY)
    factors = []
    for step in range(len(SCALES)):
        model.zero_grad()
        x, scale = batch(step)
        model(x.double(), scale.double())["loss"].backward()
        gradients = {n: p.grad for n, p in named.items() if p.grad is not None}
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        factors.append(min(1.0, float(BOUND / norm)))
        plain.step({n: gradients[n] * (factors[-1] if rule == ALL else 1.0) for n in matrices})
        for p in vectors:
            p.grad.mul_(factors[-1])
        adamw.step()
        with torch.no_grad():
            for n, p in matrices.items():
                p.copy_(plain.weights[n])
    assert len(set(factors)) == len(factors) - 1 + (factors.count(1.0) == 1), factors  # it bites in some steps
    return {n: p.detach() for n, p in named.items()}


def in_a_loop(rule: str, accelerate: bool) -> Tensors:
    model: Any = Network()
    optimizer: Any = muon(model)
    accelerator = Accelerator(cpu=True) if accelerate else None
    if accelerator is not None:
        wrapped, optimizer = accelerator.prepare(model, optimizer)
    else:
        wrapped = nn.parallel.DistributedDataParallel(model)
    for step in range(len(SCALES)):
        optimizer.zero_grad()
        wrapped(*part(step))["loss"].backward()
        if rule == ADAMW:  # as docs/hyperparameters.md has it
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            adamw = [p for group in optimizer.param_groups if group["algorithm"] == "adamw" for p in group["params"]]
            nn.utils.clip_grads_with_norm_(adamw, BOUND, norm)
        elif accelerator is not None:
            accelerator.clip_grad_norm_(wrapped.parameters(), BOUND)
        else:
            nn.utils.clip_grad_norm_(model.parameters(), BOUND)
        optimizer.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def under_deepspeed(rule: str, stage: int) -> Tensors:
    deepspeed.init_distributed("gloo", verbose=False)
    model = Network()
    config = ds_config(Case(stage, config={"gradient_clipping": BOUND}), dist.get_world_size())
    engine, *_ = deepspeed.initialize(model=model, optimizer=muon(model), config=config)
    muon_dist.attach(engine, clip_muon=rule == ALL)
    for step in range(len(SCALES)):
        engine.backward(engine(*part(step))["loss"])
        engine.step()
    found = whole_model(engine)
    engine.destroy()
    return found


def by_hands(rule: str) -> dict[str, Tensors]:
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the Trainer, before the ranks were forked
    found = {"clip_grad_norm_": in_a_loop(rule, False), "accelerate": in_a_loop(rule, True)}
    return found | {f"ZeRO-{stage}": under_deepspeed(rule, stage) for stage in range(4)}


class Samples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8 * len(SCALES)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x, scale = batch(index // 8)
        return {"x": x[index % 8], "scale": scale[index % 8]}


def under_the_trainer(rule: str, folder: Path) -> Tensors:
    model = Network()
    arguments = TrainingArguments(
        str(folder), max_steps=len(SCALES), per_device_train_batch_size=8, lr_scheduler_type="constant", use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = MuonTrainer(
        model, arguments, optimizers=(muon(model), None), clip_muon=BOUND if rule == ALL else None, clip_adamw=BOUND,
        train_dataset=Samples(), train_sampler=lambda consumed: range(consumed, 8 * len(SCALES)), flops_per_token=1.0,
        peak_flops=1.0,
    )  # fmt: skip
    trainer.train()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_same(name: str, found: Tensors, expected: Tensors) -> None:
    for parameter, wanted in expected.items():
        error = float((found[parameter].double() - wanted).norm() / wanted.norm())
        assert error < 1e-4, (name, parameter, error)


@pytest.mark.parametrize("rule", [ALL, ADAMW])
def test_every_framework_clips_by_one_rule(rule: str, tmp_path: Path) -> None:
    expected = truth(rule)
    other = truth(ADAMW if rule == ALL else ALL)
    assert max(float((expected[n] - other[n]).norm() / other[n].norm()) for n in other) > 1e-2, "the rules must differ"
    assert_same("MuonTrainer", under_the_trainer(rule, tmp_path), expected)
    for name, found in run_ranks(by_hands, 2, rule)[0].items():
        assert_same(name, found, expected)
