"""Model folders that transformers 4.57 and 5.x, vLLM and llama.cpp's converter all read.

transformers 5 writes some settings only in a new place. A reader that does not know this place uses a default, often
silently: a `rope_theta` of 500,000 is read as 10,000. So the old key is written too, with the same value. The readers'
sources: transformers 4.57 (`configuration_utils.py`, `modeling_rope_utils.py`, `tokenization_auto.py`), vLLM
(`transformers_utils/config.py`: `rope_theta`, `rope_scaling`, `dtype` or `torch_dtype`), llama.cpp
(`conversion/base.py`: `rope_theta`, `rotary_emb_base`, `rope_scaling`, `partial_rotary_factor`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from muon_dist.json_files import read_object, write_json
from muon_dist.pretrained import replaced

Json = dict[str, Any]

# Tokenizer classes of transformers 5 only. All of them save tokenizer.json, which holds the whole tokenizer.
_NEW_TOKENIZERS = frozenset({"TokenizersBackend", "PreTrainedTokenizer"})
# Settings that only say where and how this process loaded the tokenizer.
_OF_THE_PROCESS = ("backend", "is_local", "local_files_only", "name_or_path")
_UNLIMITED = 10**9  # transformers writes 1e30 if it knows no limit
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
# rope settings other than scaling, which version 4 has at the top level
_PLAIN_ROPE = frozenset({"rope_theta", "rope_type", "partial_rotary_factor"})
# Models that have a second theta, for layers with a window, in version 4 too.
_LOCAL, _TWO_THETAS = "sliding_attention", frozenset({"gemma3_text", "gemma3n_text"})


def make_portable(folder: str | Path) -> list[str]:
    """Rewrite config.json and the tokenizer's files in `folder`, which transformers 5 has saved, for older readers.

    Sets `use_cache`, which training turns off; a `model_max_length` if there is none; and the modes of all files to
    what the umask allows (weights are written for their owner only). Removes training_args.bin, which is pickled and
    may contain secrets. Returns one sentence per setting that version 4 cannot express.
    """
    root = Path(folder)
    (root / "training_args.bin").unlink(missing_ok=True)
    positions, lost = None, []
    if (root / "config.json").is_file():
        positions, lost = _rewrite(root / "config.json", _old_config)
    if (root / "tokenizer_config.json").is_file():
        _rewrite(root / "tokenizer_config.json", lambda settings: _old_tokenizer(settings, positions))
    umask = os.umask(0o077)
    os.umask(umask)
    for path in root.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)
    return lost + _other_tokenizer(root)


def _other_tokenizer(root: Path) -> list[str]:
    """A message if transformers 5's AutoTokenizer does not load the contents of tokenizer.json."""
    if not (root / "tokenizer_config.json").is_file():
        return []
    found = AutoTokenizer.from_pretrained(root, local_files_only=True, trust_remote_code=False)
    if not replaced(root, found):
        return []
    return [
        f"tokenizer.json: for this model_type AutoTokenizer of transformers {transformers.__version__} makes a "
        f"{type(found).__name__} with rules of its own, so it encodes text otherwise than the model was trained: load "
        "the tokenizer by PreTrainedTokenizerFast.from_pretrained, or train another model_type"
    ]


def _rewrite(file: Path, change: Callable[[Json], Any]) -> Any:
    settings = read_object(file)
    found = change(settings)
    write_json(file, settings, sort_keys=True)
    return found


def _old_config(settings: Json) -> tuple[int | None, list[str]]:
    """Adds the keys of version 4. Returns the longest sequence, if the model has one, and the settings without such a
    key."""
    lost = []
    for part in (settings, *(v for v in settings.values() if isinstance(v, dict) and "model_type" in v)):
        if part.get("use_cache") is False:
            part["use_cache"] = True
        if "dtype" in part:
            part.setdefault("torch_dtype", part["dtype"])
        if part.get("model_type") in CONFIG_MAPPING:  # such as num_experts, which is num_local_experts in version 5
            for alias, name in CONFIG_MAPPING[part["model_type"]].attribute_map.items():
                if name in part:
                    part.setdefault(alias, part[name])
        if isinstance(part.get("rope_parameters"), dict):
            lost += _old_rope(part)
    found = [settings[name] for name in _POSITIONS if isinstance(settings.get(name), int)]
    return (found[0] if found else None), lost


def _old_rope(settings: Json) -> list[str]:
    rope: Json = settings["rope_parameters"]
    lost = []
    by_layer = {kind: value for kind, value in rope.items() if isinstance(value, dict) and "rope_type" in value}
    if by_layer:
        thetas = {kind: value.get("rope_theta") for kind, value in by_layer.items()}
        if settings.get("model_type") in _TWO_THETAS and _LOCAL in thetas:
            settings.setdefault("rope_local_base_freq", thetas[_LOCAL])
        elif len(set(thetas.values())) > 1:
            shown = ", ".join(f"{kind} {theta:g}" for kind, theta in thetas.items())
            lost.append(
                f"model.rope_parameters: a {settings.get('model_type')} has one rope_theta in transformers 4, and "
                f"here {shown}: load it with transformers 5"
            )
        rope = by_layer.get("full_attention", next(iter(by_layer.values())))
    if "rope_theta" in rope:
        settings.setdefault("rope_theta", rope["rope_theta"])
    if "partial_rotary_factor" in rope:
        settings.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    if settings.get("model_type") == "gpt_neox":  # this model's own names for both
        settings.setdefault("rotary_emb_base", rope.get("rope_theta", 10000))
        settings.setdefault("rotary_pct", rope.get("partial_rotary_factor", 0.25))
    if rope.get("rope_type") == "llama3" and "original_max_position_embeddings" in rope:  # llama.cpp looks here
        settings.setdefault("original_max_position_embeddings", rope["original_max_position_embeddings"])
    if rope.get("rope_type", "default") != "default":
        settings.setdefault(
            "rope_scaling", {k: v for k, v in rope.items() if k == "rope_type" or k not in _PLAIN_ROPE}
        )
    return lost


def _old_tokenizer(settings: Json, positions: int | None) -> None:
    for name in _OF_THE_PROCESS:
        settings.pop(name, None)
    if settings.get("tokenizer_class") in _NEW_TOKENIZERS:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):  # a mapping in version 4
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if positions is not None and settings.get("model_max_length", _UNLIMITED) >= _UNLIMITED:
        settings["model_max_length"] = positions
