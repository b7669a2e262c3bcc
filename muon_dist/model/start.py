"""`model.init_from`: the first weights of a run, instead of fresh ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from muon_dist.checkpoint.manifest import is_checkpoint, model_folder
from muon_dist.checkpoint.weights import newest_weights
from muon_dist.errors import ConfigError
from muon_dist.failures import one_line


def starting_folder(path: str) -> Path:
    """The model folder or checkpoint that `model.init_from` names; of a run folder, the newest weights.

    Raises ConfigError if there is none.
    """
    root = Path(path)
    if (root / "config.json").is_file() or is_checkpoint(root):
        return root
    found = newest_weights(root) if root.is_dir() else None
    if found is None:
        raise ConfigError(
            f"model.init_from: {path} is neither a model folder (config.json), nor a checkpoint, nor a run folder "
            "with one of them"
        )
    return found.path


def starting_config(folder: Path, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of the model in `folder`, changed by the `model` block (`arguments`) and by the tokenizer's
    values (`given`).

    Raises ConfigError that names the key: it cannot be read, or a change is not accepted.
    """
    path = model_folder(folder)
    try:
        config = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, **{**arguments, **given}
        )
    except Exception as error:  # transformers raises many kinds of errors for a damaged file
        raise ConfigError(f"model.init_from: {path}: no configuration can be read ({one_line(error)})") from error
    for name, value in arguments.items():
        attribute = "_attn_implementation" if name == "attn_implementation" else name
        if getattr(config, attribute, None) != value and not isinstance(value, dict):
            raise ConfigError(
                f"model.{name}: the {config.model_type} model of model.init_from cannot be changed to {value!r}: "
                f"remove model.{name}"
            )
    return config


def saved_config(folder: Path) -> PretrainedConfig:
    """The unchanged configuration of the model in `folder`. Raises ConfigError."""
    return starting_config(folder, {}, {})
