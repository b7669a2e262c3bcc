"""DeepSpeed's MoE layers through a stock Trainer and through MuonTrainer, with checkpoints."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks

pytest.importorskip("deepspeed")

import deepspeed
from accelerate import PartialState
from transformers import TrainingArguments

import muon_dist
from tests.adapters.test_deepspeed_experts import EXPERTS, SAMPLES, WIDTH, Net, number
from tests.adapters.test_deepspeed_hf import _InOrder, _Watch

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(600)]

STEPS = 4


class Scored(Net):
    """As Trainer wants a model: a dict with the loss."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return {"loss": super().forward(x, y)}


class InOrder(muon_dist.MuonTrainer):
    _get_train_sampler = _InOrder._get_train_sampler


def trained(folder: str, own: bool, size: int, stage: int, resume: bool) -> list[float]:
    """The losses of the steps. own: MuonTrainer's; size: `ep_size`; resume: continue from step 2."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29557", ACCELERATE_USE_DEEPSPEED="true")
    deepspeed.init_distributed("gloo", verbose=False)
    PartialState(backend="gloo")
    model = Scored((size,))
    for name, p in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(number(name, (size,), dist.get_rank()).encode()))
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    config = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": stage},
    }  # fmt: skip
    args = TrainingArguments(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=SAMPLES // dist.get_world_size(),
        learning_rate=0.02, logging_steps=1, save_steps=2, report_to="none", max_grad_norm=0.0, disable_tqdm=True,
        remove_unused_columns=False, deepspeed=config, accelerator_config={"use_configured_state": True},
    )  # fmt: skip
    given = torch.randn(STEPS * SAMPLES, 2, WIDTH, generator=torch.Generator().manual_seed(0))
    rows = [{"x": x, "y": y} for x, y in given]
    watch = _Watch()
    common: dict[str, Any] = {"train_dataset": rows, "callbacks": [watch]}
    options = {"adamw_lr": 0.005, "ns_dtype": torch.float32, "print_routing": False}
    if own:
        trainer: Any = InOrder(model, args, muon=options, **common)
    else:
        factory = muon_dist.for_trainer(args, **options)
        trainer = _InOrder(model, args, optimizer_cls_and_kwargs=factory, **common)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2" if resume else None)
    return watch.losses


@pytest.mark.parametrize("own", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["MuonTrainer", "Trainer"])
def test_experts_on_two_ranks_are_those_of_one_process(own: bool, tmp_path: Path) -> None:
    [alone] = run_ranks(trained, 1, str(tmp_path / "alone"), own, 1, 0, False)
    folder = str(tmp_path / "shared")
    for losses in run_ranks(trained, 2, folder, own, 2, 1, False):
        assert losses == pytest.approx(alone, rel=0, abs=2e-5) and len(losses) == STEPS and EXPERTS > 2
    for losses in run_ranks(trained, 2, folder, own, 2, 1, True):
        assert losses[-2:] == pytest.approx(alone[-2:], rel=0, abs=2e-5)
