"""Load models and tokenizers from folders that transformers saved. Nothing is downloaded, no code is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from muon_dist.checkpoint import BUFFER, MODEL_FOLDER, WEIGHT, Checkpoint, open_checkpoint
from muon_dist.checkpoint.manifest import is_checkpoint, model_folder
from muon_dist.errors import CheckpointError, DataError
from muon_dist.pretrained import pretrained_tokenizer


def load_model(
    folder: str | Path, dtype: torch.dtype | None = None, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """The causal language model in `folder`, in `dtype` or in its saved dtype. Raises CheckpointError.

    folder: as transformers saved it, or one of our checkpoints, which is verified first. config: used instead of the
    folder's configuration.
    """
    path = Path(folder)
    if is_checkpoint(path):
        return _from_checkpoint(open_checkpoint(path), dtype, config)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no model there (config.json is missing)")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype or "auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # then it lists the keys; without it, its error names none
            output_loading_info=True,
        )
    except Exception as error:  # transformers and safetensors raise many kinds of errors for a damaged folder
        raise CheckpointError(f"{path}: the model cannot be loaded ({type(error).__name__}: {error})") from error
    _check_complete(path, report)
    return model


def _check_complete(path: Path, report: Mapping[str, Any]) -> None:
    """Raises CheckpointError if transformers drew weights at random because the files lack them."""
    wrong = sorted(report.get("mismatched_keys", ()), key=str)
    if wrong:
        name, found, expected = wrong[0]
        raise CheckpointError(
            f"{path}: {name} has shape {tuple(found)} in the file, and config.json says {tuple(expected)}"
            + (f"; {len(wrong) - 1} more differ" if len(wrong) > 1 else "")
        )
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise CheckpointError(
            f"{path}: the weights lack {missing[0]}"
            + (f" and {len(missing) - 1} more parameters" if len(missing) > 1 else "")
            + ", which config.json requires: the files are of another model, or incomplete"
        )


def _from_checkpoint(
    checkpoint: Checkpoint, dtype: torch.dtype | None, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """The model of a checkpoint: its weights only, also if they are in the files of many ranks."""
    path = checkpoint.path / MODEL_FOLDER
    model = _described(path, dtype, config)
    found = {WEIGHT: dict(model.named_parameters()), BUFFER: dict(model.named_buffers())}
    with torch.no_grad():
        for kind, name in checkpoint.manifest.tensors:
            if kind in found:
                if name not in found[kind]:
                    raise CheckpointError(
                        f"{checkpoint.path}: holds {name}, but the model described in {path} has no such tensor"
                    )
                own, saved = found[kind].pop(name), checkpoint.tensor(kind, name)
                if own.shape != saved.shape:
                    raise CheckpointError(
                        f"{checkpoint.path}: {name} has shape {tuple(saved.shape)}, and the model {tuple(own.shape)}"
                    )
                own.copy_(saved)
    if found[WEIGHT]:
        raise CheckpointError(f"{checkpoint.path} does not hold {min(found[WEIGHT])}, which {path} says the model has")
    checkpoint.close()
    return model.eval()


def _described(
    path: Path, dtype: torch.dtype | None = None, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """A new model, as `config` or `config.json` in `path` describes it."""
    try:
        if config is None:
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds of errors for a damaged file
        raise CheckpointError(f"{path}: no model can be made ({type(error).__name__}: {error})") from error


def parameter_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """FQN -> shape of the parameters of the model that `config.json` in `folder` describes; nothing is allocated."""
    with torch.device("meta"):
        model = _described(Path(folder))
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def load_text_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, for text in and out. Raises DataError."""
    path = model_folder(Path(folder))
    if not path.is_dir():
        raise DataError(f"{path}: no such tokenizer folder")
    try:
        return cast(PreTrainedTokenizerBase, pretrained_tokenizer(path))
    except Exception as error:  # as in _new_model
        raise DataError(f"{path}: the tokenizer cannot be loaded ({type(error).__name__}: {error})") from error
