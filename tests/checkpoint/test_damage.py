"""What is damaged, hostile or cut off is found before a tensor is copied, and named."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from muon_dist.checkpoint import LISTENERS, Phase, commits, load, newest_good, open_checkpoint, tidy
from muon_dist.checkpoint.manifest import read_manifest
from muon_dist.errors import CheckpointError
from tests.checkpoint.store import holding, ranks, save
from tests.distributed import run_ranks


@pytest.fixture()
def saved(tmp_path: Path) -> Path:
    save(tmp_path, 4)
    return tmp_path / "checkpoint-4"


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def refused(folder: Path) -> str:
    """The message of the refusal; a load has copied nothing by then, since opening verifies all."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return str(caught.value)


def test_every_flipped_byte_is_found(saved: Path) -> None:
    rng = random.Random(0)
    for path in files_of(saved):
        whole = path.read_bytes()
        for at in {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(10))}:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
            assert str(path) in refused(saved)
        path.write_bytes(whole)
    open_checkpoint(saved)


def test_every_truncation_and_missing_file_is_found(saved: Path) -> None:
    rng = random.Random(1)
    for path in files_of(saved):
        whole = path.read_bytes()
        for size in {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(5))}:
            path.write_bytes(whole[:size])
            assert str(path) in refused(saved)
        path.unlink()
        assert path.name in refused(saved)
        path.write_bytes(whole)
    open_checkpoint(saved)


def _save(folder: str) -> None:
    save(folder, 2)


def _found_by_all(folder: str) -> str:
    held, tensors = holding(0)
    before = {n: t.clone() for n, t in tensors.items()}
    with pytest.raises(CheckpointError) as caught:
        load(open_checkpoint(folder, ranks()), held, ranks())
    assert all(torch.equal(tensors[n], t) for n, t in before.items())
    return str(caught.value)


def test_one_rank_finds_it_and_all_refuse(tmp_path: Path) -> None:
    run_ranks(_save, 3, str(tmp_path))
    damaged = tmp_path / "checkpoint-2" / "rank-00001.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 4
    damaged.write_bytes(data)
    found = run_ranks(_found_by_all, 3, str(tmp_path / "checkpoint-2"))
    messages = {re.sub(r"^rank \d: ", "", text) for text in found}  # the others name the rank that found it
    assert len(messages) == 1 and str(damaged) in messages.pop()


# ---- hostile


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


def rewrite(folder: Path, change: Any) -> None:
    """A manifest that an attacker made: changed, with a right hash."""
    path = folder / "manifest.json"
    body = json.loads(path.read_bytes())
    del body["sha256"]
    change(body)
    text = json.dumps(body)[1:].encode()
    path.write_bytes(b'{"sha256": "' + hashlib.sha256(text).hexdigest().encode() + b'",\n' + text)


def test_nothing_pickled_is_ever_read(saved: Path, tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    data = pickle.dumps(Canary(canary))
    torch.save(Canary(canary), saved / "optimizer.pt")
    for path in files_of(saved):
        record = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

        def change(body: dict[str, Any], name: str = path.name, record: dict[str, Any] = record) -> None:
            body["files"].get(name, {}).update(record)

        copy = tmp_path / "checkpoint-9"
        shutil.copytree(saved, copy)
        (copy / path.relative_to(saved)).write_bytes(data)
        if path.name != "manifest.json":
            rewrite(copy, change)
        with pytest.raises((CheckpointError, ValueError, KeyError)):
            checkpoint = open_checkpoint(copy)
            checkpoint.rank_state(0)
            load(checkpoint, holding(0)[0])
            raise KeyError("read nothing of it")
        shutil.rmtree(copy)
    assert not canary.exists()


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/../../secret", ".hidden", "a/b/c", "", "a\\b", ".."]
)
def test_names_outside_of_the_folder_are_refused(saved: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("x")
    rewrite(saved, lambda body: body["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    assert "only names within the checkpoint are read" in refused(saved)


def test_links_are_refused(saved: Path, tmp_path: Path) -> None:
    path = saved / "notes.json"
    path.rename(tmp_path / "notes.json")
    path.symlink_to(tmp_path / "notes.json")
    assert "is not a regular file (a link or a folder)" in refused(saved)
    path.unlink()
    (tmp_path / "notes.json").rename(path)
    (saved / "hf").rename(tmp_path / "hf")
    (saved / "hf").symlink_to(tmp_path / "hf")
    assert "is a link: it is not followed" in refused(saved)
    (saved / "hf").unlink()
    (tmp_path / "hf").rename(saved / "hf")
    (tmp_path / "checkpoint-5").symlink_to(saved)
    assert "is a link: name the checkpoint itself" in refused(tmp_path / "checkpoint-5")
    assert commits(tmp_path) == [saved]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(format="other"), "this package reads 'muon_dist checkpoint' version 1"),
        (lambda b: b.update(version=2), "version 2; this package reads"),
        (lambda b: b.update(step=-1), "-1 is not a count"),
        (lambda b: b.pop("tensors"), "is not a manifest: KeyError"),
        (lambda b: b["tensors"]["weight"]["a"].update(shape=[70, 5]), "of the 350 elements of a"),
        (lambda b: b["files"]["rank-00000.safetensors"]["tensors"][0].__setitem__(3, 10**9), "has no part"),
    ],
)
def test_a_manifest_that_makes_no_sense(saved: Path, change: Any, message: str) -> None:
    rewrite(saved, change)
    assert message in refused(saved)


def test_a_manifest_of_depth_is_refused_not_a_crash(saved: Path) -> None:
    text = b'"state": ' + b"[" * 100_000 + b"}\n"
    line = b'{"sha256": "' + hashlib.sha256(text).hexdigest().encode() + b'",\n'
    (saved / "manifest.json").write_bytes(line + text)
    assert "is not a manifest" in refused(saved)


def test_a_tensor_file_that_does_not_match_the_manifest(saved: Path) -> None:
    """Right hashes and another shape: refused while loading, by name."""
    manifest = read_manifest(saved)
    first = manifest.tensors["weight", "b"].parts[0]
    path = saved / first.file
    data = path.read_bytes().replace(
        b'"weight/b/0":{"dtype":"F32","shape":[3]', b'"weight/b/0":{"dtype":"F16","shape":[6]'
    )
    path.write_bytes(data)
    rewrite(saved, lambda b: b["files"][first.file].update(sha256=hashlib.sha256(data).hexdigest()))
    with pytest.raises(CheckpointError, match=r"weight/b/0 has shape \[6\]"):
        load(open_checkpoint(saved), holding(0)[0])


# ---- saves that fail


def _full_disk(folder: str, phase: str, background: bool, on_error: str) -> list[str]:
    """Rank 1 or the first runs out of space at a phase of the second save; the third has space again."""
    said: list[str] = []
    options: dict[str, Any] = {"background": background, "on_error": on_error, "warn": said.append}
    save(folder, 1, **options).wait()

    def fail(event: Phase) -> None:
        if event.name == phase and event.rank == min(1, ranks().size - 1) * (phase in ("write", "fsync", "gather")):
            raise OSError(errno.ENOSPC, "No space left on device")

    LISTENERS.append(fail)
    try:
        if on_error == "stop":
            with pytest.raises(CheckpointError, match="No space left"):
                save(folder, 2, **options).wait()
        else:
            assert save(folder, 2, **options).wait() is None
    finally:
        LISTENERS.remove(fail)
    found = newest_good(folder, ranks())
    assert found is not None and found.step == 1
    if ranks().rank == 0:
        assert sorted(os.listdir(folder)) == ["checkpoint-1"], "the temporary folder is gone"
    ranks().gather(None)
    save(folder, 3, **options).wait()
    found = newest_good(folder, ranks())
    assert found is not None and found.step == 3
    return said


@pytest.mark.parametrize("phase", ["make", "write", "gather", "manifest", "rename"])
def test_a_full_disk(tmp_path: Path, phase: str) -> None:
    background, on_error = phase in ("write", "rename"), "stop" if phase in ("write", "make") else "continue"
    said = run_ranks(_full_disk, 2, str(tmp_path), phase, background, on_error)
    assert said[1] == [] and len(said[0]) == 1
    assert "checkpoint-2 could not be saved" in said[0][0] and "No space left on device" in said[0][0]
    assert ("the run continues without it" in said[0][0]) == (on_error == "continue")


def _killed(folder: str, step: int, shift: float, phase: str) -> None:
    LISTENERS.append(lambda event: os._exit(9) if event.name == phase else None)
    save(folder, step, shift)


@pytest.mark.parametrize("phase", ["write", "manifest", "sync_folder", "set_aside", "rename", "renamed", "delete"])
def test_a_save_of_the_same_step_that_is_killed_leaves_the_old_or_the_new(tmp_path: Path, phase: str) -> None:
    import multiprocessing

    save(tmp_path, 3, 1.0)
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(str(tmp_path), 3, 2.0, phase))
    process.start()
    process.join()
    assert process.exitcode == 9
    for _ in range(2):  # before and after what was left is cleared away
        found = newest_good(tmp_path)
        assert found is not None and found.step == 3
        held, tensors = holding(0)
        load(found, held)
        new = {"renamed": True, "delete": True}.get(phase, False)
        assert all(torch.equal(tensors[n], t) for n, t in holding(2.0 if new else 1.0)[1].items())
        tidy(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-3"]
