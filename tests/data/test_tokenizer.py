"""Training: the saved folder gives sentencepiece's ids, and decodes every text exactly."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from muon_dist.data import Source, TokenizerInfo, load_tokenizer, train_tokenizer
from muon_dist.data.tokenizer import BOS, EOS, MODEL_FILE, PAD, UNK, _sample
from muon_dist.model.load import load_text_tokenizer

from .refusal import refused

HARD = [
    "",
    "\n",
    " ",
    "  leading, trailing  ",
    "a\n\n\n   b\t\tc\r\n",
    "emoji 😀🎉👩‍👩‍👧, é ü ß, 中文, \u202eright to left\u202c",
    "e\u0301 is not \u00e9",
    "\x00\x01\x7f\ufeff\ufffd\U0010ffff",
    "<0x0A> <0x41> <s> </s> <unk> spelled out",
    "a" * 999 + "-" * 77 + "=" * 50 + " " * 123 + "x",
]
SPACE_SIGN = "\u2581\u2581x \u2582\u2583\u2581"


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    out = tmp_path_factory.mktemp(request.param) / "tokenizer"
    info = train_tokenizer([Source(path=corpus)], out, model_type=request.param, vocab_size=1000)
    assert (info.path, info.vocab_size, info.eos_id) == (out, 1000, 2)
    return out


def noise() -> list[str]:
    pick = random.Random(0)
    return ["".join(pick.choice("ab -=\n<0x41>e é") for _ in range(300)) for _ in range(50)]


def test_auto_tokenizer_gives_sentencepiece_ids_and_every_text_back(folder: Path, texts: list[str]) -> None:
    auto = AutoTokenizer.from_pretrained(folder)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL_FILE))
    assert len(auto) == reference.get_piece_size() == 1000
    for text in [*texts, *HARD, *noise()]:
        ids = auto(text, split_special_tokens=True)["input_ids"]
        assert ids == reference.encode(text), repr(text[:80])
        assert auto.decode(ids) == text == reference.decode(ids)
    ids = auto(SPACE_SIGN)["input_ids"]
    assert auto.decode(ids) == SPACE_SIGN and reference.decode(ids) == SPACE_SIGN
    assert reference.decode(reference.encode(SPACE_SIGN)) != SPACE_SIGN  # so ours does not use this sign for spaces


def test_special_pieces(folder: Path) -> None:
    auto = AutoTokenizer.from_pretrained(folder)
    assert [auto.unk_token_id, auto.bos_token_id, auto.eos_token_id, auto.pad_token_id] == [0, 1, 2, 3]
    assert [auto.unk_token, auto.bos_token, auto.eos_token, auto.pad_token] == [UNK, BOS, EOS, PAD]
    newline = auto.convert_tokens_to_ids("\n")
    assert auto("\n\n")["input_ids"] == [newline, newline]
    assert all(token == "\n" or "\n" not in token for token in auto.get_vocab())


def test_text_cannot_forge_the_end_of_a_document(folder: Path) -> None:
    encoder = load_tokenizer(folder)
    for name in (UNK, BOS, EOS, PAD):
        ids = encoder.encode([f"a{name}b"])[0]
        assert ids.min() > 3 and encoder.decode(ids.tolist()) == f"a{name}b"
    again = pickle.loads(pickle.dumps(encoder))
    assert again.encode([EOS, "x y"])[0].tolist() == encoder.encode([EOS])[0].tolist()
    assert again.info == encoder.info


@pytest.mark.parametrize("config", [LlamaConfig(), Qwen3Config(), GPT2Config()], ids=lambda c: c.model_type)
def test_beside_a_model_configuration_it_stays_the_same(folder: Path, config: object, tmp_path: Path) -> None:
    """transformers 5 picks the tokenizer's class by model type. Some classes rebuild the pre-tokenizer."""
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    auto, ours = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(folder)
    for text in HARD:
        assert auto(text)["input_ids"] == ours(text)["input_ids"]
        assert auto.decode(auto(text)["input_ids"]) == text


def test_the_class_of_a_model_type_takes_no_tokenizers_place(folder: Path, tmp_path: Path) -> None:
    """For qwen2 AutoTokenizer puts Qwen2Tokenizer there, which splits text in another way: data and prompts would have
    other tokens than the model in that folder was trained on."""
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    Qwen2Config().save_pretrained(tmp_path)
    auto, prompts = AutoTokenizer.from_pretrained(tmp_path), load_text_tokenizer(tmp_path)
    ours = load_tokenizer(tmp_path)
    wanted = load_tokenizer(folder)
    assert any(auto(text)["input_ids"] != wanted.encode([text])[0].tolist() for text in HARD), "no longer needed"
    assert ours.info.sha256 == wanted.info.sha256
    for text in HARD:
        assert ours.encode([text])[0].tolist() == wanted.encode([text])[0].tolist()
        if "<unk>" not in text:  # a prompt can spell a special token, a document cannot
            assert wanted.encode([text])[0].tolist() == prompts(text)["input_ids"]


def test_it_loads_without_a_network_and_without_sentencepiece(tokenizer: TokenizerInfo) -> None:
    program = (
        "import sys; sys.modules['sentencepiece'] = None; from transformers import AutoTokenizer;"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]); print(t('The for statement')['input_ids'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tokenizer.path)],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == AutoTokenizer.from_pretrained(tokenizer.path)("The for statement")["input_ids"]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_vocabulary_too_large_names_the_largest_which_then_works(
    tmp_path: Path, texts: list[str], model_type: str
) -> None:
    (tmp_path / "small.txt").write_text(texts[0])
    source = Source(path=tmp_path / "small.txt")
    with pytest.raises(ValueError, match=r"vocab_size: 30000 is too large .* the largest possible is (\d+)") as caught:
        train_tokenizer([source], tmp_path / "t", model_type=model_type, vocab_size=30000)
    assert not (tmp_path / "t").exists()
    largest = int(str(caught.value).rstrip(".").split()[-1])
    assert train_tokenizer([source], tmp_path / "t", model_type=model_type, vocab_size=largest).vocab_size == largest
    with refused("vocab_size: 12 is too small", "smallest possible"):
        train_tokenizer([source], tmp_path / "u", model_type=model_type, vocab_size=12)
    with refused("vocab_size: 2 is too small", "need more"):
        train_tokenizer([source], tmp_path / "u", model_type=model_type, vocab_size=2)


def test_training_is_deterministic_and_a_second_run_is_skipped(
    tmp_path: Path, corpus: Path, tokenizer: TokenizerInfo
) -> None:
    source = Source(path=corpus)
    info = train_tokenizer([source], tmp_path / "t", vocab_size=1000)
    assert info.sha256 == tokenizer.sha256
    before = (tmp_path / "t" / "tokenizer.json").stat()
    train_tokenizer([source], tmp_path / "t", vocab_size=1000)
    assert (tmp_path / "t" / "tokenizer.json").stat() == before
    with refused(tmp_path / "t", "other inputs", "vocab_size, seed"):
        train_tokenizer([source], tmp_path / "t", vocab_size=900, seed=1)
    assert train_tokenizer([source], tmp_path / "t", vocab_size=900, overwrite=True).vocab_size == 900


def test_sample_is_bounded_and_shared_by_weight(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "b.txt").write_text("b " * 100_000)
    sources = [
        Source(path=corpus, weight=3, document_bytes=1000),
        Source(path=tmp_path / "b.txt", document_bytes=1000),
    ]
    sample = list(_sample(sources, 80_000, seed=0))
    assert sample == list(_sample(sources, 80_000, seed=0)) != list(_sample(sources, 80_000, seed=1))
    share = sum(len(text) for text in sample if text.startswith("b "))
    assert 15_000 < share < 23_000 and 75_000 < sum(map(len, sample)) < 90_000


def test_bad_folders(tmp_path: Path, tokenizer: TokenizerInfo, corpus: Path) -> None:
    with refused(tmp_path / "none", "no such tokenizer folder"):
        load_tokenizer(tmp_path / "none")
    with refused(tmp_path, "AutoTokenizer cannot load"):
        load_tokenizer(tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(tokenizer.path, damaged)
    data = bytearray((damaged / "tokenizer.json").read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / "tokenizer.json").write_bytes(data)
    with refused(damaged / "tokenizer.json", "damaged"):
        train_tokenizer([Source(path=corpus)], damaged, vocab_size=1000)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("the only copy")
    with refused(foreign, "something other than a tokenizer"):
        train_tokenizer([Source(path=corpus)], foreign, vocab_size=1000, overwrite=True)
    assert (foreign / "thesis.tex").exists()
    with refused("model_type", "wordpiece"):
        train_tokenizer([Source(path=corpus)], tmp_path / "x", model_type="wordpiece")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_the_number_of_threads_changes_nothing(tmp_path: Path, texts: list[str], model_type: str) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(texts[:20]))
    source = Source(path=tmp_path / "a.txt")
    one, three = (
        train_tokenizer([source], tmp_path / str(n), model_type=model_type, vocab_size=900, threads=n) for n in (1, 3)
    )
    assert one.sha256 == three.sha256
