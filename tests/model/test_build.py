"""Models from scratch: accepted and refused settings; the seed decides the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from muon_dist.errors import ConfigError
from muon_dist.model import build_config, build_model, check_sequence_length

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", "intermediate_size": 64, **SMALL}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "num_key_value_heads": 2, "rope_theta": 500000.0},
    "qwen3": {"model_type": "qwen3", "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, **SMALL},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mixtral": {
        "model_type": "mixtral",
        "intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        **SMALL,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        **SMALL,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_train_one_step(kind: str) -> None:
    model = build_model(KINDS[kind], vocab_size=96, seed=0, pad_token_id=3, bos_token_id=1, eos_token_id=2)
    config = model.config
    assert (config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id) == (96, 3, 1, 2)
    assert model.dtype == torch.float32
    ids = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss
    # with fresh weights the loss is that of a uniform guess, ln 96 = 4.56
    assert abs(loss.item() - torch.tensor(96.0).log().item()) < 0.3
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_the_seed_decides_the_weights() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first = build_model(LLAMA, vocab_size=64, seed=3).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(8)
    again = build_model(LLAMA, vocab_size=64, seed=3).state_dict()
    other = build_model(LLAMA, vocab_size=64, seed=4).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_dtype_from_the_block_and_from_the_argument() -> None:
    assert build_model({**LLAMA, "dtype": "bfloat16"}, vocab_size=64, seed=0).dtype == torch.bfloat16
    assert build_model({**LLAMA, "dtype": "bfloat16"}, vocab_size=64, seed=0, dtype="float32").dtype == torch.float32
    with pytest.raises(ConfigError, match=r"model\.dtype: 'float64' is not one of float32, bfloat16, float16"):
        build_model({**LLAMA, "dtype": "float64"}, vocab_size=64, seed=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "lama"}, r"model\.model_type: 'lama' is not .*; did you mean llama\?"),
        ({"model_type": None}, r"model\.model_type: None is not a causal language model"),
        ({"hiden_size": 8}, r"model\.hiden_size: llama has no such setting; did you mean hidden_size\?"),
        ({"hidden_size": 30, "head_dim": None}, r"hidden.size.*30.*4"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads: 3 does not divide .* = 4: use one of 1, 2, 4"),
        ({"intermediate_size": 64.5}, r"refuses this llama configuration: .*'intermediate_size'.*expected int"),
        ({"num_hidden_layers": 0}, r"model\.num_hidden_layers: is 0, and must be at least 1"),
        ({"vocab_size": 7}, r"model\.vocab_size is 7, but the tokenizer has 64"),
        ({"eos_token_id": 9}, r"model\.eos_token_id is 9, but the tokenizer has None"),
        ({"hidden_act": "sillu"}, r"model\.hidden_act: unknown activation 'sillu'; did you mean silu\?"),
        ({"attn_implementation": "fast"}, "a llama cannot be built from these settings"),
        ({"model_type": "bert"}, r"model\.is_decoder"),
        (
            {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 3},
            "3 of 2 experts",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught, torch.device("meta"):
        build_model({**LLAMA, **changes}, vocab_size=64, seed=0)
    assert caught.value.exit_code == 2


def test_every_unknown_setting_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({**LLAMA, "n_embd": 1, "num_layers": 2}, vocab_size=64)
    assert "model.n_embd" in str(caught.value) and "model.num_layers" in str(caught.value)


def test_settings_that_only_the_modelling_code_reads() -> None:
    # Qwen3MoeConfig of transformers 5 does not declare head_dim, its attention reads it all the same.
    with torch.device("meta"):
        model = build_model({**KINDS["qwen3_moe"], "head_dim": 16}, vocab_size=64, seed=0)
    assert model.get_parameter("model.layers.0.self_attn.q_proj.weight").shape == (4 * 16, 32)
    with pytest.raises(ConfigError, match=r"model\.head_dim: gpt2 has no such setting"):
        build_config({**KINDS["gpt2"], "head_dim": 16}, vocab_size=64)


def test_token_ids_outside_the_vocabulary() -> None:
    with pytest.raises(ConfigError, match="pad_token_id is 64, outside its vocabulary of 64"):
        build_config(LLAMA, vocab_size=64, pad_token_id=64)
    with pytest.raises(ConfigError, match="vocabulary size is 0"):
        build_config(LLAMA, vocab_size=0)


def test_sequence_length() -> None:
    config = build_config(KINDS["gpt2"], vocab_size=64)
    check_sequence_length(config, 64)
    with pytest.raises(ConfigError, match=r"65 is more than model\.max_position_embeddings = 64 of this gpt2"):
        check_sequence_length(config, 65)
