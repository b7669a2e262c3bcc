"""Costs that were timed: what they say between and beyond what was timed, the file they are kept in, and agreement."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist

from muon_dist.errors import ConfigError
from muon_dist.layout import cut_parameter
from muon_dist.layout.replicated import replicated_layout
from muon_dist.optim import Muon
from muon_dist.ownership import assign_owners
from muon_dist.ownership.cost import CostModel
from muon_dist.ownership.measured_cost import MeasuredCost, cache_file, measure
from tests.distributed import RankFailure, run_ranks

CPU = torch.device("cpu")
TIMED = MeasuredCost(1e9, 1e9, (((8, 16, 1), 1.0), ((8, 16, 4), 2.5), ((32, 32, 1), 9.0)))


def test_between_and_beyond():
    assert TIMED.orthogonalize(16, 8, 5) == 1.0
    assert TIMED.orthogonalize(8, 16, 5, count=2) == 1.5 and TIMED.orthogonalize(8, 16, 5, count=4) == 2.5
    assert TIMED.orthogonalize(8, 16, 5, count=8) == 5.0
    other = CostModel().orthogonalize(30, 30, 5) / CostModel().orthogonalize(32, 32, 5) * 9.0
    assert TIMED.orthogonalize(30, 30, 5) == pytest.approx(other)
    assert TIMED.move(1, 4) == 4e-9


def test_owners_follow_the_measured_seconds():
    """By FLOPs the square matrices are the largest; here the wide ones take ten times as long."""
    matrices = [cut_parameter(f"s{i}", (64, 64))[0] for i in range(4)]
    matrices += [cut_parameter(f"w{i}", (32, 65))[0] for i in range(2)]
    layout = replicated_layout([[m] for m in matrices], 2)
    slow_wide = MeasuredCost(seconds=(((64, 64, 1), 1.0), ((64, 64, 2), 2.0), ((32, 65, 1), 10.0)))
    wide = [o for m, o in zip(matrices, assign_owners(layout, cost=slow_wide).owners, strict=True) if m.rows == 32]
    assert sorted(wide) == [0, 1]
    slow_square = MeasuredCost(seconds=(((64, 64, 1), 2.0), ((64, 64, 2), 4.0), ((32, 65, 1), 0.5)))
    loads = assign_owners(layout, cost=slow_square).load(
        lambda m: slow_square.orthogonalize(m.matrix.rows, m.matrix.cols, 5)
    )
    assert max(loads) == 4.5


def test_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MUON_DIST_CACHE", str(tmp_path / "made"))
    wanted = {(16, 32, 1), (16, 32, 3)}
    first = measure(wanted, steps=5, schedule="keller", dtype=torch.float32, device=CPU)
    assert {stack for stack, _ in first.seconds} == wanted and all(seconds > 0 for _, seconds in first.seconds)
    file = cache_file(CPU)
    kept = json.loads(file.read_text())
    assert len(kept) == 2 and file.parent == tmp_path / "made"
    assert (
        measure(wanted, steps=5, schedule="keller", dtype=torch.float32, device=CPU) == first
    )  # timings never repeat
    measure(wanted, steps=4, schedule="keller", dtype=torch.float32, device=CPU)
    assert len(json.loads(file.read_text())) == 4 and [p.name for p in file.parent.iterdir()] == [file.name]
    file.write_text("{ damaged")
    measure(wanted, steps=5, schedule="keller", dtype=torch.float32, device=CPU)
    assert len(json.loads(file.read_text())) == 2


def _train(cost: Any) -> tuple[tuple[int, ...], list[tuple[str, object]]]:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(24, 24 + 8 * i)) for i in range(5)]
    optimizer = Muon(parameters, cost=cost)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.plan is not None
    return optimizer.plan.owners, list(optimizer._cost.fields()) if isinstance(cost, CostModel) else []


def _measured_ranks(folder: str) -> tuple[int, ...]:
    import os

    os.environ["MUON_DIST_CACHE"] = f"{folder}/{dist.get_rank()}"
    return _train("measured")[0]


def test_all_ranks_take_the_figures_of_rank_0(tmp_path):
    owners = run_ranks(_measured_ranks, 2, str(tmp_path))
    assert owners[0] == owners[1]
    assert (tmp_path / "0").is_dir() and not (tmp_path / "1").exists()


def _different(_: int) -> None:
    _train(CostModel(1e9 * (1 + dist.get_rank()), 1e9))


def test_ranks_with_other_costs_are_named():
    with pytest.raises(RankFailure, match="field 'cost model' differs"):
        run_ranks(_different, 2, 0)


def test_unknown_cost_is_refused():
    with pytest.raises(ConfigError, match="cost 'fast' is unknown: use analytic, measured or a CostModel"):
        Muon([torch.nn.Parameter(torch.randn(4, 4))], cost="fast")
