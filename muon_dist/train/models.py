"""What is done with a trained model: evaluate, generate, export."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from muon_dist.adapters.hf_callbacks import quiet_transformers
from muon_dist.checkpoint import MODEL_FOLDER
from muon_dist.checkpoint.manifest import NAME as MANIFEST
from muon_dist.checkpoint.weights import Weights, newest_weights, record_step, weights_at
from muon_dist.config import Config, load_config
from muon_dist.data.dataset import MixtureDataset
from muon_dist.errors import CheckpointError, ConfigError
from muon_dist.model import DTYPES
from muon_dist.model.load import load_model, load_text_tokenizer
from muon_dist.train import corpus
from muon_dist.train.evaluation import evaluate
from muon_dist.train.folder import RunFolder
from muon_dist.train.generation import generate


def find_weights(path: str | Path) -> Weights:
    """The weights meant by a path: of a run folder the newest, of a checkpoint or a model folder its own.

    Raises CheckpointError when there are none.
    """
    root = Path(path)
    if (root / "config.json").is_file() or (root / MANIFEST).is_file():
        return weights_at(root)
    found = newest_weights(root)
    if found is None:
        raise CheckpointError(f"{root}: neither a model (config.json) nor a run folder with a model/ or a checkpoint")
    return found


def run_config(path: str | Path) -> Config | None:
    """The configuration of the run that a run, model or checkpoint folder belongs to, if it is in one."""
    root = Path(path)
    for candidate in (root, root.parent, root.parent.parent):
        file = RunFolder(candidate).config
        if file.is_file():
            return load_config(file)
    return None


def evaluate_folder(
    path: str | Path,
    *,
    data: str | Path | None = None,
    sequence_length: int | None = None,
    batch_size: int = 8,
    max_samples: int | None = None,
) -> dict[str, Any]:
    """`evaluate` on the validation split of the run's data, or of other prepared `data` of the same tokenizer.

    The figures come with `model`, the folder of the weights, and `step`, theirs.
    """
    quiet_transformers()
    weights = find_weights(path)
    config = run_config(path)
    if config is None and (data is None or sequence_length is None):
        raise ConfigError(f"{path} lies in no run folder: pass --data and --sequence-length")
    if data is None:
        assert config is not None
        data = corpus.tokens_folder(config)
    if sequence_length is None:
        assert config is not None
        sequence_length = config.data.sequence_length
    model = load_model(weights.path)
    dataset = MixtureDataset.open(data, "validation", sequence_length, vocab_size=model.config.vocab_size)
    figures = evaluate(model, dataset, corpus.bytes_per_token(dataset), batch_size=batch_size, max_samples=max_samples)
    return {"model": str(weights.path), "step": weights.step, "data": str(data), **figures}


def generate_from_folder(path: str | Path, prompt: str, tokens: int, **choice: Any) -> tuple[str, Weights]:
    """`generate` with the model and the tokenizer of a folder: (text, the weights that wrote it)."""
    quiet_transformers()
    weights = find_weights(path)
    text = generate(load_model(weights.path), load_text_tokenizer(weights.path), prompt, tokens, **choice)
    return text, weights


def export_folder(path: str | Path, out: str | Path, dtype: str | None = None) -> Weights:
    """Save the model (in `dtype`, or as it is) and its tokenizer to the new folder `out`; the weights that it took.

    Raises ConfigError when `out` exists or the dtype is unknown, CheckpointError when there is no model.
    """
    quiet_transformers()
    target = Path(out)
    if target.exists():
        raise ConfigError(f"{target} exists already: choose another folder")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: use one of {', '.join(DTYPES)}")
    weights = find_weights(path)
    folder = weights.path
    model = load_model(folder, DTYPES[dtype] if dtype is not None else None)
    within = folder / MODEL_FOLDER if (folder / MANIFEST).is_file() else folder
    # weights that came without one are exported without one
    tokenizer = load_text_tokenizer(folder) if (within / "tokenizer_config.json").is_file() else None
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    if weights.step is not None:
        record_step(temporary, weights.step)
    temporary.rename(target)
    return weights
