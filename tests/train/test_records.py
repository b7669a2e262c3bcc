"""The records of a run for its report: events, owners, spectra, sharpness; and the page of a real run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from muon_dist.cli import main
from muon_dist.config import load_config
from muon_dist.errors import CheckpointError, ConfigError, FrameworkError
from muon_dist.optim import Muon
from muon_dist.optim.sharpness import probe_sharpness
from muon_dist.report.run_record import read_run
from muon_dist.train.probe import probe_run
from muon_dist.train.run import train


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps that was measured every 2 steps."""
    settings = ["diagnostics.every=2", "diagnostics.budget=1.0"]
    return Path(
        train(load_config(workspace / "tiny.yaml", settings), run_dir=str(tmp_path_factory.mktemp("measured")))["run"]
    )


def test_records_of_a_run(measured: Path) -> None:
    events = [(e["event"], e["step"]) for e in lines(measured / "events.jsonl")]
    assert events == [("started", 0), ("checkpoint", 4), ("checkpoint", 8), ("ended", 8)]
    plan = json.loads((measured / "ownership.json").read_text())
    assert (plan["world_size"], len(plan["matrices"]), plan["loads"][0]["matrices"]) == (1, 14, 14)
    assert plan["loads"][0]["momentum"] == sum(m["rows"] * m["cols"] for m in plan["matrices"])
    spectra = lines(measured / "spectra" / "rank-0.jsonl")
    assert sorted({line["step"] for line in spectra}) == [1, 2, 4, 6, 8] and len(spectra) == 5 * 14
    logged = [line for line in lines(measured / "metrics.jsonl") if "loss" in line]
    last = [line["flatness"] for line in spectra if line["step"] == 8]
    assert logged[-1]["spectra/flatness"] == pytest.approx(sum(last) / 14)
    assert "spectra/nuclear_rank_ratio" in logged[0]


def test_resume_continues_the_records(measured: Path, workspace: Path, tmp_path: Path) -> None:
    settings = ["diagnostics.every=2", "diagnostics.budget=1.0"]
    out = train(load_config(workspace / "tiny.yaml", settings), run_dir=str(tmp_path))
    root = Path(out["run"])
    (root / "checkpoints" / "checkpoint-8" / "manifest.json").unlink()
    train(load_config(workspace / "tiny.yaml", settings), run_dir=str(tmp_path), resume="auto")
    events = [(e["event"], e["step"]) for e in lines(root / "events.jsonl")]
    assert events[4:] == [("resumed", 4), ("checkpoint", 8), ("ended", 8)]
    rounds = {(line["round"], line["matrix"]) for line in lines(root / "spectra" / "rank-0.jsonl")}
    assert len(rounds) == len(lines(root / "spectra" / "rank-0.jsonl"))  # nothing twice
    assert {r for r, _ in rounds} == {1, 2, 4, 5, 6, 8}
    whole = {(s["step"], s["matrix"]): s for s in lines(measured / "spectra" / "rank-0.jsonl")}
    for line in lines(root / "spectra" / "rank-0.jsonl"):
        if (line["step"], line["matrix"]) in whole:  # exact resume: the same numbers as in the whole run
            assert line["cosine"] == whole[line["step"], line["matrix"]]["cosine"]


def test_probe_and_page(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["spectra", "probe", str(measured), "--step", "4", "--samples", "2", "--lanczos", "4"])
    assert "lr is at" in capsys.readouterr().out
    (record,) = lines(measured / "spectra" / "sharpness.jsonl")
    assert record["step"] == 4 and len(record["matrices"]) == 14
    logged = next(line for line in lines(measured / "metrics.jsonl") if line["step"] == 4)
    assert record["lr"] == logged["lr/muon"]
    for row in (record["whole"], *record["matrices"]):
        assert row["slope"] > 0 and row["of_bound"] == pytest.approx(record["lr"] / row["bound"])
        assert row["threshold"] is None or row["threshold"] >= row["bound"] * 0.999
    with pytest.raises(SystemExit):
        main(["report", str(measured)])
    page = (measured / "report.html").read_text()
    assert read_run(measured).problems == []
    assert "all Muon matrices together" in page and "self_attn.q_proj" in page


def test_a_repeated_probe_replaces(measured: Path) -> None:
    for _ in range(2):
        probe_run(measured, step=8, samples=1, lanczos=1)
    steps = [line["step"] for line in lines(measured / "spectra" / "sharpness.jsonl")]
    assert steps.count(8) == 1 and steps == sorted(steps)


def test_probe_refuses(measured: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5, but of \[4, 8\]"):
        probe_run(measured, step=5)
    with pytest.raises(ConfigError, match="a probe needs the run's own configuration"):
        probe_run(tmp_path)


def test_partitioned_parameters_are_refused_by_name() -> None:
    p = torch.nn.Parameter(torch.eye(4))
    optimizer = Muon([{"params": [p]}], process_group=None)
    p.ds_id = 0  # what DeepSpeed's ZeRO-3 puts on every parameter
    with pytest.raises(FrameworkError, match=r"ZeRO-3 has partitioned .* muon-dist spectra probe RUN"):
        probe_sharpness(optimizer, lambda: p.sum())
    del p.ds_id
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(torch.zeros(8))]  # a flat partition
    with pytest.raises(FrameworkError, match="pieces that a framework"):
        probe_sharpness(optimizer, lambda: p.sum())


def test_blocks_of_a_cut_parameter_against_the_hessian() -> None:
    """Two heads in one parameter: each head's measures come from its own diagonal block of the Hessian."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(4, 3))
    x, y = torch.randn(6, 3), torch.randn(6, 4)

    def loss(w: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(x @ w.T) - y).square().mean()

    optimizer = Muon([{"params": [p], "param_names": ["w"], "cuts": [{"heads": 2}]}], lr=0.01, process_group=None)
    found = probe_sharpness(optimizer, lambda: loss(p), lanczos=12)
    hessian = torch.autograd.functional.hessian(loss, p.detach()).reshape(12, 12)
    gradient = torch.autograd.grad(loss(p), p)[0].reshape(-1)
    for index, row in enumerate(found["matrices"]):
        part = slice(6 * index, 6 * index + 6)
        g, h = gradient[part], hessian[part, part]
        assert row["name"] == f"w[{index}]"
        assert row["nds_gradient"] == pytest.approx(float(g @ h @ g / (g @ g)), rel=1e-4)
        assert row["largest"] == pytest.approx(float(torch.linalg.eigvalsh(h)[-1]), rel=1e-4)
    assert found["whole"]["largest"] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-4)
    assert found["whole"]["slope"] == pytest.approx(sum(row["slope"] for row in found["matrices"]), rel=1e-5)
