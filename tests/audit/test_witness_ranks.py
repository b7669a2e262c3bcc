"""`muon_dist.witness` on ranks: ours is right under every framework; known faults of others are found and named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tests.adapters.deepspeed_ranks  # noqa: F401  (environment of DeepSpeed, before its import)
from muon_dist.bench.conformance_cases import PEERS, Case
from muon_dist.bench.conformance_run import run
from muon_dist.optim import Muon, param_groups
from muon_dist.optim.reference import plain_newton_schulz
from tests.audit.test_witness import Net, hidden, train
from tests.distributed import run_ranks

OURS, TORCH, DEEPSPEED = (next(p for p in PEERS if p.name == n) for n in ("muon_dist.Muon", "torch.optim.Muon",
                                                                          "DeepSpeed Muon"))  # fmt: skip


def _all(cases: list[Case]) -> list[dict]:
    return [run(case) for case in cases]


def together(*cases: Case) -> dict[str, dict[str, str]]:
    """By case the findings, cause -> sentence, which must be equal on all ranks; all cases in one group of ranks."""
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


class PlainNorMuon(torch.optim.Optimizer):
    """NorMuon (arXiv 2510.05491) on whole matrices in fp32; restores the norm of each of `cut` blocks of rows."""

    def __init__(self, params: Any, cut: int) -> None:
        self.cut = cut
        super().__init__(params, {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            m = state.setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(p.grad, 0.05)
            o = plain_newton_schulz(p.grad.lerp(m, 0.95))
            v = state.setdefault("rows", torch.zeros_like(p[:, :1])).lerp_(o.square().mean(dim=1, keepdim=True), 0.05)
            blocks = zip((o / (v.sqrt() + 1e-10)).chunk(self.cut), o.chunk(self.cut), strict=True)
            update = torch.cat([n * (of.norm() / n.norm()) for n, of in blocks])
            p.mul_(1 - 0.02 * 0.1).sub_(0.02 * update)


def _normuons() -> dict[str, dict[str, str]]:
    """Findings of NorMuon, with the norm restored whole and by this rank's shards, and of our step."""
    found = {}
    for name in ("whole", "by shards", "ours"):

        def make(model: Net, name: str = name) -> torch.optim.Optimizer:
            if name == "ours":
                return Muon(param_groups(model, lr=0.02), rule="normuon", ns_dtype=torch.float32)
            return PlainNorMuon(hidden(model), 2 if name == "by shards" else 1)

        seen = train(make, rule="normuon")
        found[name] = {f.cause: f.sentence for f in seen.findings}
    return found


def test_normuon_that_restores_its_norm_by_shards() -> None:
    for found in run_ranks(_normuons, 2):
        assert found["whole"] == {} and found["ours"] == {}
        assert set(found["by shards"]) == {"rescaled_by_shards"}
        assert "NorMuon's norm was restored by shards (2 blocks of rows)" in found["by shards"]["rescaled_by_shards"]
