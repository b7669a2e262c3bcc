"""Runs on meshes: `muon-dist train` with a `parallel:` block, against one process with the same samples per step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import tests.adapters.deepspeed_ranks  # sets the environment before DeepSpeed is imported  # isort: skip  # noqa: F401

from muon_dist.config import load_config
from muon_dist.errors import ConfigError
from muon_dist.model.load import load_model
from muon_dist.train import run
from tests.distributed import RankFailure, run_ranks

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parents[2]
MIXTURE = (
    "model={model_type: qwen3_moe, num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 16, head_dim: 8, "
    "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, "
    "max_position_embeddings: 64}"
)
CLIP = ("optimizer.qk_clip={threshold: 0.05}",)  # of the 8 heads some are clipped and some are not
STEPS, TOLERANCE = 4, 2e-5
Curves = dict[str, dict[str, list[float]]]


def trained(workspace: Path, folder: Path, name: str, *settings: str, resume: Path | None = None) -> dict[str, Any]:
    """Losses, validation losses and gradient norms of one run, on every rank."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # accelerate asks; the process group is there already
    fixed = [f"name={name}", f"trainer.max_steps={STEPS}", "trainer.save_steps=2", "data.global_batch_size=8"]
    fixed += ["trainer.eval_strategy=steps", "trainer.eval_steps=2", "evaluation.generate_tokens=0"]
    config = load_config(workspace / "tiny.yaml", [*fixed, *settings])
    run.train(config, run_dir=str(folder), resume=str(resume) if resume is not None else None)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    figures = ("loss", "eval_loss", "grad_norm", "grad_norm/adamw", "tokens", "qk_clip/max_logit", "qk_clip/heads")
    return {f: [line[f] for line in lines if f in line and (f != "grad_norm" or "loss" in line)] for f in figures}


def several(workspace: Path, folder: Path, runs: dict[str, tuple[str, ...]]) -> Curves:
    return {name: trained(workspace, folder, name, *settings) for name, settings in runs.items()}


@pytest.fixture(scope="module")
def alone(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Curves]:
    """The folder and the curves of one process: a dense model, a mixture of experts, a dense model with QK-clip."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, run_ranks(several, 1, workspace, folder, {"dense": (), "mixture": (MIXTURE,), "clipped": CLIP})[0]


def assert_same(found: dict[str, list[float]], wanted: dict[str, list[float]], name: str) -> None:
    for figure, values in wanted.items():
        if found[figure]:  # DeepSpeed gives one norm of gradients, at stage 0 none
            assert found[figure] == pytest.approx(values, rel=0, abs=TOLERANCE), (name, figure)
    assert len(found["loss"]) == STEPS and len(found["eval_loss"]) == 2, name


def test_four_ranks(workspace: Path, tmp_path: Path, alone: tuple[Path, Curves]) -> None:
    """Copies of shards, tensor parallelism under FSDP2 and under copies, experts over all ranks. Validation counts
    each sample once, although two ranks evaluate it together, and its last batch is smaller."""
    runs = {
        "hsdp": ("parallel.dp_replicate=2",),
        "tp-fsdp": ("parallel.tp=2",),
        "tp-copies": ("parallel={tp: 2, dp_replicate: 2, dp_shard: 1}",),
        "experts": (MIXTURE, "parallel={tp: 2, ep: 4}"),
    }
    curves = run_ranks(several, 4, workspace, tmp_path, runs)[0]
    for name, found in curves.items():
        assert_same(found, alone[1]["mixture" if name == "experts" else "dense"], name)


def two_ranks(workspace: Path, folder: Path) -> Curves:
    found = several(workspace, folder, {"fsdp": ("parallel={}",), "tp": ("parallel.tp=2",)})
    half = folder / "fsdp" / "checkpoints" / "checkpoint-2"
    for name, block in (("again", "parallel={}"), ("other", "parallel.tp=2")):
        found[name] = trained(workspace, folder, name, block, resume=half)
    return found


def test_two_ranks_and_resumes(workspace: Path, tmp_path: Path, alone: tuple[Path, Curves]) -> None:
    """A run with a model that transformers sharded at load time resumes: bit for bit on its mesh, and on any other
    mesh, which the Trainer's own checkpoints cannot do."""
    curves = run_ranks(two_ranks, 2, workspace, tmp_path)[0]
    for name in ("fsdp", "tp"):
        assert_same(curves[name], alone[1]["dense"], name)
    assert curves["again"]["loss"] == curves["fsdp"]["loss"][2:]
    half = tmp_path / "fsdp" / "checkpoints" / "checkpoint-2"
    curves["one"] = run_ranks(_one, 1, workspace, tmp_path, half)[0]
    for name in ("other", "one"):
        assert curves[name]["loss"] == pytest.approx(curves["fsdp"]["loss"][2:], rel=0, abs=1e-5), name
    folders = tmp_path / "tp" / "model", alone[0] / "dense" / "model"
    assert len({(folder / "config.json").read_text() for folder in folders}) == 1
    model, whole = map(load_model, folders)
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-4


def _one(workspace: Path, folder: Path, half: Path) -> dict[str, Any]:
    return trained(workspace, folder, "one", resume=half)


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("name", "ranks", "stage"),
    [
        ("dense", 4, 1),
        pytest.param("dense", 2, 3, marks=pytest.mark.slow),
        pytest.param("clipped", 4, 1, marks=pytest.mark.slow),
        pytest.param("clipped", 4, 2, marks=pytest.mark.slow),
        pytest.param("clipped", 2, 3, marks=pytest.mark.slow),
    ],
)
def test_ulysses(
    workspace: Path, tmp_path: Path, alone: tuple[Path, Curves], name: str, ranks: int, stage: int
) -> None:
    """One group of two ranks, or two. Gradients equal those of one process, and so does the clip. Two groups train on
    the samples in order, so a run can continue at any step. With QK-clip each rank sees half the heads."""
    settings = ("parallel.sp=2", f"deepspeed={ROOT}/configs/deepspeed/zero{stage}.json")
    settings += CLIP if name == "clipped" else ()
    found = run_ranks(several, ranks, workspace, tmp_path, {name: settings})[0][name]
    assert_same(found, alone[1][name], name)
    if name == "clipped":
        assert 0 < sum(found["qk_clip/heads"]) < 8 * STEPS and found["loss"] != alone[1]["dense"]["loss"]


@pytest.mark.deepspeed
@pytest.mark.slow
def test_ulysses_without_reduce_scatter_is_refused(workspace: Path, tmp_path: Path) -> None:
    zero = "{stage: 3, reduce_scatter: false}"
    settings = ("parallel.sp=2", f"deepspeed={{zero_optimization: {zero}, zero_allow_untested_optimizer: true}}")
    with pytest.raises(RankFailure, match=r"zero_optimization\.reduce_scatter: is false"):
        run_ranks(several, 2, workspace, tmp_path, {"sp": settings})


# What is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "settings", "message"),
    [
        (2, ["parallel.tp=3"], "parallel: tp 3 = 3 ranks, and the run has 2: start a multiple of 3"),
        (2, ["parallel={tp: 2, dp_shard: 2}"], "parallel: dp_shard 2 x tp 2 = 4 ranks, and the run has 2"),
        (8, ["parallel.tp=8"], "parallel.tp: is 8: does not divide the 4 attention heads"),
        (4, ["parallel.tp=4", MIXTURE], "parallel.tp: is 4: does not divide the 2 key and value heads"),
        (4, ["parallel.tp=4", "model.intermediate_size=66"], "parallel.tp: is 4: does not divide model.intermediate"),
        (2, ["parallel.ep=2"], "parallel.ep: is 2: LlamaForCausalLM has no experts"),
        (8, ["parallel.ep=8", MIXTURE], "parallel.ep: is 8: does not divide the 4 experts"),
        (4, ["parallel={tp: 4, ep: 2}", MIXTURE], "parallel.ep: is 2, and must be a multiple of parallel.tp = 4"),
        (3, ["parallel.cp=3"], "parallel.cp: is 3: 16 tokens of a sample are not a multiple of 6"),
        (2, ["parallel.cp=2"], "parallel.cp: is 2, and torch's ring attention has no CPU kernel"),
        (
            4,
            ["parallel.sp=4", "data.sequence_length=18", f"deepspeed={ROOT}/configs/deepspeed/zero1.json"],
            "parallel.sp: is 4: does not divide the 18 tokens",
        ),
    ],
)
def test_refused_before_data_are_prepared(
    ranks: int,
    settings: list[str],
    message: str,
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from muon_dist.train import build
    from muon_dist.train.folder import RunFolder

    monkeypatch.setattr("muon_dist.train.distributed.world_size", lambda: ranks)
    config = load_config(workspace / "tiny.yaml", settings)
    with pytest.raises(ConfigError) as caught:
        build.check_settings(config, RunFolder(tmp_path / "run"))
    assert message in str(caught.value)
