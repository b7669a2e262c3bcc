"""Whether the axes of a mesh fit a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from muon_dist.model.build import number_of_experts


@dataclass(frozen=True)
class Architecture:
    """The sizes of a model that mesh axes must divide, and that decide how much data they send.

    Attributes:
        name: class of the model, for messages.
        heads, kv_heads, head_dim: of attention.
        intermediate: inner features of the feed-forward layers that tensor parallelism cuts, by the setting's name.
        experts, experts_per_token: routed experts of a layer; 0 in a dense model.
        tp_plan, ep_plan: whether transformers has such a plan for the class.
        keys_are_cut: the tensor-parallel plan cuts the key projection, so that tp must divide kv_heads too.
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: Mapping[str, int]
    experts: int
    experts_per_token: int
    tp_plan: bool
    ep_plan: bool
    keys_are_cut: bool


def architecture(model: Any) -> Architecture:
    """Heads, experts and parallel plans of a transformers model, which may be on the meta device."""
    config = model.config
    heads = int(config.num_attention_heads)
    tp = model.tp_plan or {}
    keys = ("k_proj", "qkv_proj", "query_key_value")
    widths = {name: getattr(config, name, None) for name in ("intermediate_size", "moe_intermediate_size")}
    return Architecture(
        name=type(model).__name__,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        intermediate={name: width for name, width in widths.items() if isinstance(width, int)},
        experts=number_of_experts(config) or 0,
        experts_per_token=int(getattr(config, "num_experts_per_tok", None) or 0),
        tp_plan=bool(tp),
        ep_plan=bool(model.ep_plan),
        keys_are_cut=any(k.rsplit(".", 1)[-1] in keys and style == "colwise" for k, style in tp.items()),
    )


def misfits(sizes: Mapping[str, int], a: Architecture, sequence_length: int) -> Iterator[tuple[str, str]]:
    """Yield (axis, error) for each axis of `sizes` that does not fit the model or the context. A missing axis has size
    1."""
    tp, sp, cp, ep = (sizes.get(name, 1) for name in ("tp", "sp", "cp", "ep"))
    if tp > 1:
        if not a.tp_plan:
            yield "tp", f"transformers has no tensor-parallel plan for {a.name}"
        if a.heads % tp:
            yield "tp", f"does not divide the {a.heads} attention heads"
        if a.keys_are_cut and a.kv_heads % tp:
            yield "tp", f"does not divide the {a.kv_heads} key and value heads"
        for name, width in a.intermediate.items():
            if width % tp and not (ep > 1 and name == "moe_intermediate_size"):
                yield "tp", f"does not divide model.{name} = {width}"
    if sp > 1:
        if a.heads % sp:
            yield "sp", f"does not divide the {a.heads} attention heads"
        if a.kv_heads % sp and sp % a.kv_heads:
            yield "sp", f"neither divides the {a.kv_heads} key and value heads nor is a multiple of them"
        if sequence_length % sp:
            yield "sp", f"does not divide the {sequence_length} tokens of a sample"
    if cp > 1 and sequence_length % (2 * cp):  # two pieces per rank, to balance the causal mask
        yield "cp", f"{sequence_length} tokens of a sample are not a multiple of {2 * cp}"
    if ep > 1:
        if not a.experts:
            yield "ep", f"{a.name} has no experts"
        elif not a.ep_plan:
            yield "ep", f"transformers has no expert-parallel plan for {a.name}"
        elif a.experts % ep:
            yield "ep", f"does not divide the {a.experts} experts of a layer"
