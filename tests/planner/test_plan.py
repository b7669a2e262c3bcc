"""The command `muon-dist plan`: its figures computed by hand, its advice, and its small need of time and memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from muon_dist.cli import main
from muon_dist.errors import ConfigError
from muon_dist.planner.advice import advise
from muon_dist.planner.balance import balance
from muon_dist.planner.devices import DEVICES, find_device
from muon_dist.planner.estimate import newton_schulz_seconds
from muon_dist.planner.memory import nccl_bytes
from muon_dist.planner.model import Settings, Workload, describe_model
from muon_dist.planner.placement import LAYOUTS, place, sub_groups
from muon_dist.planner.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> Workload:
    return describe_model("tiny", LLAMA, vocabulary=100, sequence_length=32)


def test_memory_by_hand(tiny):
    muon, adamw = 2 * (4 * 64 * 64 + 3 * 64 * 176), 2 * 100 * 64 + 5 * 64
    assert (tiny.muon_elements, tiny.adamw_elements, tiny.parameters) == (muon, adamw, muon + adamw)
    settings = Settings(sequence_length=32, micro_batch=2, bucket_mb=0.5)
    by_layout = {k: make_plan(tiny, settings, DEVICES["h100"], layout=k, nodes=2, per_node=2) for k in LAYOUTS}
    total, n = muon + adamw, 4
    assert by_layout["ddp"].memory["weights"] == 4 * total == by_layout["ddp"].memory["gradients"]
    assert by_layout["zero1"].memory["gradients"] == 2 * total and by_layout["zero2"].memory["gradients"] == total / 2
    assert by_layout["zero3"].memory["master weights"] == 4 * total / n
    assert by_layout["fsdp2"].memory["AdamW's moments"] == 8 * adamw / n
    assert by_layout["hsdp"].memory["weights"] == 4 * total / 2
    for kind in ("zero1", "zero2", "zero3", "fsdp2"):  # momentum exists once, so a rank holds its share only
        assert 4 * muon / n <= by_layout[kind].memory["momentum"] < 4 * muon / n * 1.1, kind
    kept = {k: replace(settings, momentum_everywhere=True) for k in LAYOUTS}
    kept_bytes = {k: make_plan(tiny, s, DEVICES["h100"], layout=k, nodes=2, per_node=2) for k, s in kept.items()}
    assert kept_bytes["ddp"].memory["momentum"] == 4 * muon and kept_bytes["hsdp"].memory["momentum"] >= 4 * muon / 2
    assert kept_bytes["zero1"].memory == by_layout["zero1"].memory
    tokens = 32 * 2
    assert by_layout["ddp"].memory["activations (estimate)"] == 34 * tokens * 64 * 2 + 6 * tokens * 100


def test_bytes_of_adamw_by_hand(tiny):
    total = tiny.parameters
    wanted = {"ddp": 8, "zero1": 6, "zero2": 2 * 2 * 3 + 2, "zero3": 3 * 2 * 3, "fsdp2": 3 * 8}
    for kind, width in wanted.items():
        plan = make_plan(tiny, Settings(accumulation=3), DEVICES["h100"], layout=kind, nodes=2, per_node=4)
        inside, between = plan.moved["AdamW"]
        assert inside + between == pytest.approx(width * total * 7 / 8) and between == pytest.approx(inside / 3)


def test_bf16_on_a_gpu_and_what_was_asked_for(tiny):
    h100, cpu = DEVICES["h100"], DEVICES["cpu"]
    half = make_plan(tiny, Settings(), h100, layout="zero3", nodes=1, per_node=4)
    wire = make_plan(tiny, Settings(wire_dtype=torch.bfloat16), h100, layout="zero3", nodes=1, per_node=4)
    full = make_plan(tiny, Settings(), cpu, layout="zero3", nodes=1, per_node=4)
    # momentum in fp32 and updates in bf16; both in bf16; both in fp32
    assert [round(p.moved["Muon"][0] / wire.moved["Muon"][0], 6) for p in (half, wire, full)] == [1.5, 1.0, 2.0]


def test_waiting_in_buckets():
    """Two ranks, two matrices each, two buckets with one matrix of each rank: no rank waits. If one rank has both
    matrices of a bucket, the other rank waits."""
    from muon_dist.layout import cut_parameter, replicated_layout
    from muon_dist.ownership import OwnershipPlan
    from muon_dist.ownership.cost import CostModel

    layout = replicated_layout([cut_parameter(f"m{i}", (8, 8)) for i in range(6)], 2)
    plan = OwnershipPlan(layout, (0, 1, 0, 1, 0, 1))
    model = CostModel(1.0, 1.0)
    one = model.orthogonalize(8, 8, 5)
    loads, waiting = newton_schulz_seconds(plan, [[(0, 1), (2, 3), (4, 5)]], model, 5, torch.float32)
    assert loads.tolist() == [3 * one, 3 * one] and waiting == 3 * one
    _, waiting = newton_schulz_seconds(plan, [[(0,), (2,), (4,), (1,), (3,), (5,)]], model, 5, torch.float32)
    assert 3 * one < waiting <= 6 * one


def test_sub_groups_close_when_a_slice_reaches_the_size(tiny):
    groups = sub_groups(tiny.muon, 4, 3000)
    assert [p.name for g in groups for p in g] == [p.name for p in tiny.muon]
    for group in groups[:-1]:
        assert sum(p.numel // 4 for p in group) >= 3000 > sum(p.numel // 4 for p in group[:-1])
    layout = place(tiny, Settings(sub_group_size=3000), "zero3", 4, 4).layout
    assert len(layout.phases) == len(groups) > 2


def test_advice_names_what_helps(tiny):
    h100 = DEVICES["h100"]
    small = replace(h100, memory=1.3 * 2**20 + nccl_bytes(4) / 0.9)
    settings = Settings(sequence_length=32, micro_batch=1, bucket_mb=0.1)
    plan = advise(make_plan(tiny, settings, small, layout="ddp", nodes=1, per_node=4), tiny, settings, small)
    assert any("does not fit" in line for line in plan.advice)
    assert any(line.startswith("--layout ") for line in plan.advice)
    many = advise(make_plan(tiny, settings, h100, layout="zero1", nodes=4, per_node=8), tiny, settings, h100)
    assert any("4 matrices of 176 x 64" in line and "stays whole" in line for line in many.advice)
    assert any("8 matrices of 64 x 64" in line and "split by heads" in line for line in many.advice)
    slow = replace(h100, between=1e3, inside=1e3)
    slow_plan = advise(make_plan(tiny, settings, slow, layout="zero3", nodes=2, per_node=2), tiny, settings, slow)
    assert any("wire_dtype=bfloat16" in line for line in slow_plan.advice)


def test_balance_is_within_grahams_bound(tiny):
    for _, _, ranks, _, least, ours, dealt in balance(tiny, Settings(), DEVICES["h100"], [2, 4, 8, 64]):
        assert 1 <= least <= ours * (1 + 1e-9) and ours <= dealt * (1 + 1e-9)
        assert ours <= (4 / 3 - 1 / (3 * ranks)) * max(least, 1) * (1 + 1e-9) or ours <= least + 1


def test_errors_name_the_option(tiny):
    with pytest.raises(ConfigError, match="--device h900: unknown device; use measured, or one of a100"):
        find_device("h900")
    with pytest.raises(ConfigError, match="--layout zero4: use one of ddp"):
        place(tiny, Settings(), "zero4", 4, 4)
    with pytest.raises(ConfigError, match="--layout hsdp: 6 ranks are not a multiple of 4 a node"):
        place(tiny, Settings(), "hsdp", 6, 4)


def test_command(capsys):
    config = str(ROOT / "configs" / "llama-7b.yaml")
    main_quietly("plan", config, "--nodes", "8", "--layout", "zero1", "--json", "--no-advice")
    ordered = json.loads(capsys.readouterr().out)
    assert (ordered["ranks"], ordered["matrices"], ordered["layout"]) == (64, 224, "zero1")
    assert ordered["balance"] < 1.1 and ordered["memory_total"] > 30e9
    main_quietly("plan", config, "--nodes", "8", "--layout", "zero1", "--json", "--no-advice", "--no-order")
    given = json.loads(capsys.readouterr().out)
    assert sum(ordered["moved"]["Muon"]) < 0.3 * sum(given["moved"]["Muon"])
    main_quietly("plan", config, "deepspeed=configs/deepspeed/zero3.json")
    text = capsys.readouterr().out
    assert "llama-7b: zero3 on 8 ranks" in text and "overhead over AdamW" in text and "advice: " in text


def main_quietly(*arguments: str) -> None:
    try:
        main(list(arguments))
    except SystemExit as stop:
        assert stop.code in (0, None)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zero1", "zero3", "fsdp2", "hsdp"])
def test_a_trillion_parameters_on_4096_ranks(layout):
    """In a minute of CPU time and 4 GiB: `python -m pytest -m slow tests/planner/test_plan.py`"""
    command = [sys.executable, "-m", "muon_dist.cli", "plan", "configs/moe-1t.yaml", "--nodes", "512", "--json"]
    start = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([*command, "--layout", layout], cwd=ROOT, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert json.loads(done.stdout)["ranks"] == 4096
    print(
        f"{layout}: {time.perf_counter() - start:.0f} s, {after.ru_utime - before:.0f} s of CPU, {after.ru_maxrss} KiB"
    )
    assert after.ru_utime - before < 60 and after.ru_maxrss < 4 * 2**20
