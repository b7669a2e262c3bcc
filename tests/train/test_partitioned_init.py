"""`model.partitioned_init`: under ZeRO-3 no rank ever holds the whole model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import tests.adapters.deepspeed_ranks  # sets the environment before DeepSpeed is imported  # isort: skip  # noqa: F401

from deepspeed import zero

from muon_dist.config import load_config
from muon_dist.errors import ConfigError
from muon_dist.train import run
from tests.distributed import run_ranks

pytestmark = pytest.mark.deepspeed

ZERO3 = Path(__file__).resolve().parents[2] / "configs" / "deepspeed" / "zero3.json"


def _trained(path: Path, folder: Path) -> dict[str, Any]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # accelerate asks; the process group is there already
    overrides = [
        "trainer.max_steps=2",
        "trainer.save_strategy=no",
        "model.partitioned_init=true",
        f"deepspeed={ZERO3}",
    ]
    config = load_config(path, overrides)
    partitioned: list[bool] = []
    make_model = run.build.make_model

    def noted(*args: Any) -> Any:
        model = make_model(*args)
        partitioned.extend(hasattr(p, "ds_shape") and p.numel() == 0 for p in model.parameters())
        with zero.GatheredParameters(list(model.parameters())):
            drawn = [float(p.std()) for p in model.parameters() if p.ndim > 1]
        assert all(0 < deviation < 1 for deviation in drawn), drawn
        return model

    run.build.make_model = noted
    try:
        summary = run.train(config, run_dir=str(folder), overwrite=True)
    finally:
        run.build.make_model = make_model
    return {"partitioned": partitioned, "loss": summary["validation_loss"], "steps": summary["steps"]}


def test_no_rank_holds_the_whole_model(workspace: Path, tmp_path: Path) -> None:
    results = run_ranks(_trained, 2, workspace / "tiny.yaml", tmp_path)
    for found in results:
        assert found["partitioned"] and all(found["partitioned"])
        assert found["steps"] == 2
    assert results[0]["loss"] == results[1]["loss"] < 6.0  # ln 320 = 5.77 before training


def test_without_zero_3_it_is_refused(workspace: Path, tmp_path: Path) -> None:
    config = load_config(workspace / "tiny.yaml", ["model.partitioned_init=true"])
    with pytest.raises(ConfigError, match="stage 3"):
        run.train(config, run_dir=str(tmp_path))


def test_it_is_true_or_false(workspace: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.partitioned_init.*true or false"):
        load_config(workspace / "tiny.yaml", ["model.partitioned_init=3"])
