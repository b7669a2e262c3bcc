"""From a configuration to a tokenizer, token shards and the datasets of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muon_dist.config import Config
from muon_dist.config.data import TOKENS, SourceConfig
from muon_dist.data import Manifest, Source, TokenizerInfo, load_tokenizer
from muon_dist.data import prepare as prepare_shards
from muon_dist.data import train_tokenizer as train_tokenizer_folder
from muon_dist.data.curriculum import CurriculumDataset, CurriculumSampler, DataPart
from muon_dist.data.dataset import MixtureDataset
from muon_dist.data.encoder import frame_as_documents
from muon_dist.data.sampler import MixtureSampler
from muon_dist.data.show import show_samples
from muon_dist.model.load import load_text_tokenizer

# Seed of the tokenizer's sample and of the split by document. It is not the run's seed, so that runs with different
# seeds are compared on the same data.
_DATA_SEED = 0


def sources(config: Config, wanted: Sequence[SourceConfig] | None = None) -> list[Source]:
    """Sources of text with the configuration's settings for all of them; by default the sources of the training."""
    shared = {name: getattr(config.data, name) for name in ("on_bad_record", "max_bad_records")}
    chosen = config.data.chosen if wanted is None else wanted
    # A source that is drawn only in a later part still has its share of the tokenizer's sample.
    plain = [source.model_dump(exclude_none=True) for source in chosen]
    return [Source(**shared | {**source, "weight": source["weight"] or 1.0}) for source in plain]


def tokenizer_folder(config: Config) -> Path:
    """The folder of the configuration's tokenizer; it may not exist yet."""
    return Path(config.tokenizer.path) if config.tokenizer.path is not None else Path(config.data.dir) / "tokenizer"


def tokens_folder(config: Config) -> Path:
    """The folder of the token shards; it may not exist yet."""
    return Path(config.data.dir) / TOKENS


def validation_data(config: Config) -> tuple[Path, str] | None:
    """(prepared folder, split) of the text for evaluation; None if there is none."""
    if config.data.validation_sources:
        return Path(config.data.dir) / "validation", "train"
    return (tokens_folder(config), "validation") if config.data.validation_fraction > 0 else None


def make_tokenizer(config: Config, overwrite: bool = False, rebuild: bool = True) -> TokenizerInfo:
    """Load the tokenizer of the configuration, or train it. A tokenizer trained before on the same text stays.

    If the text has changed, it is trained again; without `rebuild` that is a DataError.
    """
    block = config.tokenizer
    if block.path is not None:
        return load_tokenizer(block.path).info
    assert block.vocab_size is not None  # the schema fills it in
    return train_tokenizer_folder(
        sources(config),
        tokenizer_folder(config),
        model_type=block.model_type,
        vocab_size=block.vocab_size,
        sample_bytes=block.sample_bytes,
        seed=_DATA_SEED,
        threads=config.data.workers,
        overwrite=overwrite,
        special_tokens=block.special_tokens,
        split_digits=block.split_digits,
        rebuild=rebuild,
    )


def text_tokenizer(config: Config) -> Any:
    """The tokenizer of the configuration for transformers; it encodes a text as in the shards."""
    tokenizer = load_text_tokenizer(tokenizer_folder(config))
    frame_as_documents(tokenizer, config.data.add_bos)
    return tokenizer


def prepare(config: Config, overwrite: bool = False, verify: bool = False, rebuild: bool = True) -> Manifest:
    """Make tokenizer and token shards of the configuration, if they do not exist yet.

    If their inputs have changed, both are made again; without `rebuild` that is a DataError.
    """
    make_tokenizer(config, overwrite, rebuild)
    data = config.data

    def made(wanted: Sequence[SourceConfig], folder: Path, fraction: float) -> Manifest:
        return prepare_shards(
            sources(config, wanted),
            tokenizer_folder(config),
            folder,
            validation_fraction=fraction,
            shard_tokens=data.shard_tokens,
            workers=data.workers,
            seed=_DATA_SEED,
            overwrite=overwrite,
            verify=verify,
            rebuild=rebuild,
            add_bos=data.add_bos,
        )

    if data.validation_sources:
        made(data.validation_sources, Path(data.dir) / "validation", 0.0)
    return made(data.chosen, tokens_folder(config), 0.0 if data.validation_sources else data.validation_fraction)


def shown(config: Config, count: int) -> Iterator[str]:
    """`count` prepared training samples of each source as lines of text; see `show_samples`."""
    encoder = load_tokenizer(tokenizer_folder(config), config.data.add_bos)
    return show_samples(tokens_folder(config), encoder, config.data.sequence_length, count, config.data.packing)


@dataclass(frozen=True)
class Datasets:
    """Packed samples of a run, and the average number of bytes of text per token."""

    validation: MixtureDataset | None
    parts: tuple[DataPart, ...]
    seed: int

    @property
    def train(self) -> MixtureDataset:
        """Samples of the first part; without a curriculum, of the whole run."""
        return self.parts[0].dataset

    @property
    def drawn(self) -> MixtureDataset | CurriculumDataset:
        """Samples of all parts, into which the indices of `sampler` lead."""
        return CurriculumDataset([part.dataset for part in self.parts]) if self.parts[1:] else self.train

    @property
    def bytes_per_token(self) -> tuple[float, float]:
        """Bytes per token of (train, validation): of the training mixture, and of all validation samples."""
        weights = self.parts[0].weights
        total = sum(weights)
        train = sum(w / total * d.bytes_per_token for w, d in zip(weights, self.train.datasets, strict=True))
        return train, bytes_per_token(self.validation) if self.validation is not None else train

    def describe(self, config: Config) -> dict[str, Any]:
        """A description of the training data, for the run folder."""
        splits = {"train": self.train, "validation": self.validation}
        return {
            "tokenizers": [Manifest.load(tokens_folder(config)).tokenizer_sha256],
            "samples": {k: dict(zip(d.names, d.lengths, strict=True)) for k, d in splits.items() if d is not None},
        }

    def passes(self, consumed: int, samples_per_step: int) -> dict[str, float]:
        """Source -> passes over it after the given samples; empty for a single source, whose passes are the epochs."""
        names = self.train.names
        sampler = self.sampler(0, max(consumed, 1), samples_per_step)
        return dict(zip(names, sampler.passes(consumed), strict=True)) if names[1:] else {}

    def sampler(self, consumed: int, total: int, samples_per_step: int) -> MixtureSampler | CurriculumSampler:
        """The order of training samples from `consumed` to `total`, indices into `drawn`."""
        order: dict[str, Any] = {"seed": self.seed, "consumed": consumed, "total": total}
        if self.parts[1:]:
            return CurriculumSampler(self.parts, samples_per_step=samples_per_step, **order)
        return MixtureSampler(self.train.lengths, self.parts[0].weights, **order)


def bytes_per_token(dataset: MixtureDataset) -> float:
    """Bytes of text per token, over the samples of all sources."""
    return sum(len(d) * d.bytes_per_token for d in dataset.datasets) / len(dataset)


def open_datasets(config: Config, vocab_size: int) -> Datasets:
    """The prepared data. Raises DataError if it is missing, damaged or contains token ids of `vocab_size` or above."""
    folder = tokens_folder(config)
    opened: dict[tuple[int, str], MixtureDataset] = {}
    parts = []
    for part in config.parts:
        how = (part.sequence_length, part.packing)
        if how not in opened:
            opened[how] = MixtureDataset.open(
                folder, "train", part.sequence_length, vocab_size=vocab_size, packing=part.packing
            )
        parts.append(DataPart(part.from_step, opened[how], part.weights))
    found, first = validation_data(config), config.parts[0]
    validation = None
    if found is not None:
        validation = MixtureDataset.open(*found, first.sequence_length, vocab_size=vocab_size, packing=first.packing)
    return Datasets(validation, tuple(parts), config.seed)
