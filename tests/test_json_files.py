"""Strict JSON, whole files, and logs that survive a killed writer."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

import muon_dist
from muon_dist.json_files import (
    append_line,
    canonical,
    indented,
    keep_lines,
    one_line,
    read_lines,
    read_object,
    strict,
    write_json,
    write_lines,
)

VALUE = {"b": (1, 2.5), "a": {"loss": math.nan, "rate": [math.inf, -math.inf]}, "ü": "Größe\u2028\udc80"}
STRICT = {"b": [1, 2.5], "a": {"loss": None, "rate": [None, None]}, "ü": "Größe\u2028\udc80"}


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is not JSON")


def test_a_number_that_json_lacks_is_null() -> None:
    assert strict(VALUE) == STRICT
    for text in (one_line(VALUE), indented(VALUE)):
        assert json.loads(text, parse_constant=refuse) == STRICT
    assert len(one_line(VALUE).splitlines()) == 1


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.json"
    write_json(path, VALUE)
    assert read_object(path) == STRICT and "Größe" in path.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_object(path) == STRICT
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_nothing_is_left_behind_where_the_file_cannot_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "run.json" / "in_the_way").mkdir(parents=True)
    with pytest.raises(OSError):
        write_json(tmp_path / "run.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_what_is_not_an_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for data in (b"[1]", b'{"a": ', b'{"a": "\xff"}', b""):
        path.write_bytes(data)
        with pytest.raises(ValueError):
            read_object(path)
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "none.json")


def test_a_cut_line_is_named_and_goes(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for step in (1, 2, 3):
        append_line(path, {"step": step, "text": "a\u2028b\x85c"})
    with path.open("ab") as file:
        file.write(b'[1]\n{"step": 4, "lo\xff')
    assert [(n, v and v["step"]) for n, v in read_lines(path)] == [(1, 1), (2, 2), (3, 3), (4, None), (5, None)]
    keep_lines(path, lambda line: line["step"] != 2)
    assert [v and v["step"] for _, v in read_lines(path)] == [1, 3]
    write_lines(path, [])
    assert list(read_lines(path)) == []
    keep_lines(tmp_path / "none.jsonl", lambda line: True)
    assert not (tmp_path / "none.jsonl").exists()


def test_the_line_after_a_cut_one_is_whole(tmp_path: Path) -> None:
    """The first event of a resumed run was lost, because it was appended to the half line that a kill had left."""
    path = tmp_path / "log.jsonl"
    append_line(path, {"step": 1})
    path.write_bytes(path.read_bytes() + b'{"step": 2, "lo')
    append_line(path, {"step": 3})
    append_line(path, {"step": 4})
    assert [value for _, value in read_lines(path)] == [{"step": 1}, None, {"step": 3}, {"step": 4}]


def test_digests_do_not_depend_on_the_order_of_keys() -> None:
    assert canonical({"b": 1, "a": [2.0]}) == canonical({"a": [2.0], "b": 1}) == b'{"a":[2.0],"b":1}'
    with pytest.raises(ValueError):
        canonical({"a": math.nan})


# Each of these has its own format, for the stated reason.
OTHERS = {
    "adapters/hf/checkpoint.py",  # as Trainer writes trainer_state.json, NaN included
    "audit/chain.py",  # digests of lines as they are written in the file
    "checkpoint/files.py",  # state that must come back exactly, NaN included; the header of safetensors
    "checkpoint/manifest.py",  # its first line is the digest of the others
    "config/load.py",  # handed to pydantic
    "data/tokenizer.py",  # the text of a tokenizer
    "fuzz/case.py",  # an argument of the command line
    "guards/watchdog.py",  # a message between ranks
}


def test_json_is_written_in_one_place() -> None:
    package = Path(muon_dist.__file__).parent
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"\bjson\.dumps?\(", path.read_text(encoding="utf-8"))
    }
    assert found - {"json_files.py"} == OTHERS
