"""The tokenizer of a model folder as its files describe it: the same one for token shards, prompts and samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from muon_dist.json_files import read_object

_PLAIN = frozenset({"TokenizersBackend", "PreTrainedTokenizerFast"})
"""Classes that use tokenizer.json unchanged, in transformers 5 and 4."""


def replaced(folder: Path, tokenizer: Any) -> bool:
    """Whether AutoTokenizer chose another class than tokenizer_config.json names.

    For some model types (qwen2: Qwen2Tokenizer) it always takes the class of the type. That class splits text by its
    own rules, and ignores those in tokenizer.json.
    """
    file = folder / "tokenizer_config.json"
    named = read_object(file).get("tokenizer_class") if file.is_file() else None
    return named in _PLAIN and type(tokenizer).__name__ not in _PLAIN


def pretrained_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer in `folder`. Raises what transformers raises."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True) if replaced(folder, found) else found
