"""Corpora, tokenizers and token shards. Samples and their order are in ``data.dataset`` and ``data.sampler``, not
imported here: the worker processes of ``prepare`` import this package, and torch would cost each of them 200 MB.
"""

from __future__ import annotations

from muon_dist.data.corpus import Source
from muon_dist.data.encoder import Encoder, TokenizerInfo
from muon_dist.data.preparation import prepare
from muon_dist.data.shards import Manifest
from muon_dist.data.tokenizer import load_tokenizer, train_tokenizer

__all__ = ["Encoder", "Manifest", "Source", "TokenizerInfo", "load_tokenizer", "prepare", "train_tokenizer"]
