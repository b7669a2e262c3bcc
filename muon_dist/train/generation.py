"""Text from a model."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from muon_dist.data.encoder import frame, text_ids
from muon_dist.defaults import TEMPERATURE, TOP_K
from muon_dist.errors import ConfigError, NonFiniteError


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    tokens: int,
    *,
    temperature: float = TEMPERATURE,
    top_k: int = TOP_K,
    seed: int = 0,
) -> str:
    """`prompt` and its continuation by at most `tokens` tokens.

    temperature 0 always takes the most probable token; else one of the `top_k` most probable tokens is drawn, the same
    for equal `seed`. The text ends at the model's last position. The caller's random state is restored.

    Raises:
        ConfigError: the prompt fills all positions or is not UTF-8, or the temperature is not a finite number.
        NonFiniteError: the model's probabilities are NaN or infinite.
    """
    if not math.isfinite(temperature):
        raise ConfigError(f"temperature {temperature}: use a finite number; 0 always takes the most probable token")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # Python turns bytes of the shell that are not UTF-8 into lone surrogates
        raise ConfigError("the prompt is not UTF-8: set the terminal to UTF-8") from None
    ids = torch.tensor([_prompt_ids(tokenizer, prompt)], device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tokens = min(tokens, _room(model, inputs["input_ids"].shape[1]))
    choice: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        choice = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    was_training, used_cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            if not torch.isfinite(model(**inputs, use_cache=False).logits).all():
                raise NonFiniteError(
                    "the model's outputs are NaN or infinite: the run diverged, or its weights are not finite"
                )
            out = model.generate(**inputs, max_new_tokens=tokens, pad_token_id=padding, **choice)
    finally:
        model.train(was_training)
        model.config.use_cache = used_cache
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of the prompt as the beginning of a document: with the tokenizer's tokens before it, and no end token.

    An empty prompt gives the tokens before a document, or else the end token of the previous document.
    """
    ids = [*frame(tokenizer)[0], *text_ids(tokenizer, prompt, False)]
    if ids:
        return ids
    return [tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id]


def _room(model: Any, prompt: int) -> int:
    """Number of tokens that may follow a prompt of `prompt` tokens: beyond its positions a model fails or writes
    noise."""
    longest = getattr(model.config, "max_position_embeddings", None)  # GPT-2's n_positions has this name too
    if not isinstance(longest, int) or longest < 1:
        return sys.maxsize
    if prompt >= longest:
        raise ConfigError(
            f"the prompt has {prompt} tokens and the model {longest} positions (max_position_embeddings): shorten it"
        )
    return longest - prompt
