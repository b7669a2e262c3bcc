"""The tested optimizers and conditions, with options set as in their documentation."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from muon_dist.model import build_model
from muon_dist.optim.groups import param_groups
from muon_dist.optim.muon import Muon
from muon_dist.routing import table_of

LR, MOMENTUM, DECAY = 0.02, 0.95, 0.1
MODEL = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
VOCABULARY = 64
CONDITIONS = ("plain", "accumulation", "clip", "bf16", "fp16", "offload", "resume", "zero gradients")


@dataclass(frozen=True)
class Peer:
    """A published optimizer.

    Attributes:
        name: as on PyPI, or as it is imported.
        package: distribution whose version is shown.
        module: the module that must be importable. frameworks: where it runs according to its documentation: "ddp",
            "fsdp2", "tp", "zero0" to "zero3", "autotp".
        build: makes its optimizers for a model; None for DeepSpeed's own, which the engine makes. rule: rule of the
            witness. asked: requested settings that its groups do not have under names that the witness knows.
            reproduce: one line with which a user makes it.
    """

    name: str
    package: str
    module: str
    frameworks: tuple[str, ...]
    build: Callable[[nn.Module], list[torch.optim.Optimizer]] | None
    reproduce: str
    rule: str = "muon"
    asked: Mapping[str, Any] = field(default_factory=dict)

    @property
    def missing(self) -> str | None:
        """The reason why it cannot run here."""
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            return f"not installed ({error})"
        return None


@dataclass(frozen=True)
class Case:
    """One row of the table. ranks: processes."""

    peer: Peer
    framework: str
    condition: str
    ranks: int = 2

    @property
    def name(self) -> str:
        return f"{self.peer.name}, {self.framework}, {self.condition}"


def make_model() -> nn.Module:
    """A Llama of two layers with seeded weights."""
    return build_model(MODEL, vocab_size=VOCABULARY, seed=0).train()


def hidden(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(hidden matrices, all other parameters), the division in every Muon's documentation."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in model.parameters() if id(p) not in chosen]


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.95), weight_decay=DECAY)


def _torch(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices, others = hidden(model)
    return [torch.optim.Muon(matrices, lr=LR, momentum=MOMENTUM, weight_decay=DECAY), _adamw(others)]


def _ours(model: nn.Module) -> list[torch.optim.Optimizer]:
    groups = param_groups(model, table=table_of(model), lr=LR, weight_decay=DECAY, adamw_lr=3e-3)
    return [Muon(groups, momentum=MOMENTUM, ns_dtype=torch.float32)]


def _keller(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices, others = hidden(model)
    groups = [
        {"params": matrices, "use_muon": True, "lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY},
        {"params": others, "use_muon": False, "lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": DECAY},
    ]
    return [importlib.import_module("muon").MuonWithAuxAdam(groups)]


def _muon_fsdp2(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices, others = hidden(model)
    groups = [
        {"params": matrices, "use_muon": True, "lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY},
        {"params": others, "use_muon": False, "lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": DECAY},
    ]
    return [importlib.import_module("muon_fsdp2").Muon(groups)]


def _dtensor_muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    theirs: Any = importlib.import_module("dtensor_muon.optim.optim")
    if not torch.cuda.is_available():  # its kernel is Triton's
        iteration: Any = importlib.import_module("dtensor_muon.orthogonalize.orthogonalize")
        theirs.zeropower = functools.partial(iteration.zeropower, use_triton=False)
    matrices, others = hidden(model)
    groups = [{"params": matrices, "algorithm": "muon"}, {"params": others, "algorithm": "adamw"}]
    return [theirs.Muon(groups, lr=LR, wd=DECAY, momentum=MOMENTUM)]


def _dion(name: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices, others = hidden(model)
    first: Any = matrices[0]
    mesh = first.device_mesh if hasattr(first, "device_mesh") else dist.group.WORLD
    groups = [{"params": matrices}, {"params": others, "algorithm": "adamw", "lr": 3e-3}]
    kind = getattr(importlib.import_module("dion"), name)
    return [kind(groups, distributed_mesh=mesh, lr=LR, mu=MOMENTUM, weight_decay=DECAY)]


ZERO = ("zero0", "zero1", "zero2", "zero3")
PEERS: tuple[Peer, ...] = (
    Peer("muon_dist.Muon", "muon-dist", "muon_dist", ("ddp", "fsdp2", *ZERO), _ours,
         "muon_dist.Muon(muon_dist.param_groups(model))"),
    Peer("torch.optim.Muon", "torch", "torch", ("ddp", "fsdp2", "tp"), _torch, "torch.optim.Muon(matrices)"),
    Peer("DeepSpeed Muon", "deepspeed", "deepspeed", (*ZERO, "autotp"), None,
         '"optimizer": {"type": "Muon", ...} in the DeepSpeed configuration', asked={"nesterov": True}),
    Peer("muon-optimizer", "muon-optimizer", "muon", ("ddp",), _keller, "muon.MuonWithAuxAdam(groups)",
         asked={"nesterov": True}),
    Peer("muon-fsdp2", "muon-fsdp2", "muon_fsdp2", ("fsdp2",), _muon_fsdp2, "muon_fsdp2.Muon(groups)"),
    Peer("dtensor-muon", "dtensor-muon", "dtensor_muon", ("fsdp2",), _dtensor_muon, "dtensor_muon.Muon(groups)"),
    Peer("dion.Muon", "dion", "dion", ("ddp", "fsdp2"), functools.partial(_dion, "Muon"),
         "dion.Muon(groups, distributed_mesh=mesh)"),
    Peer("dion.NorMuon", "dion", "dion", ("ddp", "fsdp2"), functools.partial(_dion, "NorMuon"),
         "dion.NorMuon(groups, distributed_mesh=mesh)", rule="normuon"),
)  # fmt: skip


def cases() -> Iterator[Case]:
    """Every optimizer with every framework of its documentation and every condition that exists there."""
    for peer in PEERS:
        for framework in peer.frameworks:
            engine = framework.startswith("zero") or framework == "autotp"
            for condition in CONDITIONS:
                if condition == "fp16" and not engine:
                    continue  # torch's loops keep fp32 weights under fp16 autocast
                if condition == "offload" and framework in ("zero0", "autotp", "ddp", "fsdp2", "tp"):
                    continue
                if framework in ("tp", "autotp") and condition not in ("plain", "clip"):
                    continue
                yield Case(peer, framework, condition)
