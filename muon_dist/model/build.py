"""Models from scratch: a transformers configuration from keyword arguments, and weights from a seed."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from muon_dist.errors import ConfigError
from muon_dist.failures import known, one_line
from muon_dist.model.load import load_model
from muon_dist.model.start import saved_config, starting_config, starting_folder

# Keys of the `model` block that are not transformers': model type, dtype of the weights, partitioning by ZeRO-3 while
# the model is built, and the source of the first weights.
_NOT_OF_THE_CLASS = ("model_type", "dtype", "partitioned_init", "init_from")
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Every configuration class accepts these besides its own fields: transformers turns the first two into
# rope_parameters, and the last two choose an implementation.
_ALWAYS_KNOWN = ("rope_theta", "rope_scaling", "attn_implementation", "experts_implementation")
_MUST_BE_POSITIVE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def build_config(
    model: Mapping[str, Any],
    *,
    vocab_size: int,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> PretrainedConfig:
    """The transformers configuration of the `model` block of a run.

    model: `model_type`, and keyword arguments of its configuration class by their exact names; `dtype` and
    `partitioned_init` are used where the model is built. With `init_from` the configuration is that model's, and
    `model_type` is not needed. The vocabulary and the special tokens come from the tokenizer; a larger `vocab_size`
    pads the vocabulary.

    Raises ConfigError that names the key: an unknown model type or keyword argument (with the closest one), a value
    that the configuration class refuses, dimensions that do not fit, a vocabulary smaller than the
    tokenizer's, another token id.
    """
    arguments = {k: v for k, v in model.items() if k not in _NOT_OF_THE_CLASS}
    start = starting_folder(model["init_from"]) if model.get("init_from") is not None else None
    kind = model.get("model_type")
    if start is not None:
        kind = _kind_of_start(start, kind, arguments, vocab_size)
    if not isinstance(kind, str) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        hint = _closest(str(kind), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise ConfigError(f"model.model_type: {kind!r} is not a causal language model of transformers{hint}")
    known = _known_arguments(CONFIG_MAPPING[kind])
    unknown = [
        f"model.{k}: {kind} has no such setting{_closest(k, known)}"
        for k in arguments
        if k not in known and not _read_by_model(kind, k)
    ]
    if unknown:
        raise ConfigError("\n".join(unknown))
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise ConfigError(f"the tokenizer's vocabulary size is {vocab_size!r}, and must be at least 1")
    given = {
        "vocab_size": vocab_size,
        "pad_token_id": pad_token_id,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
    }
    padded = arguments.get("vocab_size")
    if isinstance(padded, int) and not isinstance(padded, bool) and padded > vocab_size:
        given["vocab_size"] = padded  # a padded vocabulary: embedding rows without a token
    for name, value in given.items():
        if arguments.get(name, value) != value:
            raise ConfigError(f"model.{name} is {arguments[name]}, but the tokenizer has {value}: remove model.{name}")
        if name != "vocab_size" and value is not None and not 0 <= value < vocab_size:
            raise ConfigError(f"the tokenizer's {name} is {value}, outside its vocabulary of {vocab_size}")
    if start is not None:
        return starting_config(start, arguments, given)
    try:
        config = AutoConfig.for_model(kind, **{**arguments, **given})
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"model: transformers refuses this {kind} configuration: {one_line(error)}") from error
    _check_dimensions(kind, config)
    return config


def build_model(
    model: Mapping[str, Any],
    *,
    vocab_size: int,
    seed: int,
    dtype: str | None = None,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> PreTrainedModel:
    """A causal language model with fresh weights, the same for the same seed and configuration; or with the weights of
    `model["init_from"]`.

    dtype: of the weights, "float32", "bfloat16" or "float16"; None takes `model["dtype"]`, else float32. The caller's
    random state is restored. Under `torch.device("meta")` no memory is used and no weight is drawn.

    Raises ConfigError as `build_config` does, and for an unknown dtype.
    """
    name = dtype if dtype is not None else model.get("dtype", "float32")
    if name not in DTYPES:
        raise ConfigError(f"model.dtype: {name!r} is not one of {', '.join(DTYPES)}")
    config = build_config(
        model,
        vocab_size=vocab_size,
        pad_token_id=pad_token_id,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )
    if model.get("init_from") is not None and torch.get_default_device().type != "meta":
        return load_model(starting_folder(model["init_from"]), DTYPES[name], config).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            built = AutoModelForCausalLM.from_config(config, dtype=DTYPES[name])
        except Exception as error:  # modelling code may raise any error
            out_of_memory = known(error)
            raise out_of_memory or ConfigError(
                f"model: a {config.model_type} cannot be built from these settings: {type(error).__name__}: "
                f"{one_line(error)}"
            ) from error
    return built


def _kind_of_start(start: Path, kind: object, arguments: dict[str, Any], vocab_size: int) -> str:
    """The model type of the model in `start`; its vocabulary is filled into `arguments`. Raises ConfigError."""
    saved = saved_config(start)
    if kind not in (None, saved.model_type):
        raise ConfigError(f"model.model_type: is {kind!r}, and {start} (model.init_from) is a {saved.model_type}")
    if saved.vocab_size < vocab_size:
        raise ConfigError(
            f"model.init_from: {start} has a vocabulary of {saved.vocab_size}, and the tokenizer of {vocab_size}: set "
            "tokenizer.path to the tokenizer that the model was trained with"
        )
    if arguments.setdefault("vocab_size", saved.vocab_size) != saved.vocab_size:
        raise ConfigError(
            f"model.vocab_size: is {arguments['vocab_size']}, and {start} (model.init_from) has {saved.vocab_size}: "
            "remove model.vocab_size"
        )
    return str(saved.model_type)


def _known_arguments(config_class: type[PretrainedConfig]) -> set[str]:
    """Every keyword argument that a configuration class understands.

    The class also accepts unknown arguments, and stores them as attributes that nothing reads.
    """
    names = set(config_class.attribute_map) | set(_ALWAYS_KNOWN)
    if dataclasses.is_dataclass(config_class):
        names |= {f.name for f in dataclasses.fields(config_class) if f.init}
    names |= set(inspect.signature(config_class.__init__).parameters) - {"self", "kwargs", "args"}
    return names


def _read_by_model(kind: str, name: str) -> bool:
    """Whether the modelling code reads a setting that the configuration class does not declare.

    Qwen3-MoE does so with `head_dim`, by `getattr(config, "head_dim", ...)`.
    """
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]]
    source = inspect.getsource(sys.modules[model_class.__module__])
    word = re.escape(name)
    return re.search(rf"""config\.{word}\b|getattr\((?:self\.)?config,\s*["']{word}["']""", source) is not None


def _check_dimensions(kind: str, config: PretrainedConfig) -> None:
    for name in _MUST_BE_POSITIVE:
        value = getattr(config, name, None)
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"model.{name}: is {value}, and must be at least 1")
    for name in ("hidden_act", "activation_function", "hidden_activation"):
        value = getattr(config, name, None)
        if isinstance(value, str) and value not in ACT2FN:
            raise ConfigError(f"model.{name}: unknown activation {value!r}{_closest(value, ACT2FN)}")
    if getattr(config, "is_decoder", True) is False:
        raise ConfigError(f"model.is_decoder: a {kind} attends to later tokens unless this is true")
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    head_dim, groups = getattr(config, "head_dim", None), getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(width, int) and head_dim is None and width % heads:
        raise ConfigError(f"model.hidden_size: {width} is not a multiple of model.num_attention_heads = {heads}")
    if isinstance(heads, int) and isinstance(groups, int) and (groups < 1 or heads % groups):
        raise ConfigError(
            f"model.num_key_value_heads: {groups} does not divide model.num_attention_heads = {heads}: "
            f"use one of {', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}"
        )
    experts, chosen = number_of_experts(config), getattr(config, "num_experts_per_tok", None)
    if experts is not None and isinstance(chosen, int) and not 1 <= chosen <= experts:
        raise ConfigError(f"model.num_experts_per_tok: {chosen} of {experts} experts ({kind})")


def number_of_experts(config: PretrainedConfig) -> int | None:
    """Routed experts in a layer; None for a dense model."""
    counts = [getattr(config, name, None) for name in _EXPERT_COUNTS]
    return next((n for n in counts if isinstance(n, int) and n > 0), None)


def check_sequence_length(config: PretrainedConfig, sequence_length: int) -> None:
    """Raise ConfigError if samples have more tokens than the model has positions."""
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and sequence_length > longest:
        raise ConfigError(
            f"data.sequence_length: {sequence_length} is more than model.max_position_embeddings = {longest} "
            f"of this {config.model_type}: shorten it or raise model.max_position_embeddings"
        )


def _closest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""
