"""Checkpoints of commit e03e19f (see earlier/make.py) still load: the same weights and momentum, the same steps after.

They hold neither rules nor blocks.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import muon_dist
from muon_dist.checkpoint import Checkpoint, Ranks, load, open_checkpoint
from tests.checkpoint.earlier.make import OURS, STEP, Run, whole
from tests.distributed import run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(600)]

ARCHIVE = Path(__file__).parent / "earlier" / "files.tar.gz"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert ARCHIVE.stat().st_size < 200_000
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def truth(files: Path) -> dict[str, Tensors]:
    return torch.load(files / "truth.pt")


def assert_continues(found: Tensors, truth: dict[str, Tensors]) -> None:
    """Within what another CPU rounds otherwise."""
    assert found.keys() == truth["later"].keys()
    for name, weight in truth["later"].items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6)


def go_on(run: Run) -> Tensors:
    for step in range(STEP, 2 * STEP):
        run.step(step)
    if run.engine is None:
        return whole(run.model)
    from tests.adapters.deepspeed_ranks import whole_model

    return whole_model(run.engine)


@pytest.mark.parametrize("layout", OURS)
def test_what_our_checkpoints_hold(files: Path, truth: dict[str, Tensors], layout: str) -> None:
    checkpoint = Checkpoint.look(files / layout / f"checkpoint-{STEP}")
    for kind, key in (("weight", "weights"), ("momentum", "momentum")):
        for name, tensor in truth[key].items():
            torch.testing.assert_close(checkpoint.tensor(kind, name), tensor, rtol=1e-5, atol=1e-7)
    assert {name for kind, name in checkpoint.manifest.tensors if kind == "momentum"} == truth["momentum"].keys()


def _ours(folder: str, layout: str) -> Tensors:
    run, ranks = Run(layout), Ranks(dist.group.WORLD)
    checkpoint = open_checkpoint(f"{folder}/checkpoint-{STEP}", ranks)
    load(checkpoint, run.holding(checkpoint), ranks)
    return go_on(run)


@pytest.mark.parametrize(("saved", "layout", "ranks"), [
    ("ddp", "ddp", 2), ("zero3", "zero3", 2), ("fsdp2", "fsdp2", 2), ("ddp", "zero3", 3), ("zero3", "fsdp2", 3),
    ("fsdp2", "zero1", 2),
])  # fmt: skip
def test_our_checkpoints_load_under_every_layout(
    files: Path, truth: dict[str, Tensors], saved: str, layout: str, ranks: int
) -> None:
    for found in run_ranks(_ours, ranks, str(files / saved), layout):
        assert_continues(found, truth)


def _full(folder: str) -> Tensors:
    run = Run("ddp")
    saved: dict[str, Any] = torch.load(f"{folder}/full.pt")
    run.model.load_state_dict(saved["weights"])
    run.optimizer.load_state_dict(saved["optimizer"])
    return go_on(run)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_full_state_dict_loads(files: Path, truth: dict[str, Tensors], ranks: int) -> None:
    for found in run_ranks(_full, ranks, str(files)):
        assert_continues(found, truth)


def _dcp(folder: str) -> Tensors:
    run = Run("fsdp2")
    state = {"weights": run.model.state_dict(), "optimizer": get_optimizer_state_dict(run.model, run.optimizer)}
    dcp.load(state, checkpoint_id=f"{folder}/dcp")
    set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"])
    return go_on(run)


@pytest.mark.parametrize("ranks", [2, 3])
def test_torchs_checkpoints_load(files: Path, truth: dict[str, Tensors], ranks: int) -> None:
    for found in run_ranks(_dcp, ranks, str(files)):
        assert_continues(found, truth)


def _engine(folder: str) -> Tensors:
    run = Run("zero2")
    assert run.engine is not None
    run.engine.load_checkpoint(f"{folder}/deepspeed", tag="three")
    muon_dist.attach(run.engine)
    return go_on(run)


def test_deepspeeds_checkpoints_load(files: Path, truth: dict[str, Tensors]) -> None:
    for found in run_ranks(_engine, 2, str(files)):
        assert_continues(found, truth)
