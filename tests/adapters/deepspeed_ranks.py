"""What the DeepSpeed tests run on each rank: tiny models, an engine, and the single-process truth beside it."""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(tempfile.gettempdir(), f"muon_dist_ext_{os.getuid()}"))

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as ds_logger
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import muon_dist
from muon_dist.numerics import newton_schulz
from muon_dist.optim.muon import Muon
from muon_dist.optim.reference import reference_step
from muon_dist.ownership import OwnershipPlan
from muon_dist.routing import route

ds_logger.setLevel("ERROR")
# Built by JIT at init otherwise: 40 s, and a lock file that hangs later runs when killed.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# Not every CPU has fp16, and DeepSpeed refuses it where torch says so. MUON_DIST_TEST_FP16=unsupported makes this CPU
# such a one; =emulated lets torch compute fp16 in software, so that these tests run on every CPU.
_FP16 = os.environ.get("MUON_DIST_TEST_FP16", "")
assert _FP16 in ("", "unsupported", "emulated"), f"MUON_DIST_TEST_FP16 is {_FP16!r}"
if _FP16:
    get_accelerator().is_fp16_supported = lambda: _FP16 == "emulated"


def why_no_fp16() -> str | None:
    """Why tests marked `fp16` cannot run here; None if they can."""
    return None if get_accelerator().is_fp16_supported() else "this CPU has no fp16, so that DeepSpeed refuses it"


def split_fp16(cases: list[Case]) -> list[Any]:
    """Parameters of a test: the cases that run on every CPU, and by themselves those that need fp16."""
    half = [case for case in cases if case.dtype == "fp16"]
    others = [case for case in cases if case.dtype != "fp16"]
    return [pytest.param(others, id="others"), pytest.param(half, id="fp16", marks=pytest.mark.fp16)]


SEQUENCE = 12
GLOBAL_BATCH = 16
VOCABULARY = 61

# Odd sizes, so that slices cut through rows and 2 or 4 ranks divide nothing evenly.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "hidden_size": 24, "intermediate_size": 50, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 20, "n_layer": 2, "n_head": 2, "n_positions": 16,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "mixtral": {
        "model_type": "mixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One engine to run. `zero` and `config` are merged into the DeepSpeed configuration."""

    stage: int
    dtype: str = "fp32"
    accumulation: int = 1
    model: str = "llama"
    steps: int = 3
    lr: float = 0.02
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    muon: dict[str, Any] = field(default_factory=dict)
    attach: bool = False
    zero_init: bool = False


def model_config(name: str, **changes: Any) -> Any:
    settings = {**MODELS[name], "vocab_size": VOCABULARY, "max_position_embeddings": 32, **changes}
    if settings["model_type"] == "gpt2":
        settings.pop("max_position_embeddings")
    return AutoConfig.for_model(**settings)


def make_model(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(model_config(name, **changes))
    with torch.no_grad():  # transformers starts biases and norms at constants: move them, so that slices differ
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model.train()


def make_muon(model: nn.Module, case: Case) -> Muon:
    decay = None if case.muon.get("rule") == "hyperball" else 0.1
    groups = muon_dist.param_groups(model, lr=case.lr, weight_decay=decay, adamw_lr=3e-3, adamw_weight_decay=0.05)
    return Muon(groups, ns_dtype=torch.float32, **case.muon)


# What an engine imports when it is made, and what `route` reads of a model's source: here once, else in every
# forked rank again.
for _name in (
    "comm.mori", "module_inject.auto_ep_layer", "ops.triton_ops", "runtime.superoffload.superoffload_stage3",
    "runtime.zero.muon.original_muon", "runtime.zero.stage3", "runtime.zero.stage_1_and_2", "utils.pin_memory",
):  # fmt: skip
    with contextlib.suppress(ImportError):  # another version of DeepSpeed
        importlib.import_module(f"deepspeed.{_name}")
importlib.import_module("muon_dist.adapters.deepspeed.engine")
with torch.random.fork_rng():
    for _name in MODELS:
        route(make_model(_name))


def ds_config(case: Case, world: int) -> dict[str, Any]:
    zero = {"stage": case.stage, **case.zero}
    if case.stage == 3:
        zero.setdefault("stage3_param_persistence_threshold", 0)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // (world * case.accumulation),
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
        **case.config,
    }
    if case.dtype == "bf16":
        config["bf16"] = {"enabled": True, **config.get("bf16", {})}
    if case.dtype == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 8, **config.get("fp16", {})}
    return config


def make_engine(case: Case) -> tuple[Any, Muon]:
    """(engine, our optimizer) with the model of `case`."""
    deepspeed.init_distributed("gloo", verbose=False)
    config = ds_config(case, dist.get_world_size())
    if case.zero_init:
        state = make_model(case.model).state_dict()
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = AutoModelForCausalLM.from_config(model_config(case.model))
        fill(model, state)
    else:
        model = make_model(case.model)
    optimizer = make_muon(model, case)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if case.attach:
        assert muon_dist.attach(engine) is optimizer
    return engine, optimizer


def fill(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Give a model made under zero.Init the weights of one that was not."""
    for name, p in model.named_parameters():
        with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
            if dist.get_rank() == 0:
                p.data.copy_(state[name])


def batch(step: int) -> torch.Tensor:
    """The global batch of one optimizer step."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, VOCABULARY, (GLOBAL_BATCH, SEQUENCE), generator=generator)


def used(step: int) -> torch.Tensor:
    """As much of the batch as the ranks can share evenly."""
    return batch(step)[: GLOBAL_BATCH - GLOBAL_BATCH % dist.get_world_size()]


def backward(engine: Any, step: int, accumulation: int) -> float:
    """All micro-batches of a step but for `engine.step()` of the last; the mean loss of this rank."""
    world, rank = dist.get_world_size(), dist.get_rank()
    parts = used(step).chunk(world * accumulation)
    total = 0.0
    for micro in range(accumulation):
        tokens = parts[micro * world + rank]
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        total += loss.item() / accumulation
        if micro < accumulation - 1:
            engine.step()
    return total


def full_gradient(engine: Any, p: torch.Tensor) -> torch.Tensor:
    """The averaged, unscaled gradient of a whole parameter, by DeepSpeed's own accessors."""
    if hasattr(p, "ds_id"):
        gradient = p._z3_optimizer.get_fp32_grad_for_param(p)
    elif hasattr(p, "_hp_mapping"):
        gradient = p.get_full_hp_grad()
    else:
        gradient = p.grad
    scale = getattr(engine.optimizer, "loss_scale", 1.0) if engine.fp16_enabled() else 1.0
    return gradient.detach().float().reshape(shape_of(p)) / scale


def shape_of(p: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(p, "ds_shape", p.shape))


def master(engine: Any, optimizer: Muon) -> dict[str, torch.Tensor]:
    """fp32 weights of the whole model, by DeepSpeed's own accessors."""
    found = {}
    for name, p in engine.module.named_parameters():
        if engine.zero_optimization():
            found[name] = deepspeed.utils.safe_get_full_fp32_param(p).detach().float().reshape(shape_of(p)).clone()
        elif engine.bfloat16_enabled():
            wrapper = engine.optimizer
            given, kept = chain.from_iterable(wrapper.fp16_groups), chain.from_iterable(wrapper.fp32_groups)
            pairs = zip(given, kept, strict=True)
            found[name] = next(k for g, k in pairs if g is p).detach().clone()
        else:
            found[name] = p.detach().clone()
    return found


class Truth:
    """One process's Muon and AdamW on whole fp32 tensors, by FQN."""

    def __init__(self, weights: dict[str, torch.Tensor], optimizer: Muon) -> None:
        self.weights = {name: nn.Parameter(w.clone()) for name, w in weights.items()}
        self.matrices = {s.name: s.matrices for specs in optimizer.specs for s in specs}
        self.momentum = {n: torch.zeros_like(w) for n, w in weights.items() if self.matrices.get(n)}
        self.options = {
            name: {k: v for k, v in group.items() if k not in ("params", "param_names")}
            for group, specs in zip(optimizer.param_groups, optimizer.specs, strict=True)
            for name in (s.name for s in specs)
        }
        self.adamw = torch.optim.AdamW(
            [
                {"params": [w], "name": n, **{k: self.options[n][k] for k in ("lr", "weight_decay", "betas", "eps")}}
                for n, w in self.weights.items()
                if n in self.options and n not in self.momentum
            ]
        )

    def step(self, gradients: dict[str, torch.Tensor], adamw_factor: float = 1.0) -> None:
        keys = ("lr", "weight_decay", "momentum", "nesterov", "ns_steps", "ns_schedule", "ns_dtype", "scale")
        with torch.no_grad():
            for name, momentum in self.momentum.items():
                options = {k: self.options[name][k] for k in keys}
                steps, schedule, dtype = (options.pop(k) for k in ("ns_steps", "ns_schedule", "ns_dtype"))
                reference_step(
                    self.weights[name], gradients[name], momentum, self.matrices[name], **options,
                    iteration=lambda u, a=steps, b=schedule, c=dtype: newton_schulz(u, a, b, c),
                )  # fmt: skip
        for group in self.adamw.param_groups:
            group["lr"] = self.options[group["name"]]["lr"]
            group["params"][0].grad = gradients[group["name"]] * adamw_factor
        self.adamw.step()

    def error(self, found: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> tuple[float, float]:
        """Relative error of the total update: (largest of any parameter, of all of Muon's as one vector).

        The second for gradients computed elsewhere: AdamW blows rounding up where the true gradient is zero, as that
        of a key's bias is.
        """
        worst, error, size = 0.0, 0.0, 0.0
        for name in self.options:
            wanted = self.weights[name].detach() - start[name]
            difference = found[name] - start[name] - wanted
            worst = max(worst, (difference.norm() / wanted.norm()).item())
            if name in self.momentum:
                error += difference.double().square().sum().item()
                size += wanted.double().square().sum().item()
        return worst, (error / size) ** 0.5


def single_process_gradients(model: nn.Module, weights: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over the global batch, computed at `weights` by one process in fp32."""
    names = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in names.items():
            p.copy_(weights[name])
    model.zero_grad()
    model(input_ids=used(step), labels=used(step)).loss.backward()
    return {name: p.grad.clone() for name, p in names.items()}


@dataclass
class Result:
    same_gradients: float | None  # largest error of a parameter, truth on the gradients that DeepSpeed averaged
    single_process: float | None  # error of the model against a single process with gradients of its own, fp32 only
    momentum: float | None  # error of the momentum as DeepSpeed's accessors find it
    orthogonalized: list[int]  # matrices orthogonalized on this rank, by step
    matrices: int
    momentum_elements: int
    moved: float
    losses: list[float]


def momentum_error(engine: Any, truth: Truth) -> float | None:
    if not engine.zero_optimization():
        return None
    worst = 0.0
    for name, p in engine.module.named_parameters():
        if name in truth.momentum:
            found = deepspeed.utils.safe_get_full_optimizer_state(p, "momentum_buffer").reshape(shape_of(p))
            wanted = truth.momentum[name]
            worst = max(worst, ((found - wanted).norm() / wanted.norm()).item())
    return worst


def run_case(case: Case, accessors: bool = True) -> Result:
    """Train on every rank, compare on the first. `accessors=False` where DeepSpeed's own are wrong."""
    engine, optimizer = make_engine(case)
    rounded = {n: p.detach() for n, p in make_model(case.model).named_parameters()}
    if case.dtype != "fp32":
        low = torch.bfloat16 if case.dtype == "bf16" else torch.float16
        rounded = {n: w.to(low).float() for n, w in rounded.items()}
    start = {n: w.clone() for n, w in rounded.items()}
    truth, alone = Truth(start, optimizer), Truth(start, optimizer)
    lone_model = make_model(case.model)
    judge = dist.get_rank() == 0
    alone_too = judge and case.dtype == "fp32"
    counts, losses = [], []
    for step in range(case.steps):
        losses.append(backward(engine, step, case.accumulation))
        if accessors:
            gradients = {n: full_gradient(engine, p) for n, p in engine.module.named_parameters()}
        before = optimizer.orthogonalized
        engine.step()
        counts.append(optimizer.orthogonalized - before)
        if accessors and judge:
            truth.step(gradients)
        if alone_too:
            alone.step(single_process_gradients(lone_model, {n: w.detach() for n, w in alone.weights.items()}, step))
    if accessors:
        found = master(engine, optimizer)
    else:
        found = whole_model(engine)
    runtime = optimizer.runtime
    assert runtime is not None
    worst_momentum = momentum_error(engine, truth) if accessors else None
    result = Result(
        same_gradients=truth.error(found, start)[0] if accessors and judge else None,
        single_process=alone.error(found, start)[1] if alone_too else None,
        momentum=worst_momentum if judge else None,
        orthogonalized=counts,
        matrices=len(runtime.plan.layout.matrices),
        momentum_elements=sum(m.numel() for m in runtime.momentum.values()),
        moved=max((found[n] - start[n]).norm().item() for n in found),
        losses=losses,
    )
    engine.destroy()
    return result


def whole_model(engine: Any) -> dict[str, torch.Tensor]:
    """The model's own weights, gathered where stage 3 has partitioned them."""
    found = {}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            found[name] = p.detach().float().clone()
    return found


def run_cases(cases: list[Case], accessors: bool = True) -> list[Result]:
    """Several engines in one process, one after another."""
    return [run_case(case, accessors) for case in cases]


def least_bytes(plan: OwnershipPlan) -> int:
    """Bytes that all ranks must send in a step: 2 (N - h) + (c - 1) N fp32 elements for each matrix.

    N: elements of the matrix. h: those that its owner holds. c: copies of the matrix.
    """
    elements = 0
    for m, owner in zip(plan.layout.matrices, plan.owners, strict=True):
        copies = int(m.fragments.length.sum()) // m.matrix.numel
        elements += 2 * (m.matrix.numel - m.held(owner)) + (copies - 1) * m.matrix.numel
    return 4 * elements
