"""Shards contain exactly the corpus, are the same for any number of workers, and never exist in part."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from muon_dist.data import Manifest, Source, TokenizerInfo, load_tokenizer, prepare, train_tokenizer
from muon_dist.data.corpus import documents
from muon_dist.data.shards import INDEX_FILE, MANIFEST_FILE, SplitIndex, check_folder

from .refusal import refused

prepare_module = importlib.import_module("muon_dist.data.preparation")


def stream(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, document ends as (tokens, bytes)) of a split's folder."""
    index = SplitIndex.load(folder)
    parts = [np.fromfile(folder / shard.file, dtype=index.dtype) for shard in index.shards]
    return np.concatenate(parts), np.fromfile(folder / "documents.bin", dtype="<i8").reshape(-1, 2)


def files_of(folder: Path) -> dict[str, str]:
    """Relative name -> SHA-256 of every file."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def decoded(out: Path, source: str, tokenizer: Path) -> dict[str, list[str]]:
    """The documents of each split, read back from the shards."""
    encoder = load_tokenizer(tokenizer)
    result = {}
    for split in ("train", "validation"):
        ids, ends = stream(out / source / split)
        bounds = [0, *ends[:, 0].tolist()]
        assert all(ids[end - 1] == encoder.info.eos_id for end in bounds[1:]) and bounds[-1] == len(ids)
        texts = [encoder.decode(ids[a : b - 1].tolist()) for a, b in itertools.pairwise(bounds)]
        assert np.array_equal(np.cumsum([len(text.encode()) for text in texts]), ends[:, 1])
        result[split] = texts
    return result


def test_shards_hold_exactly_the_corpus(prepared: Path, corpus: Path, tokenizer: TokenizerInfo) -> None:
    manifest = Manifest.load(prepared)
    found = decoded(prepared, "00-topics", tokenizer.path)
    expected = [document.data.decode() for document in documents(Source(path=corpus))]
    assert sorted(found["train"] + found["validation"]) == sorted(expected)
    assert len(found["validation"]) >= 1 and len(found["train"]) > len(found["validation"])
    for split in ("train", "validation"):
        index = SplitIndex.load(prepared / "00-topics" / split)
        totals = manifest.sources[0].splits[split]
        assert totals.bytes == index.bytes == sum(len(text.encode()) for text in found[split])
        assert totals.documents == index.documents == len(found[split])
        assert totals.tokens == index.tokens == sum(shard.tokens for shard in index.shards)
        assert [shard.tokens for shard in index.shards][:-1] == [20_000] * (len(index.shards) - 1)
        assert index.dtype == "<u2" and index.vocab_size == 1000
    assert manifest.bytes_per_token() == (
        sum(len(text.encode()) for text in found["validation"]) / manifest.totals("validation")[0]
    )
    content = hashlib.sha256(b"".join(len(t.encode()).to_bytes(8, "little") + t.encode() for t in expected))
    assert manifest.sources[0].content_sha256 == content.hexdigest()
    check_folder(prepared, manifest, hashes=True)


def test_split_follows_the_text_not_the_company_it_keeps(
    tmp_path: Path, corpus: Path, prepared: Path, tokenizer: TokenizerInfo
) -> None:
    shutil.copytree(corpus, tmp_path / "topics")
    (tmp_path / "topics" / "000a.txt").write_text("A new document at the front. " * 50)
    settings = {"validation_fraction": 0.1, "shard_tokens": 20_000}
    prepare([Source(path=tmp_path / "topics")], tokenizer.path, tmp_path / "out", **settings)
    old, new = (decoded(out, "00-topics", tokenizer.path) for out in (prepared, tmp_path / "out"))
    assert set(old["validation"]) <= set(new["validation"]) and set(old["train"]) <= set(new["train"])
    prepare([Source(path=corpus)], tokenizer.path, tmp_path / "seed", seed=1, **settings)
    assert decoded(tmp_path / "seed", "00-topics", tokenizer.path)["validation"] != old["validation"]


def test_small_source_gives_its_lowest_document_to_validation(tmp_path: Path, tokenizer: TokenizerInfo) -> None:
    lines = [json.dumps({"text": f"Document number {n}."}) for n in range(9)]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    source = Source(path=tmp_path / "few.jsonl")
    for seed in range(4):
        manifest = prepare([source], tokenizer.path, tmp_path / f"{seed}", validation_fraction=1e-9, seed=seed)
        found = decoded(tmp_path / f"{seed}", "00-few.jsonl", tokenizer.path)
        assert len(found["validation"]) == 1 and len(found["train"]) == 8
        assert sorted(found["train"] + found["validation"]) == [f"Document number {n}." for n in range(9)]
    manifest = prepare([source], tokenizer.path, tmp_path / "none", validation_fraction=0)
    assert manifest.totals("validation") == (0, 0) and manifest.sources[0].splits["train"].documents == 9
    with refused("validation split is empty", "validation_fraction"):
        manifest.bytes_per_token()


@pytest.mark.timeout(120)
def test_workers_write_the_same_bytes(
    tmp_path: Path, prepared: Path, corpus: Path, tokenizer: TokenizerInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "_INLINE_BATCHES", 2)
    monkeypatch.setattr(prepare_module, "_BATCH_BYTES", 10_000)
    started: list[int] = []
    start = prepare_module._Encoding._started
    monkeypatch.setattr(prepare_module._Encoding, "_started", lambda self: started.append(1) or start(self))
    settings = {"validation_fraction": 0.1, "shard_tokens": 20_000}
    prepare([Source(path=corpus)], tokenizer.path, tmp_path / "two", workers=2, **settings)
    assert len(started) > 10  # worker processes did encode
    assert files_of(tmp_path / "two") == files_of(prepared)


def test_several_sources_keep_their_own_shards(
    tmp_path: Path, corpus: Path, texts: list[str], tokenizer: TokenizerInfo
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts[:20]))
    sources = [
        Source(path=tmp_path / "set" / "t.jsonl", weight=3),
        Source(path=corpus),
        Source(dataset=str(tmp_path / "set"), weight=2),
    ]
    manifest = prepare(sources, tokenizer.path, tmp_path / "out", validation_fraction=0.1)
    assert [one.folder for one in manifest.sources] == [
        "00-t.jsonl",
        "01-topics",
        f"02-{str(tmp_path / 'set').strip('/').replace('/', '-')}",
    ]
    first, _, third = (one.splits["train"] for one in manifest.sources)
    assert first == third and first.documents < 20
    reweighted = [Source(path=tmp_path / "set" / "t.jsonl", weight=1), *sources[1:]]
    assert prepare(reweighted, tokenizer.path, tmp_path / "out", validation_fraction=0.1) == manifest


def test_second_run_is_skipped_and_other_inputs_are_refused(
    tmp_path: Path, texts: list[str], tokenizer: TokenizerInfo
) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(texts[:9]))
    source, out = Source(path=tmp_path / "a.txt"), tmp_path / "out"
    first = prepare([source], tokenizer.path, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    (tmp_path / "a.txt").touch()
    assert prepare([source], tokenizer.path, out, verify=True) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with refused("other inputs", "shard_tokens 10000000 (now 99)", "seed 0 (now 1)", "overwrite"):
        prepare([source], tokenizer.path, out, shard_tokens=99, seed=1)
    with refused("other inputs", "source " + str(tmp_path / "a.txt"), "changed"):
        (tmp_path / "a.txt").write_text("\n\n".join(texts[:8]))
        prepare([source], tokenizer.path, out)
    with refused("other inputs", "1 sources (now 2)"):
        prepare([source, source], tokenizer.path, out)
    other = train_tokenizer([source], tmp_path / "t", vocab_size=500)
    with refused("other inputs", "another tokenizer"):
        prepare([source], other.path, out)
    assert prepare([source], other.path, out, overwrite=True).vocab_size == 500
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "out", "t", ".out.lock", ".t.lock"}


def test_damage_is_named_then_rebuilt(tmp_path: Path, prepared: Path, corpus: Path, tokenizer: TokenizerInfo) -> None:
    settings = {"validation_fraction": 0.1, "shard_tokens": 20_000}
    whole = files_of(prepared)
    for name in (
        MANIFEST_FILE,
        f"00-topics/train/{INDEX_FILE}",
        "00-topics/train/00001.bin",
        "00-topics/train/documents.bin",
    ):
        for damage in ("flip", "cut", "gone"):
            out = tmp_path / f"{damage}-{name.replace('/', '-')}"
            shutil.copytree(prepared, out)
            data = bytearray((out / name).read_bytes())
            data[len(data) // 2] ^= 4
            (out / name).unlink()
            if damage != "gone":
                (out / name).write_bytes(data if damage == "flip" else data[:-7])
            with refused(out if (damage, name) == ("gone", MANIFEST_FILE) else out / name):
                prepare([Source(path=corpus)], tokenizer.path, out, verify=True, **settings)
            if (damage, name) != ("gone", MANIFEST_FILE):  # without a manifest the folder is not known to be ours
                prepare([Source(path=corpus)], tokenizer.path, out, verify=True, overwrite=True, **settings)
                assert files_of(out) == whole


def test_refusals(tmp_path: Path, corpus: Path, tokenizer: TokenizerInfo) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n \n")
    (tmp_path / "one.txt").write_text("One short document.")
    (tmp_path / "bad.txt").write_bytes(b"good \xc3( bad")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("the only copy")
    with refused("blank.txt", "no text"):
        prepare([Source(path=tmp_path / "blank.txt")], tokenizer.path, tmp_path / "out")
    with refused("one.txt", "too short", "1 document(s) of 19 bytes", "validation_fraction"):
        prepare([Source(path=tmp_path / "one.txt")], tokenizer.path, tmp_path / "out")
    with refused("bad.txt", "byte offset 5 "):
        prepare([Source(path=tmp_path / "bad.txt")], tokenizer.path, tmp_path / "out")
    with refused("data.sources"):
        prepare([], tokenizer.path, tmp_path / "out")
    with refused("data.validation_fraction", "1.0"):
        prepare([Source(path=corpus)], tokenizer.path, tmp_path / "out", validation_fraction=1.0)
    with refused("data.workers", "0"):
        prepare([Source(path=corpus)], tokenizer.path, tmp_path / "out", workers=0)
    with refused("no such tokenizer folder"):
        prepare([Source(path=corpus)], tmp_path / "nowhere", tmp_path / "out")
    with refused(tmp_path / "work", "not prepared by this program"):
        prepare([Source(path=corpus)], tokenizer.path, tmp_path / "work", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        "blank.txt",
        "one.txt",
        "bad.txt",
        "work",
        ".out.lock",
        ".work.lock",
    }
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["thesis.tex"]


def in_a_fork(job: Callable[[], object]) -> tuple[int, int]:
    """Run in a forked process; (exit code or 0, signal or 0)."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            job()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(process, 0)[1]
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 0, os.WTERMSIG(status)


def kill_at(event: int, place: Path) -> Callable[[], None]:
    """An audit hook that kills this process at its ``event``-th use of a file under ``place``: every open (for a
    write, or an fsync), mkdir, rename and removal."""
    seen = 0

    def hook(name: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if name in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree") and arguments:
            if str(arguments[0]).startswith(str(place)) or (name.startswith("os.r") and isinstance(arguments[0], str)):
                seen += 1
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(hook)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("apart", [3, pytest.param(1, marks=pytest.mark.slow)])  # 3: one operation in three
def test_killed_at_any_file_operation_leaves_old_new_or_nothing(
    tmp_path: Path, texts: list[str], tokenizer: TokenizerInfo, apart: int
) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(texts[:4]))
    source, place = Source(path=tmp_path / "a.txt", document_bytes=2000), tmp_path / "out"
    prepare([source], tokenizer.path, tmp_path / "old", seed=0, shard_tokens=3000)
    prepare([source], tokenizer.path, tmp_path / "new", seed=1, shard_tokens=3000)
    old, new = files_of(tmp_path / "old"), files_of(tmp_path / "new")
    found = []
    for event in range(1, 1000, apart):
        place.mkdir()
        out = place / "tokens"
        if event % 2:
            shutil.copytree(tmp_path / "old", out)
        arm = kill_at(event, place)

        def job(arm: Callable[[], None] = arm, out: Path = out) -> None:
            arm()
            prepare([source], tokenizer.path, out, seed=1, shard_tokens=3000, overwrite=True)

        code, killed = in_a_fork(job)
        assert code == 0
        state = files_of(out) if out.exists() else None
        assert state in (None, old, new), f"killed at file operation {event}"
        found.append("none" if state is None else "old" if state == old else "new")
        prepare([source], tokenizer.path, out, seed=1, shard_tokens=3000, overwrite=True)
        assert files_of(out) == new and {path.name for path in place.iterdir()} == {"tokens", ".tokens.lock"}
        shutil.rmtree(place)
        if not killed:
            break
    assert len(found) > 30 // apart and {"none", "old", "new"} == set(found), found


def test_workers_end_when_their_parent_is_killed(
    tmp_path: Path, corpus: Path, tokenizer: TokenizerInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "_INLINE_BATCHES", 0)
    monkeypatch.setattr(prepare_module, "_BATCH_BYTES", 2_000)
    process = os.fork()
    if process == 0:
        while True:  # never finished, so that there is always something to kill
            prepare([Source(path=corpus)], tokenizer.path, tmp_path / "out", workers=2)
            shutil.rmtree(tmp_path / "out")

    def children() -> list[int]:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
        return [int(one) for one in text.split()]

    def waits_for(condition: Callable[[], bool]) -> bool:
        end = time.monotonic() + 30
        while not condition() and time.monotonic() < end:
            time.sleep(0.05)
        return condition()

    assert waits_for(lambda: len(children()) >= 2 and any(tmp_path.glob(".out.tmp-*/*/*/*.bin")))
    workers = children()
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert waits_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
