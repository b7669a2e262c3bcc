"""Groups by pattern under Trainer, DeepSpeed and FSDP2, against one process that steps each parameter by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("deepspeed")

import deepspeed
import torch.distributed.fsdp  # 2 s that every forked rank would pay again
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainerCallback, TrainingArguments

import muon_dist
from muon_dist.errors import ConfigError
from muon_dist.optim.muon import Muon
from tests.adapters.deepspeed_ranks import full_gradient
from tests.distributed import run_ranks
from tests.optim.plain_groups import GROUPS, RATES, Plain, batch, model

pytestmark = pytest.mark.deepspeed
STEPS = 4
FP32 = {"ns_dtype": torch.float32}


class Gradients(TrainerCallback):
    """The gradients of every step, as the optimizer gets them."""

    def __init__(self, plain: Plain, steps: int) -> None:
        self.plain, self.steps, self.taken = plain, steps, 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = {n: p.grad.clone() for n, p in kwargs["model"].named_parameters()}
        self.plain.step(gradients, (self.steps - self.taken) / self.steps)  # the linear schedule
        self.taken += 1


@pytest.mark.parametrize("kind", ["stock", "MuonTrainer"])
def test_the_trainer(tmp_path: Path, kind: str) -> None:
    net = model()
    args = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=0.02, weight_decay=0.1, report_to="none", use_cpu=True,
        max_steps=STEPS, lr_scheduler_type="linear", per_device_train_batch_size=2, logging_steps=1,
        save_strategy="no", **({"max_grad_norm": 0.0} if kind == "stock" else {}),
    )  # fmt: skip
    plain = Plain(dict(net.named_parameters()))
    rows = [{"input_ids": row, "labels": row} for step in range(STEPS) for row in batch(step)]
    own = {key: RATES[key] for key in ("adamw_lr", "adamw_weight_decay")}
    options = {"groups": GROUPS, "print_routing": False, **own, **FP32}
    common: dict[str, Any] = {"train_dataset": rows, "callbacks": [Gradients(plain, STEPS)]}
    if kind == "stock":
        trainer = Trainer(net, args, optimizer_cls_and_kwargs=muon_dist.for_trainer(args, **options), **common)
    else:
        trainer = muon_dist.MuonTrainer(net, args, muon=options, clip_adamw=None, **common)
    trainer.train()
    assert trainer.optimizer is not None
    plain.check(dict(net.named_parameters()))
    if kind == "MuonTrainer":
        first = next(line for line in trainer.state.log_history if "loss" in line)
        assert (first["lr/muon"], first["lr/muon lm_head"]) == (0.02, 0.01)
        assert first[r"lr/muon model\.layers\.0\..*"] == 0.007


def test_for_trainer_refuses_a_bad_entry_at_once(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, weight_decay=0.1)
    for entry, words in (
        ({"pattern": ".*q_proj", "algoritm": "adamw"}, "did you mean 'algorithm'"),
        ({"pattern": ".*q_proj", "rule_options": {"beta2": 0.9}}, "rule 'muon' has no option 'beta2'"),
    ):
        with pytest.raises(ConfigError, match=words):
            muon_dist.for_trainer(args, groups=[entry])
    factory, options = muon_dist.for_trainer(
        args, rule="hyperball", groups=[{"pattern": ".*q_proj", "rule": "muon"}], print_routing=False
    )
    with pytest.raises(
        ConfigError, match=r"groups\[0\] .*its rule has weight decay, but the optimizer's rule .hyperball"
    ):
        factory()(model(), **options)
    options["groups"][0]["weight_decay"] = 0.3
    found = {g["name"]: g["weight_decay"] for g in factory()(model(), **options).param_groups}
    assert found == {"muon": 0.0, "muon .*q_proj": 0.3, "adamw": 0.1, "adamw_no_decay": 0.0}


def _under_deepspeed(stage: int, ordered: bool) -> int:
    deepspeed.init_distributed("gloo", verbose=False)
    net, world = model(), dist.get_world_size()
    plain = Plain(dict(net.named_parameters()))
    groups = muon_dist.param_groups(net, groups=GROUPS, partitions=world if ordered else None, **RATES)
    optimizer = Muon(groups, **FP32)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    named = dict(engine.module.named_parameters())
    for step in range(STEPS):
        tokens = batch(step, dist.get_rank())
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        plain.step({n: full_gradient(engine, p) for n, p in named.items()})
        engine.step()
    shapes = {n: p.shape for n, p in model().named_parameters()}
    found = {n: deepspeed.utils.safe_get_full_fp32_param(p).detach().view(shapes[n]) for n, p in named.items()}
    plain.check(found)
    optimizer.param_groups[0]["algorithm"] = "adamw"
    tokens = batch(0)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    with pytest.raises(ConfigError, match="group muon: algorithm was 'muon'"):
        engine.step()
    return optimizer.orthogonalized


@pytest.mark.parametrize(("stage", "ordered"), [(1, True), (2, False), (3, False)])
def test_deepspeed(stage: int, ordered: bool) -> None:
    counts = run_ranks(_under_deepspeed, 2, stage, ordered)
    # two q_proj of four heads, k, v, o, gate, up of both layers, down of layer 0, the head
    assert sum(counts) == STEPS * (2 * 4 + 2 * 5 + 1 + 1)


def _under_fsdp2() -> int:
    net = model()
    plain = Plain(dict(net.named_parameters()))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in net.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = Muon(net, **_for_a_model())
    named = dict(net.named_parameters())
    for step in range(STEPS):
        tokens = batch(step, dist.get_rank())
        net(input_ids=tokens, labels=tokens).loss.backward()
        plain.step({n: p.grad.full_tensor() for n, p in named.items()})
        optimizer.step()
        optimizer.zero_grad()
    plain.check({n: p.full_tensor().detach() for n, p in named.items()})
    return optimizer.orthogonalized


def _for_a_model() -> dict[str, Any]:
    """`Muon(model)` has one rate for all: AdamW's are entries, behind all others."""
    groups = [dict(g) for g in GROUPS]
    groups[3]["weight_decay"] = 0.05
    groups.append({"pattern": r".*layernorm.*", "lr": 0.003})
    return {"lr": 0.02, "weight_decay": 0.1, "groups": groups, **FP32}


def test_fsdp2() -> None:
    assert sum(run_ranks(_under_fsdp2, 2)) == STEPS * (2 * 4 + 2 * 5 + 1 + 1)
