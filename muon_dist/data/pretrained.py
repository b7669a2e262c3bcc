"""Tokenizers as transformers saved them, loaded in one way for shards, prompts and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_PLAIN = frozenset({"TokenizersBackend", "PreTrainedTokenizerFast"})
"""Classes that take tokenizer.json as it is, in transformers 5 and 4."""


def replaced(folder: Path, tokenizer: Any) -> bool:
    """Whether AutoTokenizer has put the class of the model's type (Qwen2Tokenizer for qwen2), which splits text in a
    way of its own, in the place of what tokenizer.json holds, although tokenizer_config.json names a class that takes
    it as it is."""
    file = folder / "tokenizer_config.json"
    named = json.loads(file.read_text(encoding="utf-8")).get("tokenizer_class") if file.is_file() else None
    return named in _PLAIN and type(tokenizer).__name__ not in _PLAIN


def pretrained_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer in `folder`, the same for shards and prompts. Raises what transformers raises."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True) if replaced(folder, found) else found
