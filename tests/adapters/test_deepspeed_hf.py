"""A stock Trainer and a plain Accelerator over DeepSpeed, with the configurations in configs/deepspeed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankFailure, run_ranks

pytest.importorskip("deepspeed")

import deepspeed
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from accelerate.utils import InitProcessGroupKwargs
from transformers import Trainer, TrainerCallback, TrainingArguments

import muon_dist
from muon_dist.optim.muon import Muon
from tests.adapters.deepspeed_ranks import GLOBAL_BATCH, Case, batch, make_model, make_muon, whole_model

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.name for path in (ROOT / "configs" / "deepspeed").glob("*.json"))
STEPS = 4


def _environment() -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29555")


class _Watch(TrainerCallback):
    """Losses of every step, and the engine at the end."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def _rows() -> list[dict[str, Any]]:
    return [
        {"input_ids": row, "labels": row} for step in range(STEPS) for row in batch(step)
    ]  # in order: no shuffling below


class _InOrder(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def _configuration(name: str, tensor: int) -> Any:
    path = ROOT / "configs" / "deepspeed" / name
    if tensor == 1:
        return str(path)
    return {**json.loads(path.read_text()), "tensor_parallel": {"autotp_size": tensor}}


def _train(
    config: str | None, folder: str, save: bool = False, resume: bool = False, tensor: int = 1
) -> dict[str, Any]:
    _environment()
    deepspeed.init_distributed("gloo", verbose=False)
    if config is not None:
        # Without a GPU, TrainingArguments takes the ranks for single processes: no backend is known for DeepSpeed.
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
    model = make_model("llama")  # afterwards, stage 3 would make it under zero.Init
    args = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=GLOBAL_BATCH * tensor // (2 * dist.get_world_size()),
        gradient_accumulation_steps=2,
        learning_rate=0.02,
        lr_scheduler_type="linear",
        logging_steps=1,
        save_strategy="steps" if save else "no",
        save_steps=2,
        report_to="none",
        use_cpu=config is None,  # accelerate leaves DeepSpeed out when told to use the CPU
        accelerator_config={"use_configured_state": config is not None},
        disable_tqdm=True,
        deepspeed=None if config is None else _configuration(config, tensor),
        max_grad_norm=0.0,
    )
    watch = _Watch()
    options = {
        "lr": 0.02, "weight_decay": 0.1, "adamw_lr": 3e-3, "adamw_weight_decay": 0.05, "ns_dtype": torch.float32,
        "print_routing": False,
    }  # fmt: skip
    trainer = _InOrder(
        model,
        args,
        train_dataset=_rows(),
        callbacks=[watch],
        optimizer_cls_and_kwargs=(muon_dist.MuonFactory, options),
    )
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2" if resume else None)
    optimizer = trainer.optimizer
    while not isinstance(optimizer, Muon):
        optimizer = optimizer.optimizer
    engine = trainer.model_wrapped if config is not None else None
    weights = (
        whole_model(engine) if engine is not None else {n: p.detach() for n, p in trainer.model.named_parameters()}
    )
    assert optimizer.plan is not None
    return {
        "losses": watch.losses,
        "weights": weights,
        "calls": optimizer.orthogonalized,
        "matrices": len(optimizer.plan.layout.matrices),
        "layout": optimizer.plan.layout.kind,
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same Trainer on one process without DeepSpeed."""
    (result,) = run_ranks(_train, 1, None, str(tmp_path_factory.mktemp("plain")), timeout=200.0)
    return result


@pytest.mark.slow
def test_stock_trainer_trains_the_same_under_tensor_parallelism(plain, tmp_path):
    """Two ranks hold a layer together and get the same samples; two copies of each."""
    by_rank = run_ranks(_train, 4, "zero1.json", str(tmp_path), False, False, 2, timeout=200.0)
    for result in by_rank:
        assert result["layout"] == "flat" and result["losses"] == pytest.approx(plain["losses"], abs=2e-5)
    assert sum(result["calls"] for result in by_rank) == STEPS * plain["matrices"]


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_stock_trainer_trains_the_same_at_every_stage(plain, tmp_path, config):
    by_rank = run_ranks(_train, 2, config, str(tmp_path), timeout=200.0)
    kind = {"zero0": "replicated", "zero1": "flat", "zero2": "flat", "zero3": "per_parameter"}
    start = dict(make_model("llama").named_parameters())
    for result in by_rank:
        assert result["layout"] == kind[config.removesuffix(".json").partition("_")[0]]
        assert result["losses"] == pytest.approx(plain["losses"], abs=1e-4)
        error = sum((result["weights"][n] - w).square().sum() for n, w in plain["weights"].items()).sqrt()
        moved = sum((w - start[n].detach()).square().sum() for n, w in plain["weights"].items()).sqrt()
        assert error < 1e-4 * moved, (error / moved).item()
    assert sum(r["calls"] for r in by_rank) == STEPS * by_rank[0]["matrices"]


@pytest.mark.parametrize("config", ["zero0.json", pytest.param("zero1.json", marks=pytest.mark.slow), "zero3.json"])
def test_stock_trainer_resumes_exactly(tmp_path, config):
    """Trainer loads before the first step, so the state is there before the plan."""
    straight = run_ranks(_train, 2, config, str(tmp_path), True, timeout=200.0)
    resumed = run_ranks(_train, 2, config, str(tmp_path), False, True, timeout=200.0)
    for a, b in zip(straight, resumed, strict=True):
        assert all(torch.equal(a["weights"][n], w) for n, w in b["weights"].items())


def _accelerate(stage: int, offload: bool) -> dict[str, Any]:
    _environment()
    deepspeed.init_distributed("gloo", verbose=False)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size(),
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        config["zero_force_ds_cpu_optimizer"] = False
    model = make_model("llama")
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    engine, wrapped = accelerator.prepare(model, make_muon(model, Case(stage)))
    for step in range(STEPS):
        tokens = batch(step).chunk(dist.get_world_size())[dist.get_rank()]
        accelerator.backward(engine(input_ids=tokens, labels=tokens).loss)
        wrapped.step()
        wrapped.zero_grad()
    optimizer = wrapped.optimizer if isinstance(wrapped.optimizer, Muon) else wrapped.optimizer.optimizer
    assert isinstance(optimizer, Muon)
    return {"weights": whole_model(engine), "calls": optimizer.orthogonalized}


@pytest.mark.parametrize(("stage", "offload"), [(0, False), (2, True), (3, False)])
def test_accelerate(stage, offload):
    by_rank = run_ranks(_accelerate, 2, stage, offload, timeout=200.0)
    (alone,) = run_ranks(_accelerate, 1, 0, False, timeout=200.0)
    start = dict(make_model("llama").named_parameters())
    for n, w in alone["weights"].items():
        moved = (w - start[n].detach()).norm()
        assert (by_rank[0]["weights"][n] - w).norm() < 2e-4 * moved, n
    assert sum(r["calls"] for r in by_rank) == STEPS * 14


def _offload_by_default(folder: str) -> None:
    _environment()
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }
    path = Path(folder) / "offload.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    _train(str(path), folder)


def test_offload_that_would_train_adamw_is_refused(tmp_path):
    """accelerate would replace Muon by DeepSpeedCPUAdam and say nothing."""
    with pytest.raises(RankFailure, match="FrameworkError: with offload_optimizer, accelerate and the Trainer would"):
        run_ranks(_offload_by_default, 1, str(tmp_path))


def test_every_configuration_keeps_muon():
    from muon_dist.adapters.deepspeed import check_config

    assert len(CONFIGS) == 6
    for name in CONFIGS:
        check_config(json.loads((ROOT / "configs" / "deepspeed" / name).read_text(encoding="utf-8")))
