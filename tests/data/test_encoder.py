"""Tokenizers from elsewhere: gaps, markers, BOS and EOS, dropout, loss; the same ids in shards, prompts and
samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from muon_dist.config import load_config
from muon_dist.data import Source, document, load_tokenizer, prepare, train_tokenizer
from muon_dist.data.dataset import TokenDataset
from muon_dist.data.encoder import frame, frame_as_documents, vocabulary_size
from muon_dist.model import build_config
from muon_dist.train import generation

from .refusal import refused
from .test_identity import CONFIG
from .test_preparation import files_of, stream

BYTES = pre_tokenizers.ByteLevel.alphabet()


def make(
    folder: Path, texts: list[str], *, template: str = "$A", dropout: float | None = None, lower: bool = False
) -> Any:
    """A byte-level BPE tokenizer of 400 ids with <s> 0, </s> 1 and the marker <|user|> 2, saved in ``folder``."""
    made = Tokenizer(models.BPE(dropout=dropout))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if lower:
        made.normalizer = normalizers.Lowercase()
    special = ["<s>", "</s>", "<|user|>"]
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=BYTES)
    )
    made.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} $B", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<|user|>"]}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("add_bos", [None, True, False])
def test_documents_begin_as_the_tokenizer_or_add_bos_says_and_prompts_too(
    tmp_path: Path, texts: list[str], template: str, add_bos: bool | None
) -> None:
    make(tmp_path / "tok", texts[:4], template=template)
    (tmp_path / "a.txt").write_text("\n".join(texts[:3]))
    prepare([Source(path=tmp_path / "a.txt", separator="\n")], tmp_path / "tok", tmp_path / "out", add_bos=add_bos)
    ids, ends = stream(tmp_path / "out" / "00-a.txt" / "train")
    bos = template.startswith("<s>") if add_bos is None else add_bos
    starts = np.concatenate([[0], ends[:-1, 0]])
    assert all(ids[ends[:, 0] - 1] == 1) and (ids == 1).sum() == len(ends)
    assert all((ids[starts] == 0) == bos) and (ids == 0).sum() == bos * len(ends)
    auto = AutoTokenizer.from_pretrained(tmp_path / "tok")
    frame_as_documents(auto, add_bos)
    auto.save_pretrained(tmp_path / "saved")
    for one in (auto, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert frame(one) == ((0,) * bos, ())
        assert generation._prompt_ids(one, "a word") == [*[0] * bos, *one.encode("a word", add_special_tokens=False)]
        assert generation._prompt_ids(one, "") == [0 if bos else 1]
    # a tokenizer that adds an end: never behind a prompt
    assert generation._prompt_ids(AutoTokenizer.from_pretrained(tmp_path / "tok"), "a word")[-1] != 1
    if add_bos is None:
        with refused("other inputs", "before each document"):
            prepare(
                [Source(path=tmp_path / "a.txt", separator="\n")], tmp_path / "tok", tmp_path / "out", add_bos=not bos
            )


def test_a_sample_begins_with_what_documents_begin_with(tmp_path: Path, texts: list[str]) -> None:
    tokenizer = make(tmp_path / "tok", texts[:4], template="<s> $A </s>")
    seen: list[list[int]] = []

    class Model(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(kwargs["input_ids"][0].tolist())
            return super().forward(*args, **kwargs)

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = Model(LlamaConfig(vocab_size=400, max_position_embeddings=32, **sizes))
    generation.generate(model, tokenizer, "The", 2)
    assert seen[0] == [0, *tokenizer.encode("The", add_special_tokens=False)]


def test_own_markers_are_tokens_in_text_and_frames_are_not(tmp_path: Path, texts: list[str]) -> None:
    make(tmp_path / "tok", texts[:4])
    encoder = load_tokenizer(tmp_path / "tok")
    ids = encoder.encode(["<|user|>hi</s><s>"])[0].tolist()
    assert ids[0] == 2 and not {0, 1} & set(ids[1:]) and encoder.decode(ids) == "<|user|>hi</s><s>"


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_special_tokens_and_digits_of_a_trained_tokenizer(tmp_path: Path, corpus: Path, model_type: str) -> None:
    info = train_tokenizer(
        [Source(path=corpus)],
        tmp_path / "t",
        model_type=model_type,
        vocab_size=1000,
        special_tokens=["<|user|>", "<|end|>"],
        split_digits=True,
    )
    assert info.vocab_size == 1000
    encoder, auto = load_tokenizer(tmp_path / "t"), AutoTokenizer.from_pretrained(tmp_path / "t")
    text = "<|user|>in 2026, 1234567 <|end|>"
    ids = encoder.encode([text])[0].tolist()
    assert ids == auto.encode(text) and encoder.decode(ids) == text
    pieces = [encoder.decode([one]) for one in ids]
    assert pieces[0] == "<|user|>" and pieces[-1] == "<|end|>"
    assert all(len(piece) == 1 for piece in pieces if any(letter.isdigit() for letter in piece))


def test_gaps_and_padding_of_the_vocabulary(tmp_path: Path, texts: list[str]) -> None:
    folder = tmp_path / "tok"
    make(folder, texts[:4])
    value = json.loads((folder / "tokenizer.json").read_text())
    value["model"]["vocab"]["Ġgap"] = 70_000
    (folder / "tokenizer.json").write_text(json.dumps(value))
    info = load_tokenizer(folder).info
    assert info.vocab_size == 70_001 == vocabulary_size(AutoTokenizer.from_pretrained(folder))
    (tmp_path / "a.txt").write_text(texts[0])
    prepare([Source(path=tmp_path / "a.txt")], folder, tmp_path / "out", validation_fraction=0)
    assert TokenDataset(tmp_path / "out", "train", 8, vocab_size=70_001).index.dtype == "<u4"
    assert build_config({"model_type": "llama", "vocab_size": 70_016}, vocab_size=70_001).vocab_size == 70_016
    (tmp_path / "c.yaml").write_text(CONFIG)
    assert load_config(tmp_path / "c.yaml", ["model.vocab_size=512"]).model["vocab_size"] == 512


def test_dropout_is_told_and_shards_are_the_same_each_time(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    document.say.cache_clear()
    make(tmp_path / "plain", texts[:4])
    make(tmp_path / "dropout", texts[:4], dropout=0.5)
    (tmp_path / "a.txt").write_text(texts[0])
    for name in ("plain", "dropout"):
        prepare([Source(path=tmp_path / "a.txt")], tmp_path / name, tmp_path / f"{name}-out", validation_fraction=0)
    first, second = (files_of(tmp_path / f"{name}-out") for name in ("plain", "dropout"))
    assert first["00-a.txt/train/00000.bin"] == second["00-a.txt/train/00000.bin"]
    assert "BPE dropout of 0.5" in capsys.readouterr().err


def test_a_lossy_tokenizer_is_told(tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    document.say.cache_clear()
    make(tmp_path / "tok", [text.lower() for text in texts[:4]], lower=True)
    (tmp_path / "a.txt").write_text("all lower, then Upper case")
    prepare([Source(path=tmp_path / "a.txt")], tmp_path / "tok", tmp_path / "out", validation_fraction=0)
    assert "lossy" in (said := capsys.readouterr().err) and "Upper" in said and "upper" in said
