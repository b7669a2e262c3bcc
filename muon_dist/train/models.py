"""Commands for a trained model: evaluate, generate, export."""

from __future__ import annotations

import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from muon_dist.adapters.hf.callbacks import quiet_transformers
from muon_dist.checkpoint.manifest import is_checkpoint, model_folder
from muon_dist.checkpoint.weights import (
    NEWEST,
    Choice,
    Weights,
    choose_weights,
    record_step,
    trained_with,
    weights_at,
)
from muon_dist.config import Config, load_config
from muon_dist.config.data import TOKENS
from muon_dist.data.dataset import MixtureDataset
from muon_dist.errors import CheckpointError, ConfigError, DataError
from muon_dist.model import DTYPES
from muon_dist.model.load import load_model, load_text_tokenizer
from muon_dist.model.portable import make_portable
from muon_dist.train import corpus
from muon_dist.train.evaluation import check_tokenizer, evaluate, is_prepared, text_dataset
from muon_dist.train.folder import RunFolder
from muon_dist.train.generation import generate


def find_weights(path: str | Path, choice: Choice = NEWEST) -> Weights:
    """The weights under a path: of a run folder, the newest or those of `choice`; of a checkpoint or a model folder,
    its own.

    Raises CheckpointError if there are none, or none that fit `choice`.
    """
    root = Path(path)
    if (root / "config.json").is_file() or is_checkpoint(root):
        own = weights_at(root)
        if choice.best or choice.step not in (None, own.step):
            raise CheckpointError(f"{own} is a single checkpoint or model: --step and --best need a run folder")
        return own
    found = choose_weights(root, choice)
    if found is None:
        raise CheckpointError(f"{root}: neither a model (config.json) nor a run folder with a model/ or a checkpoint")
    return found


def choice_of(path: str | Path, step: int | None, best: bool) -> Choice:
    """The choice of --step and --best. Best: by the run's metric_for_best_model, else by the validation loss."""
    if not best:
        return Choice(step)
    config = run_config(path)
    trainer = config.trainer if config is not None else {}
    metric = str(trainer.get("metric_for_best_model") or "loss")
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    return Choice(step, best, name, bool(trainer.get("greater_is_better", not name.endswith("loss"))))


def run_config(path: str | Path) -> Config | None:
    """The configuration of the run to which a run, model or checkpoint folder belongs; None if it is in no run
    folder."""
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
    text: str | Path | None = None,
    sequence_length: int | None = None,
    batch_size: int = 8,
    max_samples: int | None = None,
    choice: Choice = NEWEST,
) -> dict[str, Any]:
    """`evaluate` on the validation split of the run's data, of other prepared `data`, or on raw `text`.

    text: a file, folder or URL of any format of a source; all of it is used. data: a folder prepared with the model's
    tokenizer, or the `data.dir` that contains it; any other path is read as text. The result also has `model` (the
    folder of the weights) and `step` (their step).

    Raises:
        ConfigError: both are given, a needed value is not known, or samples are longer than the model's positions.
        DataError: the tokens are of another tokenizer, or the run's data no longer exist.
    """
    quiet_transformers()
    if data is not None and text is not None:
        raise ConfigError("--data and --text both say what to evaluate on: give one")
    if data is not None and not is_prepared(data):
        inner = Path(data) / TOKENS  # a whole `data.dir`
        data, text = (inner, None) if is_prepared(inner) else (None, data)
    weights = find_weights(path, choice)
    config = run_config(path)
    if config is None and ((data is None and text is None) or sequence_length is None):
        raise ConfigError(f"{path} is not inside a run folder: pass --data (or --text) and --sequence-length")
    if sequence_length is None:
        assert config is not None
        sequence_length = config.data.sequence_length
    packing = config.data.packing if config is not None else "concatenate"
    model = load_model(weights.path)
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and sequence_length > longest > 0:
        raise ConfigError(
            f"--sequence-length {sequence_length}: the model has {longest} positions (max_position_embeddings): give "
            f"at most {longest}"
        )
    opened: AbstractContextManager[MixtureDataset]
    if text is not None:
        opened = text_dataset(text, weights.path, sequence_length, model.config.vocab_size, packing)
    else:
        split = "validation"
        if data is None:
            assert config is not None
            data, split = corpus.validation_data(config) or (corpus.tokens_folder(config), split)
            if not is_prepared(data):
                raise DataError(f"{data}: the data of the run no longer exist: give other data with --data or --text")
        else:
            check_tokenizer(data, weights.path)
        vocab_size = model.config.vocab_size
        opened = nullcontext(MixtureDataset.open(data, split, sequence_length, vocab_size=vocab_size, packing=packing))
    with opened as dataset:
        size = corpus.bytes_per_token(dataset)
        figures = evaluate(model, dataset, size, batch_size=batch_size, max_samples=max_samples)
    return {"model": str(weights.path), "step": weights.step, "data": str(data or text), **figures}


def generate_from_folder(
    path: str | Path, prompt: str, tokens: int, *, choice: Choice = NEWEST, **sampling: Any
) -> tuple[str, Weights]:
    """`generate` with the model and the tokenizer of a folder. Returns (text, the weights that were used)."""
    quiet_transformers()
    weights = find_weights(path, choice)
    text = generate(load_model(weights.path), load_text_tokenizer(weights.path), prompt, tokens, **sampling)
    return text, weights


def export_folder(path: str | Path, out: str | Path, dtype: str | None = None, choice: Choice = NEWEST) -> Weights:
    """Save the model (in `dtype`, or unchanged) and its tokenizer to the new folder `out`. Returns its source.

    transformers 4.57 and 5.x load it, see `muon_dist.model.portable`; a setting that version 4 cannot express causes a
    warning.

    Raises ConfigError when `out` exists or the dtype is unknown, CheckpointError when there is no model.
    """
    quiet_transformers()
    target = Path(out)
    if target.exists():
        raise ConfigError(f"{target} exists already: choose another folder")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: use one of {', '.join(DTYPES)}")
    weights = find_weights(path, choice)
    folder = weights.path
    model = load_model(folder, DTYPES[dtype] if dtype is not None else None)
    # weights without a tokenizer are exported without one
    tokenizer = load_text_tokenizer(folder) if (model_folder(folder) / "tokenizer_config.json").is_file() else None
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    record_step(temporary, weights.step, tokenizers=trained_with(folder))
    for problem in make_portable(temporary):
        print(f"warning: {problem}", file=sys.stderr, flush=True)
    temporary.rename(target)
    return weights
