"""Muon with QK-clip in plain fp64 on one process: logits head by head under masks written here, rows named by hand.

Nothing of muon_dist's QK-clip is used, only the plain Newton-Schulz of `optim.reference`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from muon_dist.optim.reference import plain_newton_schulz

VOCABULARY, LENGTH, SAMPLES, STEPS = 48, 9, 6, 6
LR, DECAY, ADAMW_LR = 0.02, 0.1, 0.01
EPS = 1e-4  # AdamW would blow rounding up where the true gradient is zero, as that of a key's bias is
_LLAMA: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip
_MLA: dict[str, Any] = {
    **_LLAMA, "num_key_value_heads": 4, "head_dim": 2, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "v_head_dim": 3,
    "qk_rope_head_dim": 2, "first_k_dense_replace": 2, "n_routed_experts": 2, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 1, "moe_intermediate_size": 8,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 3},
    "qwen2": _LLAMA,
    "olmo2": _LLAMA,
    "cohere": {**_LLAMA, "use_qk_norm": True},
    "phi3": _LLAMA,
    "gpt_neox": {**_LLAMA, "num_key_value_heads": 4, "hidden_dropout": 0.0},
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16, "initializer_range": 0.3,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "deepseek_v3": {**_MLA, "q_lora_rank": 8},
    "deepseek_v2": {**_MLA, "q_lora_rank": None},
}  # fmt: skip
THRESHOLDS = {"olmo2": 1.9, "cohere": 2.2}
"""Such that some heads are clipped and some are not; 2 for the others."""


def make_model(kind: str, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    settings = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **KINDS[kind]}
    if kind != "gpt2":
        settings["max_position_embeddings"] = 16
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, tie_word_embeddings=False, **settings), attn_implementation=attention
    )
    with torch.no_grad():  # transformers starts biases and norms at constants
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.train()


def batch(step: int) -> dict[str, torch.Tensor]:
    """Samples of several lengths, padded at the end."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, VOCABULARY, (SAMPLES, LENGTH), generator=generator)
    real = torch.arange(LENGTH) < torch.randint(4, LENGTH + 1, (SAMPLES, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": real.long(), "labels": torch.where(real, ids, -100)}


def loss_of(model: Any, inputs: dict[str, torch.Tensor], total: int) -> torch.Tensor:
    """The sum over the labels of `inputs`, divided by those of the whole batch."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    wanted = inputs["labels"][:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted, reduction="sum") / total


def labels_in(inputs: dict[str, torch.Tensor]) -> int:
    return int((inputs["labels"][:, 1:] != -100).sum())


class Plain:
    """A model in fp64 and its steps. threshold: None leaves QK-clip out."""

    def __init__(self, kind: str, threshold: float | None) -> None:
        self.kind, self.threshold = kind, threshold
        self.maxima: dict[str, list[float]] = {}
        self.history: list[dict[str, list[float]]] = []
        self.real = torch.empty(0)
        AttentionInterface.register("plain_logits", self._attention)
        self.model = make_model(kind)
        self.model.set_attn_implementation("plain_logits")
        self.model = self.model.double()
        self.names = {module: name for name, module in self.model.named_modules()}
        every = dict(self.model.named_parameters())
        outside = ("embed", "lm_head", "wte", "wpe")
        self.muon = {n: p for n, p in every.items() if p.dim() == 2 and not any(part in n for part in outside)}
        if kind == "cohere":
            self.muon = {n: p for n, p in self.muon.items() if "norm" not in n}
        self.momentum = {n: torch.zeros_like(p) for n, p in self.muon.items()}
        rest = [p for n, p in every.items() if n not in self.muon]
        self.adamw = torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.95), eps=EPS, weight_decay=0.0)

    def _attention(self, module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> Any:
        window = KINDS[self.kind].get("sliding_window", LENGTH)
        ahead = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        seen = (ahead >= 0) & (ahead < window) & self.real[:, None, :]
        shared = q.shape[1] // k.shape[1]
        outputs, largest = [], []
        for head in range(q.shape[1]):
            logits = torch.einsum("btd,bsd->bts", q[:, head], k[:, head // shared]) * scaling
            logits = torch.where(seen, logits, -math.inf)
            largest.append(float(logits.detach().max()))
            weights = torch.softmax(logits.clamp(min=-1e30), dim=-1)  # finite for padding that sees no key
            outputs.append(weights @ v[:, head // shared])
        self.maxima[self.names[module]] = largest
        return torch.stack(outputs, dim=2), None

    def step(self, step: int) -> None:
        inputs = batch(step)
        self.real = inputs["attention_mask"].bool()
        self.model.zero_grad()
        loss_of(self.model, inputs, labels_in(inputs)).backward()
        with torch.no_grad():
            for name, p in self.muon.items():
                assert p.grad is not None
                self.momentum[name].lerp_(p.grad, 0.05)
                update = p.grad.lerp(self.momentum[name], 0.95)
                direction = plain_newton_schulz(update)
                p.mul_(1 - LR * DECAY).sub_(0.2 * math.sqrt(max(p.shape)) * LR * direction)
        self.adamw.step()
        self.history.append(dict(self.maxima))
        if self.threshold is not None:
            with torch.no_grad():
                for layer, largest in self.maxima.items():
                    self._clip(self.model.get_submodule(layer), largest)

    def _clip(self, attention: Any, largest: list[float]) -> None:
        """Rows of heads, written down for each kind."""
        heads, config = len(largest), self.model.config
        groups = heads if self.kind in ("gpt2", "gpt_neox") else config.num_key_value_heads
        shared = heads // groups
        size = 6
        for group in range(groups):
            top = max(largest[group * shared : (group + 1) * shared])
            assert self.threshold is not None
            root = math.sqrt(min(1.0, self.threshold / top)) if top > 0 else 1.0
            queries = slice(group * shared * size, (group + 1) * shared * size)
            keys = slice(group * size, (group + 1) * size)
            if self.kind in ("llama", "mistral", "qwen2"):
                for p in attention.q_proj.parameters():
                    p[queries] *= root
                for p in attention.k_proj.parameters():
                    p[keys] *= root
            elif self.kind == "olmo2":
                attention.q_norm.weight[queries] *= root
                attention.k_norm.weight[keys] *= root
            elif self.kind == "cohere":
                attention.q_norm.weight[group * shared : (group + 1) * shared] *= root
                attention.k_norm.weight[group] *= root
            elif self.kind == "phi3":
                attention.qkv_proj.weight[queries] *= root
                attention.qkv_proj.weight[24:36][keys] *= root
            elif self.kind == "gpt2":
                attention.c_attn.weight[:, queries] *= root
                attention.c_attn.weight[:, 24:48][:, keys] *= root
                attention.c_attn.bias[queries] *= root
                attention.c_attn.bias[24:48][keys] *= root
            elif self.kind == "gpt_neox":
                for p in attention.query_key_value.parameters():
                    p[18 * group : 18 * group + 12] *= root
            else:
                query = attention.q_proj if self.kind == "deepseek_v2" else attention.q_b_proj
                query.weight[6 * group : 6 * group + 4] *= root
                query.weight[6 * group + 4 : 6 * group + 6] *= root**2
                attention.kv_b_proj.weight[7 * group : 7 * group + 4] *= root


def plain_weights(kind: str, threshold: float | None) -> tuple[dict[str, torch.Tensor], list[dict[str, list[float]]]]:
    """(weights after STEPS steps, maxima of every step by attention module)."""
    plain = Plain(kind, threshold)
    for step in range(STEPS):
        plain.step(step)
    return {n: p.detach() for n, p in plain.model.named_parameters()}, plain.history
