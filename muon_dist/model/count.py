"""Number of parameters of a model, and floating-point operations per training token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from muon_dist.errors import ConfigError
from muon_dist.model.build import number_of_experts
from muon_dist.routing import embedding_weights, logical_shape, output_head


@dataclass(frozen=True)
class ParameterCount:
    """Elements of the parameters; tied weights count once.

    total: everything. non_embedding: without embeddings and output head (N of Kaplan et al. 2020, section 2.1).
    active: parameters that one token uses, so only its own routed experts. active_non_embedding: active and outside
    embeddings and head. head: the output head, even if it is tied to the embedding; 0 if there is none.
    """

    total: int
    non_embedding: int
    active: int
    active_non_embedding: int
    head: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of a model, by logical shape (also when ZeRO-3 has partitioned it, or on the meta device).

    In a mixture of experts, transformers keeps the routed experts of a layer as (E, rows, columns) parameters and a
    token uses `num_experts_per_tok` of the E.
    """
    config = getattr(model, "config", None)
    experts = number_of_experts(config) if config is not None else None
    chosen = getattr(config, "num_experts_per_tok", None)
    heads = output_head(model)
    lookup = embedding_weights(model) | heads
    total = embedding = active = head = 0
    for parameter in model.parameters():
        shape = logical_shape(parameter)
        elements = math.prod(shape)
        total += elements
        embedding += elements if id(parameter) in lookup else 0
        head += elements if id(parameter) in heads else 0
        routed = experts is not None and chosen is not None and len(shape) == 3 and shape[0] == experts
        active += elements // experts * chosen if routed else elements  # type: ignore[operator]
    return ParameterCount(total, total - embedding, active, active - embedding, head)


def flops_per_token(model: PreTrainedModel, sequence_length: int) -> int:
    """Floating-point operations of forward and backward for one token in a sequence of `sequence_length`.

    6 N + 12 L H Q T. N: the parameters that multiply a token, which are the active ones without the embedding tables
    (a lookup costs nothing) but with the output head, tied or not (6 N: Kaplan et al. 2020, arXiv 2001.08361,
    section 2.1). L layers, H heads, Q head size, T sequence length (PaLM, arXiv 2204.02311, appendix B); as in PaLM
    the causal mask is not subtracted, so that figures can be compared. In a layer with a sliding window, T is the
    window. Recomputation of activations is not counted.

    Raises ConfigError when the configuration does not say how many attention heads and layers there are.
    """
    count = count_parameters(model)
    attention = sum(context * _attention_width(model.config) for context in _contexts(model.config, sequence_length))
    return 6 * (count.active_non_embedding + count.head) + 12 * attention


def _attention_width(config: Any) -> int:
    """H x Q of one layer."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise ConfigError(f"model: the attention of a {config.model_type} is unknown, so are its operations per token")
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * size


def _contexts(config: Any, sequence_length: int) -> list[int]:
    """Largest number of positions to which a token attends, per layer."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    if len(kinds) != config.num_hidden_layers:
        kinds = kinds[:1] * config.num_hidden_layers
    near = min(window, sequence_length) if window else sequence_length
    return [near if kind == "sliding_attention" else sequence_length for kind in kinds]
