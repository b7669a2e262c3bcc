"""Validation loss: plain cross entropy over all tokens, whatever the loss that is trained and however many ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from muon_dist import MuonTrainer
from tests.adapters.hf.test_trainer import LENGTH, VOCABULARY, Words, arguments, make_model
from tests.distributed import run_ranks

SAMPLES = 11  # neither a multiple of the batch nor of the ranks


class Uneven(Words):
    """Samples of different numbers of predicted tokens, in two named sources."""

    names, lengths = ("00-a", "01-b"), (4, SAMPLES - 4)

    def __init__(self) -> None:
        super().__init__(SAMPLES)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        sample["labels"][: index + 1] = -100
        return sample


def mixtral() -> Any:
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
                "num_key_value_heads": 4, "num_local_experts": 4, "output_router_logits": True,
                "router_aux_loss_coef": 5.0, "vocab_size": VOCABULARY}  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **settings))


def expected(model: Any, samples: range) -> float:
    """Sum of all losses over the number of tokens, one token at a time."""
    losses = []
    with torch.no_grad():
        for index in samples:
            sample = Uneven()[index]
            logits = model.eval()(sample["input_ids"][None]).logits[0]
            for t in range(1, LENGTH):
                if sample["labels"][t] != -100:
                    losses.append(functional.cross_entropy(logits[t - 1], sample["labels"][t]).item())
    return math.fsum(losses) / len(losses)


def make_trainer(folder: str, changes: dict[str, Any], kind: str = "llama") -> MuonTrainer:
    settings = {"per_device_eval_batch_size": 2, "max_steps": 1, **changes}
    return MuonTrainer(
        mixtral() if kind == "mixtral" else make_model(),
        arguments(Path(folder), **settings),
        muon={"print_routing": False},
        train_dataset=Words(),
        eval_dataset=Uneven(),
        bytes_per_token=(2.0, 2.0),
    )


def many(folder: str) -> list[dict[str, float]]:
    kinds = ({}, {"label_smoothing_factor": 0.3}, {"per_device_eval_batch_size": 3, "dataloader_drop_last": True})
    return [make_trainer(folder, changes).evaluate() for changes in kinds]


def trained(folder: str, changes: dict[str, Any], kind: str = "llama") -> set[str]:
    """The names in the lines of the training log."""
    trainer = make_trainer(folder, changes, kind)
    trainer.train()
    return {name for line in trainer.state.log_history if "loss" in line for name in line}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_it_is_equal_for_any_number_of_ranks(tmp_path: Path, ranks: int) -> None:
    """No sample twice, none left out, every token counts once; and label smoothing is no part of it."""
    model, right = make_model(), {}
    right["eval_loss"] = expected(model, range(SAMPLES))
    right["eval_loss/00-a"], right["eval_loss/01-b"] = expected(model, range(4)), expected(model, range(4, SAMPLES))
    for found in many(str(tmp_path)) if ranks == 1 else run_ranks(many, ranks, str(tmp_path))[-1]:
        for name, value in right.items():
            assert found[name] == pytest.approx(value, rel=2e-6), name


def test_what_is_no_cross_entropy_has_no_bits_per_byte(tmp_path: Path) -> None:
    """The auxiliary loss of experts and label smoothing are in the training loss, so it does not say bits per byte."""
    found = make_trainer(str(tmp_path), {}, "mixtral").evaluate()
    assert found["eval_loss"] == pytest.approx(expected(mixtral(), range(SAMPLES)), rel=2e-6)
    assert "bits_per_byte" not in trained(str(tmp_path), {}, "mixtral")
    assert "bits_per_byte" not in trained(str(tmp_path), {"label_smoothing_factor": 0.3})
    assert "bits_per_byte" in trained(str(tmp_path), {})
