"""Any layout and world size to any other: the same momentum bit for bit, the same samples, the same curve.

The whole sweep (400 pairs, 20 steps each): `bash launch/test.sh -m slow tests/checkpoint/test_reshard.py`.
"""

from __future__ import annotations

from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed")

from muon_dist.adapters.deepspeed_state import EngineState
from muon_dist.checkpoint import Contents, Saver, load, open_checkpoint
from tests.adapters.deepspeed_ranks import make_model
from tests.checkpoint.layouts import LAYOUTS, Run
from tests.distributed import run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(600)]

SAVE_AT = 3
STATES = ("weight", "momentum_buffer", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module", autouse=True)
def imported_once() -> None:
    """transformers imports a model's module when it is first made: here, not in every forked rank."""
    for kind in ("llama", "gpt2", "mixtral"):
        make_model(kind)


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), (name, (found[name] - tensor).abs().max())


def _begin(folder: str, layout: str, kind: str, dtype: str, steps: int) -> dict[str, Any]:
    """Train, save after SAVE_AT steps and go on: the truth about the state, and the losses that follow."""
    run = Run(layout, kind, dtype)
    for step in range(SAVE_AT):
        run.step(step)
    held = run.holding()
    Saver(folder, run.ranks).save(held.pieces, Contents(SAVE_AT, held.layout))
    truth = {state: run.whole(state) for state in STATES}
    losses = [run.step(SAVE_AT + i) for i in range(steps)]
    out = {"losses": losses, "seen": run.seen[SAVE_AT:], "last": run.whole("weight")}
    return {**out, **({"truth": truth} if run.rank == 0 else {})}


def _continue(folder: str, truth: dict[str, Any], layout: str, kind: str, dtype: str, steps: int) -> dict[str, Any]:
    """A fresh run that loads, compares all state with the truth and goes on."""
    run = Run(layout, kind, dtype)
    for step in range(900, 902):  # state of its own, to be overwritten
        run.step(step)
    run.seen.clear()
    checkpoint = open_checkpoint(Path(folder) / f"checkpoint-{SAVE_AT}", run.ranks)
    load(checkpoint, run.holding(checkpoint), run.ranks)
    for state in STATES:
        equal(run.whole(state), truth[state])
    if dtype == "bf16":
        equal(run.working_copies(), {n: w.bfloat16().float() for n, w in truth["weight"].items()})
    losses = [run.step(SAVE_AT + i) for i in range(steps)]
    return {"losses": losses, "seen": run.seen, "last": run.whole("weight")}


def samples(by_rank: list[dict[str, Any]]) -> list[list[int]]:
    """All samples of each step, over all ranks."""
    return [sorted(chain.from_iterable(step)) for step in zip(*(r["seen"] for r in by_rank), strict=True)]


def check_pair(tmp: Path, before: tuple[str, int], after: tuple[str, int], kind: str, dtype: str, steps: int) -> None:
    started = run_ranks(_begin, before[1], str(tmp), before[0], kind, dtype, steps, timeout=200)
    truth = started[0]["truth"]
    resumed = run_ranks(_continue, after[1], str(tmp), truth, after[0], kind, dtype, steps, timeout=200)
    assert samples(resumed) == samples(started)
    compare(started, resumed, before == after, dtype)


def compare(started: list[dict[str, Any]], resumed: list[dict[str, Any]], same: bool, dtype: str) -> None:
    if same:  # bit for bit
        assert resumed[0]["losses"] == started[0]["losses"]
        equal(resumed[0]["last"], started[0]["last"])
    else:
        tolerance = 1e-5 if dtype == "fp32" else 2e-2
        assert resumed[0]["losses"] == pytest.approx(started[0]["losses"], abs=tolerance)


POINTS = [
    (("ddp", 2), ("zero3", 3), "gpt2", "fp32"),  # strided thirds of c_attn
    (("zero2", 4), ("ddp", 1), "llama", "fp32"),
    (("zero1", 3), ("fsdp2", 2), "mixtral", "fp32"),  # experts
    (("zero3", 3), ("zero2", 2), "llama", "bf16"),  # fp32 masters, refreshed 16-bit copies
    *(
        pytest.param(*point, marks=pytest.mark.slow)
        for point in (
            (("fsdp2", 4), ("zero3", 2), "gpt2", "fp32"),
            (("fsdp2", 2), ("ddp", 3), "llama", "fp32"),
            # the same layout again
            (("ddp", 3), ("ddp", 3), "gpt2", "fp32"),
            (("zero1", 2), ("zero1", 2), "gpt2", "bf16"),
            (("zero3", 2), ("zero3", 2), "mixtral", "fp32"),
            (("fsdp2", 3), ("fsdp2", 3), "llama", "fp32"),
        )
    ),
]


@pytest.mark.parametrize(("before", "after", "kind", "dtype"), POINTS)
def test_points(tmp_path: Path, before: tuple[str, int], after: tuple[str, int], kind: str, dtype: str) -> None:
    check_pair(tmp_path, before, after, kind, dtype, steps=4)


def _scaled(folder: str, resume: bool) -> dict[str, Any]:
    """fp16 whose first scale overflows at once and grows again every third step."""
    run = Run("zero2", dtype="fp16", config={"fp16": {"initial_scale_power": 40, "loss_scale_window": 3}})
    if resume:
        checkpoint = open_checkpoint(Path(folder) / "checkpoint-30", run.ranks)
        load(checkpoint, run.holding(checkpoint), run.ranks)
        EngineState(run.engine).load_state_dict(checkpoint.state()["deepspeed"])
    else:
        for step in range(30):
            run.step(step)
        held = run.holding()
        state = {"deepspeed": EngineState(run.engine).state_dict()}
        Saver(folder, run.ranks).save(held.pieces, Contents(30, held.layout), state=state)
    scales = []
    for step in range(30, 36):
        run.step(step)
        scales.append(run.engine.optimizer.loss_scaler.cur_scale)
    return {"scales": scales, "skipped": run.engine.skipped_steps, "last": run.whole("weight")}


@pytest.mark.fp16
def test_the_loss_scaler_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = run_ranks(_scaled, 2, str(tmp_path), False, timeout=200)[0]
    again = run_ranks(_scaled, 2, str(tmp_path), True, timeout=200)[0]
    assert whole["skipped"] > 0 and len(set(whole["scales"])) > 1, "it has backed off, and grows"
    assert (again["scales"], again["skipped"]) == (whole["scales"], whole["skipped"])
    equal(again["last"], whole["last"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("before", list(product(LAYOUTS, (1, 2, 3, 4))))
def test_sweep(tmp_path: Path, before: tuple[str, int]) -> None:
    """One start of each kind, continued under every layout on every number of ranks."""
    started = run_ranks(_begin, before[1], str(tmp_path), before[0], "llama", "fp32", 20, timeout=200)
    truth = started[0]["truth"]
    for after in product(LAYOUTS, (1, 2, 3, 4)):
        resumed = run_ranks(_continue, after[1], str(tmp_path), truth, after[0], "llama", "fp32", 20, timeout=200)
        assert samples(resumed) == samples(started), after
        compare(started, resumed, before == after, "fp32")
