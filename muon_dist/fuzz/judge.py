"""Runs a case and compares it with the reference."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from muon_dist.fuzz.case import MUON, Case, Setup
from muon_dist.fuzz.model import start
from muon_dist.fuzz.pool import Answer, Pool
from muon_dist.fuzz.reference import Reference
from muon_dist.fuzz.work import Found, run_segment

RIGHT, WRONG, REFUSED = "right", "wrong", "refused"
TOLERANCE, ROUNDED_TOLERANCE = 1e-3, 0.3
"""Of the error of `distance`. Newton-Schulz makes rounding up to 485 times larger where a singular value is small, and
far more where the messages themselves are rounded to 16 bits."""
NOISE, ROUNDED_NOISE = 3e-7, 4e-3
"""What rounding does to the input of Newton-Schulz, in fp32 and in bfloat16. AdaMuon and SOAP divide what comes out by
its own size, element by element: where an element is zero but for rounding, rounding decides it."""
SPREAD_SHARE = 8.0
"""How often the error may be as large as what such noise does to the references that have it."""
_NOISY, _MORE_NOISY = 3, 30
"""References with noise, and how many more are computed before a case is called wrong: one reference may draw little
noise just where rounding decides."""
STOCHASTIC = 2.0**-7
"""Stochastic rounding moves a bfloat16 weight by less than this share of it, in each step (hyperball: twice)."""
PATIENCE = 60.0
"""Seconds after which a case hangs: it takes about one, and machines do other work too."""
_JOBS_OF_A_POOL = 150
"""Process groups that frameworks make are never given back: after so many jobs the ranks are forked again."""


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Attributes:
        kind: "right", "wrong" or "refused".
        error: the largest of any parameter, see `distance`; None if nothing could be compared.
        parameter: that has it.
        message: why it was refused or is wrong.
    """

    kind: str
    error: float | None = None
    parameter: str | None = None
    message: str = ""


def tolerance(case: Case) -> float:
    return ROUNDED_TOLERANCE if case.wire == "bfloat16" else TOLERANCE


def distance(found: torch.Tensor, wanted: torch.Tensor, first: torch.Tensor, rounded: float = 0.0) -> float:
    """||found - wanted|| over ||wanted - first|| + 1e-3 ||wanted||: an error of the change, where there is one.

    rounded: share of the norm of the weights by which they may differ besides.
    """
    if found.shape != wanted.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    size = (wanted - first.double()).norm() + 1e-3 * wanted.norm()
    spared = rounded * torch.maximum(wanted.norm(), first.double().norm())
    return float(((found.double() - wanted).norm() - spared).clamp_min(0.0) / size.clamp_min(1e-30))


class Judge:
    """Keeps ranks of each number, and runs cases on them.

    Args:
        prepare: called in every rank, for tests.
        patience: seconds after which a case hangs.
    """

    def __init__(self, prepare: Callable[[], None] | None = None, patience: float = PATIENCE) -> None:
        self._prepare, self._patience = prepare, patience
        self._pools: dict[int, Pool] = {}

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        for world in list(self._pools):
            self._close(world)

    def run(self, case: Case) -> Outcome:
        """One case."""
        text = case.to_json()
        with tempfile.TemporaryDirectory() as folder:
            reference, orthogonalized = Reference(case), 0
            for number, (setup, steps) in enumerate(case.segments()):
                answers = self._answers(setup, text, number, folder)
                failed = _failed(answers)
                if failed is not None:
                    return failed
                for step in steps:
                    reference.step(step)
                done = sum(answer.value.orthogonalized for answer in answers)
                orthogonalized += done // _groups(case, setup)
        found = [answer.value for answer in answers]
        noisy = [_noisy(case, seed) for seed in range(_NOISY)]
        outcome = _compare(case, reference, noisy, found)
        if outcome.kind == WRONG:
            noisy += [_noisy(case, _NOISY + seed) for seed in range(_MORE_NOISY)]
            outcome = _compare(case, reference, noisy, found)
        if outcome.kind == RIGHT and orthogonalized != reference.orthogonalized:
            said = f"{orthogonalized} matrices were orthogonalized in place of {reference.orthogonalized}"
            return Outcome(WRONG, outcome.error, outcome.parameter, said)
        return outcome

    def _answers(self, setup: Setup, text: str, number: int, folder: str) -> list[Answer]:
        world = setup.world
        if setup.for_good:
            self._close(world)
        pool = self._pools.get(world)
        if pool is None:
            pool = self._pools[world] = Pool(world, self._patience, self._prepare)
        answers = pool.run(run_segment, text, number, folder)
        spent = setup.for_good or pool.jobs >= _JOBS_OF_A_POOL
        if spent or any(a.kind != "done" for a in answers):  # messages may be on their way
            self._close(world)
        return answers

    def _close(self, world: int) -> None:
        if world in self._pools:
            self._pools.pop(world).close()


def _noisy(case: Case, seed: int) -> Reference:
    """The weights of the whole case, computed with noise of the size of rounding."""
    reference = Reference(case, ROUNDED_NOISE if case.wire == "bfloat16" else NOISE, seed)
    for _, steps in case.segments():
        for step in steps:
            reference.step(step)
    return reference


def _compare(case: Case, reference: Reference, noisy: Sequence[Reference], found: Sequence[Found]) -> Outcome:
    first = start(case)
    worst, name, where = 0.0, None, 0
    rounded = 2 * STOCHASTIC * case.steps if case.rounding == "stochastic" else 0.0
    for rank, of_rank in enumerate(found):
        for p in case.parameters:
            wanted = reference.weights[p.fqn]
            error = distance(of_rank.weights[p.fqn], wanted, first[p.fqn], rounded)
            spread = max(distance(other.weights[p.fqn], wanted, first[p.fqn]) for other in noisy)
            error = max(0.0, error - SPREAD_SHARE * spread)
            if error > worst:
                worst, name, where = error, p.fqn, rank
    if worst > tolerance(case):
        return Outcome(WRONG, worst, name, f"{name} on rank {where} is off by {worst:.1e} of its change")
    return Outcome(RIGHT, worst, name)


def _groups(case: Case, setup: Setup) -> int:
    """Groups of ranks that step the same matrices, not knowing of each other: no matrix lies on the axis of tp."""
    known = setup.shard == 1 or any(p.kind == MUON and (p.tp is not None or setup.shares(p)) for p in case.parameters)
    return 1 if known else setup.tp


def _failed(answers: Sequence[Answer]) -> Outcome | None:
    """The verdict if some ranks are not done; None if all are."""
    kinds = {answer.kind for answer in answers}
    if kinds == {"done"}:
        return None
    if kinds == {"refused"}:
        return Outcome(REFUSED, message=answers[0].value)
    order = ("failed", "refused", "hung")
    worst = min((a for a in answers if a.kind != "done"), key=lambda a: order.index(a.kind))
    told = "; ".join(f"rank {rank} {answer.kind}" for rank, answer in enumerate(answers))
    return Outcome(WRONG, message=f"{told}\n{worst.value}")
