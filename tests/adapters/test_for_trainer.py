"""`for_trainer`: what a stock Trainer gets, and the DeepSpeed blocks that would replace Muon or its rates."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankFailure, run_ranks

pytest.importorskip("deepspeed")

import deepspeed
from accelerate import PartialState
from transformers import Trainer, TrainingArguments

import muon_dist
from muon_dist.errors import ConfigError, FrameworkError
from muon_dist.optim.muon import Muon
from tests.adapters.deepspeed_ranks import Case, backward, batch, ds_config, make_model, make_muon

pytestmark = pytest.mark.deepspeed

WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}}
DECAY = {"type": "WarmupDecayLR", "params": {**WARMUP["params"], "total_num_steps": "auto"}}
COSINE = {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}}
ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
MUON = {"type": "Muon", "params": {"lr": "auto", "momentum": 0.95}}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings = {"learning_rate": 0.02, "weight_decay": 0.3, "report_to": "none", "use_cpu": True, "max_steps": 2}
    return TrainingArguments(output_dir=str(folder), **{**settings, **changes})


def rates(optimizer: Muon) -> dict[str, tuple[float, float]]:
    return {g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}


def test_rate_and_decay_come_from_the_arguments_of_the_trainer(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    factory, options = muon_dist.for_trainer(args, adamw_lr=0.005, print_routing=False)
    assert rates(factory()(make_model("llama"), **options)) == {
        "muon": (0.02, 0.3), "adamw": (0.005, 0.3), "adamw_no_decay": (0.005, 0.0),
    }  # fmt: skip
    args.learning_rate, args.weight_decay = 0.04, 0.1  # as a hyper-parameter search sets them, later
    assert rates(factory()(make_model("llama"), **options))["muon"] == (0.04, 0.1)
    _, options = muon_dist.for_trainer(args, lr=0.5, weight_decay=0.0, print_routing=False)
    assert rates(factory()(make_model("llama"), **options))["muon"] == (0.5, 0.0)


def test_a_rule_without_weight_decay_leaves_that_of_the_trainer_to_adamw(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    factory, options = muon_dist.for_trainer(args, rule="hyperball", print_routing=False)
    optimizer = factory()(make_model("llama"), **options)
    assert [(g["name"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("muon", 0.0), ("adamw", 0.3), ("adamw_no_decay", 0.0),
    ]  # fmt: skip
    assert optimizer.param_groups[0]["rule"] == "hyperball"


def test_what_a_rule_does_not_have_is_an_error_at_once(tmp_path: Path) -> None:
    for given, words in (({"rule": "namo", "nesterov": True}, "nesterov"), ({"rule_options": {"b": 1}}, "'b'")):
        with pytest.raises(ConfigError, match=words):
            muon_dist.for_trainer(arguments(tmp_path), **given)


def test_an_unknown_option_is_an_error_at_once(tmp_path: Path) -> None:
    for name, meant in (
        ("adam_lr", "adamw_lr"),
        ("muon_lr", "lr"),
        ("adamw_betas", "betas"),
        ("adjust_lr_fn", "scale"),
    ):
        with pytest.raises(ConfigError, match=rf"'{name}' is an argument of another optimizer: write {meant}="):
            muon_dist.for_trainer(arguments(tmp_path), **{name: 0.1})


def test_a_stock_trainer_trains_with_it(tmp_path: Path) -> None:
    args = arguments(tmp_path, lr_scheduler_type="constant", max_grad_norm=0.0)
    rows = [{"input_ids": row, "labels": row} for row in batch(0)]
    options = muon_dist.for_trainer(args, adamw_lr=0.005, print_routing=False)
    trainer = Trainer(make_model("llama"), args, train_dataset=rows, optimizer_cls_and_kwargs=options)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, Muon) and optimizer.orthogonalized == 2 * 14
    assert rates(optimizer)["muon"] == (0.02, 0.3)


# ---- blocks of a DeepSpeed configuration


def _deepspeed(folder: str, blocks: dict[str, Any], how: str) -> Any:
    """TrainingArguments over a DeepSpeed configuration with `blocks`, handed over in one of three ways."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29557", ACCELERATE_USE_DEEPSPEED="true")
    deepspeed.init_distributed("gloo", verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 1},
        **blocks,
    }
    path = Path(folder) / "ds.json"
    path.write_text(json.dumps(config))
    PartialState(backend="gloo")
    changes: dict[str, Any] = {"use_cpu": False, "accelerator_config": {"use_configured_state": True}}
    if how == "accelerate launch":
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)
    else:
        changes["deepspeed"] = config if how == "dict" else str(path)
    return arguments(Path(folder), lr_scheduler_type="constant", logging_steps=1, max_grad_norm=0.0, **changes)


def _options(folder: str, blocks: dict[str, Any], how: str) -> list[str]:
    return sorted(muon_dist.for_trainer(_deepspeed(folder, blocks, how), lr=0.02, adamw_lr=0.005)[1])


REFUSED = [
    ({"optimizer": ADAMW}, 'has an "optimizer" block'),
    ({"optimizer": MUON}, 'has an "optimizer" block'),
    ({"optimizer": ADAMW, "scheduler": WARMUP}, 'has an "optimizer" block'),
    ({"scheduler": WARMUP}, 'has a "scheduler" block of type WarmupLR'),
    ({"scheduler": DECAY}, 'has a "scheduler" block of type WarmupDecayLR'),
]


@pytest.mark.parametrize("how", ["file", "dict", "accelerate launch"])
@pytest.mark.parametrize(("blocks", "message"), REFUSED)
def test_blocks_that_would_replace_muon_or_its_rates_are_refused(
    tmp_path: Path, blocks: dict[str, Any], message: str, how: str
) -> None:
    with pytest.raises(RankFailure, match=f"FrameworkError: the DeepSpeed configuration {message}"):
        run_ranks(_options, 1, str(tmp_path), blocks, how)


def _muon_trainer(folder: str, blocks: dict[str, Any]) -> None:
    args = _deepspeed(folder, blocks, "file")
    muon_dist.MuonTrainer(make_model("llama"), args, muon={"print_routing": False})


@pytest.mark.parametrize(("blocks", "message"), REFUSED[::3])
def test_muon_trainer_refuses_them_too(tmp_path: Path, blocks: dict[str, Any], message: str) -> None:
    with pytest.raises(RankFailure, match=f"FrameworkError: the DeepSpeed configuration {message}"):
        run_ranks(_muon_trainer, 1, str(tmp_path), blocks)


def _trained(folder: str, blocks: dict[str, Any]) -> list[list[float]]:
    """The rates of all groups after each step of a stock Trainer."""
    model = make_model("llama")
    args = _deepspeed(folder, blocks, "file")
    args.max_steps = 6
    found: list[list[float]] = []

    class Rates(Trainer):
        def training_step(self, *a: Any, **k: Any) -> Any:
            optimizer = self.deepspeed.basic_optimizer
            assert isinstance(optimizer, Muon)
            found.append([group["lr"] for group in optimizer.param_groups])
            return super().training_step(*a, **k)

    rows = [{"input_ids": row, "labels": row} for step in range(4) for row in batch(step)]
    options = muon_dist.for_trainer(args, adamw_lr=0.005, print_routing=False)
    Rates(model, args, train_dataset=rows, optimizer_cls_and_kwargs=options).train()
    return found


def test_a_scheduler_block_that_multiplies_is_taken(tmp_path: Path) -> None:
    (found,) = run_ranks(_trained, 1, str(tmp_path), {"scheduler": COSINE}, timeout=120)
    assert len({muon for muon, *_ in found}) > 3
    assert all(muon == pytest.approx(4 * adamw) for muon, adamw, _ in found)


def _attached(scheduler: dict[str, Any], own: bool) -> str:
    case = Case(1, config={"scheduler": scheduler})
    deepspeed.init_distributed("gloo", verbose=False)
    model = make_model(case.model)
    optimizer = make_muon(model, case)
    mine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0) if own else None
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=mine, config=ds_config(case, dist.get_world_size())
    )
    try:
        muon_dist.attach(engine)
    except FrameworkError as error:
        return str(error)
    backward(engine, 0, 1)
    engine.step()
    return "taken"


def test_attach_checks_the_scheduler_of_the_engine() -> None:
    one = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 2}}
    each = {"type": "WarmupLR", "params": {"warmup_min_lr": [0.0] * 3, "warmup_max_lr": [0.02, 0.003, 0.003]}}
    assert "replaces the learning rates of Muon and of AdamW by one number" in run_ranks(_attached, 1, one, False)[0]
    assert run_ranks(_attached, 1, each, False) == ["taken"]
    assert run_ranks(_attached, 1, one, True) == ["taken"], "a client scheduler makes DeepSpeed ignore the block"


# ---- FSDP


def _warnings(folder: str) -> list[str]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29557")
    args = arguments(Path(folder), fsdp="full_shard")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        muon_dist.for_trainer(args, lr=0.1)
    return [str(w.message) for w in caught if "fsdp" in str(w.message)]


def test_fsdp_on_a_cpu_is_said_to_be_ddp(tmp_path: Path) -> None:
    first, second = run_ranks(_warnings, 2, str(tmp_path))
    assert second == [], "the first rank says it"
    (text,) = first
    assert "no effect on a CPU" in text and "DistributedDataParallel" in text and "ZeRO stage 3" in text
