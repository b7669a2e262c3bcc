"""Loads the tokenizer of a model folder from its files, in the same way for token shards, prompts and samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from muon_dist.json_files import read_object

_PLAIN = frozenset({"TokenizersBackend", "PreTrainedTokenizerFast"})
"""Classes that use tokenizer.json unchanged, in transformers 5 and 4."""


def replaced(folder: Path, tokenizer: Any) -> bool:
    """Whether AutoTokenizer chose another class than the one in tokenizer_config.json.

    For some model types it always uses the class of the type (qwen2: Qwen2Tokenizer). This class splits text by its
    own rules, and ignores the rules in tokenizer.json.
    """
    file = folder / "tokenizer_config.json"
    named = read_object(file).get("tokenizer_class") if file.is_file() else None
    return named in _PLAIN and type(tokenizer).__name__ not in _PLAIN


def pretrained_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer in `folder`. Raises what transformers raises."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True) if replaced(folder, found) else found
