"""The largest attention logits of transformers' models, and the parameters that compute them; for QK-clip."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from muon_dist.checkpoint.piece import clean_name
from muon_dist.defaults import QK_ALPHA, QK_THRESHOLD
from muon_dist.errors import ConfigError, FrameworkError
from muon_dist.optim.muon import Muon
from muon_dist.optim.qk_clip import AttentionLayer, Maxima, QKClip, Scaled, check_options
from muon_dist.routing.model import is_conv1d, logical_shape

_SCORES = 2**23
"""Number of logits that are computed at a time, over all heads and samples of a call."""
_PAIRS = (("q_proj", "k_proj"), ("query", "key"), ("q_lin", "k_lin"))
_LATENT = "kv_b_proj"
_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))
# Child modules that do not change queries and keys between their projection and the logits.
_HARMLESS = frozenset(
    {"v_proj", "value", "v_lin", "o_proj", "out_proj", "out_lin", "dense", "c_proj", "rotary_emb", "rotary_fn"}
    | {"q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "q_b_proj"}
)
Features = list[tuple[int, int, float]]
"""(number of features, group of heads, power of g), one after another along a parameter's axis."""


def attach(
    model: nn.Module,
    optimizer: Muon,
    threshold: float = QK_THRESHOLD,
    alpha: float = QK_ALPHA,
    share: Callable[[], tuple[int, int]] = lambda: (0, 1),
) -> QKClip:
    """Clip the attention logits of a transformers model after each step of `optimizer` from now on.

    Logits are the inputs of softmax in forward passes in training mode, without evaluations. A step uses all forward
    passes since the previous step. bfloat16 logits are rounded to 8 bits.

    Args:
        model: a model with "sdpa" attention; bare or wrapped.
        optimizer: the optimizer of its parameters, before or after a framework has sharded them.
        threshold, alpha: see `QKClip`.
        share: see `Maxima`.

    Raises:
        ConfigError: an option is out of range, or the rule would undo the scaling.
        FrameworkError: an attention module is not supported, because its logits do not scale with known parameters;
            names it.
    """
    check_options({"threshold": threshold, "alpha": alpha})
    if not isinstance(optimizer, Muon):
        raise ConfigError(f"qk_clip: it needs Muon, but the optimizer is {type(optimizer).__name__}")
    found = [
        (module, _layer(clean_name(name), module, alpha)) for name, module in model.named_modules() if _attends(module)
    ]
    if not found:
        raise FrameworkError(
            f"qk_clip: {type(model).__name__} has no attention module of transformers: leave qk_clip out"
        )
    maxima = Maxima([layer for _, layer in found], share)
    clip = QKClip(optimizer, maxima, threshold)
    _around_sdpa()
    for number, (module, _) in enumerate(found):
        _watched[module] = (maxima, number)
    return clip


# Recording -----------------------------------------------------------------------------------------------------------

_watched: WeakKeyDictionary[nn.Module, tuple[Maxima, int]] = WeakKeyDictionary()


def _around_sdpa() -> None:
    """Register a function as "sdpa" that records the logits of watched modules and calls the previous function.

    It keeps the name "sdpa", because masks, sequence parallelism and models select attention by this name.
    """
    inner = AttentionInterface._global_mapping["sdpa"]
    if getattr(inner, "looks_at_logits", False):
        return

    def sdpa(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **options: Any
    ) -> Any:
        if module.training and module in _watched:
            _record(module, query, key, mask, options)
        return inner(module, query, key, value, mask, *args, **options)

    sdpa.looks_at_logits = True  # type: ignore[attr-defined]
    AttentionInterface.register("sdpa", sdpa)


@torch.compiler.disable
def _record(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: Mapping[str, Any]) -> None:
    if torch._C._current_graph_task_id() != -1:
        return  # gradient checkpointing repeats a forward pass in the backward pass: already recorded
    maxima, number = _watched[module]
    if options.get("position_bias") is not None:
        raise FrameworkError(
            f"qk_clip: {maxima.layers[number].name} adds a position bias to its logits, which scaling cannot reduce"
        )
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    scaling = options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    maxima.record(number, highest_logits(query.detach(), key.detach(), mask, scaling, bool(causal)))


@torch.no_grad()
def highest_logits(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, causal: bool) -> Tensor:
    """The largest logit of each head over all samples and all unmasked pairs, (heads,) in fp32.

    Args:
        query: (B, heads, T, D).
        key: (B, groups, S, D); consecutive query heads share a key head.
        mask: (B or 1, heads or 1, T, S): boolean, True where a query attends; or numbers to add; or None.
        scaling: factor on the products.
        causal: without a mask, query t attends to keys 0 to t.
    """
    if query.dtype == torch.float16:  # fp16 products may overflow; the kernel computes them in fp32
        query, key = query.float(), key.float()
    batch, heads, length, width = query.shape
    groups, keys = key.shape[1:3]
    causal = causal and mask is None and length > 1
    across = key.transpose(-1, -2)
    found = torch.full((heads,), -torch.inf, device=query.device)
    rows = max(16, _SCORES // max(batch * heads * keys, 1))
    for first in range(0, length, rows):
        stop = min(first + rows, length)
        seen = min(stop, keys) if causal else keys
        grouped = query[:, :, first:stop].reshape(batch, groups, -1, width)
        logits = (grouped @ across[..., :seen]).view(batch, heads, stop - first, seen)
        if causal and seen > first:
            square = logits[..., first:seen]
            later = torch.ones(square.shape[-2:], dtype=torch.bool, device=square.device).triu_(1)
            square.masked_fill_(later, -torch.inf)
        logits = logits * scaling if mask is not None and mask.dtype != torch.bool else logits.mul_(scaling)
        if mask is not None:
            of_rows = mask[..., first:stop, :seen]
            logits = logits.masked_fill_(~of_rows, -torch.inf) if mask.dtype == torch.bool else logits + of_rows
        found = torch.maximum(found, logits.amax(dim=(0, 2, 3)).float())
    return found


# The parameters behind the logits ------------------------------------------------------------------------------------


def _attends(module: nn.Module) -> bool:
    """Whether a module is attention itself, not a block that contains attention."""
    if "attention" not in type(module).__name__.lower() or "output" in type(module).__name__.lower():
        return False
    children = dict(module.named_children())
    inside = any("attention" in type(child).__name__.lower() for child in children.values())
    return not inside and any(isinstance(getattr(child, "weight", None), nn.Parameter) for child in children.values())


def _layer(name: str, module: nn.Module, alpha: float) -> AttentionLayer:
    """The layer of an attention module. Raises FrameworkError if its logits may not scale with its parameters."""
    config = getattr(module, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if implementation != "sdpa":
        raise FrameworkError(
            f"qk_clip: {name} ({type(module).__name__}) computes attention by {implementation!r}, but logits can be "
            "read only with 'sdpa': make the model with attn_implementation='sdpa', or leave qk_clip out"
        )
    if getattr(config, "clip_qkv", None) is not None:
        raise _unknown(name, module, "clip_qkv clamps queries and keys, so scaling their weights is not exact")
    read = _latent if hasattr(module, _LATENT) else _fused if _fused_child(module) else _separate
    heads, groups, parts = read(name, module, alpha)
    known = {child for child, _, _ in parts} | _HARMLESS
    for child, inner in module.named_children():
        norm = any(child in pair for pair in _NORMS)
        if child not in known and not norm and not isinstance(inner, (nn.Dropout, nn.Identity)):
            raise _unknown(name, module, f"its {child} ({type(inner).__name__}) may change queries or keys")
    scaled = [s for child, axis, features in parts for s in _of_child(name, module, child, axis, features)]
    return AttentionLayer(name, heads, groups, tuple(scaled))


def _unknown(name: str, module: nn.Module, why: str) -> FrameworkError:
    return FrameworkError(f"qk_clip: {name} ({type(module).__name__}): {why}: leave qk_clip out")


def _heads(count: int, groups: int, parts: Sequence[tuple[int, float]]) -> Features:
    """The features of `count` heads in `groups` groups; each head has `parts`: (features, power)."""
    return [(size, head * groups // count, power) for head in range(count) for size, power in parts]


_Read = tuple[int, int, list[tuple[str, int, Features]]]
"""(query heads, key heads, [(child, axis of the features in its weight, features)])."""


def _separate(name: str, module: nn.Module, alpha: float) -> _Read:
    """Attention with W_q and W_k in separate modules."""
    children = dict(module.named_children())
    pair = next((pair for pair in _PAIRS if set(pair) <= set(children)), None)
    if pair is None:
        raise _unknown(name, module, "the weights of its queries and keys have unknown names")
    size = _size(name, module)
    rows = [_out(name, module, child) for child in pair]
    heads, groups = (n // size for n in rows)
    wanted = _configured(module)
    if [heads * size, groups * size] != rows or (wanted is not None and wanted != heads) or heads % groups:
        raise _unknown(name, module, f"{pair[0]} has {rows[0]} outputs and {pair[1]} {rows[1]}, in heads of {size}")
    queries, keys = _heads(heads, groups, [(size, alpha)]), _heads(groups, groups, [(size, 1 - alpha)])
    return heads, groups, [(pair[0], 0, queries), (pair[1], 0, keys)]


def _latent(name: str, module: Any, alpha: float) -> _Read:
    """Latent attention, as in DeepSeek-V2. All heads share the part of the keys with positions, so this part stays
    unchanged, and the matching part of the queries is scaled by g instead."""
    nope, rope, value = module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim
    heads = _configured(module)
    query = "q_b_proj" if getattr(module, "q_b_proj", None) is not None else "q_proj"
    if heads is None or _out(name, module, query) != heads * (nope + rope):
        raise _unknown(name, module, f"{query} does not consist of heads of {nope} + {rope} outputs")
    if _out(name, module, _LATENT) != heads * (nope + value):
        raise _unknown(name, module, f"{_LATENT} does not consist of heads of {nope} + {value} outputs")
    queries = _heads(heads, heads, [(nope, alpha), (rope, 1.0)])
    return heads, heads, [(query, 0, queries), (_LATENT, 0, _heads(heads, heads, [(nope, 1 - alpha), (value, 0.0)]))]


def _fused_child(module: nn.Module) -> str | None:
    """Name of the fused projection of queries, keys and values, for classes with a known order; else None."""
    kinds = {"c_attn": "GPT2", "qkv_proj": "Phi3", "query_key_value": "GPTNeoX"}
    of_kind = (c for c, kind in kinds.items() if type(module).__name__.startswith(kind) and hasattr(module, c))
    return next(of_kind, None)


def _fused(name: str, module: Any, alpha: float) -> _Read:
    child, heads, size = _fused_child(module), _configured(module), _size(name, module)
    if child is None or heads is None:
        raise _unknown(name, module, "its configuration does not say how many heads it has")
    out = _out(name, module, child)
    groups = module.config.num_key_value_heads if child == "qkv_proj" else heads
    if out != (heads + 2 * groups) * size:
        raise _unknown(name, module, f"{child} has {out} outputs, which do not match queries, keys and values")
    if child == "query_key_value":  # head by head
        features = _heads(heads, heads, [(size, alpha), (size, 1 - alpha), (size, 0.0)])
    else:
        features = _heads(heads, groups, [(size, alpha)]) + _heads(groups, groups, [(size, 1 - alpha)])
        features.append((groups * size, 0, 0.0))
    return heads, groups, [(child, int(is_conv1d(getattr(module, child))), features)]


def _size(name: str, module: nn.Module) -> int:
    for attribute in ("head_dim", "head_size", "attention_head_size"):
        size = getattr(module, attribute, None)
        if isinstance(size, int) and size > 0:
            return size
    raise _unknown(name, module, "it does not say the size of a head")


def _configured(module: Any) -> int | None:
    """Query heads of the whole layer, from the configuration; None if unknown."""
    config = module.config
    found = next(
        (getattr(config, key) for key in ("num_attention_heads", "n_head", "n_heads") if hasattr(config, key)), None
    )
    return int(found) if isinstance(found, int) else None


def _out(name: str, module: nn.Module, child: str) -> int:
    """Number of outputs of a plain linear layer."""
    layer = getattr(module, child)
    if type(layer).__name__.removeprefix("FSDP") not in ("Linear", "Conv1D") or not isinstance(
        layer.weight, nn.Parameter
    ):
        raise _unknown(name, module, f"its {child} is a {type(layer).__name__}, not a plain linear layer")
    return logical_shape(layer.weight)[1 if is_conv1d(layer) else 0]


def _of_child(name: str, module: nn.Module, child: str, axis: int, features: Features) -> list[Scaled]:
    """The tensors to scale for a projection: its weight and bias, or those of a norm that follows it."""
    sizes, groups, powers = zip(*features, strict=True)
    group, power = np.repeat(groups, sizes), np.repeat(powers, sizes)
    side = next((s for s in (0, 1) if any(child == pair[s] for pair in _PAIRS)), None)
    norms = (
        []
        if side is None
        else [pair[side] for pair in _NORMS if isinstance(getattr(module, pair[side], None), nn.Module)]
    )
    norms = [norm for norm in norms if not isinstance(getattr(module, norm), nn.Identity)]
    if side is None and any(isinstance(getattr(module, norm, None), nn.Module) for pair in _NORMS for norm in pair):
        raise _unknown(name, module, f"its {child} is followed by norms of queries and keys")
    for norm in norms:
        _check_gain(name, module, norm, len(group))
        child, axis = norm, 0
    layer = getattr(module, child)
    found = []
    for kind, p in layer.named_parameters(recurse=False):
        shape = logical_shape(p)
        if len(shape) == 2 and norms:  # (heads, size of a head)
            group, power = group.reshape(shape)[:, 0], power.reshape(shape)[:, 0]
        found.append(Scaled(f"{name}.{child}.{kind}", axis if len(shape) == 2 else 0, group, power))
    return found


def _check_gain(name: str, module: nn.Module, norm: str, features: int) -> None:
    """Raises FrameworkError unless a norm has one gain per feature of each head, and its output is proportional to
    the gain."""
    layer = getattr(module, norm)
    own = dict(layer.named_parameters())
    if not own:
        raise _unknown(name, module, f"its {norm} has no gain, and scaling the weights before it has no effect")
    for kind, p in own.items():
        if int(np.prod(logical_shape(p))) != features:
            raise _unknown(
                name,
                module,
                f"its {norm} bounds the logits, and all heads share its {kind} of shape {logical_shape(p)}, so no "
                "single head can be scaled",
            )
    one = {kind: torch.rand(logical_shape(p)) + 0.5 for kind, p in own.items()}
    x = torch.randn(1, 2, *(logical_shape(p) if (p := next(iter(own.values()))).dim() > 1 else (features,)))
    with torch.no_grad():
        once = torch.func.functional_call(layer, one, (x,))
        twice = torch.func.functional_call(layer, {kind: 2 * value for kind, value in one.items()}, (x,))
    if not torch.allclose(2 * once, twice):
        raise _unknown(name, module, f"the output of its {norm} is not proportional to its gain")
