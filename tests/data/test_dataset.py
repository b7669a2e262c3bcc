"""Samples equal the stream exactly; damage and unknown tokens are named."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from muon_dist.data import Manifest, Source, TokenizerInfo, prepare
from muon_dist.data.dataset import MixtureDataset, TokenDataset
from muon_dist.data.sampler import MixtureSampler
from muon_dist.data.shards import SplitIndex, SplitWriter, damages

from .refusal import refused
from .test_preparation import stream


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("length", [2, 100, 256, 3001])
def test_samples_are_the_stream_across_shards(prepared: Path, split: str, length: int) -> None:
    ids, _ = stream(prepared / "00-topics" / split)
    dataset = TokenDataset(prepared, split, length, vocab_size=1000)
    assert len(dataset) == len(ids) // length
    step = max(1, len(dataset) // 50)
    crossing = [20_000 * k // length for k in range(1, len(dataset.index.shards))]
    for index in [*range(0, len(dataset), step), *crossing, len(dataset) - 1]:
        sample = dataset[index]
        expected = torch.from_numpy(ids[index * length : (index + 1) * length].astype(np.int64))
        assert sample.keys() == {"input_ids", "labels"} and sample["input_ids"].dtype == torch.int64
        assert torch.equal(sample["input_ids"], expected) and torch.equal(sample["labels"], expected)
    for outside in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset[outside]
    dataset.verify()


def test_one_sample_may_span_many_shards(tmp_path: Path, corpus: Path, tokenizer: TokenizerInfo) -> None:
    source = Source(path=corpus, max_documents=10)
    prepare([source], tokenizer.path, tmp_path / "out", shard_tokens=100, validation_fraction=0)
    ids, _ = stream(tmp_path / "out" / "00-topics" / "train")
    dataset = TokenDataset(tmp_path / "out", "train", 1111)
    assert torch.equal(
        torch.cat([s["input_ids"] for s in dataset]), torch.from_numpy(ids[: 1111 * len(dataset)].astype("i8"))
    )


def test_loader_workers_and_pickling(prepared: Path) -> None:
    dataset = TokenDataset(prepared, "train", 128)
    first = dataset[0]["input_ids"]
    assert len(pickle.dumps(dataset)) < 50_000  # no token is sent
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[0]["input_ids"], first)
    sampler = MixtureSampler([len(dataset)], seed=0, total=40)
    loader = DataLoader(dataset, batch_size=8, sampler=sampler, num_workers=2)
    seen = torch.cat([batch["input_ids"] for batch in loader])
    assert torch.equal(seen, torch.stack([dataset[i]["input_ids"] for i in sampler]))


def test_bytes_per_token(prepared: Path, manifest: Manifest) -> None:
    dataset = TokenDataset(prepared, "validation", 64)
    assert dataset.bytes_per_token == manifest.bytes_per_token("validation")
    assert 2 < dataset.bytes_per_token < 5


def test_mixture(tmp_path: Path, corpus: Path, texts: list[str], tokenizer: TokenizerInfo) -> None:
    (tmp_path / "b.txt").write_text("\n\n".join(texts[:5]))
    sources = [Source(path=corpus), Source(path=tmp_path / "b.txt", document_bytes=500)]
    manifest = prepare(sources, tokenizer.path, tmp_path / "out", validation_fraction=0.1)
    mixture = MixtureDataset.open(tmp_path / "out", "train", 128, vocab_size=1000)
    parts = [TokenDataset(tmp_path / "out", "train", 128, source=one.folder) for one in manifest.sources]
    assert mixture.lengths == tuple(map(len, parts)) and len(mixture) == sum(mixture.lengths)
    sampler = MixtureSampler(mixture.lengths, [1, 3], seed=0, total=200)
    for position, index in enumerate(sampler):
        source, sample = sampler.at(position)
        assert torch.equal(mixture[index]["input_ids"], parts[source][sample]["input_ids"])
    assert sum(sampler.at(position)[0] for position in range(200)) == 150
    mixture.verify()
    with refused("name one of its sources", "00-topics, 01-b.txt"):
        TokenDataset(tmp_path / "out", "train", 128)
    with refused("no source 'topics'", "00-topics"):
        TokenDataset(tmp_path / "out", "train", 128, source="topics")


def test_refusals(prepared: Path, tmp_path: Path) -> None:
    with refused(tmp_path / "manifest.json", "no such file"):
        TokenDataset(tmp_path, "train", 128)
    with refused("split", "'test'", "train, validation"):
        TokenDataset(prepared, "test", 128)
    with refused("sequence_length: 1"):
        TokenDataset(prepared, "train", 1)
    tokens = Manifest.load(prepared).totals("validation")[0]
    with refused(prepared / "00-topics" / "validation", "too short", f"{tokens} tokens", str(tokens + 1)):
        TokenDataset(prepared, "validation", tokens + 1)
    assert len(TokenDataset(prepared, "validation", tokens)) == 1


def test_vocabulary_of_the_model_is_checked_before_training(prepared: Path) -> None:
    ids, _ = stream(prepared / "00-topics" / "train")
    top = int(ids.max())
    TokenDataset(prepared, "train", 64, vocab_size=top + 1)
    first = int(np.argmax(ids >= top))
    shard, position = divmod(first, 20_000)
    where = prepared / "00-topics" / "train" / f"{shard:05d}.bin"
    with refused(where, f"token id {top} ", f"byte offset {2 * position} ", f"vocabulary of {top}"):
        TokenDataset(prepared, "train", 64, vocab_size=top)


@pytest.mark.parametrize("offset", [0, 1234, 39_999])
def test_damaged_shard_is_named_with_its_offset(prepared: Path, tmp_path: Path, offset: int) -> None:
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    path = out / "00-topics" / "train" / "00001.bin"
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x80  # in the upper byte of a token: an id outside the vocabulary
    path.write_bytes(data)
    dataset = TokenDataset(out, "train", 64)
    with refused(path, "between byte offsets 0 and 39999"):
        dataset.verify()
    if offset % 2:
        with refused(path, f"byte offset {offset - 1} ", "vocabulary of 1000"):
            dataset[(20_000 + offset // 2) // 64]
    path.write_bytes(data[:offset])
    with refused(path, f"byte offset {offset}:", f"{offset} bytes instead of 40000"):
        TokenDataset(out, "train", 64)


def test_wide_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    ids = np.array([0, 65_535, 65_536, 2**31, 69_999_999, 2], dtype=np.int64)
    writer = SplitWriter(tmp_path / "train", 2**32 - 1, 2, shard_tokens=4)
    writer.add(ids, 17)
    writer.finish()
    index = SplitIndex.load(tmp_path / "train")
    assert index.dtype == "<u4" and [shard.max_token_id for shard in index.shards] == [2**31, 69_999_999]
    assert np.array_equal(stream(tmp_path / "train")[0], ids)
    assert list(damages(tmp_path / "train", index, hashes=True)) == []


def test_damage_is_located_by_block(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path / "train", 1000, 2, shard_tokens=10**7)
    writer.add(np.arange(1_500_000) % 1000, 17)
    writer.finish()
    path = tmp_path / "train" / "00000.bin"
    data = bytearray(path.read_bytes())
    data[1_100_000] ^= 1
    data[2_999_999] ^= 1
    path.write_bytes(data)
    assert list(damages(tmp_path / "train", SplitIndex.load(tmp_path / "train"), hashes=True)) == [
        f"{path}: damaged between byte offsets 1048576 and 2097151 (SHA-256).",
        f"{path}: damaged between byte offsets 2097152 and 2999999 (SHA-256).",
    ]
