"""Plans of meshes against models sharded by transformers: layouts, bytes and collectives on 4 ranks."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DistributedConfig

from muon_dist import Muon, param_groups
from muon_dist.cli import main
from muon_dist.errors import ConfigError
from muon_dist.exchange.schedule import bucket_elements
from muon_dist.ownership import assign_owners
from muon_dist.planner.advice import advise
from muon_dist.planner.communication import bytes_by_axis
from muon_dist.planner.devices import DEVICES, GB
from muon_dist.planner.estimate import buckets_of, exchange_of
from muon_dist.planner.memory import activation_bytes
from muon_dist.planner.mesh import Mesh, make_mesh
from muon_dist.planner.model import Settings, Workload, describe_model
from muon_dist.planner.placement import held_bytes, place_on
from muon_dist.planner.plan import make_plan
from muon_dist.planner.search import every_mesh
from muon_dist.planner.sharding import largest_part
from tests.adapters.test_meshes import MODELS, SIZES, saved
from tests.distributed import run_ranks
from tests.traffic import BATCH, Traffic

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Settings(ns_dtype=torch.float32, bucket_mb=256.0, low_precision=False)
BLOCK = {key: value for key, value in SIZES.items() if key not in ("vocab_size", "pad_token_id", "eos_token_id")}


def workload(name: str, **changes: Any) -> Workload:
    block = {"model_type": name, **BLOCK, **MODELS[name], **changes}
    return describe_model(name, block, vocabulary=64, sequence_length=16)


def _stepped(folder: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """The bytes of one step, its layout, and the elements of the parameters on this rank."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(**sizes), dtype=torch.float32
    )
    optimizer = Muon(param_groups(model, lr=0.02), ns_dtype=torch.float32, bucket_mb=SETTINGS.bucket_mb)
    for step in range(2):
        tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens).loss.backward()
        with Traffic() as traffic:
            optimizer.step()
        optimizer.zero_grad()
    assert optimizer.plan is not None
    return {
        "layout": optimizer.plan.layout,
        "owners": optimizer.plan.owners,
        "received": traffic.received[BATCH] + traffic.received["broadcast"],
        "calls": traffic.calls[BATCH] + traffic.calls["broadcast"],
        "held": sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters()),
    }


@pytest.mark.parametrize(
    ("name", "mesh", "sizes"),
    [
        pytest.param("llama", ("fsdp2", {"tp": 2}), {"tp_size": 2, "fsdp_size": 2}, marks=pytest.mark.slow),
        ("mixtral", ("hsdp", {"tp": 2, "dp_replicate": 2}), {"tp_size": 2, "dp_replicate_size": 2}),
        pytest.param("mixtral", ("fsdp2", {"tp": 2}), {"tp_size": 2, "fsdp_size": 2}, marks=pytest.mark.slow),
        ("qwen3_moe", ("fsdp2", {"tp": 2, "ep": 4}), {"tp_size": 2, "fsdp_size": 2, "ep_size": 4}),
        ("qwen3_moe", ("hsdp", {"ep": 2, "dp_replicate": 2}), {"fsdp_size": 2, "dp_replicate_size": 2, "ep_size": 2}),
        ("phi3", ("fsdp2", {"tp": 2}), {"tp_size": 2, "fsdp_size": 2}),
    ],
)
def test_a_mesh_moves_what_was_planned(name: str, mesh: Any, sizes: dict[str, int], tmp_path: Path) -> None:
    rows = run_ranks(_stepped, 4, saved(name, tmp_path), sizes)
    kind, axes = mesh
    planned = make_mesh(kind, 4, 2, axes)
    placement = place_on(workload(name), SETTINGS, planned)
    owners = assign_owners(placement.layout)
    buckets = buckets_of(owners, bucket_elements(int(SETTINGS.bucket_mb * 2**20)), SETTINGS.overlap)
    exchange = exchange_of(owners, buckets, per_node=2, gather_bytes=4, scatter_bytes=4)
    for row in rows:
        assert row["layout"] == placement.layout
        assert row["owners"] == owners.owners
        assert row["calls"] == exchange.collectives
    received = [row["received"] for row in rows]
    assert sum(received) == pytest.approx(exchange.received.sum(), rel=1e-12) and sum(received) > 0
    if kind == "fsdp2":  # a broadcast is counted as its mean over the ranks
        assert received == exchange.received.sum(axis=0).tolist()
    assert max(row["held"] for row in rows) * 4 == held_bytes(workload(name), SETTINGS, planned).weights


def _autotp_stepped(stages: tuple[int, ...]) -> list[dict[str, Any]]:
    """The layout and the bytes that this rank sent in a step under AutoTP, by ZeRO stage."""
    from tests.adapters.deepspeed_ranks import Case
    from tests.adapters.test_deepspeed_autotp import Run

    found = []
    for stage in stages:
        run = Run(Case(stage))
        engine, optimizer = run.engine()
        run.backward(engine, 0)
        engine.step()
        assert optimizer.plan is not None and optimizer.runtime is not None
        held = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
        found.append(
            {
                "layout": optimizer.plan.layout,
                "owners": optimizer.plan.owners,
                "sent": optimizer.runtime.transport.bytes_sent,
                "held": held,
            }
        )
        engine.destroy()
    return found


@pytest.mark.deepspeed
def test_autotp_moves_what_was_planned() -> None:
    """Two tensor-parallel ranks, two copies of each, ZeRO 1 to 3."""
    pytest.importorskip("deepspeed")
    from tests.adapters.deepspeed_ranks import MODELS as TINY
    from tests.adapters.deepspeed_ranks import SEQUENCE, VOCABULARY

    stages = (1, 2, 3)
    model = describe_model("llama", TINY["llama"], vocabulary=VOCABULARY, sequence_length=SEQUENCE)
    settings = replace(SETTINGS, ordered=False)
    for stage, rows in zip(stages, zip(*run_ranks(_autotp_stepped, 4, stages, timeout=200), strict=True), strict=True):
        mesh = make_mesh(f"zero{stage}", 4, 2, {"tp": 2})
        placement = place_on(model, settings, mesh)
        owners = assign_owners(placement.layout)
        buckets = buckets_of(owners, bucket_elements(int(settings.bucket_mb * 2**20)), settings.overlap)
        exchange = exchange_of(owners, buckets, per_node=2, gather_bytes=4, scatter_bytes=4)
        for row in rows:
            assert row["layout"] == placement.layout and row["owners"] == owners.owners, stage
        assert [row["sent"] for row in rows] == exchange.sent.sum(axis=0).tolist() and exchange.sent.sum() > 0
        held = 4 * sum(row["held"] for row in rows) / 4 / (2 if stage == 3 else 1)
        assert held_bytes(model, settings, mesh).weights == pytest.approx(held, rel=0.01), stage


def test_memory_and_bytes_by_hand() -> None:
    """llama of the tests on tp 2 x cp 2 x dp_shard 2, two ranks a node."""
    model = workload("llama")
    settings = Settings(sequence_length=64, micro_batch=3, accumulation=2, checkpointing=True)
    mesh = make_mesh("fsdp2", 8, 2, {"tp": 2, "cp": 2})
    assert (mesh.dp_shard, mesh.fsdp, mesh.stage_ranks) == (2, 4, 8)
    norms = 5 * 32  # whole on both tp ranks; tp divides all others
    cut = model.parameters - norms
    assert held_bytes(model, settings, mesh).weights == (cut / 2 + norms) / 4 * 4
    axes = bytes_by_axis(model, settings, mesh)
    tokens = 64 * 3 * 2 / 2
    assert axes["tp"] == (2 * 1 / 2 * 2 * 3 * 2 * 2 * tokens * 32, 0)  # a ring of 2, 2 layers, 3 passes, 2 products
    keys = 2 * 2 * tokens * 2 * 8 / 2
    assert axes["cp"] == (0, 2 * 4 * 1 * keys)
    assert axes["dp_shard"] == (0, 3 / 4 * 2 * 8 * (cut / 2 + norms))
    one = 64 * 3 / 2
    wanted = 2 * one * 32 * 2 + (10 + 24 / 2) * one * 32 + 6 * one * 64
    assert activation_bytes(model, settings, mesh) == wanted
    longer = replace(settings, sequence_length=128)
    assert activation_bytes(model, longer, mesh) == 2 * wanted


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe"])
def test_every_mesh_of_the_search_has_the_layout_that_its_memory_says(name: str) -> None:
    """The closed form for the fullest rank equals the layout's, and a layout always covers each matrix."""
    model = workload(name, intermediate_size=44, num_attention_heads=4, num_key_value_heads=4)
    checked = 0
    for mesh in every_mesh(model, Settings(sequence_length=16), 8, 4):
        if mesh.layout not in ("fsdp2", "hsdp") or mesh.pp > 1:
            continue
        layout = place_on(model, SETTINGS, mesh).layout
        held = sum(m.held_by_rank(mesh.stage_ranks) for m in layout.matrices)
        assert max(held) == sum(n * largest_part(p, mesh) for p, n, muon in model.kinds if muon), mesh
        checked += 1
    assert checked >= 9


def test_stages_of_a_pipeline_divide_the_model() -> None:
    model = workload("llama", num_hidden_layers=5)
    stage = model.largest_stage(2)  # 2 layers, and 3 with the head
    assert stage.layers == 3 and len(stage.muon) == 3 * 7
    assert sum(stage.muon_groups) == len(stage.muon)
    per_layer = (32 * 32 * 2 + 32 * 16 * 2) + 3 * 32 * 48 + 2 * 32
    assert stage.parameters == 3 * per_layer + 32 + 64 * 32
    settings = Settings(sequence_length=16, micro_batch=1, accumulation=4)
    plan = make_plan(model, settings, DEVICES["h100"], layout="ddp", nodes=1, per_node=8, axes={"pp": 2})
    assert plan.mesh.stage_ranks == 4 and plan.seconds["pipeline bubble"] > 0 and plan.axes["pp"][1] == 0
    assert plan.tokens == 4 * 16 * 4


def test_experts_fill_only_as_many_ranks_as_there_are() -> None:
    """4 experts over ep 2 x efsdp 4: `fully_shard` cuts the axis of the experts, so half of the ranks hold none."""
    model, mesh = workload("qwen3_moe"), make_mesh("fsdp2", 8, 8, {"ep": 2})
    held = {m.matrix.name: {int(r) for r in m.fragments.rank} for m in place_on(model, SETTINGS, mesh).layout.matrices}
    experts = {ranks.pop() for name, ranks in held.items() if "experts" in name and len(ranks) == 1}
    assert len(experts) == 4
    whole = sum(p.numel for p in model.muon if "experts" in p.name)
    assert held_bytes(model, SETTINGS, mesh).weights > 4 * whole / 4  # not an eighth


def test_links_of_an_axis() -> None:
    mesh = Mesh("fsdp2", per_node=8, dp_shard=16, tp=4)
    assert mesh.ring_between(4, 1) == 0 and mesh.peers_between(4, 1) == 0  # tp inside the node
    assert mesh.ring_between(16, 4) == 1 / 2  # two ranks of each ring on a node; one of them receives from outside
    assert mesh.peers_between(16, 4) == 14 / 15
    assert mesh.ring_between(4, 64) == 1


@pytest.mark.parametrize(
    ("name", "layout", "axes", "message"),
    [
        ("llama", "fsdp2", {"tp": 8}, "--tp 8: does not divide the 4 attention heads"),
        ("llama", "fsdp2", {"tp": 4}, "--tp 4: does not divide the 2 key and value heads"),
        ("llama", "zero1", {"sp": 8}, "--sp 8: does not divide the 4 attention heads"),
        ("llama", "fsdp2", {"cp": 16}, "--cp 16: 16 tokens of a sample are not a multiple of 32"),
        ("llama", "fsdp2", {"ep": 2}, "--ep 2: LlamaForCausalLM has no experts"),
        ("llama", "fsdp2", {"pp": 4}, "--pp 4: more stages than the 2 layers"),
        ("mixtral", "fsdp2", {"ep": 8}, "--ep 8: does not divide the 4 experts"),
        ("mixtral", "fsdp2", {"ep": 3}, "--ep 3: must be a multiple of tp = 1 and divide"),
        ("mixtral", "fsdp2", {"tp": 4, "ep": 2}, "--ep 2: must be a multiple of tp = 4"),
        ("llama", "fsdp2", {"tp": 3}, "--tp 3: 16 ranks are not a multiple of 3"),
        ("llama", "ddp", {"tp": 2}, "--tp 2 with --layout ddp: use --layout fsdp2 or hsdp"),
        ("llama", "zero3", {"tp": 2, "sp": 2}, "--tp 2 with --sp 2: DeepSpeed has AutoTP or Ulysses"),
        ("mixtral", "zero1", {"tp": 2}, "AutoTP does not take the style"),
        ("llama", "fsdp2", {"sp": 2}, "--sp 2 with --layout fsdp2: Ulysses is DeepSpeed's"),
        ("llama", "zero1", {"pp": 2}, "--pp 2 with --layout zero1: DeepSpeed"),
        ("llama", "fsdp2", {"dp_replicate": 2}, "--dp-replicate 2 with --layout fsdp2"),
        ("llama", "hsdp", {"dp_replicate": 3}, "--dp-replicate 3: the 16 data-parallel ranks"),
        ("llama", "fsdp2", {"tp": 0}, "--tp 0: must be at least 1"),
    ],
)
def test_numbers_that_do_not_fit_name_the_option(name: str, layout: str, axes: dict[str, int], message: str) -> None:
    settings = Settings(sequence_length=16, micro_batch=1)
    with pytest.raises(ConfigError, match=message):
        make_plan(workload(name), settings, DEVICES["h100"], layout=layout, nodes=2, per_node=8, axes=axes)


def test_a_model_without_a_plan_of_transformers() -> None:
    block = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    gpt2 = describe_model("gpt2", block, vocabulary=64, sequence_length=16)
    with pytest.raises(ConfigError, match="--tp 2: transformers has no tensor-parallel plan for GPT2LMHeadModel"):
        make_plan(gpt2, SETTINGS, DEVICES["h100"], layout="fsdp2", nodes=1, per_node=4, axes={"tp": 2})


def test_a_deepspeed_configuration_with_parallelism(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ulysses and AutoTP."""
    file = tmp_path / "zero.json"
    config = ["plan", str(ROOT / "configs" / "llama-7b.yaml"), f"deepspeed={file}", "--json", "--no-advice"]
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}, "sequence_parallel_size": 2}))
    with pytest.raises(SystemExit) as stop:
        main(config)
    planned = json.loads(capsys.readouterr().out)
    assert stop.value.code in (0, None) and planned["mesh"]["sp"] == 2 and planned["mesh"]["dp_shard"] == 4
    assert sum(planned["axes"]["sp"]) > 0
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, "tensor_parallel": {"autotp_size": 2}}))
    with pytest.raises(SystemExit) as stop:
        main(config)
    planned = json.loads(capsys.readouterr().out)
    assert stop.value.code in (0, None) and planned["mesh"]["tp"] == 2 and planned["mesh"]["dp_shard"] == 4
    assert sum(planned["axes"]["tp"]) > 0


def test_the_search_is_over_meshes_that_fit() -> None:
    model = workload("mixtral")
    found = list(every_mesh(model, Settings(sequence_length=16), 16, 8))
    assert len(found) == len(set(found)) > 30 and all(m.ranks == 16 for m in found)
    used = Counter(name for m in found for name in ("tp", "ep", "pp", "dp_replicate") if getattr(m, name) > 1)
    assert all(used[name] for name in ("tp", "ep", "pp", "dp_replicate"))
    assert {m.tp for m in found} == {1, 2} and {m.ep for m in found} == {1, 2, 4}


def test_advice_finds_the_mesh_and_says_why() -> None:
    """Weights that are too large for one rank under data parallelism of 4 ranks; slow links between nodes."""
    model = workload("llama")
    settings = Settings(sequence_length=16, micro_batch=1, accumulation=4, bucket_mb=0.01)
    device = replace(DEVICES["cpu"], memory=5e5)
    whole = make_plan(model, settings, device, layout="ddp", nodes=2, per_node=2)
    small = replace(device, memory=(whole.memory_total - 1) / 0.9)
    made = make_plan(model, settings, small, layout="ddp", nodes=2, per_node=2)
    assert not made.fits
    last = advise(made, model, settings, small).advice
    assert "(10% are kept in reserve)" in last[0] and "does not fit" in last[0]
    line = next(a for a in last if a.startswith("--layout "))
    assert "it fits: " in line and "next: --layout " in line and "in place of" in line


def test_the_best_mesh_is_kept_with_its_rival_named() -> None:
    model = workload("llama")
    settings = Settings(sequence_length=16, micro_batch=1, accumulation=4)
    fast = replace(DEVICES["h100"], inside=1000 * GB, between=1000 * GB)
    plans = [
        make_plan(model, settings, fast, layout=layout, nodes=1, per_node=4) for layout in ("zero1", "fsdp2", "ddp")
    ]
    lines = [advise(plan, model, settings, fast).advice[-1] for plan in plans]
    assert all("next: --layout " in line for line in lines)
    assert not any("nothing" in line for line in lines)


@pytest.mark.parametrize(
    ("settings", "options", "layout", "axes"),
    [
        (["parallel.tp=4"], [], "fsdp2", {"tp": 4, "dp_shard": 4, "dp_replicate": 1}),
        (["parallel={tp: 4, dp_replicate: 2}"], [], "hsdp", {"tp": 4, "dp_shard": 2, "dp_replicate": 2}),
        (["parallel={tp: 4, dp_replicate: 2}"], ["--tp", "2"], "hsdp", {"tp": 2, "dp_shard": 4, "dp_replicate": 2}),
        (["parallel={dp_replicate: 16, dp_shard: 1}"], [], "ddp", {"tp": 1, "dp_shard": 1, "dp_replicate": 16}),
        (["parallel.sp=2", "deepspeed=configs/deepspeed/zero3.json"], [], "zero3", {"sp": 2, "dp_shard": 8}),
        (["parallel.tp=4"], ["--layout", "fsdp2", "--cp", "2"], "fsdp2", {"tp": 4, "cp": 2, "dp_shard": 2}),
    ],
)
def test_the_mesh_is_that_of_the_configuration(
    settings: list[str],
    options: list[str],
    layout: str,
    axes: dict[str, int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main(["plan", "configs/llama-60m.yaml", *settings, "--nodes", "2", "--json", "--no-advice", *options])
    planned = json.loads(capsys.readouterr().out)
    assert stop.value.code in (0, None) and planned["layout"] == layout
    assert {name: planned["mesh"][name] for name in axes} == axes


def test_ranks_that_the_configuration_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", str(ROOT / "configs" / "llama-60m.yaml"), "parallel={tp: 2, dp_shard: 2}", "--nodes", "2"])
    assert stop.value.code == 2
    assert "parallel: dp_shard 2 x tp 2 = 4 ranks, and the run has 16" in capsys.readouterr().err
