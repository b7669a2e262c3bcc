"""Models and tokenizers that lie in a folder, as transformers saved them. Nothing is downloaded, no code is run."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from muon_dist.errors import CheckpointError, DataError


def load_model(folder: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal language model in `folder`, in `dtype` or as it was saved. Raises CheckpointError."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no model there (config.json is missing)")
    try:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # transformers and safetensors raise many kinds on a damaged folder
        raise CheckpointError(f"{path}: the model cannot be loaded ({type(error).__name__}: {error})") from error


def load_text_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, for text in and out. Raises DataError."""
    path = Path(folder)
    if not path.is_dir():
        raise DataError(f"{path}: no such tokenizer folder")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as above
        raise DataError(f"{path}: the tokenizer cannot be loaded ({type(error).__name__}: {error})") from error
