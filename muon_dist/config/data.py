"""The blocks `tokenizer` and `data` of a configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from muon_dist import defaults
from muon_dist.config.kinds import BelowOne, Block, DataPath, Flag, LocalPath, NonNegative, OnBadRecord, PositiveInt


class TokenizerConfig(Block):
    """A tokenizer to load (`path`), or one to train on the sources."""

    path: LocalPath | None = Field(default=None, description="folder of an existing tokenizer, for AutoTokenizer")
    model_type: Literal["bpe", "unigram"] = Field(
        default="bpe", description="sentencepiece model to train when path is null"
    )
    vocab_size: PositiveInt | None = Field(
        default=None, description="size of the vocabulary to train (4096 unless given); null when path is given"
    )
    sample_bytes: PositiveInt = Field(
        default=defaults.SAMPLE_BYTES, description="UTF-8 bytes of text that the training reads at most"
    )
    special_tokens: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v),
    ] = Field(
        default=(),
        description="strings that become one token each wherever a text contains them, for instance <|user|>",
    )
    split_digits: Flag = Field(default=False, description="each digit is a token")

    @model_validator(mode="before")
    @classmethod
    def _default_vocabulary(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("path") is None and "vocab_size" not in data:
            return {**data, "vocab_size": defaults.VOCAB_SIZE}
        return data


class SourceConfig(Block):
    """One source of text: exactly one of builtin, path and dataset."""

    builtin: Literal["stdlib"] | None = Field(default=None, description="English text of the Python standard library")
    path: DataPath | tuple[DataPath, ...] | None = Field(
        default=None,
        description="a file, a folder that is read recursively, a glob, a URL that fsspec opens (s3://), or a list",
    )
    dataset: DataPath | None = Field(default=None, description="name of a dataset for datasets.load_dataset")
    weight: NonNegative = Field(
        default=1.0, description="share of the training samples, relative to the other sources; 0: not drawn"
    )
    format: Literal["auto", "text", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "megatron", "datatrove"] = (
        Field(default="auto", description="format of the files of path; auto: detected from their content")
    )
    text_field: str = Field(
        default=defaults.TEXT_FIELD,
        description="field of a record that has the text; a.b for field b inside field a",
    )
    config: str | None = Field(default=None, description="configuration name of the dataset")
    split: str = Field(default="train", description="split of the dataset")
    streaming: Flag = Field(default=True, description="read the dataset without downloading all of it")
    revision: str | None = Field(default=None, description="branch, tag or commit of the dataset")
    max_documents: PositiveInt | None = Field(default=None, description="stop after this many documents")
    # left out of repr, so that the default of data in the public signature of Config does not change
    document_bytes: Annotated[int, Field(ge=64)] = Field(
        repr=False,
        default=defaults.DOCUMENT_BYTES,
        description="plain text is cut into documents at the first blank line after this many bytes",
    )
    separator: Annotated[str, Field(min_length=1)] | None = Field(
        repr=False,
        default=None,
        description="text between two documents of a plain text file; a newline: one document per line",
    )
    on_bad_record: OnBadRecord | None = Field(repr=False, default=None, description="null: data.on_bad_record")
    max_bad_records: Annotated[int, Field(ge=0)] | None = Field(
        repr=False, default=None, description="null: data.max_bad_records"
    )


TOKENS = "tokens"
"""Folder of the token shards in `data.dir`."""


class DataConfig(Block):
    """The data sources, and how they are cut into samples."""

    path: DataPath | tuple[DataPath, ...] | None = Field(
        repr=False,
        default=None,
        description="your own text; short for sources with one entry that has this path",
    )
    sources: tuple[SourceConfig, ...] = (SourceConfig(builtin="stdlib"),)
    text_field: str = Field(
        repr=False, default=defaults.TEXT_FIELD, description="with path: field of a record that has the text"
    )
    on_bad_record: OnBadRecord = Field(
        repr=False,
        default="stop",
        description="stop: a record that cannot be read ends the preparation; skip: it is skipped and counted",
    )
    max_bad_records: Annotated[int, Field(ge=0)] = Field(
        repr=False,
        default=defaults.MAX_BAD_RECORDS,
        description="with skip: more bad records than this in a source end the preparation",
    )
    add_bos: Flag | None = Field(
        repr=False,
        default=None,
        description="begin each document with the beginning-of-sequence token; null: if the tokenizer does",
    )
    dir: LocalPath = Field(default="data", description="folder of the tokenizer and the token shards")
    sequence_length: Annotated[int, Field(ge=2)] = Field(
        default=defaults.SEQUENCE_LENGTH, description="tokens in a sample"
    )
    packing: Literal["concatenate", "document_mask", "best_fit"] = Field(
        repr=False,
        default="concatenate",
        description="how documents share a sample: cut from one stream; cut so, with attention, positions and loss "
        "inside each document; or so, and no document is cut that fits into a sample",
    )
    validation_fraction: BelowOne = Field(
        default=defaults.VALIDATION_FRACTION, description="share of the documents kept for validation"
    )
    validation_sources: tuple[SourceConfig, ...] = Field(
        repr=False,
        default=(),
        description="text to evaluate on; then no document of sources is kept for validation",
    )
    shard_tokens: PositiveInt = Field(default=defaults.SHARD_TOKENS, description="tokens in one shard file")
    workers: PositiveInt = Field(default=2, description="processes that tokenize")
    global_batch_size: PositiveInt | None = Field(
        default=None,
        description="samples of one optimizer step over all processes, kept at any number of them: accumulation "
        "follows, and trainer.per_device_train_batch_size is the most that a process takes at a time",
    )

    @property
    def chosen(self) -> tuple[SourceConfig, ...]:
        """The sources that are read: one source made from `path` if it is set, else `sources`."""
        if self.path is None:
            return self.sources
        # not validated again: the path was already expanded, and a second time would expand an escaped dollar sign
        return (SourceConfig.model_construct(path=self.path, text_field=self.text_field),)
