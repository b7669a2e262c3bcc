"""`muon-dist checkpoint`: list, verify, export, convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from muon_dist.checkpoint import Checkpoint, open_checkpoint
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


def deepspeed_folder(folder: Path) -> Any:
    """Files as DeepSpeed's ds_to_universal writes them, of a model with AdamW state."""
    model = make_model("llama")
    model.save_pretrained(folder / "hf")
    for name, p in model.named_parameters():
        (folder / "universal" / "zero" / name).mkdir(parents=True)
        for state, value in (("fp32", p.detach()), ("exp_avg", p.detach() * 2), ("exp_avg_sq", p.detach() ** 2)):
            torch.save({"param": value.clone()}, folder / "universal" / "zero" / name / f"{state}.pt")
        torch.save(torch.tensor(7.0), folder / "universal" / "zero" / name / "step.pt")
    return model


def test_deepspeeds_universal_format(tmp_path: Path) -> None:
    model = deepspeed_folder(tmp_path)
    with pytest.raises(ConfigError, match="--model"):
        checkpoints.convert(tmp_path / "universal", tmp_path / "start")
    checkpoints.convert(tmp_path / "universal", tmp_path / "start", model=tmp_path / "hf")
    checkpoint = open_checkpoint(tmp_path / "start")
    for name, p in model.named_parameters():
        assert torch.equal(checkpoint.tensor("weight", name), p)
        assert torch.equal(checkpoint.tensor("exp_avg", name), p * 2)
        assert checkpoint.tensor("step", name).item() == 7
    assert checkpoint.beginning and not checkpoint.weights_only
    checkpoints.convert(tmp_path / "universal", tmp_path / "bare", model=tmp_path / "hf", weights_only=True)
    assert Checkpoint.look(tmp_path / "bare").weights_only
    assert same(load_model(tmp_path / "start"), model)


def test_pickled_state_is_refused(tmp_path: Path) -> None:
    from tests.checkpoint.test_damage import Canary

    deepspeed_folder(tmp_path)
    canary = tmp_path / "executed"
    torch.save(Canary(canary), tmp_path / "universal" / "zero" / "lm_head.weight" / "fp32.pt")
    with pytest.raises(CheckpointError, match=r"lm_head.weight/fp32\.pt is no plain tensor"):
        checkpoints.convert(tmp_path / "universal", tmp_path / "start", model=tmp_path / "hf")
    (tmp_path / "engine" / "global_step5").mkdir(parents=True)
    (tmp_path / "engine" / "latest").write_text("global_step5")
    torch.save(Canary(canary), tmp_path / "engine" / "global_step5" / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"DeepSpeed's own format, which is pickled: .*ds_to_universal"):
        checkpoints.convert(tmp_path / "engine", tmp_path / "start")
    assert not canary.exists() and not (tmp_path / "start").exists()
