"""Files of users: formats detected from content, compression, paths; files that are not data are reported."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import typing
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from muon_dist.config.data import SourceConfig
from muon_dist.data import Source, document
from muon_dist.data.corpus import FORMATS, documents
from muon_dist.data.source import BUILTINS

from .refusal import refused

TEXTS = ["first, with a comma", 'second "quoted"\nin two lines', "third: é 😀", "{fourth}", "[fifth]"]


@pytest.fixture(autouse=True)
def fresh_notes() -> None:
    document.say.cache_clear()


def texts_of(source: Source) -> list[str]:
    return [one.data.decode("utf-8") for one in documents(source)]


def table(mark: str) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=mark)
    writer.writerows([["id", "text"], *enumerate(TEXTS)])
    return stream.getvalue()


RECORDS = [{"id": n, "text": text} for n, text in enumerate(TEXTS)]
WRITTEN: dict[str, tuple[str, str]] = {
    "jsonl": ("jsonl", "\n".join(map(json.dumps, RECORDS))),
    "one line": ("jsonl", json.dumps(RECORDS[0])),
    "array": ("json", json.dumps(RECORDS)),
    "array over lines": ("json", json.dumps(RECORDS, indent=2, ensure_ascii=False)),
    "array of texts": ("json", json.dumps(TEXTS, indent=1)),
    "objects over lines": ("json", "\n".join(json.dumps(one, indent=1) for one in RECORDS)),
    "csv": ("csv", table(",")),
    "semicolons": ("csv", table(";")),
    "tabs": ("csv", table("\t")),
}


@pytest.mark.parametrize("suffix", [".txt", ".json", ".csv", ".tsv", ".dat", ""])
@pytest.mark.parametrize("case", WRITTEN)
def test_formats_are_known_by_content_whatever_the_suffix(
    tmp_path: Path, case: str, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, text = WRITTEN[case]
    path = tmp_path / f"data{suffix}"
    path.write_text("\ufeff" * (suffix == "") + text, encoding="utf-8")  # also with a byte order mark
    assert texts_of(Source(path=path)) == (TEXTS[:1] if case == "one line" else TEXTS)
    promised = suffix in {"jsonl": [".json"], "json": [".json"], "csv": [".csv", ".tsv"]}[kind]
    assert (f"{path}: 1 file as {kind}" in capsys.readouterr().err) != promised


@pytest.mark.parametrize(
    "text", ["[Music] plays\n[End]", "{not json}\n", '"quoted" prose, with, commas\nand, more', "# x"]
)
def test_prose_that_begins_like_data_is_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert texts_of(Source(path=tmp_path / "a.txt")) == [text]


def test_large_values_and_long_lines_are_read_in_pieces(tmp_path: Path) -> None:
    long = ["x" * 3_000_000, "é" * 1_500_000, "end"]
    (tmp_path / "a").write_text(json.dumps(long, ensure_ascii=False))
    (tmp_path / "b").write_text("\n".join(json.dumps({"text": one}) for one in long))
    assert texts_of(Source(path=tmp_path / "a")) == texts_of(Source(path=tmp_path / "b")) == long


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files_whatever_their_name(tmp_path: Path, suffix: str) -> None:
    data = "".join(json.dumps(one) + "\n" for one in RECORDS * 500).encode()
    pack = PACKERS[suffix]
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(pack(data) + pack(data))  # parts joined, as `cat` does it
    (tmp_path / "b").write_bytes(pack(b"plain text"))
    assert texts_of(Source(path=tmp_path / f"a.jsonl.{suffix}")) == TEXTS * 1000
    assert texts_of(Source(path=tmp_path / "b")) == ["plain text"]
    (tmp_path / "cut").write_bytes(pack(data * 20)[:-20])
    with refused(tmp_path / "cut", "cut off" if suffix != "zst" else "cannot be read"):
        texts_of(Source(path=tmp_path / "cut"))


def test_parquet_arrow_and_nested_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"doc": {"id": n, "body": text}, "turns": [{"content": text}]} for n, text in enumerate(TEXTS)]
    frame = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(frame, tmp_path / "a.txt", row_group_size=2)
    with pyarrow.ipc.new_stream(tmp_path / "b.arrow", frame.schema) as stream:
        stream.write_table(frame)
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("a.txt", "b.arrow", "c.jsonl"):
        for field in ("doc.body", "turns.0.content"):
            assert texts_of(Source(path=tmp_path / name, text_field=field)) == TEXTS, (name, field)
        with refused(tmp_path / name, "'doc.title'", "missing", "text_field"):
            texts_of(Source(path=tmp_path / name, text_field="doc.title"))
    assert "a.txt: 1 file as parquet" in capsys.readouterr().err


def test_folders_of_datasets_by_path_and_by_name(tmp_path: Path) -> None:
    import datasets

    flat = datasets.Dataset.from_list(RECORDS)
    flat.save_to_disk(str(tmp_path / "flat"))
    datasets.DatasetDict(train=flat, test=flat.select([1])).save_to_disk(str(tmp_path / "splits"))
    for arguments in ({"path": tmp_path / "flat"}, {"dataset": str(tmp_path / "flat")}, {"path": tmp_path / "splits"}):
        assert texts_of(Source(**arguments)) == TEXTS
    assert texts_of(Source(path=tmp_path / "splits", split="test")) == TEXTS[1:2]
    with refused("no split 'dev'", "train, test"):
        texts_of(Source(path=tmp_path / "splits", split="dev"))
    next((tmp_path / "flat").glob("*.arrow")).write_bytes(b"damaged")
    with refused(tmp_path / "flat", "cannot"):
        texts_of(Source(path=tmp_path / "flat"))


def test_globs_lists_and_urls(tmp_path: Path) -> None:
    for name, text in zip("abc", ["one", "two", "three"], strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(text)
        (tmp_path / name / f"{name}.log").write_text("not asked for")
        fsspec.filesystem("memory").pipe(f"/bucket/{name}/{name}.txt", text.encode())
    for pattern in ("*/*.txt", "**/*.txt", "[a-c]/?.txt"):
        assert texts_of(Source(path=f"{tmp_path}/{pattern}")) == ["one", "two", "three"]
    assert texts_of(Source(path=[tmp_path / "c" / "c.txt", tmp_path / "a" / "a.txt"])) == ["three", "one"]
    assert texts_of(Source(path="memory://bucket")) == ["one", "two", "three"]
    assert texts_of(Source(path=["memory://bucket/*/b.txt", f"file://{tmp_path}/a/a.txt"])) == ["two", "one"]
    with refused(tmp_path, "no non-empty file matches"):
        texts_of(Source(path=str(tmp_path / "*.md")))
    (tmp_path / "[x]").mkdir()
    (tmp_path / "[x]" / "a.txt").write_text("bracket")
    with refused(f"{tmp_path}/[x]/*", "no non-empty file matches", "write [[] for it"):
        texts_of(Source(path=f"{tmp_path}/[x]/*"))
    assert texts_of(Source(path=f"{tmp_path}/[[]x]/*")) == texts_of(Source(path=tmp_path / "[x]")) == ["bracket"]
    with refused("names it twice", "a.txt"):
        texts_of(Source(path=[tmp_path / "a" / "a.txt", str(tmp_path / "a" / "*.txt")]))
    with refused("memory://nowhere", "no such file"):
        texts_of(Source(path="memory://nowhere"))
    with refused("nosuch://x", "knows no such URL"):
        texts_of(Source(path="nosuch://x"))


def test_separators_and_a_document_per_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\n\n three \nfour")
    assert texts_of(Source(path=path, separator="\n")) == ["one", "two", " three ", "four"]
    mark = "<|endoftext|>"
    parts = ["a" * (1 << 20), "b\n\nc", "d" * 17]
    path.write_text(mark.join(parts))
    assert texts_of(Source(path=path, separator=mark)) == parts
    with refused(path, "'<sep>'", "nowhere"):
        path.write_text("one\ntwo\nthree")
        texts_of(Source(path=path, separator="<sep>"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.json", "a.txt"])
def test_bad_records_stop_or_are_skipped_counted_and_bounded(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, separator, bad = tmp_path / name, None, 2
    if name == "a.jsonl":
        lines = [b'{"text": "one"}', b'{"text": "x', b'{"text": "two"}', b'{"text": "\xff"}', b'{"text": "three"}']
        path.write_bytes(b"\n".join(lines))
    elif name == "a.csv":
        path.write_bytes(b"id,text\n1,one\n2\n3,two\n4,\xff\n5,three\n")
    elif name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None, "two", None, "three"]}), path)
    elif name == "a.json":
        path.write_text(json.dumps([{"text": "one"}, {"body": "x"}, {"text": "two"}, {"text": 5}, {"text": "three"}]))
    else:
        path.write_bytes(b"one\nx\xff\ntwo\n\xfe\nthree")
        separator = "\n"
    with refused(path):
        texts_of(Source(path=path, separator=separator))
    source = Source(path=path, separator=separator, on_bad_record="skip", max_bad_records=bad)
    assert texts_of(source) == ["one", "two", "three"]
    assert f"{path}: {bad} bad records skipped" in capsys.readouterr().err
    with refused("more than 1 bad records", "max_bad_records"):
        texts_of(Source(path=path, separator=separator, on_bad_record="skip", max_bad_records=1))


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"<!DOCTYPE html>\n<html><body>x</body></html>", ["HTML", "format to text"]),
        (b"  <html>", ["HTML"]),
        (b'<?xml version="1.0"?><a/>', ["XML"]),
        (b"%PDF-1.7 x", ["PDF", "extract"]),
        (b"PK\x03\x04rest", ["zip"]),
        (b"\x89PNG\r\n\x1a\n\0\0\0", ["binary", "byte offset 8"]),
        ("text".encode("utf-16"), ["UTF-16", "convert"]),
        ("text".encode("utf-32"), ["UTF-32", "convert"]),
        (gzip.compress(gzip.compress(b"text", mtime=0), mtime=0), ["compressed twice", "decompress"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", ["Git LFS"]),
        (b"x" * 257 + b"ustar" + b"\0" * 99, ["tar archive"]),
        (gzip.compress(b"x" * 257 + b"ustar" + b"\0" * 99, mtime=0), ["tar archive"]),
        (b"good text\n" * 9000 + b"\0" * 4096, ["a zero byte at byte offset 90000", "damaged"]),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "folder/b.txt"])
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, parts: list[str], name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    (path.parent / "c.txt").write_text("good")
    with refused(path, *parts):
        texts_of(Source(path=path if name == "a.txt" else path.parent))


def test_what_is_no_data_beside_data_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "data"}')
    (tmp_path / "notes.txt").write_text("about the data")
    (tmp_path / "README.md").write_text("# About")
    assert texts_of(Source(path=tmp_path)) == ["data"]
    said = capsys.readouterr().err
    assert "1 file as jsonl; left out because they are not data: README.md, notes.txt" in said
    (tmp_path / "a.jsonl").unlink()
    assert texts_of(Source(path=tmp_path)) == ["about the data"]
    assert texts_of(Source(path=[tmp_path / "notes.txt", tmp_path / "README.md"])) == ["about the data", "# About"]
    assert texts_of(Source(path=tmp_path / "README.md")) == ["# About"]


def test_what_programs_leave_in_a_folder_is_left_out_at_any_depth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A backup file contains its document a second time. Spark and Dask write a `_metadata` whose rows are in the
    other files."""
    place = tmp_path / "license" / "deep"
    place.mkdir(parents=True)
    (place / "a.txt").write_text("the text")
    for name in ("a.txt~", "#a.txt#", "Thumbs.db", "desktop.ini", "README.md"):
        (place / name).write_bytes(b"\0no text")
    assert texts_of(Source(path=tmp_path)) == ["the text"]
    assert (
        "left out because they are not data: license/deep/#a.txt#, license/deep/README.md" in capsys.readouterr().err
    )
    rows, found = pyarrow.table({"text": TEXTS}), []
    pyarrow.parquet.write_to_dataset(rows, tmp_path / "spark", metadata_collector=found)
    pyarrow.parquet.write_metadata(rows.schema, tmp_path / "spark" / "_common_metadata")
    pyarrow.parquet.write_metadata(rows.schema, tmp_path / "spark" / "_metadata", metadata_collector=found)
    assert texts_of(Source(path=tmp_path / "spark")) == TEXTS


def test_a_format_that_contradicts_the_content_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(WRITTEN["array"][1])
    assert len(texts_of(Source(path=tmp_path / "a.txt", format="text"))) == 1
    assert "looks like json, and is read as text because format says so" in capsys.readouterr().err
    (tmp_path / "b.txt").write_text("a,b,c\n" * 12)
    assert texts_of(Source(path=tmp_path / "b.txt"))
    assert "looks like a table of 3 columns and is read as plain text" in capsys.readouterr().err
    (tmp_path / "c.csv").write_text("id,body\n1,x\n")
    with refused(tmp_path / "c.csv", "'text'", "missing", "'id', 'body'", "text_field"):
        texts_of(Source(path=tmp_path / "c.csv"))
    (tmp_path / "d.jsonl").write_text("no JSON at all\n")
    with refused(f"{tmp_path / 'd.jsonl'}:1", "not a JSON object"):
        texts_of(Source(path=tmp_path / "d.jsonl"))
    (tmp_path / "e.json").write_text('[{"text": "x"}, {"text": ')
    with refused(tmp_path / "e.json", "record 1", "not JSON"):
        texts_of(Source(path=tmp_path / "e.json"))


HUGE = "9" * 5000


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.jsonl", f'{{"id": {HUGE}, "text": "one"}}\n{{"id": NaN, "text": "two"}}', ["one", "two"]),
        ("a.json", f'[{{"id": {HUGE}, "text": "one"}}, {{"id": 1, "id": 2, "text": "two"}}]', ["one", "two"]),
        ("a.jsonl", '{"text": "one"}\r{"text": "two"}\r', ["one", "two"]),
        ("a.jsonl", '{"text": "one", "meta": {"text": "other"}}', ["one"]),
        ("a.csv", "id,text\r1,one\r2,two\r", ["one", "two"]),
        ("a.csv", '"my\nid",text\n1,one\n', ["one"]),
        ("a.jsonl", '\ufeff\n{"text": "one"}\n\ufeff{"text": "two"}\n', ["one", "two"]),
        ("a.csv", 'id,text\n1,"one\n""two"""\n2,5" pipe\n', ['one\n"two"', '5" pipe']),
    ],
)
def test_rare_spellings_of_good_records_are_read(tmp_path: Path, name: str, content: str, wanted: list[str]) -> None:
    """Numbers that Python does not read, lines that end in a carriage return alone, headers over two lines."""
    (tmp_path / name).write_bytes(content.encode())
    assert texts_of(Source(path=tmp_path / name)) == wanted


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", '{"text": "one", "text": "two"}', [":1", "'text' appears twice"]),
        ("a.json", '[{"text": "one", "text": "two"}]', ["record 0", "'text' appears twice"]),
        ("b.jsonl", '{"a": {"text": "one", "text": "two"}}', [":1", "'text' appears twice"]),
        ("a.csv", "text,text\none,two\n", ["2 columns named 'text'"]),
        ("a.csv", 'id,text\n1,fine\n2,"never closed\n3,lost\n', [":3", "quotation mark"]),
        ("a.csv", 'id,text\n1,"one" more\n', [":2", "quotation mark"]),
        ("a.csv", "id,text\n1,one\n2,t\0wo\n", [":3"]),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(tmp_path: Path, name: str, content: str, parts: list[str]) -> None:
    """The last of two values was taken; the rest of a file became one column."""
    (tmp_path / name).write_text(content)
    with refused(tmp_path / name, *parts):
        texts_of(Source(path=tmp_path / name, text_field="a.text" if name == "b.jsonl" else "text"))


def test_two_columns_of_one_name_in_parquet(tmp_path: Path) -> None:
    table = pyarrow.table([pyarrow.array(["one"]), pyarrow.array(["two"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with refused(tmp_path / "a.parquet", "2 columns named 'text'"):
        texts_of(Source(path=tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{'text': 'one'}\n{'text': 'two'}\n", "looks like Python dictionaries"),
        ("<p>one</p>\n<p>two</p>\n", "looks like HTML or XML"),
        ("<3 you. a</b> is no markup.\n", None),
        ("{'s' is a set in Python.\n", None),
    ],
)
def test_text_that_looks_like_something_else_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, said: str | None
) -> None:
    (tmp_path / "a.txt").write_text(content)
    assert texts_of(Source(path=tmp_path / "a.txt")) == [content]
    shown = capsys.readouterr().err
    assert said in shown if said is not None else not shown


def test_folders_that_a_pattern_matches_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in" / "one").mkdir(parents=True)
    (tmp_path / "in" / "one" / "a.txt").write_text("inner")
    with refused(f"{tmp_path}/in/*", "only folders such as", f"write {tmp_path}/in/*/*"):
        texts_of(Source(path=f"{tmp_path}/in/*"))
    (tmp_path / "in" / "b.txt").write_text("outer")
    assert texts_of(Source(path=f"{tmp_path}/in/*")) == ["outer"]
    assert "matches folders too, which are left out" in capsys.readouterr().err
    assert texts_of(Source(path=f"{tmp_path}/in/**")) == ["outer", "inner"]


def test_the_configuration_knows_every_format() -> None:
    assert set(typing.get_args(SourceConfig.model_fields["format"].annotation)) == set(FORMATS)


def test_the_configuration_knows_every_builtin_corpus() -> None:
    literal, _ = typing.get_args(SourceConfig.model_fields["builtin"].annotation)
    assert set(typing.get_args(literal)) == set(BUILTINS)
