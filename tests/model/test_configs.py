"""Every shipped configuration loads, builds on the meta device, and has the stated size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from muon_dist.config import load_config
from muon_dist.config.routing import routing_rules
from muon_dist.model import build_model, check_sequence_length, count_parameters
from muon_dist.routing import route

ROOT = Path(__file__).resolve().parents[2]

NAMES = sorted(p.stem for p in (ROOT / "configs").glob("*.yaml") if not p.name.startswith("_"))
# (total, active) in millions that name and comments of each file state
STATED = {
    "quickstart": (1.6, 1.6),
    "llama-60m": (59, 59),
    "llama-350m": (370, 370),
    "llama-1b": (1040, 1040),
    "llama-7b": (6740, 6740),
    "qwen3-60m": (59, 59),
    "gpt2-124m": (124, 124),
    "moe-small": (115, 59),
    "llama-70b": (68500, 68500),
    "moe-1t": (992000, 73300),
}


def body_by_hand(m: dict[str, Any]) -> tuple[int, int]:
    """(parameters, active parameters) without embeddings and head, from the dimensions of a model block."""
    if m["model_type"] == "gpt2":
        d = m["n_embd"]
        # four attention weights and two of 4 d, their biases, two norms with bias; the last norm
        body = m["n_layer"] * (12 * d * d + 9 * d + 4 * d) + 2 * d
        return body, body
    d, heads = m["hidden_size"], m["num_attention_heads"]
    size = m.get("head_dim", d // heads)
    layer = 2 * d * heads * size + 2 * d * m["num_key_value_heads"] * size + 2 * d
    layer += 2 * size if m["model_type"].startswith("qwen3") else 0
    if m["model_type"] != "qwen3_moe":
        body = m["num_hidden_layers"] * (layer + 3 * d * m["intermediate_size"]) + d
        return body, body
    expert, layer = 3 * d * m["moe_intermediate_size"], layer + d * m["num_experts"]
    counts = [m["num_hidden_layers"] * (layer + n * expert) + d for n in (m["num_experts"], m["num_experts_per_tok"])]
    return counts[0], counts[1]


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configuration(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert config.name == name and config.tokenizer.vocab_size is not None
    with torch.device("meta"):
        model = build_model(config.model, vocab_size=config.tokenizer.vocab_size, seed=config.seed)
    check_sequence_length(model.config, config.data.sequence_length)
    count = count_parameters(model)
    assert (count.non_embedding, count.active_non_embedding) == body_by_hand(config.model)
    total, active = STATED[name]
    assert count.total == pytest.approx(total * 1e6, rel=0.01) and count.active == pytest.approx(
        active * 1e6, rel=0.01
    )
    table = route(model, **routing_rules(config.optimizer))
    # Muon trains everything in the body except vectors.
    muon = sum(r.elements for r in table.select("muon"))
    assert muon + sum(r.elements for r in table.routes if len(r.shape) < 2) == count.non_embedding
    scheduler = config.trainer["lr_scheduler_type"]
    warmup = config.trainer["warmup_steps"]
    decay = config.trainer["lr_scheduler_kwargs"]["num_decay_steps"] if scheduler == "warmup_stable_decay" else 0
    assert warmup + decay < config.trainer["max_steps"]


def test_adamw_is_one_line_away() -> None:
    path = ROOT / "configs" / "quickstart.yaml"
    muon, adamw = load_config(path), load_config(path, ["optimizer.name=adamw"])
    assert adamw.optimizer.name == "adamw"
    assert adamw.model_copy(update={"optimizer": muon.optimizer}) == muon
