"""`split: heads`: found in transformers' models without a pattern, exact on every layout, and without traffic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # 2 s that every forked rank would pay again
import transformers as hf
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from muon_dist import Muon, param_groups
from muon_dist.errors import RoutingError
from muon_dist.optim.rules.entries import split_rules
from muon_dist.routing import route
from tests.distributed import run_ranks
from tests.optim.plain_rules import PlainRule

SMALL: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
WIDE: dict[str, Any] = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 2}
LATENT: dict[str, Any] = {
    "moe_intermediate_size": 8, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 2, "qk_nope_head_dim": 4,
    "v_head_dim": 5, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}  # fmt: skip
# For each model, what its projections are cut into: (count, outputs, inputs) block after block.
MODELS: dict[str, tuple[Any, dict[str, list[tuple[int, int, int]]]]] = {
    "Llama, grouped queries": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE)),
        {"q_proj": [(4, 4, 16)], "k_proj": [(2, 4, 16)], "v_proj": [(2, 4, 16)], "o_proj": [(4, 16, 4)],
         "down_proj": [(1, 16, 24)]},
    ),
    "Qwen3, heads of another width": (
        lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**WIDE, head_dim=6)),
        {"q_proj": [(4, 6, 16)], "k_proj": [(2, 6, 16)], "o_proj": [(4, 16, 6)]},
    ),
    "GPT-2, stored (in, out)": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=4)),
        {"c_attn": [(12, 4, 16)], "attn.c_proj": [(4, 16, 4)], "mlp.c_proj": [(1, 16, 64)]},
    ),
    "Phi-3, fused QKV and gate-up": (
        lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**WIDE, pad_token_id=0)),
        {"qkv_proj": [(8, 4, 16)], "o_proj": [(4, 16, 4)], "gate_up_proj": [(2, 24, 16)]},
    ),
    "GPT-NeoX, interleaved QKV": (
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL, intermediate_size=24)),
        {"query_key_value": [(12, 4, 16)], "attention.dense": [(4, 16, 4)]},
    ),
    "Mixtral, experts": (
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**WIDE, num_local_experts=3)),
        {"q_proj": [(4, 4, 16)], "experts.gate_up_proj": [(6, 24, 16)], "experts.down_proj": [(3, 16, 24)]},
    ),
    "gpt-oss, interleaved gate-up": (
        lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**WIDE, head_dim=4, num_local_experts=3)),
        {"o_proj": [(4, 16, 4)], "experts.gate_up_proj": [(3, 48, 16)]},
    ),
    "DeepSeek-V3, latent attention": (
        lambda: hf.DeepseekV3ForCausalLM(
            hf.DeepseekV3Config(**{**WIDE, "num_key_value_heads": 4, "num_hidden_layers": 2}, **LATENT)
        ),
        {"q_a_proj": [(1, 12, 16)], "q_b_proj": [(1, 4, 12), (1, 2, 12)] * 4,
         "kv_a_proj_with_mqa": [(1, 8, 16), (1, 2, 16)], "kv_b_proj": [(1, 4, 8), (1, 5, 8)] * 4,
         "o_proj": [(4, 16, 5)]},
    ),
    "BERT, output in another module": (
        lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL, intermediate_size=24)),
        {"self.query": [(4, 4, 16)], "attention.output.dense": [(4, 16, 4)], "0.output.dense": [(1, 16, 24)]},
    ),
    "Falcon, one key": (
        lambda: hf.FalconForCausalLM(hf.FalconConfig(**SMALL)),
        {"query_key_value": [(6, 4, 16)], "self_attention.dense": [(4, 16, 4)]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_heads_are_found_in_the_model(name):
    make, expected = MODELS[name]
    table = route(make(), splits=split_rules("heads"))
    for part, blocks in expected.items():
        routes = [r for r in table.routes if r.fqn.removesuffix(".weight").endswith(part)]
        assert routes, part
        for r in routes:
            assert [(g.count, g.rows, g.columns) for g in r.matrices()] == blocks, r.fqn


def test_an_entry_restricts_where_heads_are_cut():
    groups = [{"pattern": r".*\.q_proj", "split": "heads"}]
    cuts = {n: c for g in param_groups(MODELS["Llama, grouped queries"][0](), groups=groups) if "cuts" in g
            for n, c in zip(g["param_names"], g["cuts"], strict=True)}  # fmt: skip
    heads = {n.split(".")[-2] for n, c in cuts.items() if c.get("heads")}
    assert heads == {"q_proj"}


class Blind(nn.Module):
    """Attention whose source does not show an output."""

    head_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.query, self.output = nn.Linear(16, 16), nn.Linear(16, 16)


def test_what_cannot_be_found_is_refused_by_name():
    with pytest.raises(RoutingError, match=r"belong to no known attention.*heads: N"):
        route(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)), splits=split_rules("heads"))
    blind = type("BlindAttention", (Blind,), {})()
    model = nn.Sequential(blind, nn.Linear(16, 4))
    with pytest.raises(RoutingError, match=r"the source of 0 .BlindAttention. does not show which projection"):
        route(model, splits=split_rules("heads"), overrides=[])


# Steps --------------------------------------------------------------------------------------------------------------

SHAPES = {"q": (32, 24), "o": (24, 32), "conv1d": (32, 24)}
CUTS = {
    "q": {"heads": 4},
    "o": {"heads": 4, "axis": "inputs"},
    "conv1d": {"heads": 4, "axis": "inputs", "transposed": True},
}


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def stepped(mesh_shape: tuple[int, ...], of_tp: dict[str, int], of_fsdp: dict[str, int]) -> tuple[Any, list[bool]]:
    """Weights after 4 steps, and whether anything was gathered or scattered in a step."""
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp", "tp")[: len(mesh_shape)])
    model = nn.Module()
    for name, weight in gradients(100).items():
        if "tp" in (mesh.mesh_dim_names or ()):
            weight = distribute_tensor(weight, mesh["tp"], [Shard(of_tp[name])])
        model.register_parameter(name, nn.Parameter(weight))
    fully_shard(
        model,
        mesh=mesh["dp"],
        shard_placement_fn=lambda p: next(Shard(of_fsdp[n]) for n, q in model.named_parameters() if q is p),
    )
    named: dict[str, Any] = dict(model.named_parameters())
    group = {"params": list(named.values()), "param_names": list(named), "cuts": [CUTS[n] for n in named]}
    optimizer = Muon([group], lr=0.02)
    for step in range(4):
        for name, g in gradients(step).items():
            p = named[name]
            whole = DTensor.from_local(g, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
            p.grad = whole.redistribute(placements=p.placements)
        optimizer.step()
    assert optimizer.runtime is not None
    buckets = [b for program in optimizer.runtime.programs() for b in program.buckets]
    found = {n: p.full_tensor().detach() for n, p in named.items()}
    return found, [b.gather is not None or b.scatter is not None for b in buckets]


ALONG = {"q": 0, "o": 1, "conv1d": 0}
"""The axis of the heads, as it is stored."""
ACROSS = {"q": 1, "o": 0, "conv1d": 1}


@pytest.mark.parametrize(
    ("mesh", "of_tp", "of_fsdp", "sends"),
    [
        ((2,), {}, ALONG, False),
        ((2, 2), ALONG, ALONG, False),
        ((2, 2), ALONG, ACROSS, True),
        ((3,), {}, {"q": 0, "o": 0, "conv1d": 0}, True),
    ],
    ids=["heads of each rank", "heads over two axes", "heads cut across", "heads cut by 3 ranks"],
)
def test_heads_are_exact_and_stay_where_they_are_whole(mesh, of_tp, of_fsdp, sends):
    plain = PlainRule(gradients(100), CUTS, "muon", lr=0.02, weight_decay=0.1)
    for step in range(4):
        plain.step(gradients(step))
    for found, sent in run_ranks(stepped, torch.Size(mesh).numel(), mesh, of_tp, of_fsdp):
        for name, wanted in plain.weights.items():
            assert float((found[name].double() - wanted).norm() / wanted.norm()) <= 1e-6, name
        assert any(sent) == sends
