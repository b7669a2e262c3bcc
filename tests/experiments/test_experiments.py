"""Every experiment at tiny settings: what it must find exactly, and that its criteria can fail."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from muon_dist.experiments import (
    e1_threshold,
    e2_input_scale,
    e3_divergence,
    e4_kronecker,
    e5_efficiency,
    e6_networks,
    e7_milestones,
    e8_tiny_gpt,
)
from muon_dist.experiments.result import Criterion, summary, verdict
from muon_dist.experiments.training import Rule

E1 = replace(e1_threshold.PROFILES["quick"], seeds=(0,), draws=60, rows=8, cols=16, steps=40, wide_steps=10)
E4 = replace(
    e4_kronecker.PROFILES["quick"], seeds=(0,), wide=(4, 64), square=(6, 6), kappa_a_sweep=(10.0, 100.0), limit=400,
    annealed_limit=80, starts=(0.7, 1.5), decays=(0.7, 0.85), alignments=(-0.5, 0.0, 0.5, 1.0, 2.5),
)  # fmt: skip
E5 = replace(e5_efficiency.PROFILES["quick"], seeds=(0,), draws=4)
E8 = replace(
    e8_tiny_gpt.PROFILES["quick"], seeds=(0,), steps=4, batch=2, context=16, width=16, layers=1, characters=60_000,
    validation=4_000, iteration_counts=(1, 5, 8), capture_steps=(1,),
)  # fmt: skip


def named(criteria: list[Any], part: str) -> dict[str, Any]:
    rows = [c if isinstance(c, dict) else vars(c) for c in criteria]
    (found,) = [c for c in rows if part in c["name"]]
    return found


def failures(criteria: list[Criterion]) -> set[str]:
    return {c.name for c in criteria if not c.passed}


def is_record(record: dict[str, Any]) -> bool:
    keys = {"experiment", "title", "claim", "verdict", "criteria", "notes", "config", "data"}
    rows = {"name", "measured", "threshold", "passed", "source", "central"}
    assert record["criteria"] and all(set(c) == rows and isinstance(c["passed"], bool) for c in record["criteria"])
    return set(record) == keys


# E1


def test_e1_holds_at_tiny_size():
    record = e1_threshold.run(E1)
    assert is_record(record)
    assert named(record["criteria"], "c = 1.99")["measured"] == 0
    assert named(record["criteria"], "c = 2.01")["measured"] == 1.0
    assert named(record["criteria"], "largest error")["measured"] < 1e-12
    assert named(record["criteria"], "formula against bisection")["measured"] < 1e-9


def test_e1_slopes_of_a_known_law():
    mean, largest = torch.rand(2, 50, dtype=torch.float64) + 0.5
    a, b, r2 = e1_threshold.slopes(3 * mean**0.7 * largest**-0.2, mean, largest)
    assert (a, b, r2) == pytest.approx((0.7, -0.2, 1.0))


def test_e1_notices_a_step_above_the_threshold():
    above = e1_threshold.trajectory(E1, 0, 1.0, 10.0, 2.5, 20)
    assert above["increases"] == 20 and above["law_error"] < 1e-12
    assert e1_threshold.trajectory(E1, 0, 1.0, 10.0, 0.5, 20)["increases"] == 0


# E2


def test_e2_thresholds_scale_exactly():
    one, ten = (e2_input_scale.one_hot_thresholds(0, s) for s in (1.0, 10.0))
    assert one["sgd"] / ten["sgd"] == pytest.approx(100, rel=1e-6)
    assert one["muon"] / ten["muon"] == pytest.approx(10, rel=1e-6)


def test_e2_largest_stable_is_the_last_stable_point():
    config = replace(e2_input_scale.PROFILES["quick"], steps=8)
    found = e2_input_scale.largest_stable(config, "sgd", 16.0, 0)["lr"]
    assert e2_input_scale.stable_norm(config, "sgd", found, 16.0, 0) is not None
    assert e2_input_scale.stable_norm(config, "sgd", 2 * found, 16.0, 0) is None
    assert math.log2(found).is_integer()


def test_e2_criteria_can_fail():
    config = replace(e2_input_scale.Config(), scales=(1.0, 16.0))
    fits = {"sgd": summary([-1.9]), "muon": summary([-1.2])}
    same = {arm: {"1": 1.0, "16": 1.0} for arm in config.arms}
    bad = e2_input_scale._criteria(config, fits, {"sgd": 1.0, "muon": 1.0}, same, same)
    assert len(failures(bad)) == len(bad) and verdict(bad).startswith("contradicted")


# E3


def test_e3_finds_divergence_and_stability():
    config = replace(e3_divergence.PROFILES["quick"], steps=6)
    sgd = e3_divergence.train_mlp(config, "sgd", 0.75, 16.0, True, 0)
    muon = e3_divergence.train_mlp(config, "muon", 0.75, 16.0, True, 0)
    assert sgd["blown_up_at"] == 1 and sgd["accuracy"] is None
    assert muon["blown_up_at"] is None and len(muon["losses"]) == 6
    assert e3_divergence.blown([sgd, muon]) == 1 and e3_divergence.blown([sgd, muon], within=0) == 0


def test_e3_plateau_goes_as_eta_squared():
    config = replace(e3_divergence.PROFILES["quick"], plateau_rows=6, plateau_cols=12, plateau_steps=200)
    etas = (0.01, 1.0, 100.0)
    found = [e3_divergence.plateau(config, eta, 0) for eta in etas]
    assert e3_divergence.log_slope(etas, [p["level"] for p in found]) == pytest.approx(2.0, abs=0.05)
    assert all(p["largest"] <= p["bound"] for p in found)


def test_e3_criteria_can_fail():
    config = replace(e3_divergence.Config(), seeds=(0, 1))
    stable = [{"blown_up_at": None, "accuracy": 0.5, "losses": [1.0]}] * 2
    lost = [{"blown_up_at": 0, "accuracy": None, "losses": [1.0]}] * 2
    runs = {"sgd": stable, "muon": lost, "nsgd": stable}
    plateaus = {"1": [{"level": 1.0, "largest": 2.0, "bound": 1.0}]}
    bad = e3_divergence._criteria(config, runs, {"1": stable, "3": lost}, plateaus, summary([1.5]), stable)
    assert len(failures(bad)) == len(bad)


# E4


def test_e4_tiny_run_and_exact_cases():
    record = e4_kronecker.run(E4)
    assert is_record(record)
    flat = record["data"]["problems"]["kappa 1"]
    assert flat["GD, step 1/L"]["mean"] == 1 and flat["Muon, line search"]["mean"] > 1
    wide = record["data"]["problems"]["wide"]
    assert wide["Muon, line search"]["mean"] * 3 < wide["steepest descent"]["mean"]


def test_e4_condition_law():
    config = replace(E4, alignment_samples=2000)
    for s, factor in ((0.0, 1.0), (0.5, 10.0), (1.0, 100.0), (2.5, 0.1)):
        assert e4_kronecker.condition_law(config, s)["ratio"] == pytest.approx(factor, rel=0.1)


def test_e4_guaranteed_step_meets_its_recursion_for_many_columns():
    config = replace(E4, wide=(4, 64), wide_kappas=(20.0, 3.0))
    found = e4_kronecker.guaranteed_step(config, 4096)["Muon, step s_mean/L"]["mean"]
    assert found == pytest.approx(e4_kronecker.guaranteed_step_theory(config), rel=0.1)


def test_e4_criteria_can_fail():
    slow = {name: summary([100.0]) for name in ("steepest descent", "Muon, line search", "Muon, annealed",
            "NSGD, annealed", "GD, step 1/L", "Muon, step s_mean/L")}  # fmt: skip
    slow["frozen C^-1/2, line search"] = summary([10.0])
    square = slow | {"steepest descent": summary([10.0])}
    sweep = {"10": {"Muon, line search": summary([10.0])}, "1000": {"Muon, line search": summary([100.0])}}
    law = [{"s": 0.5, "ratio": 1.0, "kappa_c_half": 10.0}, {"s": 2.5, "ratio": 3.0, "kappa_c_half": 1.0}]
    bad = e4_kronecker._criteria({"wide": slow, "square": square, "kappa 1": slow}, sweep, law, {"64": slow}, 10)
    assert len(failures(bad)) == len(bad)


# E5


def test_e5_tiny_run():
    record = e5_efficiency.run(E5)
    assert is_record(record)
    assert record["data"]["shapes"]["16x1024"]["quotient"]["mean"] == pytest.approx(1.0, abs=0.03)
    assert record["data"]["alignment"]["1.5"]["measured"]["mean"] < 0.2


def test_e5_shuffling_keeps_the_eigenvalues_and_breaks_the_formula():
    whole, part = (e5_efficiency.shuffled(E5, 0, share) for share in (0.0, 0.1))
    assert whole["measured"] > 1.2 > 1.05 > part["measured"]
    assert part["predicted"] > 1.2


def test_e5_criteria_can_fail():
    def row(measured: float, predicted: float, quotient: float) -> dict[str, Any]:
        return {"measured": summary([measured]), "predicted": summary([predicted]), "quotient": summary([quotient])}

    shuffle = {"0": row(1.0, 2.0, 0.5), "0.1": row(1.1, 2.0, 0.5)}
    bad = e5_efficiency._criteria({"16x1024": row(1, 1, 0.9)}, {"1.5": row(0.3, 1, 0.3)}, shuffle)
    assert len(failures(bad)) == len(bad)


# E6


def test_e6_actual_threshold_of_a_parabola():
    assert e6_networks.actual_threshold(lambda eta: (eta - 3.0) ** 2, 0.1) == pytest.approx(6.0, rel=1e-3)
    assert e6_networks.actual_threshold(lambda eta: (eta - 3.0) ** 2, 50.0) == pytest.approx(6.0, rel=1e-3)
    assert e6_networks.actual_threshold(lambda eta: -eta, 0.1) == math.inf


def test_e6_probe_is_exact_on_a_quadratic():
    generator = torch.Generator().manual_seed(0)
    h = torch.rand(4, 6, generator=generator) + 0.1
    weight = nn.Parameter(torch.randn(4, 6, generator=generator))
    before = weight.detach().clone()
    found = e6_networks.probe_layer(lambda: 0.5 * (h * weight**2).sum(), weight, 24)
    assert found["top"] == pytest.approx(float(h.max()), rel=1e-4)
    assert found["actual"] == pytest.approx(found["quadratic_threshold"], rel=1e-2)
    assert found["bound"] <= found["actual"]
    g = h * before
    assert found["nds_g"] == pytest.approx(float((g * h * g).sum() / (g * g).sum()), rel=1e-4)
    assert torch.equal(weight, before)


def test_e6_criteria_can_fail():
    row = {"bound": 2.0, "actual": 1.0, "nds_o": 2.0, "nds_g": 1.0}
    bad = e6_networks._criteria(
        {"mlp": [row], "tied RNN": [row]},
        {"bound": 0.1, "max": 0.9, "nds": 0.9},
        {"mlp": summary([2.0]), "tied RNN": summary([1.0])},
        summary([80.0]),
    )
    assert len(failures(bad)) == len(bad)


# E7


def test_e7_deep_linear_solves_and_stalls():
    config = replace(e7_milestones.PROFILES["quick"], linear_seeds=(0,), linear_width=4, linear_limit=400)
    polar = e7_milestones.polar
    lr, decay = torch.tensor([0.5, 1e-6], dtype=torch.float64), torch.tensor([0.9, 0.9], dtype=torch.float64)
    found = e7_milestones.deep_linear(config, (0,), polar, lr, decay)
    assert found.shape == (2, 1) and 1 < found[0, 0] < 100 and found[1, 0] == math.inf


def test_e7_milestone_counts_epochs():
    config = replace(e7_milestones.PROFILES["quick"], milestone=0.5, epochs=4)
    test, training = e7_milestones.accuracy_curves(config, e7_milestones.mlp, ("muon", 0.05), 0)
    assert len(test) == len(training) <= 4 and max(test) >= 0.5 and max(training) >= 0.5
    test, training = e7_milestones.accuracy_curves(config, e7_milestones.mlp, ("sgd", 1e-6), 0)
    assert len(test) == 4 and e7_milestones.first_epoch(test, 0.5) == math.inf
    assert e7_milestones.first_epoch([0.1, 0.6, 0.4, 0.9], 0.5) == 2


def test_e7_criteria_can_fail():
    config = e7_milestones.Config()
    row = summary([5.0])
    table = {e7_milestones.name(arm): {**row, "training": row} for arm in config.arms}
    linear = {"NSGD, annealed": summary([30.0]), "Muon, annealed": summary([20.0])}
    bad = e7_milestones._criteria({"MLP": table, "CNN": table}, linear)
    assert len(failures(bad)) == len(bad)


# E8


def test_e8_text_is_held_out_by_blocks():
    text = e8_tiny_gpt.stdlib_text(E8.characters, E8.validation)
    assert 20 < text.alphabet < 200 and int(text.train.max()) < text.alphabet
    assert len(text.train) > 10 * len(text.validation) > 0


def test_e8_text_batches_predict_the_next_character():
    x, y = next(e8_tiny_gpt.text_batches(torch.arange(1000), 3, 16, 0))
    assert x.shape == y.shape == (3, 16) and torch.equal(x + 1, y)


def test_e8_tiny_run_trains_and_captures_momentum():
    capture: dict[str, torch.Tensor] = {}
    found = e8_tiny_gpt.train_gpt(E8, Rule("muon", 0.03, 0.95, True), 0, capture)
    assert 1.0 < found["loss"] < 10.0
    assert len(capture) == 6 and all(name.startswith("step 1 ") for name in capture)


def test_e8_uniform_model_has_the_entropy_of_its_alphabet():
    model = e8_tiny_gpt.TinyGPT(11, 8, 16, 1)
    nn.init.zeros_(model.head.weight)
    ids = torch.randint(11, (200,))
    assert e8_tiny_gpt.validation_loss(model, ids, 8) == pytest.approx(math.log(11), rel=1e-5)


def test_e8_criteria_can_fail():
    arms = {kind: summary([2.0]) for kind in ("muon", "random", "nsgd", "adam", "flat_adam")}
    counts = {"k = 1": summary([2.0]), "k = 5": summary([2.0]), "k = 8": summary([1.5])}
    bad = e8_tiny_gpt._criteria(arms, counts)
    assert len(failures(bad)) == len(bad)
