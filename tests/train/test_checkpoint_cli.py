"""`muon-dist checkpoint`: list, verify, export, convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from muon_dist.checkpoint import open_checkpoint
from muon_dist.cli import main
from muon_dist.errors import CheckpointError, ConfigError
from muon_dist.model.load import load_model
from muon_dist.train import checkpoints
from tests.checkpoint.store import save


def make_model(kind: str) -> Any:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    tied = {"llama": {}, "mixtral": {"num_local_experts": 2}, "gemma": {"tie_word_embeddings": True, "head_dim": 8}}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, vocab_size=32, num_key_value_heads=2, **small, **tied[kind])
    )


def same(first: Any, second: Any) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    return int(ended.value.code or 0)


def test_list_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (2, 10):
        save(tmp_path, step)
    assert run("checkpoint", "list", tmp_path, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in rows] == [2, 10]
    assert rows[0]["kinds"] == ["columns", "momentum", "weight"] and rows[0]["parameters"] == 35 + 3 + 32
    assert run("checkpoint", "verify", tmp_path) == 0
    assert capsys.readouterr().out.count("every byte is right") == 2
    path = tmp_path / "checkpoint-10" / "rank-00000.json"
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    assert run("checkpoint", "list", tmp_path) == 0, "sizes are right, and a list reads no more"
    assert run("checkpoint", "verify", tmp_path) == 7
    shown = capsys.readouterr()
    assert f"DAMAGED: {path}" in shown.out and "1 damaged" in shown.err
    path.unlink()
    assert run("checkpoint", "list", tmp_path) == 0
    assert "damaged" in capsys.readouterr().out
    assert run("checkpoint", "list", tmp_path / "nothing") == 7


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gemma"])
def test_hugging_face_weights_there_and_back(tmp_path: Path, kind: str) -> None:
    model = make_model(kind)
    model.save_pretrained(tmp_path / "given")
    checkpoints.convert(tmp_path / "given", tmp_path / "start")
    checkpoint = open_checkpoint(tmp_path / "start")
    assert checkpoint.beginning and checkpoint.weights_only and checkpoint.step == 0
    assert same(load_model(tmp_path / "start"), model)
    assert checkpoints.convert(tmp_path / "start", tmp_path / "back") == "a Hugging Face folder"
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "back"), model)
    with pytest.raises(ConfigError, match="exists already"):
        checkpoints.convert(tmp_path / "given", tmp_path / "start")
    with pytest.raises(ConfigError, match="a checkpoint's name"):
        checkpoints.convert(tmp_path / "given", tmp_path / ".hidden")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoints.convert(tmp_path, tmp_path / "new")
