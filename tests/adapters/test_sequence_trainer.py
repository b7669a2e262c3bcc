"""A stock Trainer with `ParallelismConfig(sp_size=2, sp_backend="deepspeed")`, against one process.

MuonTrainer: tests/train/test_parallel.py, which compares gradients and order of the samples as well.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks

pytest.importorskip("deepspeed")

import deepspeed
from accelerate import ParallelismConfig, PartialState
from accelerate.utils import DeepSpeedSequenceParallelConfig
from torch.nn import functional
from transformers import AutoModelForCausalLM, TrainingArguments

import muon_dist
from tests.adapters.deepspeed_ranks import GLOBAL_BATCH, SEQUENCE, batch, make_model, model_config
from tests.adapters.test_deepspeed_hf import STEPS, _InOrder, _Watch

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(600)]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    found = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {**found, "position_ids": torch.arange(SEQUENCE).expand_as(found["input_ids"])}


def sequence_parallel(stage: int) -> dict[str, Any]:
    """Arguments of `TrainingArguments` for a group of all ranks."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29556", ACCELERATE_USE_DEEPSPEED="true")
    deepspeed.init_distributed("gloo", verbose=False)
    PartialState(backend="gloo")
    handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
    auto = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    zero = {"zero_allow_untested_optimizer": True, "zero_optimization": {"stage": stage}}
    return {
        "deepspeed": {**auto, **zero, "gradient_clipping": "auto"},
        "accelerator_config": {"use_configured_state": True},
        "parallelism_config": ParallelismConfig(
            sp_size=dist.get_world_size(), sp_backend="deepspeed", sp_handler=handler
        ),
    }


def trained(folder: str, stage: int | None) -> list[float]:
    """Losses of a stock Trainer over the same samples a step, alone or with each sample cut over all ranks."""
    settings: dict[str, Any] = {"use_cpu": True} if stage is None else sequence_parallel(stage)
    model = AutoModelForCausalLM.from_config(model_config("llama"), attn_implementation="sdpa")
    model.load_state_dict(make_model("llama").state_dict())
    args = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=1,  # on CPUs transformers' loss fails on the slice of a larger batch
        gradient_accumulation_steps=GLOBAL_BATCH,
        learning_rate=0.02,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        max_grad_norm=0.0,
        disable_tqdm=True,
        remove_unused_columns=False,
        **settings,
    )
    watch = _Watch()
    rows = [{"input_ids": row, "labels": row} for step in range(STEPS) for row in batch(step)]
    options = muon_dist.for_trainer(args, adamw_lr=0.005, print_routing=False, ns_dtype=torch.float32)
    _InOrder(
        model, args, train_dataset=rows, data_collator=collate, optimizer_cls_and_kwargs=options, callbacks=[watch]
    ).train()
    return watch.losses


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_stock_trainer_under_sequence_parallelism(tmp_path: Path, stage: int) -> None:
    [alone] = run_ranks(trained, 1, str(tmp_path), None)
    for losses in run_ranks(trained, 2, str(tmp_path), stage):
        assert losses == pytest.approx(alone, rel=0, abs=2e-5) and len(losses) == STEPS


SAMPLES = 7  # on two ranks in batches of two, the last batch is filled up


def make_sample(index: int) -> dict[str, torch.Tensor]:
    """A sample that predicts fewer tokens than the one before."""
    ids = batch(index)[0]
    return {"input_ids": ids, "labels": torch.where(torch.arange(SEQUENCE) <= index, -100, ids)}


def evaluated(folder: str) -> tuple[dict[str, float], dict[str, float]]:
    """What MuonTrainer finds after a step under sequence parallelism, and what a loop over single tokens finds."""
    samples = [make_sample(index) for index in range(SAMPLES)]
    args = TrainingArguments(
        output_dir=folder, max_steps=1, per_device_train_batch_size=1, per_device_eval_batch_size=2,
        save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False, **sequence_parallel(1),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(model_config("llama"), attn_implementation="sdpa")
    trainer = muon_dist.MuonTrainer(
        model, args, muon={"print_routing": False}, train_dataset=samples, eval_dataset=samples, data_collator=collate
    )
    trainer.train()
    losses = []
    with torch.no_grad():
        for sample in samples:
            logits = model.eval()(input_ids=sample["input_ids"][None]).logits[0]
            targets = sample["labels"][1:]
            chosen = (targets != -100).nonzero().flatten().tolist()
            losses += [functional.cross_entropy(logits[t], targets[t]).item() for t in chosen]
    return trainer.evaluate(), {"eval_loss": math.fsum(losses) / len(losses)}


def test_validation_loss_is_plain_cross_entropy(tmp_path: Path) -> None:
    for found, wanted in run_ranks(evaluated, 2, str(tmp_path)):
        assert found["eval_loss"] == pytest.approx(wanted["eval_loss"], rel=2e-6)
