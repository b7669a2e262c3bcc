"""Exported folders: read by transformers 5, and by 4.57 where MUON_DIST_TRANSFORMERS_4 names a folder with it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from muon_dist.model.load import load_text_tokenizer
from muon_dist.model.portable import make_portable

BASE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 100, "pad_token_id": 0}  # fmt: skip
GPT_NEOX = {name: value for name, value in BASE.items() if name != "num_key_value_heads"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
# kind -> settings, and the keys that a reader of version 4 needs
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {**BASE, "rope_theta": 500000}, {"rope_theta": 500000}),
    "llama3": (
        "llama",
        {**BASE, "rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
    ),
    "yarn": (
        "llama",
        {**BASE, "rope_theta": 2e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_theta": 2e4},
    ),
    "gpt_neox": (
        "gpt_neox",
        {**GPT_NEOX, "rotary_pct": 0.5, "rotary_emb_base": 5000},
        {"rotary_pct": 0.5, "rotary_emb_base": 5000},
    ),
    "stablelm": (
        "stablelm",
        {**BASE, "partial_rotary_factor": 0.5, "rope_theta": 5e4},
        {"partial_rotary_factor": 0.5, "rope_theta": 5e4},
    ),
    "gemma3": (
        "gemma3_text",
        {**BASE, "head_dim": 8, "sliding_window": 8, "rope_theta": 1e6, "rope_local_base_freq": 5000.0,
         "layer_types": ["sliding_attention", "full_attention"]},
        {"rope_theta": 1e6, "rope_local_base_freq": 5000.0},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {**BASE, "head_dim": 8, "rope_theta": 1e6, "num_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 16},
        {"num_experts": 4},
    ),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 100}, {}),
}  # fmt: skip
IDS = torch.arange(48)[None] % 100
TEXT = "cat <sep> dog cat"
OLD = """
import sys, torch, transformers
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4.57"), transformers.__version__
ids = torch.arange(48)[None] % 100
for folder in sorted(Path(sys.argv[1]).iterdir()):
    known = torch.load(folder / "known.pt")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        away = (model(ids).logits - known["logits"]).abs().max().item()
    assert away < 1e-5 and model.config.use_cache, (folder.name, away)
    assert tokenizer("cat <sep> dog cat")["input_ids"] == known["ids"], folder.name
    assert tokenizer.model_max_length == 64 and "<sep>" in tokenizer.all_special_tokens, folder.name
    print(folder.name, away)
"""


def save(folder: Path, kind: str) -> torch.Tensor:
    """A model as a run saves it, with weights large enough for its positions to matter; its logits."""
    name, settings, _ = KINDS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **copy.deepcopy(settings))).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3)
        logits = model(IDS).logits
    model.config.use_cache = False
    model.save_pretrained(folder)
    return logits


def save_tokenizer(folder: Path) -> list[int]:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "cat": 2, "dog": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    made.add_special_tokens({"additional_special_tokens": ["<sep>"]})
    made.save_pretrained(folder)
    return list(made(TEXT)["input_ids"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exports")
    before = os.umask(0o022)
    try:
        for kind in KINDS:
            logits = save(root / kind, kind)
            ids = save_tokenizer(root / kind)
            (root / kind / "training_args.bin").write_bytes(b"secret")
            assert make_portable(root / kind) == []
            torch.save({"logits": logits, "ids": ids}, root / kind / "known.pt")
    finally:
        os.umask(before)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_the_old_spellings_are_there_and_version_5_reads_the_same_model(saved: Path, kind: str) -> None:
    folder = saved / kind
    settings = json.loads((folder / "config.json").read_text())
    wanted = {**KINDS[kind][2], "use_cache": True, "torch_dtype": "float32", "dtype": "float32"}
    assert {name: settings.get(name) for name in wanted} == wanted
    if kind == "yarn":
        assert settings["rope_scaling"]["factor"] == 4.0 and "rope_theta" not in settings["rope_scaling"]
    known = torch.load(folder / "known.pt")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits, known["logits"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(TEXT)["input_ids"] == known["ids"] and tokenizer.model_max_length == 64
    assert "<sep>" in tokenizer.all_special_tokens


def test_files(saved: Path) -> None:
    """All users may read the files; they contain no pickle, no path of this machine, and no setting that only version
    5 knows."""
    for folder in saved.iterdir():
        files = {p.name: p.stat().st_mode & 0o777 for p in folder.iterdir() if p.name != "known.pt"}
        assert set(files.values()) == {0o644} and "training_args.bin" not in files and "model.safetensors" in files
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert settings["additional_special_tokens"] == ["<sep>"]
        assert not {"extra_special_tokens", "backend", "is_local", "name_or_path"} & settings.keys()


def test_two_thetas_that_version_4_cannot_tell_apart(tmp_path: Path) -> None:
    rope = {kind: {"rope_type": "default", "rope_theta": t} for kind, t in (("full_attention", 5e4),
                                                                            ("sliding_attention", 1e4))}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmo3", "rope_parameters": rope}))
    assert "full_attention 50000, sliding_attention 10000: load it with transformers 5" in make_portable(tmp_path)[0]


def test_a_tokenizer_that_transformers_5_replaces(tmp_path: Path) -> None:
    """For qwen2 AutoTokenizer makes a Qwen2Tokenizer of any tokenizer.json. We warn, and load the contents of the
    file."""
    ids = save_tokenizer(tmp_path)
    AutoConfig.for_model("qwen2", **BASE).save_pretrained(tmp_path)
    assert "makes a Qwen2Tokenizer with rules of its own" in make_portable(tmp_path)[0]
    assert load_text_tokenizer(tmp_path)(TEXT)["input_ids"] == ids


@pytest.mark.skipif("MUON_DIST_TRANSFORMERS_4" not in os.environ, reason="bash .ci/extended transformers4")
def test_version_4_reads_the_same_model(saved: Path) -> None:
    """In a separate process, in which the folder with transformers 4.57 comes first in the path."""
    path = os.pathsep.join([os.environ["MUON_DIST_TRANSFORMERS_4"], os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", OLD, str(saved)], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
