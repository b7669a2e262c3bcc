"""Checkpoints of real DeepSpeed engines, through DeepSpeed's own `ds_to_universal`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("deepspeed")

import deepspeed
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import safe_get_full_fp32_param

from muon_dist.adapters.deepspeed import prepare_process
from muon_dist.checkpoint import Checkpoint, open_checkpoint
from muon_dist.errors import CheckpointError, ConfigError
from muon_dist.model.load import load_model
from muon_dist.train import checkpoints
from tests.checkpoint.test_damage import Canary
from tests.distributed import run_ranks
from tests.train.test_checkpoint_cli import make_model

pytestmark = pytest.mark.deepspeed
STEPS = 3


def _train(folder: str, stage: int) -> dict[str, Any]:
    """Three steps with AdamW and a checkpoint of DeepSpeed's; the weights."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29567")
    prepare_process(gpu=False)
    deepspeed.init_distributed("gloo", verbose=False)
    model = make_model("llama")
    if dist.get_rank() == 0:
        model.save_pretrained(f"{folder}/hf")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        tokens = torch.randint(0, 32, (1, 8), generator=generator)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(f"{folder}/engine")
    return {name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()}


@pytest.fixture(scope="module", params=[1, 3])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(stage, folder with hf/, engine/ and universal/, weights)."""
    folder = tmp_path_factory.mktemp(f"zero{request.param}")
    weights = run_ranks(_train, 2, str(folder), request.param)[0]
    arguments = [
        *("--input_folder", folder / "engine" / f"global_step{STEPS}", "--output_folder", folder / "universal"),
        *("--num_extract_workers", 1, "--num_merge_workers", 1, "--inject_missing_state"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ds_to_universal", *map(str, arguments)])
        ds_to_universal.main(ds_to_universal.parse_arguments())
    return request.param, folder, weights


def test_weights_and_adamw_arrive(made: Any, tmp_path: Path) -> None:
    stage, folder, weights = made
    source, model = folder / "universal", folder / "hf"
    with pytest.raises(ConfigError, match="--model"):
        checkpoints.convert(source, tmp_path / "start")
    if stage == 3:  # its universal format has flat tensors and no step
        with pytest.raises(CheckpointError, match=r"step\.pt is missing: .*--step"):
            checkpoints.convert(source, tmp_path / "start", model=model)
    checkpoints.convert(source, tmp_path / "start", model=model, step=STEPS if stage == 3 else None)
    checkpoint = open_checkpoint(tmp_path / "start")
    assert checkpoint.beginning and not checkpoint.weights_only
    for name, weight in weights.items():
        assert torch.equal(checkpoint.tensor("weight", name), weight), name
        moments = [checkpoint.tensor(kind, name) for kind in ("exp_avg", "exp_avg_sq")]
        assert all(m.shape == weight.shape and m.abs().sum() > 0 for m in moments)
        assert checkpoint.tensor("step", name).item() == STEPS
    loaded = load_model(tmp_path / "start")
    assert all(torch.equal(p, weights[name]) for name, p in loaded.named_parameters())
    checkpoints.convert(source, tmp_path / "bare", model=model, weights_only=True)
    assert Checkpoint.look(tmp_path / "bare").weights_only


def test_another_model_is_refused(made: Any, tmp_path: Path) -> None:
    _, folder, _ = made
    make_model("gemma").save_pretrained(tmp_path / "gemma")
    with pytest.raises(CheckpointError, match=r"holds lm_head\.weight, .* the model does not have"):
        checkpoints.convert(folder / "universal", tmp_path / "start", model=tmp_path / "gemma")
    wider = tmp_path / "wider"
    wider.mkdir()
    config = (folder / "hf" / "config.json").read_text()
    (wider / "config.json").write_text(config.replace('"intermediate_size": 24', '"intermediate_size": 25'))
    with pytest.raises(CheckpointError, match=r"fp32\.pt has 384 elements, .*mlp.* has shape \(\d+, \d+\)"):
        checkpoints.convert(folder / "universal", tmp_path / "start", model=wider, weights_only=True)
    assert not (tmp_path / "start").exists()


def test_pickled_state_is_refused(made: Any, tmp_path: Path) -> None:
    """Last of all: it spoils what the others read."""
    _, folder, _ = made
    canary = tmp_path / "executed"
    torch.save(Canary(canary), folder / "universal" / "zero" / "lm_head.weight" / "fp32.pt")
    with pytest.raises(CheckpointError, match=r"lm_head.weight/fp32\.pt is not a plain tensor"):
        checkpoints.convert(folder / "universal", tmp_path / "start", model=folder / "hf")
    with pytest.raises(CheckpointError, match=r"DeepSpeed's own format, which is pickled: .*ds_to_universal"):
        checkpoints.convert(folder / "engine", tmp_path / "start")
    assert not canary.exists() and not (tmp_path / "start").exists()
