"""Corpora, tokenizers, token shards, and the order in which samples are drawn from them."""

from __future__ import annotations

from muon_dist.data.corpus import Source
from muon_dist.data.dataset import MixtureDataset, TokenDataset
from muon_dist.data.prepare import prepare
from muon_dist.data.sampler import MixtureSampler
from muon_dist.data.shards import Manifest
from muon_dist.data.tokenizer import Encoder, TokenizerInfo, load_tokenizer, train_tokenizer

__all__ = [
    "Encoder",
    "Manifest",
    "MixtureDataset",
    "MixtureSampler",
    "Source",
    "TokenDataset",
    "TokenizerInfo",
    "load_tokenizer",
    "prepare",
    "train_tokenizer",
]
