"""Saving and loading on forked ranks: what was saved is found, at any number of ranks, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from muon_dist.checkpoint import Checkpoint, commits, load, newest_good, open_checkpoint
from muon_dist.errors import CheckpointError
from muon_dist.layout import Block
from tests.checkpoint.store import holding, ranks, save, values
from tests.distributed import run_ranks


def _save(folder: str, step: int, background: bool) -> None:
    saver = save(folder, step, background=background)
    path = saver.wait()
    assert path is not None and path.name == f"checkpoint-{step}"


def _load(folder: str, step: int, sharded: bool) -> tuple[dict, dict | None]:
    checkpoint = open_checkpoint(Path(folder) / f"checkpoint-{step}", ranks())
    held, tensors = holding(0, sharded)
    wanted = holding(step, sharded)[1]
    load(checkpoint, held, ranks())
    for name, tensor in wanted.items():
        assert torch.equal(tensors[name], tensor), name
    return checkpoint.state(), checkpoint.rank_state(ranks().rank)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (3, 4), (4, 2), (2, 2)])
def test_any_world_size_loads_what_any_saved(tmp_path: Path, before: int, after: int) -> None:
    run_ranks(_save, before, str(tmp_path), 7, before % 2 == 0)
    for sharded in (True, False):
        found = run_ranks(_load, after, str(tmp_path), 7, sharded)
        for rank, (state, own) in enumerate(found):
            assert state == {"scheduler": {"last": 7}}
            if rank < before:
                assert own is not None and own["number"] == 70 + rank
                assert own["random"].tolist() == [rank, rank + 1, rank + 2]
            else:
                assert own is None
    checkpoint = Checkpoint.look(tmp_path / "checkpoint-7")
    assert (checkpoint.manifest.world_size, checkpoint.manifest.layout) == (before, "test")
    assert checkpoint.manifest.info == {"position": {"step": 7}}
    assert torch.equal(checkpoint.tensor("weight", "a"), values("a", 7))
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-7"}


def _another_model(folder: str) -> None:
    from muon_dist.checkpoint import Holding, Piece

    held, tensors = holding(0)
    before = {n: t.clone() for n, t in tensors.items()}
    extra = Piece("d", "weight", (2,), Block.run(0, 2), torch.zeros(2))
    swapped = Piece("b", "weight", (2, 2), Block.run(0, 4), torch.zeros(4))
    other = Piece("b", "exp_avg", (3,), Block.run(0, 3), torch.zeros(3))
    checkpoint = open_checkpoint(Path(folder) / "checkpoint-1", ranks())
    kept = [p for p in held.pieces if (p.kind, p.name) != ("weight", "b")]
    for pieces, message in (
        ([*held.pieces, extra], "does not hold d: it belongs to another model"),
        ([*kept, swapped], r"b \(weight\) has shape \(3,\) in .* but \(2, 2\) in this model"),
        ([*held.pieces, other], "holds momentum of b and no exp_avg: it was trained by another algorithm"),
        (kept, "holds b, which this model does not have"),
    ):
        if ranks().rank == 0 and "d:" in message:
            pieces = held.pieces  # one rank alone finds fault, all refuse
        with pytest.raises(CheckpointError, match=message):
            load(checkpoint, Holding("test", pieces), ranks())
        assert all(torch.equal(tensors[n], t) for n, t in before.items()), "touched before it was refused"


def test_another_model_is_refused_before_a_tensor_is_touched(tmp_path: Path) -> None:
    save(tmp_path, 1)
    run_ranks(_another_model, 2, str(tmp_path))


def test_state_that_was_not_there_becomes_zero(tmp_path: Path) -> None:
    """A parameter that was never stepped has no state in the checkpoint; a fresh one is the same."""
    from muon_dist.checkpoint import Contents, Holding, Piece, Saver
    from muon_dist.checkpoint.piece import whole

    weight = torch.ones(3)
    Saver(tmp_path).save(whole("w", "weight", (3,), weight), Contents(1, "test"))
    momentum = torch.ones(3)
    pieces = [*whole("w", "weight", (3,), weight), Piece("w", "momentum", (3,), Block.run(0, 3), momentum)]
    checkpoint = open_checkpoint(tmp_path / "checkpoint-1")
    assert checkpoint.weights_only
    load(checkpoint, Holding("test", pieces))
    assert momentum.tolist() == [0, 0, 0]


def test_the_newest_good_one_is_taken_with_a_warning(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, step)
    said: list[str] = []
    found = newest_good(tmp_path, warn=said.append)
    assert found is not None and found.step == 10 and not said
    damaged = tmp_path / "checkpoint-10" / "rank-00000.safetensors"
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    found = newest_good(tmp_path, warn=said.append)
    assert found is not None and found.step == 2
    assert len(said) == 1 and str(damaged) in said[0]
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}" / "rank-00000.json").unlink()
    with pytest.raises(CheckpointError, match="checkpoint-10"):
        newest_good(tmp_path, warn=said.append)
    assert newest_good(tmp_path / "nothing") is None


def test_retention(tmp_path: Path) -> None:
    def steps() -> list[int]:
        return [int(p.name.split("-")[1]) for p in commits(tmp_path)]

    for step in range(1, 6):
        save(tmp_path, step, keep_last=2, keep_every=3)
    assert steps() == [3, 4, 5]
    save(tmp_path, 2, keep_last=1)  # a run that went back: what it just saved is kept in any case
    assert steps() == [2]
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-2"}


def _reads(folder: str) -> tuple[int, int]:
    """(elements read, elements held) on this rank."""
    read = 0

    class Counting(Checkpoint):
        def _read(self, stored, part):  # type: ignore[no-untyped-def]
            nonlocal read
            for block, found in super()._read(stored, part):
                read += found.numel()
                yield block, found

    held, _ = holding(0)
    pieces = [p for p in held.pieces if p.kind == "momentum"]
    Counting.look(Path(folder) / "checkpoint-5").fill(pieces)
    return read, sum(p.block.numel for p in pieces)


def test_a_rank_reads_what_it_holds_and_no_more(tmp_path: Path) -> None:
    run_ranks(_save, 3, str(tmp_path), 5, False)
    found = run_ranks(_reads, 4, str(tmp_path))
    assert all(read == held for read, held in found)
    assert sum(held for _, held in found) == 35 + 3 + 32
