"""Models that transformers shards at load time: tensor, expert and data parallelism on one mesh, one exact step.

Beside the large matrices these hold norms and routers that lie on a part of the mesh, or are plain tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, DistributedConfig

from muon_dist import Muon, param_groups
from muon_dist.adapters import module_state
from muon_dist.checkpoint import Contents, Saver, open_checkpoint
from muon_dist.checkpoint import load as load_checkpoint
from muon_dist.layout import cut_parameter
from muon_dist.numerics import newton_schulz
from muon_dist.optim.reference import reference_step
from muon_dist.ranks import Ranks
from tests.distributed import run_ranks

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi3": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}
STEPS, LR = 3, 0.02


def saved(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SIZES, **MODELS[name])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def full(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def stepped(folder: Path, mesh: dict[str, int], rank_batches: bool) -> tuple[float, int, int]:
    """(largest difference from a plain reference on whole tensors with the same gradients, matrices, matrices
    orthogonalized here)."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(**mesh), dtype=torch.float32
    )
    groups = param_groups(model, lr=LR, weight_decay=0.1)
    optimizer = Muon(groups, ns_dtype=torch.float32)
    muon = next(g for g in groups if g["algorithm"] == "muon")
    cuts = muon.get("cuts") or [{}] * len(muon["params"])
    named = dict(zip(muon["param_names"], muon["params"], strict=True))
    matrices = {n: cut_parameter(n, tuple(p.shape), **cut) for (n, p), cut in zip(named.items(), cuts, strict=True)}
    truth = {n: full(p) for n, p in named.items()}
    momentum = {n: torch.zeros_like(w) for n, w in truth.items()}
    seed = dist.get_rank() // mesh.get("tp_size", 1) if rank_batches else 0
    for step in range(STEPS):
        ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(100 * seed + step))
        model(input_ids=ids, labels=ids).loss.backward()
        for n, p in named.items():
            gradient = full(p.grad)
            reference_step(
                truth[n], gradient, momentum[n], matrices[n], lr=LR, weight_decay=0.1, iteration=newton_schulz
            )
        optimizer.step()
        optimizer.zero_grad()
    difference = max(float((full(p) - truth[n]).abs().max()) for n, p in named.items())
    return difference, sum(map(len, matrices.values())), optimizer.orthogonalized


@pytest.mark.parametrize(
    ("name", "ranks", "mesh"),
    [
        ("phi3", 2, {"tp_size": 2}),
        ("qwen3_moe", 2, {"tp_size": 2, "ep_size": 2}),
        ("mixtral", 4, {"tp_size": 2, "fsdp_size": 2}),
        ("qwen3_moe", 4, {"tp_size": 2, "fsdp_size": 2, "ep_size": 4}),
        pytest.param("llama", 8, {"tp_size": 2, "fsdp_size": 2, "dp_replicate_size": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_step_is_that_of_whole_tensors(name: str, ranks: int, mesh: dict[str, int], tmp_path: Path) -> None:
    found = run_ranks(stepped, ranks, saved(name, tmp_path), mesh, "fsdp_size" in mesh)
    assert max(difference for difference, *_ in found) == 0.0
    assert sum(calls for *_, calls in found) == STEPS * found[0][1]


def batches(step: int) -> torch.Tensor:
    return torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(step))


def trained(
    folder: Path, mesh: dict[str, int], first: int, saved_in: Path | None, load: bool
) -> dict[str, torch.Tensor]:
    """Whole weights after two steps from `first` on, after a load from `saved_in` or before a save into it."""
    options = {"distributed_config": DistributedConfig(**mesh)} if mesh else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    optimizer = Muon(param_groups(model, lr=LR, weight_decay=0.1), ns_dtype=torch.float32)
    ranks = Ranks(dist.group.WORLD)
    if load and saved_in is not None:
        checkpoint = open_checkpoint(saved_in / "checkpoint-2", ranks)
        held = module_state.holding(model, optimizer, dist.get_world_size(), source=checkpoint)
        load_checkpoint(checkpoint, held, ranks)
    for step in range(first, first + 2):
        ids = batches(step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if not load and saved_in is not None:
        held = module_state.holding(model, optimizer, dist.get_world_size())
        Saver(saved_in, ranks).save(held.pieces, Contents(2, held.layout))
    return {n: full(p) for n, p in model.named_parameters()}


def test_a_checkpoint_goes_on_under_another_mesh(tmp_path: Path) -> None:
    """Saved under tensor parallelism below fully_shard with routers on a part of the mesh; loaded by others."""
    folder = saved("mixtral", tmp_path / "model")
    here = {"tp_size": 2, "fsdp_size": 2}
    run_ranks(trained, 4, folder, here, 0, tmp_path / "run", False)
    [wanted, *_] = run_ranks(trained, 4, folder, here, 2, tmp_path / "run", True)
    for ranks, mesh in ((2, {"fsdp_size": 2}), (2, {"tp_size": 2}), (1, {})):
        for found in run_ranks(trained, ranks, folder, mesh, 2, tmp_path / "run", True):
            assert found.keys() == wanted.keys()
            for n, w in wanted.items():
                assert torch.allclose(found[n], w, rtol=0, atol=2e-5), (n, mesh)


def flattened() -> tuple[float, int, int]:
    """As `stepped`: `fully_shard` over dp_shard x cp as one axis, which is how ring attention lies; each rank has
    samples, or a part of a sample, of its own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "cp"))
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(*sides, bias=False) for sides in ((10, 7), (7, 10), (10, 10))))
    fully_shard(model, mesh=mesh["dp_shard", "cp"]._flatten("dp_shard_cp"))
    named = dict(model.named_parameters())
    optimizer = Muon(param_groups(model, lr=LR, weight_decay=0.1), ns_dtype=torch.float32)
    matrices = {n: cut_parameter(n, tuple(p.shape)) for n, p in named.items()}
    truth = {n: full(p) for n, p in named.items()}
    momentum = {n: torch.zeros_like(w) for n, w in truth.items()}
    for step in range(STEPS):
        x = torch.randn(4, 10, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        (model(x) - x).square().mean().backward()
        for n, p in named.items():
            reference_step(
                truth[n], full(p.grad), momentum[n], matrices[n], lr=LR, weight_decay=0.1, iteration=newton_schulz
            )
        optimizer.step()
        optimizer.zero_grad()
    return max(float((full(p) - truth[n]).abs().max()) for n, p in named.items()), 3, optimizer.orthogonalized


def test_the_layout_of_context_parallelism_is_exact() -> None:
    """Its attention has no CPU kernel, so that this is all of it that runs here."""
    found = run_ranks(flattened, 4)
    assert max(difference for difference, *_ in found) == 0.0
    assert sum(calls for *_, calls in found) == STEPS * found[0][1]
