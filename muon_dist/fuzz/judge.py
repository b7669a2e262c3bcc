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
"""Largest error (`distance`) of a right case, and the same with 16-bit messages. Newton-Schulz makes rounding up to
485 times larger if a singular value is small, and far more if messages are rounded to 16 bits."""
NOISE, ROUNDED_NOISE = 3e-7, 4e-3
"""Relative size of rounding in the input of Newton-Schulz, in fp32 and in bfloat16. AdaMuon and SOAP divide the result
by its own size, element by element: if an element is zero except for rounding, rounding decides it."""
SPREAD_SHARE = 8.0
"""The error may be this many times the effect of such noise on the references."""
_NOISY, _MORE_NOISY = 3, 30
"""References with noise, and how many more are computed before a case is called wrong: a single reference may have
little noise exactly where rounding decides."""
STOCHASTIC = 2.0**-7
"""Stochastic rounding changes a bfloat16 weight by less than this share of it per step (hyperball: twice per step)."""
PATIENCE = 60.0
"""After so many seconds a case counts as hanging; a case takes about one second, more on a busy machine."""
_JOBS_OF_A_POOL = 150
"""After so many jobs the ranks are forked again, because process groups made by frameworks are never released."""


@dataclass(frozen=True)
class Outcome:
    """The result of a case.

    Attributes:
        kind: "right", "wrong" or "refused".
        error: the largest error of any parameter, see `distance`; None if nothing could be compared. parameter: the
            parameter with it. message: why the case was refused or is wrong.
    """

    kind: str
    error: float | None = None
    parameter: str | None = None
    message: str = ""


def tolerance(case: Case) -> float:
    return ROUNDED_TOLERANCE if case.wire == "bfloat16" else TOLERANCE


def distance(found: torch.Tensor, wanted: torch.Tensor, first: torch.Tensor, rounded: float = 0.0) -> float:
    """||found - wanted|| / (||wanted - first|| + 1e-3 ||wanted||): the error as a share of the change.

    rounded: further difference that is allowed, as a share of the norm of the weights.
    """
    if found.shape != wanted.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    size = (wanted - first.double()).norm() + 1e-3 * wanted.norm()
    spared = rounded * torch.maximum(wanted.norm(), first.double().norm())
    return float(((found.double() - wanted).norm() - spared).clamp_min(0.0) / size.clamp_min(1e-30))


class Judge:
    """Keeps forked ranks per world size, and runs cases on them.

    Args:
        prepare: called in every rank, for tests. patience: seconds after which a case counts as hanging.
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
            said = f"{orthogonalized} matrices were orthogonalized instead of {reference.orthogonalized}"
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
        if spent or any(a.kind != "done" for a in answers):  # messages may still be in transit
            self._close(world)
        return answers

    def _close(self, world: int) -> None:
        if world in self._pools:
            self._pools.pop(world).close()


def _noisy(case: Case, seed: int) -> Reference:
    """The final weights of the case, computed with noise of the size of rounding."""
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
    """Groups of ranks that step the same matrices independently, because no matrix is cut along the tp axis."""
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
