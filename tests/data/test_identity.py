"""Tokens are made again if their inputs have changed, and only then."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from muon_dist.config import Config, load_config
from muon_dist.data import Source, TokenizerInfo, prepare
from muon_dist.errors import DataError
from muon_dist.train import corpus

from .refusal import refused
from .test_preparation import files_of, in_a_fork

CONFIG = """\
name: tiny
data: {dir: data, path: text, sequence_length: 32, validation_fraction: 0}
tokenizer: {vocab_size: 500}
model: {model_type: llama, hidden_size: 32}
optimizer: {muon: {lr: 0.01}, adamw: {lr: 0.003}}
"""


def write(kind: str, place: Path, texts: list[str]) -> Source:
    """A source of each kind that holds the texts."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    rows = [{"text": text} for text in texts]
    if kind == "memory":
        fsspec.filesystem("memory").pipe("/identity/a.jsonl", "\n".join(map(json.dumps, rows)).encode())
        return Source(path="memory://identity/a.jsonl")
    if kind == "saved":
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(place / "set"))
        return Source(path=place / "set")
    if kind in ("jsonl", "dataset", "cached dataset", "glob"):
        (place / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return {
            "jsonl": Source(path=place / "a.jsonl"),
            "dataset": Source(dataset=str(place)),
            "cached dataset": Source(dataset=str(place), streaming=False),
            "glob": Source(path=f"{place}/*.jsonl"),
        }[kind]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), place / "a.parquet")
    return Source(path=place)


@pytest.mark.parametrize("kind", ["jsonl", "glob", "parquet folder", "dataset", "cached dataset", "saved", "memory"])
def test_every_kind_of_source_notices_content_and_nothing_else(
    tmp_path: Path, kind: str, texts: list[str], tokenizer: TokenizerInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    out, place = tmp_path / "out", tmp_path / "raw"
    source = write(kind, place, texts[:6])
    prepare([source], tokenizer.path, out, rebuild=True)
    before = files_of(out)
    for file in place.rglob("*"):
        os.utime(file, (1, 1))
    source = write(kind, place, texts[:6])  # the same again: other times, other inodes
    prepare([source], tokenizer.path, out)
    assert files_of(out) == before
    changed = [*texts[:5], texts[5].swapcase()]  # of the same size
    times = {file: file.stat() for file in place.rglob("*")}
    source = write(kind, place, changed)
    for file in place.rglob("*"):
        if file in times:
            os.utime(file, ns=(times[file].st_atime_ns, times[file].st_mtime_ns))
    with refused("other inputs", "content or description of source"):
        prepare([source], tokenizer.path, out)
    prepare([source], tokenizer.path, out, rebuild=True)
    after = files_of(out)
    assert after.keys() == before.keys()
    assert any(after[name] != before[name] for name in after if str(name).endswith("000.bin"))


def test_place_name_weight_and_packing_do_not_count(
    tmp_path: Path, texts: list[str], tokenizer: TokenizerInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, out = tmp_path / "a.jsonl", tmp_path / "out"
    first.write_text("\n".join(json.dumps({"text": text}) for text in texts[:6]))
    prepare([Source(path=first)], tokenizer.path, out)
    before = files_of(out)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moved").mkdir()
    first.rename("moved/b.txt")
    Path("c").write_bytes(gzip.compress(Path("moved/b.txt").read_bytes()))
    array = Path("d.json")
    array.write_text(json.dumps([{"id": 1, "body": text} for text in texts[:6]]))
    shutil.copytree(out, tmp_path / "copy" / "tokens")
    shutil.copytree(tokenizer.path, tmp_path / "copy" / "tokenizer")
    for source in (
        Source(path="moved/b.txt", weight=7),
        Source(path="moved"),
        Source(path=["moved/b.txt"], format="jsonl"),
        Source(path="c"),
        Source(path=array, text_field="body"),
    ):
        prepare([source], tmp_path / "copy" / "tokenizer", tmp_path / "copy" / "tokens")
    assert files_of(tmp_path / "copy" / "tokens") == before


def config(folder: Path, *overrides: str) -> Config:
    (folder / "c.yaml").write_text(CONFIG.replace("data:", f"run_dir: {folder}\ndata:"))
    return load_config(folder / "c.yaml", [f"data.dir={folder}/data", f"data.path={folder}/text", *overrides])


@pytest.fixture
def place(texts: list[str]) -> Path:  # type: ignore[misc]
    """A folder that every user may read, with a folder of text."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "text").mkdir()
        for number, text in enumerate(texts[:12]):
            (folder / "text" / f"{number}.txt").write_text(text)
        yield folder


def as_nobody(job: Callable[[], object]) -> int:
    def run() -> None:
        if os.getuid() == 0:
            os.setuid(65534)
        job()

    return in_a_fork(run)[0]


def test_prepared_data_alone_and_read_only_are_enough(place: Path) -> None:
    settings = config(place)
    corpus.prepare(settings)
    before = files_of(place / "data")
    shutil.rmtree(place / "text")
    for path in (*(place / "data").rglob("*"), place / "data"):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def job() -> None:
        with pytest.raises(OSError):
            (place / "data" / "new").touch()
        corpus.prepare(settings)
        assert len(corpus.open_datasets(settings, 500).train) > 10

    assert as_nobody(job) == 0
    (place / "data").chmod(0o755)
    assert files_of(place / "data") == before
    with pytest.raises(DataError, match="no such file or folder"):  # not what was prepared, and not there either
        corpus.prepare(config(place, f"data.path={place}/txt"))
    with pytest.raises(DataError, match="no such file or folder"):
        corpus.prepare(config(place, f"data.sources=[{{path: {place}/text, document_bytes: 99}}]", "data.path=null"))


def test_changed_text_makes_tokenizer_and_tokens_again_unless_a_run_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(place)
    corpus.prepare(settings)
    before = files_of(place / "data")
    two = f"data.sources=[{{path: {place}/text, weight: 3}}]"
    corpus.prepare(config(place, two, "data.path=null", "data.sequence_length=64", "seed=5"))
    assert files_of(place / "data") == before
    (place / "text" / "more.txt").write_text("More text. " * 200)
    for _ in range(2):
        with pytest.raises(DataError, match="other inputs"):
            corpus.prepare(settings, rebuild=False)
    corpus.prepare(settings)
    assert "trained again" in capsys.readouterr().err
    assert files_of(place / "data") != before
    (place / "text" / "more.txt").unlink()
    corpus.prepare(settings)
    after = files_of(place / "data")
    assert {name for name in after if after[name] != before[name]} <= {
        "tokenizer/training.json",
        "tokens/manifest.json",
    }
