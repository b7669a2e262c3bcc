"""`muon_dist.witness` on ranks: ours is right under every framework; known faults of others are found and named."""

from __future__ import annotations

import pytest

import tests.adapters.deepspeed_ranks  # noqa: F401  (environment of DeepSpeed, before its import)
from muon_dist.bench.conformance_cases import PEERS, Case
from muon_dist.bench.conformance_run import run
from tests.distributed import run_ranks

OURS, TORCH, DEEPSPEED = (next(p for p in PEERS if p.name == n) for n in ("muon_dist.Muon", "torch.optim.Muon",
                                                                          "DeepSpeed Muon"))  # fmt: skip


def _all(cases: list[Case]) -> list[dict]:
    return [run(case) for case in cases]


def together(*cases: Case) -> dict[str, dict[str, str]]:
    """By case the findings, cause -> sentence, which every rank must have alike; all cases in one group of ranks."""
    outcomes = run_ranks(_all, 2, list(cases))
    assert outcomes[0] == outcomes[1]
    return {case.name: dict(found["findings"]) for case, found in zip(cases, outcomes[0], strict=True)}


def test_ours_has_no_finding_under_any_framework() -> None:
    cases = [Case(OURS, f, "plain") for f in ("ddp", "fsdp2", "zero1", "zero2", "zero3")]
    cases += [Case(OURS, "zero2", "clip"), Case(OURS, "zero1", "resume")]
    assert together(*cases) == {case.name: {} for case in cases}


def test_deepspeeds_muon_clips_the_update() -> None:
    """DeepSpeed issue 8439."""
    found = together(Case(DEEPSPEED, "zero1", "plain"), Case(DEEPSPEED, "zero1", "clip"))
    assert found[Case(DEEPSPEED, "zero1", "plain").name] == {}
    sentence = found[Case(DEEPSPEED, "zero1", "clip").name].pop("clipped_update")
    assert sentence.endswith("times too small: clipped after orthogonalization")


@pytest.mark.slow
def test_deepspeeds_autotp_orthogonalizes_shards() -> None:
    found = together(Case(DEEPSPEED, "autotp", "plain"))
    (sentence,) = found[Case(DEEPSPEED, "autotp", "plain").name].values()
    assert "% off: orthogonalized by shards (2 blocks of " in sentence


@pytest.mark.slow
def test_a_zero_gradient_keeps_moving_the_weights_of_torch_and_deepspeed() -> None:
    found = together(Case(TORCH, "ddp", "zero gradients"), Case(DEEPSPEED, "zero2", "zero gradients"))
    assert all(set(causes) == {"zero_gradient"} for causes in found.values()), found


@pytest.mark.slow
def test_deepspeeds_momentum_is_loss_scaled() -> None:
    found = together(Case(DEEPSPEED, "zero2", "fp16"))
    assert set(found[Case(DEEPSPEED, "zero2", "fp16").name]) == {"momentum_scaled"}
