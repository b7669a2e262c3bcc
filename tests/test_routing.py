"""Routing of real transformers models, built from their configurations on the meta device, and of models that lie."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from muon_dist.errors import RoutingError
from muon_dist.routing import Override, Route, RoutingTable, Split, SplitRule, logical_shape, output_head, route

VOCAB, WIDTH, LAYERS = 128, 32, 2
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(kind: str, **settings: Any) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))


def llama(tied: bool = False) -> nn.Module:
    return build("llama", **COMMON, tie_word_embeddings=tied)


def gpt2() -> nn.Module:
    return build(
        "gpt2",
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        n_positions=WIDTH,
        bos_token_id=1,
        eos_token_id=1,
    )


def by_name(table: RoutingTable) -> dict[str, Route]:
    return {r.fqn: r for r in table.routes}


def test_llama_untied() -> None:
    model = llama()
    routes = by_name(route(model))
    assert list(routes) == [n for n, _ in model.named_parameters()]
    assert routes["model.embed_tokens.weight"].reason == "embedding"
    assert routes["lm_head.weight"].reason == "output head"
    matrices = {n for n in routes if n.endswith("_proj.weight")}
    assert len(matrices) == 7 * LAYERS
    assert {n for n, r in routes.items() if r.algorithm == "muon"} == matrices
    for name, r in routes.items():
        assert r.shape == tuple(model.get_parameter(name).shape)
        assert r.decay == ("norm" not in name)
        assert not r.transposed and not r.frozen and r.split is None and r.aliases == ()


def test_tied_weights_are_listed_once() -> None:
    routes = by_name(route(llama(tied=True)))
    embedding = routes["model.embed_tokens.weight"]
    assert embedding.algorithm == "adamw" and embedding.aliases == ("lm_head.weight",)
    assert "lm_head.weight" not in routes


def test_gpt2_names_and_transposed_weights() -> None:
    # n_positions == n_embd, so that the position table is as square as a weight.
    routes = by_name(route(gpt2(), splits=[SplitRule(r".*\.c_attn", sizes=(WIDTH, WIDTH, WIDTH))]))
    assert routes["transformer.wte.weight"].aliases == ("lm_head.weight",)
    assert {routes[f"transformer.{n}.weight"].algorithm for n in ("wte", "wpe")} == {"adamw"}
    fused = routes["transformer.h.0.attn.c_attn.weight"]
    assert fused.transposed and fused.shape == (WIDTH, 3 * WIDTH)
    assert [(g.count, g.rows, g.columns) for g in fused.matrices()] == [(3, WIDTH, WIDTH)]
    up = routes["transformer.h.0.mlp.c_fc.weight"]
    assert up.transposed and [(g.count, g.rows, g.columns) for g in up.matrices()] == [(1, 4 * WIDTH, WIDTH)]
    assert sum(r.algorithm == "muon" for r in routes.values()) == 4 * LAYERS


def test_qwen3() -> None:
    routes = by_name(route(build("qwen3", **COMMON)))
    assert sum(r.algorithm == "muon" for r in routes.values()) == 7 * LAYERS
    assert routes["model.layers.0.self_attn.q_norm.weight"].algorithm == "adamw"


@pytest.mark.parametrize("kind, count", [("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts")])
def test_experts_are_batches_of_matrices(kind: str, count: str) -> None:
    width = {"moe_intermediate_size": 16} if kind == "qwen3_moe" else {"intermediate_size": 16}
    model = build(kind, **{**COMMON, count: 4, "num_experts_per_tok": 2, **width})
    routes = by_name(route(model, splits=[SplitRule(r".*\.gate_up_proj", sizes=(16, 16))]))
    fused = routes["model.layers.0.mlp.experts.gate_up_proj"]
    assert fused.shape == (4, 2 * 16, WIDTH) and fused.algorithm == "muon" and not fused.transposed
    assert [(g.count, g.rows, g.columns) for g in fused.matrices()] == [(8, 16, WIDTH)]
    down = routes["model.layers.0.mlp.experts.down_proj"]
    assert [(g.count, g.rows, g.columns) for g in down.matrices()] == [(4, WIDTH, 16)]
    assert routes["lm_head.weight"].algorithm == "adamw"


def test_transposed_experts_and_their_biases() -> None:
    model = build("gpt_oss", **{**COMMON, "intermediate_size": 48}, num_local_experts=4, num_experts_per_tok=2)
    routes = by_name(route(model))
    fused = routes["model.layers.0.mlp.experts.gate_up_proj"]
    assert fused.shape == (4, WIDTH, 96) and fused.transposed
    assert [(g.count, g.rows, g.columns) for g in fused.matrices()] == [(4, 96, WIDTH)]
    bias = routes["model.layers.0.mlp.experts.gate_up_proj_bias"]
    assert bias.shape == (4, 96) and bias.algorithm == "adamw" and not bias.decay


class Liar(nn.Module):
    """Names that say the opposite of what the modules are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(24, 24, bias=False)
        self.q_proj = nn.Embedding(50, 24)
        self.lm_head = nn.Linear(24, 36)
        self.wte = nn.Linear(36, 24)
        self.norm = nn.Linear(24, 24)
        self.linear = nn.LayerNorm((3, 24))
        self.down_proj = nn.Linear(24, 50, bias=False)


def test_names_do_not_decide() -> None:
    routes = by_name(route(Liar()))
    assert {n for n, r in routes.items() if r.algorithm == "muon"} == {
        "embed.weight",
        "lm_head.weight",
        "wte.weight",
        "norm.weight",
    }
    assert routes["q_proj.weight"].reason == "embedding"
    assert routes["down_proj.weight"].reason == "output head"
    assert routes["linear.weight"].reason == "normalisation (LayerNorm)" and not routes["linear.weight"].decay


def test_output_head_by_shape_prefers_the_vocabulary_over_positions() -> None:
    model = nn.ModuleDict(
        {
            "head": nn.Linear(16, 40, bias=False),
            "words": nn.Embedding(40, 16),
            "places": nn.Embedding(16, 16),
            "inner": nn.Linear(16, 16, bias=False),
        }
    )
    assert output_head(model) == {id(model["head"].weight)}
    assert by_name(route(model))["inner.weight"].algorithm == "muon"


def test_plain_model_other_shapes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv1d(4, 4, 2), nn.Linear(8, 8), nn.Linear(8, 1), nn.BatchNorm1d(8))
    routes = by_name(route(model))
    assert {n for n, r in routes.items() if r.algorithm == "muon"} == {"2.weight"}
    assert routes["3.weight"].reason == "a vector (one side is 1)"
    sent = by_name(route(model, [Override("0", "muon"), Override("3", "muon")]))
    assert [(g.count, g.rows, g.columns) for g in sent["0.weight"].matrices()] == [(1, 4, 27)]
    assert sent["3.weight"].algorithm == "muon"
    with pytest.raises(RoutingError, match=r"1\.weight \(4, 4, 2\) is the kernel of a Conv1d"):
        route(model, [Override("1", "muon")])


def test_wrapped_model_keeps_its_head() -> None:
    routes = by_name(route(nn.ModuleDict({"module": llama()})))
    assert routes["module.lm_head.weight"].reason == "output head"


def test_partitioned_parameter_is_routed_by_its_logical_shape() -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50, bias=False))
    expected = [(r.fqn, r.shape, r.algorithm, r.reason) for r in route(model).routes]
    for parameter in model.parameters():  # as DeepSpeed's zero.Init leaves it
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert logical_shape(model[0].weight) == (50, 8)
    assert [(r.fqn, r.shape, r.algorithm, r.reason) for r in route(model).routes] == expected
    del model[1].weight.ds_shape
    with pytest.raises(RoutingError, match=r"1\.weight has shape \(0\) and no ds_shape"):
        route(model)


def test_frozen_parameters_are_listed_and_left_out() -> None:
    model = llama()
    model.get_parameter("model.layers.0.self_attn.q_proj.weight").requires_grad_(False)
    table = route(model)
    frozen = [r for r in table.routes if r.frozen]
    assert [r.fqn for r in frozen] == ["model.layers.0.self_attn.q_proj.weight"]
    assert frozen[0] not in table.select("muon") and len(table.select("muon")) == 7 * LAYERS - 1
    assert "frozen: 1 parameters" in table.render()


def test_overrides_and_splits() -> None:
    table = route(
        llama(),
        overrides=[
            Override(r".*\.mlp\..*", "adamw"),
            Override(r"model\.layers\.1\.mlp\.up_proj", "muon"),
            Override("lm_head", "muon"),
        ],
        splits=[SplitRule(".*q_proj", heads=2), SplitRule(r".*\.1\..*q_proj\.weight", heads=4)],
    )
    routes = by_name(table)
    assert routes["model.layers.0.mlp.up_proj.weight"].algorithm == "adamw"
    assert routes["model.layers.1.mlp.up_proj.weight"].algorithm == "muon"
    assert routes["lm_head.weight"].reason == "override 'lm_head'"
    assert routes["model.layers.0.self_attn.q_proj.weight"].split == Split(heads=2)
    assert routes["model.layers.1.self_attn.q_proj.weight"].split == Split(heads=4)
    uneven = by_name(route(llama(), splits=[SplitRule(".*q_proj", sizes=(8, 8, 16))]))
    groups = uneven["model.layers.0.self_attn.q_proj.weight"].matrices()
    assert [(g.count, g.rows) for g in groups] == [(2, 8), (1, 16)]


@pytest.mark.parametrize(
    "overrides, splits, message",
    [
        ([Override(".*q_prj", "muon")], [], r"'\.\*q_prj' matches no parameter .*closest name is .*q_proj\.weight"),
        ([], [SplitRule("lm_haed", heads=2)], r"split 'lm_haed' matches no parameter .*closest name is lm_head"),
        ([Override("(", "muon")], [], r"override '\(' is not a valid regular expression"),
        ([Override("lm_head", "sgd")], [], "algorithm 'sgd' is not muon or adamw"),  # type: ignore[arg-type]
        ([], [SplitRule(".*q_proj", heads=5)], r"heads = 5 does not divide .*q_proj\.weight \(32, 32\).* 32 rows"),
        ([], [SplitRule(".*q_proj", sizes=(8, 8))], "add up to 16, which does not fit .* 32 rows"),
        ([], [SplitRule(".*q_proj")], "exactly one of heads and sizes"),
        ([], [SplitRule(".*q_proj", heads=2, sizes=(16, 16))], "exactly one of heads and sizes"),
        ([], [SplitRule(".*q_proj", sizes=(32, 0))], "whole numbers of at least 1"),
        ([], [SplitRule("lm_head", heads=2)], r"matches only parameters that go to AdamW: lm_head\.weight"),
    ],
)
def test_bad_rules(overrides: list[Override], splits: list[SplitRule], message: str) -> None:
    with pytest.raises(RoutingError, match=message) as caught:
        route(llama(), overrides, splits)
    assert caught.value.exit_code == 4


def test_vector_sent_to_muon_is_refused_with_the_table() -> None:
    with pytest.raises(RoutingError) as caught:
        route(llama(), [Override(r"model\.norm", "muon")])
    text = str(caught.value)
    assert text.startswith("model.norm.weight (32) has fewer than two axes and cannot go to muon")
    assert "REFUSED" in text and "lm_head.weight" in text


def test_no_parameter_reaches_muon() -> None:
    with pytest.raises(RoutingError, match="no parameter reaches Muon") as caught:
        route(nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4)))
    assert "embedding" in str(caught.value) and caught.value.exit_code == 4
    frozen = nn.Linear(4, 4).requires_grad_(False)
    with pytest.raises(RoutingError, match="no parameter reaches Muon"):
        route(frozen)


def test_table_as_json_and_text() -> None:
    model = llama(tied=True)
    table = route(model, splits=[SplitRule(".*q_proj", heads=4)])
    plain = json.loads(json.dumps(table.to_json()))
    assert plain == table.to_json()
    first = next(r for r in plain["routes"] if r["fqn"].endswith("0.self_attn.q_proj.weight"))
    assert first["split"] == {"heads": 4, "sizes": None, "axis": "outputs", "from_model": False}
    assert first["matrices"] == [{"count": 4, "rows": 8, "columns": WIDTH}]
    elements = sum(p.numel() for p in model.parameters())
    assert plain["totals"]["muon"]["elements"] + plain["totals"]["adamw"]["elements"] == elements
    assert plain["totals"]["muon"]["matrices"] == LAYERS * (4 + 6)
    lines = table.render().splitlines()
    assert len(lines) == 1 + len(table.routes) + 2
    assert lines[0].split() == ["parameter", "shape", "algorithm", "matrices", "reason"]
    row = next(line for line in lines if "0.self_attn.q_proj.weight" in line)
    assert "(32, 32)" in row and "muon" in row and "4 x (8, 32)" in row
    assert "tied with lm_head.weight" in lines[1]
