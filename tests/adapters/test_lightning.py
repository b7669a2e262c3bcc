"""Lightning's checkpoints on two ranks; skipped where Lightning is not installed (muon_dist does not depend on it)."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from muon_dist import Muon
from tests.distributed import run_ranks

lightning = pytest.importorskip("lightning")

from lightning.pytorch.plugins.environments import TorchElasticEnvironment  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402

WIDTH = 12


class Module(lightning.LightningModule):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)))
        self.options = options

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        # Lightning orders the samples of a resumed epoch in its own way, so a batch is a function of step and rank.
        generator = torch.Generator().manual_seed(10 * self.global_step + self.global_rank)
        x = torch.randn(4, WIDTH, generator=generator)
        return nn.functional.mse_loss(self.net(x), x.roll(1, -1))

    def configure_optimizers(self) -> Muon:
        return Muon(self.net.parameters(), lr=0.01, **self.options)


def session(folder: str, options: dict[str, Any], steps: int, resume: str | None) -> tuple[list[torch.Tensor], int]:
    """(weights, how often a save warned) after `steps` in all."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", TORCHELASTIC_RUN_ID="test", LOCAL_WORLD_SIZE="2")
    os.environ.update(GROUP_RANK="0")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(12)), batch_size=2)
    module = Module(options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = lightning.Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            devices=2,
            strategy=DDPStrategy(process_group_backend="gloo"),
            plugins=[TorchElasticEnvironment()],
            max_steps=steps,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, loader, ckpt_path=resume)
        if resume is None:
            trainer.save_checkpoint(f"{folder}/{steps}.ckpt", weights_only=False)
    said = sum("momentum_everywhere=True" in str(w.message) for w in caught)
    return [p.detach().clone() for p in module.net.parameters()], said


def test_lightning_goes_on_exactly_with_the_option(tmp_path: Path) -> None:
    options = {"momentum_everywhere": True}
    expected = run_ranks(session, 2, str(tmp_path), options, 6, None)
    run_ranks(session, 2, str(tmp_path), options, 3, None)
    found = run_ranks(session, 2, str(tmp_path), options, 6, f"{tmp_path}/3.ckpt")
    for (weights, said), (wanted, _) in zip(found, expected, strict=True):
        assert said == 0 and all(torch.equal(a, b) for a, b in zip(weights, wanted, strict=True))


def test_lightnings_save_without_it_says_so(tmp_path: Path) -> None:
    assert run_ranks(session, 2, str(tmp_path), {}, 3, None)[0][1] == 1
