from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import tests.adapters.deepspeed_ranks  # noqa: F401  # sets the environment before DeepSpeed is imported  # isort: skip

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from muon_dist.bench import machine, step
from muon_dist.bench.cases import DEEPSPEED, KELLER, MUON_FSDP2, PROFILES, TORCH, Case, select
from muon_dist.bench.exact import make_exact
from muon_dist.bench.memory import peak_bytes
from muon_dist.bench.rows import merge
from muon_dist.bench.traffic import Traffic
from muon_dist.errors import ConfigError
from tests.distributed import run_ranks

FLAGS = 64  # bytes at most that a step spends on agreeing which gradients are there and finite
MATRICES = 14  # of the tiny Llama: 2 layers of 7


def bench(folder: Path, **options: Any) -> dict[str, Any]:
    """`muon-dist bench step --profile ci`; the record that it wrote."""
    settings: dict[str, Any] = {
        "ranks": 2, "peers": [], "only": [], "device": "cpu", "model": None, "rounds": None, "link": "loopback",
        "append": False,
    }  # fmt: skip
    step.command("ci", folder, **{**settings, **options}, echo=lambda line: None)
    return json.loads((folder / "step.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    found = bench(folder)
    found["markdown"] = (folder / "step.md").read_text(encoding="utf-8")
    return found


def rows_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [r for r in record["rows"] if not r["skipped"]]


@pytest.mark.deepspeed
def test_every_case_has_a_row_and_every_gap_its_reason(record: dict[str, Any]) -> None:
    cases = PROFILES["ci"].cases
    assert [(r["case"], r["peer"]) for r in record["rows"]] == [(c.name, c.peer) for c in cases]
    for case, row in zip(cases, record["rows"], strict=True):
        assert f"| {case.name} | {case.peer} |" in record["markdown"]
        if row["skipped"]:
            assert row["ratio_peer_over_ours"] is None
            assert machine.version(case.peer) is None or machine.version("triton") is None, row["skipped"]
            assert row["skipped"] in record["markdown"]
    assert {DEEPSPEED, TORCH} <= {r["peer"] for r in rows_of(record)}


@pytest.mark.deepspeed
def test_every_column_is_there_and_finite(record: dict[str, Any]) -> None:
    columns = (
        "optimizer_seconds", "optimizer_cpu_seconds", "step_seconds",
        "bytes_received", "bytes_sent", "collectives", "newton_schulz_calls",
        "momentum_bytes", "temporary_bytes", "peak_optimizer_bytes",
    )  # fmt: skip
    for row in rows_of(record):
        for column in columns:
            for side in ("ours", "peer", "adamw"):
                assert math.isfinite(row[f"{side}_{column}"]), (row["case"], side, column)
        assert row["ratio_lowest"] <= row["ratio_peer_over_ours"] <= row["ratio_highest"]
        assert row["ratio_whole_step"] > 0
        assert row["ours_momentum_bytes"] <= 4 * row["muon_parameters"]
    assert record["environment"]["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


@pytest.mark.deepspeed
def test_updates_are_as_exact_as_the_dtype_allows(record: dict[str, Any]) -> None:
    for row in rows_of(record):
        bound = 1e-5 if row["ns_dtype"] == "fp32" else 0.05
        assert row["ours_error_to_exact"] < bound, row["case"]
        assert row["ours_error_to_exact"] < row["peer_error_to_exact"], row["case"]


@pytest.mark.deepspeed
def test_calls_and_bytes_are_counted_exactly(record: dict[str, Any]) -> None:
    """On two ranks: AdamW's all-reduce receives 4 bytes a parameter, ours scatters what the owners hold."""
    for row in rows_of(record):
        assert row["ours_newton_schulz_calls"] == MATRICES, row["case"]
        extra = row["ours_bytes_received"] - row["adamw_bytes_received"]
        if row["sharding"] == "zero3":  # half of each matrix to its owner, half of its update back, fp32
            assert 0 <= extra - 2 * 4 * row["muon_parameters"] / 4 <= FLAGS
            assert row["peer_bytes_received"] > row["ours_bytes_received"]
        if row["peer"] == TORCH:
            assert row["adamw_bytes_received"] == row["peer_bytes_received"] == 4 * row["parameters"]
            assert row["peer_newton_schulz_calls"] == 2 * MATRICES
            assert row["peer_momentum_bytes"] == 4 * row["muon_parameters"]
            assert extra < 2 * row["muon_parameters"]  # updates in bf16 of the matrices that others own
        if row["peer"] in (KELLER, MUON_FSDP2):
            assert row["peer_newton_schulz_calls"] == MATRICES


@pytest.mark.deepspeed
def test_a_peer_that_fails_is_a_row_with_its_error(tmp_path: Path) -> None:
    """muon-fsdp2 on plain parameters calls a function that it does not define."""
    pytest.importorskip("muon_fsdp2")
    row = step.run(
        [Case("DDP", MUON_FSDP2, "ddp", "bf16")],
        PROFILES["ci"],
        ranks=2,
        link="loopback",
        report=lambda row: None,
    )[0]
    assert "NameError" in row["skipped"] and "muon_update" in row["skipped"]
    assert row["ratio_peer_over_ours"] is None
    assert row["ours_newton_schulz_calls"] == MATRICES


def test_merge_replaces_the_same_case_and_keeps_the_others() -> None:
    def row(case: str, value: int, link: str = "loopback") -> dict[str, Any]:
        return {"case": case, "model": "tiny", "ranks": 2, "link": link, "value": value}

    merged = merge([row("b", 2), row("c", 3), row("a", 4, "1gbit")], [row("a", 0), row("b", 0)])
    assert [(r["case"], r["link"], r["value"]) for r in merged] == [
        ("a", "loopback", 0), ("b", "loopback", 2), ("c", "loopback", 3), ("a", "1gbit", 4),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("huge", [], []), "--profile 'huge'"),
        (("ci", ["ZeRO-9"], []), "--only 'ZeRO-9'"),
        (("ci", [], ["x"]), "--peers 'x'"),
    ],
)
def test_words_that_select_nothing_are_named(arguments: tuple, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        select(*arguments)


def test_the_exact_update_is_that_of_the_reference_in_double() -> None:
    """Keller's coefficients leave singular values between 0.7 and 1.2, so each of two steps has about that norm."""
    exact = make_exact("tiny", 1)
    assert len(exact.start) == 7 and set(exact.start) == set(exact.gradients[0])
    name = next(n for n in exact.start if "gate_proj" in n)
    rows, cols = exact.start[name].shape
    for gradients in exact.gradients:
        assert torch.equal(gradients[name], gradients[name].bfloat16().float())
    first, second = exact.moved["spectral"][name], exact.moved["match_rms_adamw"][name]
    factor = 0.2 * math.sqrt(max(rows, cols)) / math.sqrt(max(1.0, rows / cols))
    torch.testing.assert_close(second, first * factor, rtol=1e-12, atol=0)
    whole = {n: exact.start[n].double() + exact.moved["spectral"][n] for n in exact.start}
    assert exact.error("spectral", lambda n: whole[n]) < 1e-12
    assert exact.error("spectral", lambda n: exact.start[n]) == pytest.approx(1.0)


def test_peak_bytes_is_that_of_what_lives_together() -> None:
    def work() -> None:
        a = torch.empty(1000, dtype=torch.float32)
        del a
        b = torch.empty(2000, dtype=torch.float32)
        c = torch.empty(500, dtype=torch.float32)
        del b, c

    assert peak_bytes(work) == 4 * 2500


def _traffic() -> list[tuple[float, float, int]]:
    rank = dist.get_rank()
    x = torch.zeros(6)
    found = []

    def counted(call: Any) -> None:
        with Traffic() as traffic:
            call()
        found.append((traffic.total, traffic.total_sent, traffic.collectives))

    counted(lambda: dist.gather(x, [torch.empty(6), torch.empty(6)] if rank == 0 else None, dst=0))
    counted(lambda: dist.scatter(x, [torch.ones(6), torch.ones(6)] if rank == 1 else None, src=1))
    counted(lambda: dist.all_reduce(x))
    sharded = distribute_tensor(torch.zeros(4, 3), init_device_mesh("cpu", (2,)), [Shard(0)])
    counted(lambda: sharded.redistribute(placements=[Replicate()]))
    return found


def test_traffic_counts_gather_scatter_and_what_dtensor_moves() -> None:
    """Bytes (received, sent) and calls on two ranks, of 6 floats and of a DTensor of 4 x 3."""
    first, second = run_ranks(_traffic, 2)
    assert first == [(24, 0, 1), (24, 0, 1), (24, 24, 1), (24, 24, 1)]
    assert second == [(0, 24, 1), (0, 24, 1), (24, 24, 1), (24, 24, 1)]
