"""Sources: the files that they read, and those that they refuse."""

from __future__ import annotations

import hashlib
import inspect
import json
import pydoc_data.topics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from muon_dist.data import Source
from muon_dist.data.corpus import documents, same_source, source_record

from .refusal import refused


def texts_of(source: Source) -> list[str]:
    return [document.data.decode("utf-8") for document in documents(source)]


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("jsonl") / "topics.jsonl"
    path.write_text("".join(json.dumps({"id": n, "body": text}) + "\n" for n, text in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("parquet") / "topics.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "body": texts}), path, row_group_size=7)
    return path


def test_folder_is_read_in_order_and_whole(corpus: Path) -> None:
    files = sorted(corpus.rglob("*.txt"), key=lambda path: path.relative_to(corpus).as_posix())
    assert "".join(texts_of(Source(path=corpus))) == "".join(path.read_text(encoding="utf-8") for path in files)


@pytest.mark.parametrize("size", [64, 100, 1000, 16384, 1 << 20])
@pytest.mark.parametrize("text", ["blank lines", "lines", "characters"])
def test_long_text_is_cut_without_loss(tmp_path: Path, texts: list[str], size: int, text: str) -> None:
    whole = "\n\n".join(texts[:8]).replace("e", "é")
    whole = {"blank lines": whole, "lines": whole.replace("\n\n", "\n"), "characters": whole.replace("\n", "😀")}[text]
    (tmp_path / "book.txt").write_text(whole, encoding="utf-8")
    parts = [document.data for document in documents(Source(path=tmp_path / "book.txt", document_bytes=size))]
    assert b"".join(parts).decode("utf-8") == whole
    assert all(size <= len(part) <= 2 * size for part in parts[:-1]) or text == "characters"
    assert all(2 * size - 4 < len(part) <= 2 * size for part in parts[:-1]) or text != "characters"
    assert size > 16384 or len(parts) > 1


def test_line_ends_and_spaces_are_kept_and_the_byte_order_mark_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf  one\r\n\ttwo  \r\n\r\n")
    assert texts_of(Source(path=tmp_path / "a.txt")) == ["  one\r\n\ttwo  \r\n\r\n"]


def test_jsonl_parquet_and_datasets_give_the_same_documents(jsonl: Path, parquet: Path, texts: list[str]) -> None:
    assert texts_of(Source(path=jsonl, text_field="body")) == texts
    assert texts_of(Source(path=parquet, text_field="body")) == texts
    for folder in (jsonl.parent, parquet.parent):
        for streaming in (True, False):
            source = Source(dataset=str(folder), text_field="body", streaming=streaming)
            assert texts_of(source) == texts
    assert texts_of(Source(dataset=str(jsonl.parent), text_field="body", max_documents=5)) == texts[:5]


def test_format_overrides_the_suffix(jsonl: Path, tmp_path: Path, texts: list[str]) -> None:
    (tmp_path / "topics.txt").write_bytes(jsonl.read_bytes())
    assert texts_of(Source(path=tmp_path, format="jsonl", text_field="body")) == texts


def test_stdlib_holds_the_topics_and_docstrings_and_runs_nothing() -> None:
    """Read twice, in this process and in a fresh one that also looks at what was imported meanwhile."""
    program = (
        "import sys, hashlib; from muon_dist.data.readers import read_stdlib, stdlib_root;"
        "stdlib_root(); before = set(sys.modules);"
        "found = read_stdlib(); assert set(sys.modules) == before, set(sys.modules) - before;"
        "print(len(found), hashlib.sha256(b''.join(one.data for one in found)).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = list(documents(Source(builtin="stdlib")))
    assert run.stdout.split() == [str(len(found)), hashlib.sha256(b"".join(one.data for one in found)).hexdigest()]
    texts = {one.data.decode("utf-8") for one in found}
    assert set(pydoc_data.topics.topics.values()) <= texts
    assert any((inspect.getdoc(Counter) or "?") in text for text in texts)
    assert 1_500_000 < sum(len(one.data) for one in found) < 6_000_000


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({}, ["exactly one of builtin, path and dataset"]),
        ({"builtin": "stdlib", "path": "x"}, ["exactly one"]),
        ({"builtin": "wikipedia"}, ["wikipedia", "stdlib"]),
        ({"path": "x", "format": "xml"}, ["format", "xml", "jsonl"]),
        ({"path": "x", "weight": 0}, ["weight", "0", "x"]),
        ({"path": "x", "weight": float("nan")}, ["weight", "nan"]),
        ({"path": "x", "max_documents": 0}, ["max_documents", "0"]),
    ],
)
def test_contradictory_source(arguments: dict, parts: list[str]) -> None:
    with refused(*parts):
        Source(**arguments)


def test_missing_and_empty(tmp_path: Path) -> None:
    with refused(tmp_path / "nowhere", "no such file or folder"):
        texts_of(Source(path=tmp_path / "nowhere"))
    (tmp_path / "empty.txt").touch()
    with refused(tmp_path / "empty.txt", "empty", "byte offset 0"):
        texts_of(Source(path=tmp_path / "empty.txt"))
    with refused(tmp_path, "no non-empty file"):
        texts_of(Source(path=tmp_path))


def test_not_utf8_is_named_with_its_offset(tmp_path: Path, texts: list[str]) -> None:
    body = "\n\n".join(texts).encode("utf-8")
    for offset in (0, 5, 70_001, len(body) - 1):
        path = tmp_path / f"{offset}.txt"
        path.write_bytes(body[:offset] + b"\xff" + body[offset + 1 :])
        with refused(path, f"byte offset {offset} ", "0xff", "UTF-8"):
            texts_of(Source(path=path))
    lines = b'{"text": "fine"}\n' * 3
    (tmp_path / "bad.jsonl").write_bytes(lines + b'{"text": "\xe9"}\n')
    with refused(tmp_path / "bad.jsonl", f"byte offset {len(lines) + 10} ", "0xe9"):
        texts_of(Source(path=tmp_path / "bad.jsonl"))


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"content": "x", "id": 1}', ["'text'", "missing", "'content', 'id'", "text_field"]),
        ('{"text": 5}', ["'text'", "int"]),
        ('{"text": null}', ["'text'", "NoneType"]),
        ('["text"]', ["JSON object", "list"]),
        ('{"text": "x"', ["not a JSON object", "column"]),
        (r'{"text": "half \ud83d"}', ["'text'", "surrogate", "character 5"]),
    ],
)
def test_bad_json_line_is_named(tmp_path: Path, line: str, parts: list[str]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with refused(f"{path}:3:", *parts):
        texts_of(Source(path=path))


def test_bad_parquet(tmp_path: Path, parquet: Path) -> None:
    with refused(parquet, "'text'", "missing", "'id', 'body'"):
        texts_of(Source(path=parquet))
    with refused(f"{parquet} row 0", "'id'", "int"):
        texts_of(Source(path=parquet, text_field="id"))
    (tmp_path / "cut.parquet").write_bytes(parquet.read_bytes()[:-10])
    with refused(tmp_path / "cut.parquet", "not a readable parquet file"):
        texts_of(Source(path=tmp_path / "cut.parquet", text_field="body"))


def test_bad_dataset_names(tmp_path: Path, jsonl: Path) -> None:
    with refused("no-such-owner/no-such-set", "cannot be loaded"):
        texts_of(Source(dataset="no-such-owner/no-such-set"))
    with refused("cannot be loaded", "split 'test'"):
        texts_of(Source(dataset=str(jsonl.parent), split="test", text_field="body"))
    with refused("row 0", "'text'", "missing"):
        texts_of(Source(dataset=str(jsonl.parent)))


def test_dataset_scripts_are_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "hostile.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with refused("hostile", "cannot be loaded"):
        texts_of(Source(dataset=str(folder)))
    assert not (tmp_path / "ran").exists()


def test_links(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "below").mkdir(parents=True)
    (folder / "a.txt").write_text("inside")
    (folder / "b.txt").symlink_to("a.txt")
    (folder / "below" / "up").symlink_to("..")  # a circle
    (folder / ".hidden").write_bytes(b"\xff")
    assert texts_of(Source(path=folder)) == ["inside", "inside"]
    (tmp_path / "secret").write_text("outside")
    (folder / "c.txt").symlink_to("../secret")
    with refused(folder / "c.txt", "leads out"):
        texts_of(Source(path=folder))
    (folder / "c.txt").unlink()
    (folder / "c.txt").symlink_to("gone")
    with refused(folder / "c.txt", "broken"):
        texts_of(Source(path=folder))


def test_record_knows_the_content_not_the_time(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first")
    source = Source(path=path)
    first = source_record(source)
    path.touch()
    assert same_source(first, source_record(source, first))
    path.write_text("other")
    assert not same_source(first, source_record(source, first))
    assert not same_source(first, source_record(Source(path=path, document_bytes=100)))
