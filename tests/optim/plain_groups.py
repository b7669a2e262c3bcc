"""Groups by pattern for a tiny Llama, and what each parameter must then do, written by hand for one process.

Nothing here is shared with the grammar: `settings` names for each parameter what a reader of GROUPS expects.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.optim.plain_rules import PlainRule

GROUPS: list[dict[str, Any]] = [
    {"pattern": r".*\.q_proj", "lr": 0.013, "rule": "normuon", "rule_options": {"beta2": 0.9}, "split": {"heads": 4}},
    {"pattern": r"model\.layers\.0\..*", "lr": 0.007},
    {"pattern": r".*\.(gate|up)_proj\.weight", "scale": "none", "weight_decay": 0.3},
    {"pattern": r".*\.down_proj", "algorithm": "adamw", "lr": 0.002},
    {"pattern": r"lm_head", "algorithm": "muon", "rule": "hyperball", "lr": 0.01},
    {"pattern": r"model\.embed_tokens|model\.norm", "lr": 0.001, "weight_decay": 0.2},
]
RATES: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "adamw_lr": 0.003, "adamw_weight_decay": 0.05}
VOCABULARY = 37
Tensors = dict[str, torch.Tensor]


def settings(name: str) -> dict[str, Any]:
    """What holds for a parameter under GROUPS and RATES; `rule` is None for AdamW."""
    if "q_proj" in name:  # of layer 0 too: the first match wins
        return {"rule": "normuon", "beta2": 0.9, "lr": 0.013, "weight_decay": 0.1, "heads": 4}
    norm = "norm" in name
    if "layers.0." in name:
        return {"rule": None if norm else "muon", "lr": 0.007, "weight_decay": 0.0 if norm else 0.1}
    if "gate_proj" in name or "up_proj" in name:
        return {"rule": "muon", "lr": 0.02, "weight_decay": 0.3, "scale": "none"}
    if "down_proj" in name:
        return {"rule": None, "lr": 0.002, "weight_decay": 0.05}
    if name == "lm_head.weight":
        return {"rule": "hyperball", "lr": 0.01, "weight_decay": 0.0}
    if name in ("model.embed_tokens.weight", "model.norm.weight"):
        return {"rule": None, "lr": 0.001, "weight_decay": 0.2}
    if norm:
        return {"rule": None, "lr": 0.003, "weight_decay": 0.0}
    return {"rule": "muon", "lr": 0.02, "weight_decay": 0.1}


def model() -> LlamaForCausalLM:
    """Two layers; sizes that 2 ranks do not divide evenly; norms moved away from 1."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=20, intermediate_size=26, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=6, max_position_embeddings=16,
                         tie_word_embeddings=False, attn_implementation="eager")  # fmt: skip
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return made


def batch(step: int, rank: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(100 * step + rank))


class Plain:
    """Every parameter by itself, in one process: the rules of the papers in fp64, and torch's own AdamW.

    Args:
        weights: by name, at the start.
    """

    def __init__(self, weights: Tensors) -> None:
        self.start = {n: w.detach().double().clone() for n, w in weights.items()}
        self.rules: dict[str, PlainRule] = {}
        self.adamw: dict[str, torch.optim.AdamW] = {}
        self.by_adamw: dict[str, torch.nn.Parameter] = {}
        for name, weight in self.start.items():
            chosen = settings(name)
            rule, heads = chosen.pop("rule"), chosen.pop("heads", None)
            if rule is not None:
                self.rules[name] = PlainRule({name: weight}, {name: {"heads": heads}}, rule, **chosen)
            else:
                self.by_adamw[name] = torch.nn.Parameter(weight.clone())
                self.adamw[name] = torch.optim.AdamW([self.by_adamw[name]], betas=(0.9, 0.95), **chosen)

    def step(self, gradients: Tensors, factor: float = 1.0) -> None:
        """One step on whole gradients; factor: of the schedule, on each parameter's own rate."""
        for name, rule in self.rules.items():
            rule.lr = factor * settings(name)["lr"]
            rule.step({name: gradients[name]})
        for name, adamw in self.adamw.items():
            adamw.param_groups[0]["lr"] = factor * settings(name)["lr"]
            self.by_adamw[name].grad = gradients[name].double()
            adamw.step()

    def check(self, found: Tensors, tolerance: float = 1e-4) -> None:
        """Each parameter has moved as here, up to `tolerance` of its way."""
        assert found.keys() == self.start.keys()
        for name, start in self.start.items():
            now = self.rules[name].weights[name] if name in self.rules else self.by_adamw[name].detach()
            way = now - start
            error = float((found[name].detach().double() - now).norm() / way.norm())
            assert error <= tolerance, (name, error)
