"""Checks and learning rates that follow from `curriculum` and `model.init_from` of a configuration."""

from __future__ import annotations

from typing import Any

from muon_dist.adapters.hf.curriculum import RatePart
from muon_dist.checkpoint.manifest import model_folder
from muon_dist.checkpoint.weights import trained_with
from muon_dist.config import Config
from muon_dist.data import load_tokenizer
from muon_dist.errors import ConfigError
from muon_dist.model import check_sequence_length
from muon_dist.model.packed import keep_documents_apart
from muon_dist.model.start import starting_folder
from muon_dist.train import corpus


def prepare_for_parts(config: Config, model: Any) -> None:
    """Check the model against the data of every part, and make it keep documents apart if a part needs that.

    Raises ConfigError: samples are longer than the model's positions, or the model would mix documents.
    """
    for part in config.parts:
        check_sequence_length(model.config, part.sequence_length)
    packed = [part.packing for part in config.parts if part.packing != "concatenate"]
    if packed:
        keep_documents_apart(model, packed[0])


def check_starting_tokenizer(config: Config) -> None:
    """Raises ConfigError unless the model of `model.init_from` and the data have the same tokenizer.

    A model folder without a tokenizer is accepted unchecked.
    """
    if config.model.get("init_from") is None:
        return
    folder = starting_folder(config.model["init_from"])
    within = model_folder(folder)
    if not (within / "tokenizer_config.json").is_file():
        return
    own = load_tokenizer(corpus.tokenizer_folder(config)).info
    if own.sha256 not in {load_tokenizer(within).info.sha256, *trained_with(folder)}:
        raise ConfigError(
            f"model.init_from: {folder} was trained with another tokenizer than {own.path}, so its embeddings mean "
            f"other tokens: set tokenizer.path to {within}, and data.dir to a new folder"
        )


def rate_parts(config: Config) -> list[RatePart]:
    """The learning rates of the parts of the curriculum, and one line of text per part."""
    found = []
    for part in config.curriculum:
        plain = part.model_dump(exclude={"from_step"}, exclude_defaults=True)
        muon = plain.pop("optimizer", {}).get("muon", {})
        about = ", ".join(f"{name} {value}" for name, value in (plain.pop("data", {}) | muon | plain).items())
        own = (part.lr_scheduler_type, part.lr_scheduler_kwargs, part.warmup_steps, part.lr_scale)
        found.append(RatePart(part.from_step, *own, about or "as before"))
    return found
