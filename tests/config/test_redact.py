"""Values that are redacted, and values that only look secret."""

from __future__ import annotations

from muon_dist.config import REDACTED, is_secret, redact


def test_environment() -> None:
    environment = {"HF_TOKEN": "a", "WANDB_API_KEY": "b", "aws_secret_access": "c", "PATH": "/bin", "EMPTY_TOKEN": ""}
    assert redact(environment) == {
        "HF_TOKEN": REDACTED,
        "WANDB_API_KEY": REDACTED,
        "aws_secret_access": REDACTED,
        "PATH": "/bin",
        "EMPTY_TOKEN": "",
    }
    assert environment["HF_TOKEN"] == "a"


def test_nested_data_and_counts() -> None:
    data = {
        "tokenizer": {"path": "p", "vocab_size": 4096},
        "data": {"shard_tokens": 10, "sources": [{"token": "x", "path": "y"}]},
        "keys": ["k1", "k2"],
        "model": {"num_key_value_heads": 4, "pad_token_id": None},
    }
    assert redact(data) == {
        "tokenizer": {"path": "p", "vocab_size": 4096},
        "data": {"shard_tokens": 10, "sources": [{"token": REDACTED, "path": "y"}]},
        "keys": [REDACTED, REDACTED],
        "model": {"num_key_value_heads": 4, "pad_token_id": None},
    }


def test_is_secret() -> None:
    assert is_secret("GITHUB_TOKEN") and is_secret("client_secret") and is_secret("ApiKey")
    assert not is_secret("HOME")
