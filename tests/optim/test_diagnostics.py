"""Live measures: what is written, by whom, when, at what price, and that nothing is sent for them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from muon_dist.errors import ConfigError
from muon_dist.numerics import newton_schulz, spectral_stats
from muon_dist.optim import Binding, Diagnostics, Muon
from muon_dist.optim.diagnostics import place
from tests.distributed import run_ranks
from tests.optim.test_distributed import flat_binding
from tests.optim.test_muon import gradients, make_groups, make_parameters


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def square(count: int = 3, side: int = 8, **options: Any) -> tuple[dict[str, torch.nn.Parameter], Muon]:
    generator = torch.Generator().manual_seed(0)
    parameters = {
        f"layers.{i}.mlp.up.weight": torch.nn.Parameter(torch.randn(side, side, generator=generator))
        for i in range(count)
    }
    group = {"params": list(parameters.values()), "param_names": list(parameters)}
    return parameters, Muon([group], lr=0.02, **options)


def steps(parameters: dict[str, torch.nn.Parameter], optimizer: Muon, count: int, first: int = 0) -> None:
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def train(kind: str, folder: str | None, count: int) -> tuple[list[torch.Tensor], int, int]:
    """Parameters after training, and the bytes and collectives that it took on this rank."""
    parameters = make_parameters()
    options = {"diagnostics": {"every": 2, "folder": folder, "budget": 1.0}} if folder else {}
    optimizer = Muon(make_groups(parameters), lr=0.02, bucket_mb=0.02, **options)
    shard, cuts = None, []
    if kind == "flat":
        layout, shard, cuts = flat_binding(parameters, dist.get_rank(), dist.get_world_size(), False)
        optimizer.param_groups[0]["params"] = [shard]
        optimizer.bind(Binding(layout, (shard,), dist.group.WORLD, torch.device("cpu")), {0: 0})
    for step in range(count):
        given = gradients(step)
        if shard is not None:
            whole = torch.cat([g.reshape(-1) for g in given.values()])
            shard.grad = whole[cuts[dist.get_rank()] : cuts[dist.get_rank() + 1]].clone()
        else:
            for name, g in given.items():
                parameters[name].grad = g
        optimizer.step()
    assert optimizer.runtime is not None
    transport = optimizer.runtime.transport
    kept = [shard.detach()] if shard is not None else [p.detach() for p in parameters.values()]
    return kept, transport.bytes_sent, transport.collectives


@pytest.mark.parametrize("kind", ["replicated", "flat"])
def test_nothing_is_sent_and_nothing_changes(kind: str, tmp_path: Path) -> None:
    without = run_ranks(train, 2, kind, None, 4)
    with_them = run_ranks(train, 2, kind, str(tmp_path), 4)
    for (kept, sent, calls), (kept_with, sent_with, calls_with) in zip(without, with_them, strict=True):
        assert sent > 0 and calls > 0
        assert (sent_with, calls_with) == (sent, calls)
        assert all(torch.equal(a, b) for a, b in zip(kept, kept_with, strict=True))
    written = [lines(tmp_path / f"rank-{r}.jsonl") for r in range(2)]
    names = [{line["matrix"] for line in rank} for rank in written]
    # each rank wrote of its own, together of all 16, in the rounds of steps 1, 2 and 4
    assert names[0] and names[1] and not names[0] & names[1] and len(names[0] | names[1]) == 16
    assert {line["round"] for rank in written for line in rank} == {1, 2, 4}
    assert sum(map(len, written)) == 3 * 16


def test_the_numbers(tmp_path: Path) -> None:
    """Against measures by singular value decomposition of momentum and update recomputed from their definition."""
    parameters, optimizer = square(diagnostics={"every": 2, "folder": tmp_path, "budget": 1.0})
    steps(parameters, optimizer, 4)
    momentum: dict[str, torch.Tensor] = {name: torch.zeros(8, 8) for name in parameters}
    expected = {}
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for name in parameters:
            g = torch.randn(8, 8, generator=generator)
            momentum[name] = momentum[name].lerp(g, 0.05)
            ahead = g.lerp(momentum[name], 0.95)
            expected[step + 1, name] = asdict(spectral_stats(ahead, newton_schulz(ahead)))
    found = lines(tmp_path / "rank-0.jsonl")
    assert len(found) == 9
    for line in found:
        measures = expected[line["step"], line["matrix"]]
        assert {name: line[name] for name in measures} == pytest.approx(measures, rel=1e-5)
        assert (line["layer"], line["type"]) == (int(line["matrix"][7]), "mlp.up")
        assert (line["rows"], line["cols"]) == (8, 8)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (3, "self_attn.q_proj")),
        ("transformer.h.11.attn.c_attn.weight[2]", (11, "attn.c_attn")),
        ("model.layers.0.mlp.experts.7.up_proj.weight", (0, "mlp.experts.*.up_proj")),
        ("model.layers.0.mlp.experts.gate_up_proj[5]", (0, "mlp.experts.gate_up_proj")),
        ("0.weight", (0, "matrix")),
        ("net.2.weight", (2, "net")),
        ("patch_projection.weight", (None, "patch_projection")),
        ("blocks.12.conv1.weight", (12, "conv1")),
    ],
)
def test_layer_and_type(name: str, expected: tuple[int | None, str]) -> None:
    assert place(name) == expected


def test_rounds(tmp_path: Path) -> None:
    parameters, optimizer = square(diagnostics=Diagnostics(5, tmp_path, budget=1.0))
    steps(parameters, optimizer, 12)
    found = lines(tmp_path / "rank-0.jsonl")
    assert sorted({(line["step"], line["round"]) for line in found}) == [(1, 1), (5, 5), (10, 10)]
    assert len(found) == 9


def test_the_budget_spreads_a_round_over_steps(tmp_path: Path) -> None:
    parameters, optimizer = square(count=6, side=96, diagnostics=Diagnostics(1, tmp_path, budget=0.2))
    diagnostics = optimizer.diagnostics
    assert diagnostics is not None
    done = 0
    while len(diagnostics.latest) < 6 and done < 500:  # how many steps that takes depends on the machine
        steps(parameters, optimizer, 1, first=done)
        done += 1
    found = lines(tmp_path / "rank-0.jsonl")
    assert len({line["matrix"] for line in found}) == 6  # each had its turn
    assert len({line["step"] for line in found if line["round"] == 1}) > 1  # not all in the first step
    counts = [sum(line["matrix"] == name for line in found) for name in parameters]
    assert max(counts) - min(counts) <= 1  # nobody twice before everybody once


def test_a_matrix_without_gradient_does_not_hold_up_the_round(tmp_path: Path) -> None:
    parameters, optimizer = square(diagnostics=Diagnostics(2, tmp_path, budget=1.0))
    idle = "layers.1.mlp.up.weight"
    for step in range(6):
        for name, p in parameters.items():
            p.grad = None if name == idle else torch.eye(8) + step
        optimizer.step()
    rounds = {(line["round"], line["matrix"][7]) for line in lines(tmp_path / "rank-0.jsonl")}
    assert rounds == {(r, layer) for r in (1, 2, 4, 6) for layer in "02"}


def test_continuing_drops_what_came_after(tmp_path: Path) -> None:
    parameters, optimizer = square(diagnostics=Diagnostics(2, tmp_path, budget=1.0))
    steps(parameters, optimizer, 8)
    own = tmp_path / "rank-0.jsonl"
    (tmp_path / "rank-3.jsonl").write_text(own.read_text())  # of a run on four ranks
    with own.open("a") as file:
        file.write('{"step": 9, "ma')  # killed while writing
    again = Diagnostics(2, tmp_path, budget=1.0)
    again.start(4)
    assert [line["step"] for line in lines(own)] == [1] * 3 + [2] * 3 + [4] * 3
    assert own.read_text() == (tmp_path / "rank-3.jsonl").read_text()
    parameters, optimizer = square(diagnostics=again)
    steps(parameters, optimizer, 2, first=4)
    assert [line["step"] for line in lines(own)][9:] == [5] * 3 + [6] * 3
    again.start(0)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_stop_a_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    parameters, optimizer = square(diagnostics=Diagnostics(1, tmp_path / "file", budget=1.0))
    steps(parameters, optimizer, 2)
    assert capsys.readouterr().err.count("diagnostics: cannot write") == 1
    assert optimizer.diagnostics is not None and len(optimizer.diagnostics.latest) == 3


def test_a_poisoned_momentum_is_written_as_null(tmp_path: Path) -> None:
    parameters, optimizer = square(count=1, diagnostics=Diagnostics(1, tmp_path, budget=1.0))
    for p in parameters.values():
        p.grad = torch.eye(8)
    optimizer.step()
    for p in parameters.values():
        optimizer.state[p]["momentum_buffer"].fill_(torch.nan)  # not by a gradient: the optimizer refuses those
    optimizer.step()
    _, line = lines(tmp_path / "rank-0.jsonl")
    assert line["s_mean"] is None and line["cosine"] is None
    assert optimizer.diagnostics is not None and optimizer.diagnostics.means() == {}


@pytest.mark.parametrize("wrong", [{"every": 0}, {"every": 2.5}, {"every": True}, {"every": 1, "budget": 0.0}])
def test_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="diagnostics: "):
        Diagnostics(**wrong)
