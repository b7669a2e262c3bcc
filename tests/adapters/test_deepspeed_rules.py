"""Every update rule, alone and with all its parts, inside DeepSpeed's engines against the formulas in fp64."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import run_ranks

pytest.importorskip("deepspeed")

from muon_dist.optim.rules import RULES
from tests.adapters.deepspeed_ranks import Case, backward, full_gradient, make_engine, master
from tests.optim.plain_rules import PlainRule
from tests.optim.test_rules import ALL_PARTS, AT_OWNER, STEPS, TOLERANCE

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(600)]

LR = 0.02
SOAP_TOLERANCE = 2e-4
"""Gradients of a model have directions of almost no size. Their eigenvectors depend on the last bit of a sum."""
PARTS_OF = {
    "hyperball": {"muoneq": True, "muon_plus": True, **AT_OWNER},
    "namo": {**ALL_PARTS, "row_floor": 0.1},
    "soap_muon": {"frequency": 2, **ALL_PARTS, **AT_OWNER},
}
CASES: dict[str, dict[str, Any]] = {
    **{rule: {"rule": rule} for rule in RULES},
    **{f"{r} with parts": {"rule": r, "rule_options": PARTS_OF.get(r, {**ALL_PARTS, **AT_OWNER})} for r in RULES},
}


def errors(stage: int, cases: list[str]) -> dict[str, float]:
    return {name: error(stage, CASES[name]) for name in cases}


def error(stage: int, muon: dict[str, Any]) -> float:
    """Largest relative error of a weight under Muon after some steps on the gradients that DeepSpeed has averaged."""
    engine, optimizer = make_engine(Case(stage, lr=LR, muon=muon))
    matrices = {s.name: s.matrices for specs in optimizer.specs for s in specs if s.matrices}
    start = master(engine, optimizer)
    options = {**muon, **muon.get("rule_options", {})}
    options.pop("rule_options", None)
    decay = 0.0 if muon["rule"] == "hyperball" else 0.1
    truth = PlainRule({n: start[n] for n in matrices}, {}, lr=LR, weight_decay=decay, **options)
    for step in range(STEPS):
        backward(engine, step, 1)
        gradients = {n: full_gradient(engine, p) for n, p in engine.module.named_parameters()}
        truth.step({n: gradients[n] for n in matrices})
        engine.step()
    found = master(engine, optimizer)
    engine.destroy()
    return max(float((found[n].double() - w).norm() / w.norm()) for n, w in truth.weights.items())


WITH_PARTS = [name for name in CASES if name.endswith("with parts")]


@pytest.mark.parametrize(
    ("stage", "cases"),
    [(3, WITH_PARTS), *(pytest.param(stage, [*CASES], marks=pytest.mark.slow) for stage in range(4))],
)
def test_every_rule_is_its_formula(stage: int, cases: list[str]) -> None:
    """Three ranks: flat shards begin inside rows."""
    for found in run_ranks(errors, 3, stage, cases, timeout=300.0):
        assert list(found) == cases
        for case, largest in found.items():
            assert largest <= (SOAP_TOLERANCE if case.startswith("soap_muon") else TOLERANCE), (case, found)
