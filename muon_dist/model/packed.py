"""Tests whether a model keeps the documents of a packed sample apart, and sets what it needs for that.

If positions start again inside a sample, transformers takes that for the border of a document, and masks attention
there (`transformers.masking_utils`). Models with a recurrent state or without positions ignore this, and no setting
says so; therefore the model is tested.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from muon_dist.errors import ConfigError

ATTENTION = ("sdpa", "eager", "flex_attention")
"""Implementations of attention that mask by positions for any number of samples in a batch."""
_TOKENS = 12  # tokens of each document of the test
_ROUNDING = 1e-5  # share of the largest logit: in a longer sample kernels sum in another order
_SHARE = 1e-4  # share of the effect of the first document on the second without masks


def keep_documents_apart(model: PreTrainedModel, packing: str) -> None:
    """Prepare `model` for samples with `position_ids`, and test whether it keeps their documents apart.

    A document's logits must not change if another document is before it in the sample. A model on the meta device is
    not tested. Raises ConfigError that names the model's type.
    """
    name = model.config.model_type
    refusal = f"data.packing: {packing}, and {name}"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"{refusal} takes no position_ids, which keep documents apart: set data.packing to concatenate"
        )
    attention = model.config._attn_implementation or "eager"
    if attention not in ATTENTION:
        raise ConfigError(
            f"{refusal} has model.attn_implementation {attention}, which does not mask documents in a batch of "
            f"several samples: set it to one of {', '.join(ATTENTION)}"
        )
    model.register_forward_pre_hook(_without_cache, with_kwargs=True)
    if model.device.type == "meta":
        return
    leak, unmasked, largest = _trial(model)
    if not leak <= max(_SHARE * unmasked, _ROUNDING * largest):
        raise ConfigError(
            f"{refusal} does not keep documents apart: a document's logits change by {leak:.2g} when another one is "
            f"before it in the sample ({unmasked:.2g} without masks). Set data.packing to concatenate"
        )


def _without_cache(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Without a cache: with one, transformers does not look for documents in the positions."""
    if kwargs.get("position_ids") is not None:
        kwargs.setdefault("use_cache", False)
    return args, kwargs


@torch.no_grad()
def _trial(model: PreTrainedModel) -> tuple[float, float, float]:
    """(largest change of a document's logits by another before it, the same without masks, largest logit), in fp32."""
    ids = (7 * torch.arange(2 * _TOKENS, device=model.device) + 3) % model.config.vocab_size
    first, second = ids.split(_TOKENS)
    reset = torch.arange(_TOKENS, device=model.device)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    exact = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}

    def logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        given = {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False}
        return torch.func.functional_call(model, exact, (), given).logits[0, -_TOKENS:].float()

    was_training = model.training
    model.eval()
    try:
        both = torch.cat([first, second])
        alone = logits(second, reset)
        packed = logits(both, torch.cat([reset, reset]))
        unmasked = logits(both, torch.arange(2 * _TOKENS, device=model.device))
    finally:
        model.train(was_training)
    change = (packed - alone).abs().max().item()
    return change, (unmasked - alone).abs().max().item(), alone.abs().max().item()
