"""TRL, PEFT and a hyperparameter search on real Trainers; skipped where they are not installed.

muon_dist does not depend on them: `bash .ci/extended libraries` makes an environment that has them.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

import muon_dist
from muon_dist import MuonFactory
from tests.distributed import run_ranks

VOCABULARY = 32


def model(targets: tuple[str, ...] = ()) -> Any:
    """A small Llama, with LoRA on `targets` if there are any."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    if not targets:
        return made
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(made, peft.LoraConfig(r=2, target_modules=list(targets), lora_dropout=0.0))


def data() -> Dataset:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(2, VOCABULARY, (48, 12), generator=generator).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])


def settings(folder: str, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": folder, "use_cpu": True, "per_device_train_batch_size": 2, "max_steps": 6,
        "save_strategy": "steps", "save_steps": 3, "report_to": "none", "disable_tqdm": True,
        "logging_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.01, **more,
    }  # fmt: skip


def stock(folder: str, options: dict[str, Any]) -> Trainer:
    return Trainer(
        model=model(("q_proj", "v_proj")), args=TrainingArguments(**settings(folder)), train_dataset=data(),
        optimizer_cls_and_kwargs=(MuonFactory, {"lr": 0.01, "print_routing": False, **options}),
    )  # fmt: skip


def sft(folder: str, options: dict[str, Any]) -> Trainer:
    trl = pytest.importorskip("trl")
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), unk_token="w0", pad_token="w0", eos_token="w1"
    )
    return trl.SFTTrainer(
        model=model(), args=trl.SFTConfig(**settings(folder, bf16=False)),
        train_dataset=data().remove_columns("labels"), processing_class=tokenizer,
        optimizer_cls_and_kwargs=(MuonFactory, {"lr": 0.01, "print_routing": False, **options}),
    )  # fmt: skip


def session(kind: str, folder: str, options: dict[str, Any], resume: str | None) -> tuple[list[torch.Tensor], int]:
    """(weights, how often a save warned of missing momentum) after six steps."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"
    )  # accelerate asks, though the ranks have met already
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = (sft if kind == "trl" else stock)(folder, options)
        trainer.train(resume_from_checkpoint=resume)
    said = sum("momentum_everywhere" in str(w.message) for w in caught)
    return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad], said


@pytest.mark.parametrize("kind", ["trl", "peft"])
def test_a_stock_save_goes_on_exactly_with_momentum_everywhere(kind: str, tmp_path: Path) -> None:
    pytest.importorskip(kind)
    everywhere = {"momentum_everywhere": True}
    whole = run_ranks(session, 2, kind, str(tmp_path), everywhere, None)
    resumed = run_ranks(session, 2, kind, str(tmp_path), everywhere, str(tmp_path / "checkpoint-3"))
    for (a, said), (b, _) in zip(whole, resumed, strict=True):
        assert said == 0 and len(a) == len(b) > 0
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", ["trl", "peft"])
def test_without_it_the_save_says_so(kind: str, tmp_path: Path) -> None:
    pytest.importorskip(kind)
    found = run_ranks(session, 2, kind, str(tmp_path), {}, None)
    assert found[0][1] == 1


def test_a_hyperparameter_search_steps_at_the_rates_that_it_draws(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    seen: list[tuple[float, float]] = []

    class Watched(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            asked = self.args.learning_rate
            seen.append((asked, max(group["lr"] for group in self.optimizer.param_groups)))
            return super().training_step(*args, **kwargs)

    args = TrainingArguments(**settings(str(tmp_path), save_strategy="no", lr_scheduler_type="constant", max_steps=2))
    trainer = Watched(
        model_init=lambda trial=None: model(), args=args, train_dataset=data(), eval_dataset=data(),
        optimizer_cls_and_kwargs=muon_dist.for_trainer(args, print_routing=False),
    )  # fmt: skip
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True)},
        backend="optuna", n_trials=3, direction="minimize",
    )  # fmt: skip
    assert len({asked for asked, _ in seen}) == 3
    assert all(asked == used for asked, used in seen), seen
