"""Real text for the data tests: the language reference that Python carries, as files."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import pytest

from muon_dist.data import Manifest, Source, TokenizerInfo, prepare, train_tokenizer


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """The topics of ``pydoc_data``, about 460 KB of English and code."""
    topics = pydoc_data.topics.topics
    return [topics[name] for name in sorted(topics)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A folder of text files, one per topic, some in a subfolder."""
    folder = tmp_path_factory.mktemp("corpus") / "topics"
    (folder / "more").mkdir(parents=True)
    for number, text in enumerate(texts):
        place = folder / "more" if number % 3 == 0 else folder
        (place / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> TokenizerInfo:
    """BPE, vocabulary 1000, trained on the corpus."""
    return train_tokenizer([Source(path=corpus)], tmp_path_factory.mktemp("bpe") / "tokenizer", vocab_size=1000)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer: TokenizerInfo) -> Path:
    """The corpus as shards of 20,000 tokens, a tenth of it for validation. Read only."""
    out = tmp_path_factory.mktemp("prepared") / "tokens"
    prepare([Source(path=corpus)], tokenizer.path, out, validation_fraction=0.1, shard_tokens=20_000)
    return out


@pytest.fixture
def manifest(prepared: Path) -> Manifest:
    """The manifest of ``prepared``."""
    return Manifest.load(prepared)
