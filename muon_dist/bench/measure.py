"""The work of one rank for one case: three optimizers, stepped in turn."""

from __future__ import annotations

import importlib
import time
import traceback
import warnings
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist

from muon_dist.bench.cases import (
    DEEPSPEED,
    DTENSOR_MUON,
    KELLER,
    MICRO_BATCH,
    MUON_FSDP2,
    TORCH,
    Case,
    make_model,
    tokens,
)
from muon_dist.bench.exact import Exact
from muon_dist.bench.memory import peak_bytes
from muon_dist.bench.sides import ADAMW, OURS, Builder, Side, build_adamw, build_ours, split
from muon_dist.bench.traffic import Traffic

# Each framework's own module imports it, when it is needed.
SHARDINGS = {
    "ddp": "muon_dist.bench.peers_ddp",
    "fsdp2": "muon_dist.bench.peers_fsdp2",
    **{f"zero{stage}": "muon_dist.bench.peers_deepspeed" for stage in range(4)},
}
BUILDERS = {
    TORCH: "muon_dist.bench.peers_torch",
    KELLER: "muon_dist.bench.peers_keller",
    MUON_FSDP2: "muon_dist.bench.peers_muon_fsdp2",
    DTENSOR_MUON: "muon_dist.bench.peers_dtensor_muon",
}


def import_for(case: Case) -> None:
    """Import the modules of a case before ranks are forked, so that no rank spends time on it."""
    importlib.import_module(SHARDINGS[case.sharding])
    if case.peer != DEEPSPEED:
        importlib.import_module(BUILDERS[case.peer])


def make(optimizer: str, case: Case, model_name: str) -> Side:
    """A side with a fresh model."""
    model = make_model(model_name, case.device)
    sharding = importlib.import_module(SHARDINGS[case.sharding])
    if optimizer == DEEPSPEED:
        return sharding.make_theirs(model, case)
    build: Builder
    if optimizer == OURS:
        build = build_ours
    elif optimizer == ADAMW:
        build = build_adamw
    else:
        build = importlib.import_module(BUILDERS[optimizer]).build
    return sharding.make(model, case, build)


@dataclass
class Measured:
    """One side on one rank. Per round: seconds from barrier to barrier, and CPU seconds of backward and step. Per
    step: bytes and counts."""

    error: float | None = None
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    backward_cpu: list[float] = field(default_factory=list)
    step_cpu: list[float] = field(default_factory=list)
    received: float = 0.0
    sent: float = 0.0
    collectives: int = 0
    calls: int = 0
    momentum: int = 0
    temporary: int = 0


@dataclass
class Outcome:
    """A case on one rank: sides by name, or the reason why there is no peer; elements of the model, and of Muon's
    part."""

    sides: dict[str, Measured]
    parameters: int
    muon_parameters: int
    micro_batch: float | None = None
    skipped: str | None = None


def _tokens(model_name: str, index: int, device: str) -> torch.Tensor:
    return tokens(model_name, index * 97 + dist.get_rank()).to(device)


def _first_steps(side: Side, exact: Exact, model_name: str, device: str) -> Measured:
    """The steps before the timed ones, with given gradients: the error of the weights afterwards, and what the last
    step sends and allocates."""
    for gradients in exact.gradients[:-1]:
        side.give(gradients)
        side.backward(side.loss(_tokens(model_name, 0, device)))
        side.step()
    side.give(exact.gradients[-1])
    before = side.calls()
    with Traffic() as traffic:
        loss = side.loss(_tokens(model_name, 1, device))
        if not side.works_in_backward:
            side.backward(loss)

        def rest() -> None:
            if side.works_in_backward:
                side.backward(loss)
            side.step()

        temporary = peak_bytes(rest, device)
    side.give({})
    return Measured(
        error=exact.error(side.scale, side.whole) if side.scale in exact.moved else None,
        received=traffic.total,
        sent=traffic.total_sent,
        collectives=traffic.collectives,
        calls=side.calls() - before,
        momentum=side.momentum_bytes(),
        temporary=temporary,
    )


def _all_done(device: str) -> None:
    """Waits until every rank and its device have finished."""
    if device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def _timed(side: Side, measured: Measured, index: int, model_name: str, device: str) -> None:
    batch = _tokens(model_name, index, device)
    marks: list[tuple[float, float]] = []

    def mark() -> None:
        _all_done(device)
        marks.append((time.perf_counter(), time.process_time()))

    mark()
    loss = side.loss(batch)
    mark()
    side.backward(loss)
    mark()
    side.step()
    mark()
    wall, cpu = ([end[i] - start[i] for start, end in pairwise(marks)] for i in range(2))
    measured.forward.append(wall[0])
    measured.backward.append(wall[1])
    measured.step.append(wall[2])
    measured.backward_cpu.append(cpu[1])
    measured.step_cpu.append(cpu[2])


def _micro_batch(side: Side, model_name: str, device: str) -> float:
    """Seconds of forward and backward of one micro-batch of `MICRO_BATCH` on every rank, the lower of two."""
    found = []
    for index in range(2):
        batch = tokens(model_name, index, MICRO_BATCH).to(device)
        _all_done(device)
        started = time.perf_counter()
        side.backward(side.loss(batch))
        _all_done(device)
        found.append(time.perf_counter() - started)
    side.step()  # completes the messages that DeepSpeed has started
    return min(found)


def _described(error: Exception) -> str:
    """An error in one line: type, message, and the file, line and function that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message} ({Path(last.filename).name}:{last.lineno}, {last.name}: {last.line})"


def run_case(case: Case, model_name: str, exact: Exact, rounds: int, micro_batch: bool) -> Outcome:
    """Make our Muon, the peer and AdamW, check their updates and count their bytes, then time `rounds` steps in turn.

    A peer that cannot be made or stepped, on any rank, is left out with its error; ours and AdamW must run.
    """
    warnings.simplefilter("ignore", FutureWarning)  # torch warns at every collective of DeepSpeed
    sides: dict[str, Side] = {}
    model = make_model(model_name, case.device)
    outcome = Outcome({}, sum(p.numel() for p in model.parameters()), sum(p.numel() for p in split(model)[0]))
    for name in (OURS, case.peer, ADAMW):
        try:
            sides[name] = make(name, case, model_name)
            outcome.sides[name] = _first_steps(sides[name], exact, model_name, case.device)
        except Exception as error:
            if name != case.peer:
                raise
            sides.pop(name, None)
            outcome.sides.pop(name, None)
            outcome.skipped = _described(error)
    names = list(sides)
    for index in range(rounds):
        turn = index % len(names)
        for name in (*names[turn:], *names[:turn]):
            _timed(sides[name], outcome.sides[name], index + 2, model_name, case.device)
    if micro_batch:
        outcome.micro_batch = _micro_batch(sides[ADAMW], model_name, case.device)
    for side in sides.values():
        side.close()
    return outcome
