"""What one version of muon_dist does on every layout: digests of weights and momentum, bytes, collectives, calls.

Run as a file with the version's root in PYTHONPATH: it imports nothing of the tests, and of muon_dist only what the
base version has as well. Prints one JSON object: case -> ranks -> figures.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from typing import Any

os.environ.update(DS_ACCELERATOR="cpu", TORCHDYNAMO_DISABLE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(tempfile.gettempdir(), f"muon_dist_ext_{os.getuid()}"))

import deepspeed
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from deepspeed.utils import logger
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

import muon_dist
from muon_dist.adapters import deepspeed_state, module_state
from muon_dist.bench.ranks import run_ranks
from muon_dist.routing import SplitRule

logger.setLevel("ERROR")
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

STEPS = 5
# Sizes that 2, 3 and 4 do not divide, so that slices cut through rows; heads, strided thirds and experts.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "hidden_size": 20, "intermediate_size": 26, "num_hidden_layers": 2,
              "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6, "max_position_embeddings": 16},
    "gpt2": {"model_type": "gpt2", "n_embd": 20, "n_layer": 2, "n_head": 2, "n_positions": 16,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "mixtral": {"model_type": "mixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2},
}  # fmt: skip
SPLITS = {"llama": (SplitRule(r".*q_proj\.weight", heads=2),)}
LAYOUTS = ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2", "hsdp")
# (layout, model, dtype, options of Muon)
CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    *((layout, model, "fp32", {}) for layout in LAYOUTS for model in MODELS),
    *((layout, "llama", "fp32", {"bucket_mb": 0.005}) for layout in LAYOUTS),
    *((layout, "gpt2", "fp32", {"nesterov": False, "owner_policy": "round_robin"}) for layout in LAYOUTS),
    *((layout, "llama", "fp32", {"wire_dtype": torch.bfloat16, "overlap": False}) for layout in LAYOUTS),
    *((layout, "llama", "fp32", {"ns_dtype": torch.bfloat16}) for layout in LAYOUTS),
    *((layout, "llama", "bf16", {}) for layout in ("zero0", "zero1", "zero2", "zero3")),
    *((layout, "llama", "bf16", {"ns_dtype": torch.bfloat16}) for layout in ("ddp", "fsdp2", "hsdp")),
]


def name_of(layout: str, model: str, dtype: str, options: dict[str, Any]) -> str:
    shown = ", ".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in options.items())
    return f"{layout} {model} {dtype}{' ' + shown if shown else ''}"


def make_model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(vocab_size=37, **MODELS[kind]))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model.train()


def batch(step: int) -> torch.Tensor:
    rows = torch.randint(0, 37, (12, 8), generator=torch.Generator().manual_seed(step))
    return rows.chunk(dist.get_world_size())[dist.get_rank()]


def make_muon(model: torch.nn.Module, kind: str, options: dict[str, Any]) -> Any:
    groups = muon_dist.param_groups(model, lr=0.02, weight_decay=0.1, adamw_lr=3e-3, splits=SPLITS.get(kind, ()))
    return muon_dist.Muon(groups, **{"ns_dtype": torch.float32, **options})


def train_module(layout: str, kind: str, dtype: str, options: dict[str, Any]) -> tuple[Any, Any]:
    model: Any = make_model(kind)
    if dtype == "bf16":
        model = model.bfloat16()
    world = dist.get_world_size()
    if layout == "ddp":
        wrapped: Any = DistributedDataParallel(model, find_unused_parameters=kind == "mixtral")
    else:
        shape = (world,) if layout == "fsdp2" else (2, world // 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        wrapped = fully_shard(model, mesh=mesh)
    optimizer = make_muon(model, kind, options)
    for step in range(STEPS):
        tokens = batch(step)
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, module_state.holding(model, optimizer, world)


def train_engine(layout: str, kind: str, dtype: str, options: dict[str, Any]) -> tuple[Any, Any]:
    deepspeed.init_distributed("gloo", verbose=False)
    model = make_model(kind)
    optimizer = make_muon(model, kind, options)
    stage = int(layout[-1])
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 12 // dist.get_world_size(),
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 2000},
        "steps_per_print": 10**9,
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(STEPS):
        tokens = batch(step)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    return optimizer, deepspeed_state.holding(engine)


def run(case: tuple[str, str, str, dict[str, Any]]) -> dict[str, Any]:
    layout, kind, dtype, options = case
    train = train_engine if layout.startswith("zero") else train_module
    optimizer, held = train(layout, kind, dtype, options)
    digests = {}
    for wanted in ("weight", "momentum"):
        state = hashlib.sha256()
        for p in sorted((p for p in held.pieces if p.kind == wanted), key=lambda p: (p.name, p.offset)):
            data = p.tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
            state.update(f"{p.name} {p.offset} {tuple(p.tensor.shape)} ".encode() + data.numpy().tobytes())
        digests[wanted] = state.hexdigest()[:16]
    transport = optimizer.runtime.transport
    return {
        **digests,
        "bytes": transport.bytes_sent,
        "collectives": transport.collectives,
        "calls": optimizer.orthogonalized,
    }


def main(arguments: list[str]) -> None:
    worlds = [int(w) for w in arguments[0].split(",")]
    wanted = arguments[1] if len(arguments) > 1 else ""
    out: dict[str, dict[int, Any]] = {}
    for case in CASES:
        for world in worlds:
            if (case[0] == "hsdp" and world % 2) or wanted not in name_of(*case):
                continue
            out.setdefault(name_of(*case), {})[world] = run_ranks(run, world, case, timeout=240.0)
    print(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1:])
