"""Packed samples of fixed length out of prepared shards, memory-mapped."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from muon_dist.data.files import sha256_file
from muon_dist.data.packing import PACKINGS, packed_sample
from muon_dist.data.packing import packing as choose_packing
from muon_dist.data.shards import DOCUMENTS_FILE, INDEX_FILE, Manifest, damages
from muon_dist.errors import DataError

Sample = dict[str, torch.Tensor]


class TokenDataset(Dataset[Sample]):
    """Samples of ``sequence_length`` tokens out of the stream of one source's split.

    ``dir`` is a prepared folder; ``source`` its source folder, needed when it holds several; ``packing`` one of
    ``muon_dist.data.packing.PACKINGS``. With concatenated packing, item i is ``{"input_ids", "labels"}``, both int64
    (sequence_length,) and equal (Hugging Face models shift labels themselves); with other packings it is a
    `packed_sample`. Files are mapped when the dataset is made, so a folder that is prepared again does not change the
    samples. When the dataset is pickled to a DataLoader's workers, they map the files again.

    Raises DataError, naming the file, when the folder is not prepared or a shard's size is wrong, when the split is
    shorter than one sample, and when the model's ``vocab_size`` is too small for the tokens.
    """

    def __init__(
        self,
        dir: str | Path,
        split: str,
        sequence_length: int,
        *,
        source: str | None = None,
        vocab_size: int | None = None,
        packing: str = "concatenate",
    ) -> None:
        if packing not in PACKINGS:
            raise DataError(f"data.packing: {packing!r} is not one of {', '.join(PACKINGS)}.")
        if sequence_length < 2:
            raise DataError(f"data.sequence_length: {sequence_length} is less than 2, so nothing could be predicted.")
        self.folder, self.index = Manifest.load(dir).find(dir, split, source)
        self.split = split
        self.sequence_length = sequence_length
        for damage in damages(self.folder, self.index, hashes=False):
            raise DataError(damage)
        self._starts = list(accumulate((shard.tokens for shard in self.index.shards), initial=0))
        self._index_sha256 = sha256_file(self.folder / INDEX_FILE)
        self._maps = {number: self._mapped(number) for number in range(len(self.index.shards))}
        self.packing = packing
        self._packing = choose_packing(packing, self.folder / DOCUMENTS_FILE, self.index.tokens, sequence_length)
        if len(self) == 0:
            raise DataError(
                f"{self.folder}: too short: {self.index.tokens} tokens, one sample has {sequence_length}. "
                "Add text or lower data.sequence_length."
            )
        if vocab_size is not None:
            self.check_vocabulary(vocab_size)

    def __len__(self) -> int:
        return len(self._packing)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        pieces = self._packing.pieces(index)
        if self.packing != "concatenate":
            return packed_sample(pieces, self.tokens, self.sequence_length, self.index.eos_id)
        ids = torch.from_numpy(self.tokens(*pieces[0]))
        return {"input_ids": ids, "labels": ids.clone()}

    def tokens_in(self, index: int) -> int:
        """Tokens of text in a sample; the rest is padding."""
        return sum(count for _, count in self._packing.pieces(index))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token of this split, exactly counted over whole documents."""
        return self.index.bytes / self.index.tokens

    def tokens(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Tokens start .. start + count of the stream, int64 (count,). DataError on an id outside the vocabulary."""
        out = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            number = bisect_right(self._starts, start + filled) - 1
            offset = start + filled - self._starts[number]
            part = self._map(number)[offset : offset + count - filled]
            if int(part.max()) >= self.index.vocab_size:
                self._refuse(number, offset + int(np.argmax(part >= self.index.vocab_size)), self.index.vocab_size)
            out[filled : filled + len(part)] = part
            filled += len(part)
        return out

    def _map(self, number: int) -> npt.NDArray[np.integer[Any]]:
        if not self._maps:  # in a worker process
            if sha256_file(self.folder / INDEX_FILE) != self._index_sha256:
                raise DataError(
                    f"{self.folder}: was prepared again while this run was reading it: start the run again."
                )
            self._maps = {number: self._mapped(number) for number in range(len(self.index.shards))}
        return self._maps[number]

    def _mapped(self, number: int) -> npt.NDArray[np.integer[Any]]:
        shard = self.index.shards[number]
        return np.memmap(self.folder / shard.file, dtype=self.index.dtype, mode="r", shape=(shard.tokens,))

    def _refuse(self, number: int, position: int, vocab_size: int) -> None:
        ids = self._map(number)
        raise DataError(
            f"{self.folder / self.index.shards[number].file}: token id {int(ids[position])} at byte offset "
            f"{position * ids.itemsize} is outside the vocabulary of {vocab_size}."
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises DataError with shard and byte offset if a token id is not below the model's ``vocab_size``. Reads the
        index files, and a shard only to find the offset."""
        for number, shard in enumerate(self.index.shards):
            if shard.max_token_id >= vocab_size:
                self._refuse(number, int(np.argmax(self._map(number) >= vocab_size)), vocab_size)

    def verify(self) -> None:
        """Check every file by its SHA-256. Raises DataError with the first damaged shard and the place of the
        damage."""
        for damage in damages(self.folder, self.index, hashes=True):
            raise DataError(damage)


class MixtureDataset(Dataset[Sample]):
    """Several sources one after the other: samples [0, lengths[0]) are the first source's, and so on.
    ``MixtureSampler`` decides the order, by the weights."""

    def __init__(self, datasets: Sequence[TokenDataset]) -> None:
        if not datasets:
            raise DataError("A mixture needs at least one source.")
        self.datasets = tuple(datasets)
        self.lengths = tuple(len(dataset) for dataset in datasets)
        self._starts = list(accumulate(self.lengths, initial=0))

    @classmethod
    def open(
        cls,
        dir: str | Path,
        split: str,
        sequence_length: int,
        *,
        vocab_size: int | None = None,
        packing: str = "concatenate",
    ) -> MixtureDataset:
        """All sources of a prepared folder, in the order of the manifest."""
        names = [source.folder for source in Manifest.load(dir).sources]
        options: dict[str, Any] = {"vocab_size": vocab_size, "packing": packing}
        return cls([TokenDataset(dir, split, sequence_length, source=name, **options) for name in names])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sources' folders, in order."""
        return tuple(dataset.folder.parent.name for dataset in self.datasets)

    @property
    def padding(self) -> float:
        """Share of padding in all samples, 0 to 1."""
        size = len(self) * self.datasets[0].sequence_length
        return max(0.0, 1.0 - sum(dataset.index.tokens for dataset in self.datasets) / size)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._starts, index) - 1
        return self.datasets[number][index - self._starts[number]]

    def verify(self) -> None:
        """Check every file of every source by its SHA-256; raises DataError with the first damage."""
        for dataset in self.datasets:
            dataset.verify()
