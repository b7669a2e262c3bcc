"""What an update rule remembers, from any layout and world size to any other: the same bits, and the same curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed")

from muon_dist.checkpoint import Checkpoint, Contents, Saver, load, open_checkpoint
from muon_dist.errors import CheckpointError
from tests.adapters.deepspeed_ranks import make_model
from tests.checkpoint.layouts import Run
from tests.distributed import RankFailure, run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(600)]

AT_OWNER = {"momentum_at_owner": True}
CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "normuon": ({"rule": "normuon"}, {"row_second_moment", "momentum"}),
    "hyperball": ({"rule": "hyperball"}, {"radius", "momentum"}),
    "namo": ({"rule": "namo"}, {"gradient_second_moment", "gradient_steps", "momentum"}),
    "adamuon": ({"rule": "adamuon"}, {"update_second_moment", "momentum"}),
    "soap_muon": (
        {"rule": "soap_muon", "rule_options": {"frequency": 2}},
        {"row_covariance", "column_basis", "projected_second_moment", "basis_steps", "momentum"},
    ),
    "momentum_at_owner": ({"rule_options": AT_OWNER}, {"owner_momentum"}),
}
"""Options of Muon, and what a checkpoint has of them."""
POINTS = [
    (("ddp", 2), ("zero3", 3), "gpt2"),  # weights stored (in, out); strided thirds of c_attn
    pytest.param(("zero1", 3), ("fsdp2", 2), "mixtral", marks=pytest.mark.slow),  # experts
    pytest.param(("zero3", 3), ("zero2", 2), "llama", marks=pytest.mark.slow),
    pytest.param(("fsdp2", 4), ("ddp", 1), "gpt2", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", autouse=True)
def imported_once() -> None:
    """transformers imports a model's module when it is first made: here, not in every forked rank."""
    for kind in ("llama", "gpt2", "mixtral"):
        make_model(kind)


def _save(run: Run, folder: str, step: int) -> None:
    held = run.holding()
    Saver(folder, run.ranks).save(held.pieces, Contents(step, held.layout))


def _begin(folder: str, layout: str, kind: str, muon: dict[str, Any]) -> list[float]:
    run = Run(layout, kind, muon=muon)
    for step in range(3):
        run.step(step)
    _save(run, folder, 3)
    return [run.step(step) for step in range(3, 6)]


def _begin_all(folder: str, layout: str, kind: str) -> dict[str, list[float]]:
    return {case: _begin(f"{folder}/{case}", layout, kind, muon) for case, (muon, _) in CASES.items()}


def _continue_all(folder: str, layout: str, kind: str) -> dict[str, list[float]]:
    return {case: _continue(f"{folder}/{case}", layout, kind, muon) for case, (muon, _) in CASES.items()}


def _continue(folder: str, layout: str, kind: str, muon: dict[str, Any]) -> list[float]:
    run = Run(layout, kind, muon=muon)
    run.step(900)  # memory of its own, to be overwritten
    checkpoint = open_checkpoint(Path(folder) / "checkpoint-3", run.ranks)
    load(checkpoint, run.holding(checkpoint), run.ranks)
    _save(run, f"{folder}/again", 3)
    return [run.step(step) for step in range(3, 6)]


def contents(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    checkpoint = Checkpoint.look(folder / "checkpoint-3")
    return {key: checkpoint.tensor(*key) for key in checkpoint.manifest.tensors}


@pytest.mark.parametrize(("before", "after", "kind"), POINTS)
def test_memory_moves_between_layouts(tmp_path, before, after, kind):
    losses = run_ranks(_begin_all, before[1], str(tmp_path), before[0], kind)[0]
    continued = run_ranks(_continue_all, after[1], str(tmp_path), after[0], kind)[0]
    for case, (_, kept) in CASES.items():
        assert continued[case] == pytest.approx(losses[case], abs=2e-5), case
        first, again = contents(tmp_path / case), contents(tmp_path / case / "again")
        assert {kind for kind, _ in first} >= kept
        assert first.keys() == again.keys()
        for key, tensor in first.items():
            assert torch.equal(tensor, again[key]), (case, key)


def _silent(folder: str, layout: str, again: bool) -> dict[str, torch.Tensor]:
    """Two steps as usual, three with zero gradients of Muon's matrices; or, from the checkpoint, the last two."""
    run = Run(layout, "mixtral")
    muon = [p for g, a in zip(run.optimizer.param_groups, run.optimizer.algorithms, strict=True) if a == "muon"
            for p in g["params"]]  # fmt: skip
    if again:
        checkpoint = open_checkpoint(Path(folder) / "checkpoint-3", run.ranks)
        load(checkpoint, run.holding(checkpoint), run.ranks)
    silent = False

    def silence(optimizer: Any, *given: Any) -> None:
        for p in muon if silent else ():
            p.grad.zero_()

    run.optimizer.register_step_pre_hook(silence)
    for step in range(3 if again else 0, 5):
        if step == 3 and not again:
            _save(run, folder, 3)
        silent = step >= 2
        run.step(step)
    return run.whole("weight")


@pytest.mark.parametrize(("before", "after"), [(("fsdp2", 2), ("fsdp2", 3)), (("ddp", 2), ("ddp", 3))])
def test_a_checkpoint_knows_how_long_gradients_were_zero(tmp_path, before, after):
    wanted = run_ranks(_silent, before[1], str(tmp_path), before[0], False)[0]
    assert any(kind == "zero_gradient_steps" for kind, _ in contents(tmp_path))
    found = run_ranks(_silent, after[1], str(tmp_path), after[0], True)[0]
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)


def _load(folder: str, rule: str) -> Any:
    run = Run("zero2", muon={"rule": rule})
    run.step(0)
    before = run.whole("weight")
    checkpoint = open_checkpoint(Path(folder) / "checkpoint-3", run.ranks)
    try:
        load(checkpoint, run.holding(checkpoint), run.ranks)
    except CheckpointError:
        after = run.whole("weight")
        assert all(torch.equal(before[n], after[n]) for n in before)
        raise


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        ("normuon", "muon", "holds row_second_moment of .*, which this run does not keep"),
        ("muon", "normuon", "and no row_second_moment: it was trained by another algorithm or rule"),
        ("hyperball", "namo", "and no gradient_"),
    ],
)
def test_a_checkpoint_of_another_rule_is_refused_before_anything_changes(tmp_path, was, now, words):
    run_ranks(_begin, 2, str(tmp_path), "zero1", "llama", {"rule": was})
    with pytest.raises(RankFailure, match=words):
        run_ranks(_load, 2, str(tmp_path), now)
