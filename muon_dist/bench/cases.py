"""The comparisons of a benchmark: models, cases, profiles."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from muon_dist.errors import ConfigError
from muon_dist.model import build_model

LR = 0.02
MOMENTUM = 0.95
SEQUENCE = 32  # tokens per rank in a timed step: few, so that the optimizer takes most of the time
MICRO_BATCH = (
    4,
    128,
)  # (sequences, tokens): timed forward and backward, from which larger steps are computed

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4},
    "quick": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
    "small": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 6},
    "medium": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 16, "num_attention_heads": 8},
    # half of the layers of a Llama 1B, for a GPU
    "half-1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12, "num_attention_heads": 16},
}
VOCABULARY = {"tiny": 256, "quick": 16384, "small": 4096, "medium": 8192, "half-1b": 32768}

NS_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One peer under one sharding, compared with our Muon and AdamW under the same sharding.

    Attributes:
        name: unique, shown.
        peer: name of the other optimizer.
        sharding: "ddp", "fsdp2" or "zero0" to "zero3".
        ns_dtype: dtype of Newton-Schulz on both sides: "fp32", "bf16" or "fp16".
        dtype: of weights and gradients, "fp32" or "bf16" (with fp32 masters).
        offload: optimizer state on the CPU, by DeepSpeed.
        device: of the model, "cpu" or "cuda": the GPU that is chosen in this process.
    """

    name: str
    peer: str
    sharding: str
    ns_dtype: str = "fp32"
    dtype: str = "fp32"
    offload: bool = False
    device: str = "cpu"


DEEPSPEED, TORCH, KELLER = "deepspeed", "torch.optim.Muon", "muon-optimizer"
MUON_FSDP2, DTENSOR_MUON = "muon-fsdp2", "dtensor-muon"

# Peers that compute only in bf16 are compared in bf16; DeepSpeed, whose dtype can be set, in fp32 and in its default,
# fp16.
_PEERS = (
    Case("DDP", TORCH, "ddp", "bf16"),
    Case("DDP, Keller Jordan's", KELLER, "ddp", "bf16"),
    Case("FSDP2", MUON_FSDP2, "fsdp2", "bf16"),
    Case("FSDP2, DTensor", DTENSOR_MUON, "fsdp2", "bf16"),
)
_ZERO = tuple(Case(f"ZeRO-{stage}", DEEPSPEED, f"zero{stage}") for stage in (1, 2, 3))
_MORE = (
    Case("ZeRO-0", DEEPSPEED, "zero0"),
    Case("ZeRO-1, fp16 iteration", DEEPSPEED, "zero1", "fp16"),
    Case("ZeRO-3, fp16 iteration", DEEPSPEED, "zero3", "fp16"),
    Case("ZeRO-1, bf16 weights", DEEPSPEED, "zero1", dtype="bf16"),
    Case("ZeRO-3, bf16 weights", DEEPSPEED, "zero3", dtype="bf16"),
    Case("ZeRO-2, offload", DEEPSPEED, "zero2", offload=True),
    Case("ZeRO-3, offload", DEEPSPEED, "zero3", offload=True),
)
# The defaults: on a GPU our Muon and DeepSpeed's iterate in fp16, the others in bf16.
_GPU = (
    _PEERS[0],
    *(Case(f"{c.name}, ours in fp16", c.peer, c.sharding, "fp16") for c in _PEERS),
    *_MORE[1:3],
)


@dataclass(frozen=True)
class Profile:
    """The amount of measurement.

    Attributes:
        model: name in MODELS.
        rounds: timed steps of each side.
        exact_layers: layers whose updates are compared with the exact ones; None for all.
        tokens_per_step: step sizes for which the optimizer's share is computed; empty: it is not measured.
    """

    model: str
    cases: tuple[Case, ...]
    rounds: int
    exact_layers: int | None
    tokens_per_step: tuple[int, ...] = (8192, 65536)


PROFILES = {
    "ci": Profile("tiny", (_ZERO[0], _ZERO[2], *_PEERS), 1, None, ()),
    "quick": Profile("quick", (*_ZERO, *_PEERS), 3, 1),
    # for slow links, where a step takes long and only the link matters
    "link": Profile("small", (*_ZERO, *_PEERS), 2, 1, ()),
    "full": Profile("small", (*_ZERO, *_PEERS, *_MORE), 5, 2),
    "gpu": Profile("half-1b", _GPU, 10, 1, ()),
}


def select(profile: str, only: Sequence[str], peers: Sequence[str]) -> tuple[Case, ...]:
    """The cases of `profile` that have one of `only` in their names and one of `peers` as their peer.

    Raises ConfigError for an unknown profile, and for a word that selects nothing.
    """
    if profile not in PROFILES:
        raise ConfigError(f"--profile {profile!r} is unknown: use {', '.join(PROFILES)}")
    cases = PROFILES[profile].cases
    for option, words, known in (
        ("--only", only, [c.name for c in cases]),
        ("--peers", peers, sorted({c.peer for c in cases})),
    ):
        for word in words:
            if not any(word in name for name in known):
                raise ConfigError(f"{option} {word!r}: profile {profile} has {', '.join(known)}")
    return tuple(
        c
        for c in cases
        if (not only or any(word in c.name for word in only)) and (not peers or any(word in c.peer for word in peers))
    )


def make_model(name: str, device: str = "cpu") -> nn.Module:
    """The Llama of that name; its seeded weights are exact in bf16, so every dtype starts with the same weights."""
    return copy.deepcopy(_drawn(name, device))


@functools.lru_cache(maxsize=1)
def _drawn(name: str, device: str) -> nn.Module:
    settings: Mapping[str, Any] = {
        "model_type": "llama",
        "num_key_value_heads": MODELS[name]["num_attention_heads"],
        "max_position_embeddings": 2048,
        **MODELS[name],
    }
    model = build_model(settings, vocab_size=VOCABULARY[name], seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    return model.train().to(device)


def tokens(name: str, seed: int, shape: tuple[int, int] = (1, SEQUENCE)) -> torch.Tensor:
    """Random tokens for the model of that name."""
    return torch.randint(0, VOCABULARY[name], shape, generator=torch.Generator().manual_seed(seed))
