"""Decoded samples as a model sees them, with the bounds of their documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from muon_dist.data.dataset import MixtureDataset
from muon_dist.data.encoder import Encoder


def show_samples(
    folder: str | Path, encoder: Encoder, sequence_length: int, count: int, packing: str = "concatenate"
) -> Iterator[str]:
    """``count`` training samples of each source of a prepared folder, evenly over it, as lines of text.

    A separate line marks each end of a document; other special tokens are shown by name, padding is left out.
    """
    info = encoder.info
    end = f"---- {encoder.decode([info.eos_id])} end of document"
    for dataset in MixtureDataset.open(folder, "train", sequence_length, packing=packing).datasets:
        shown = min(count, len(dataset))
        for number in (k * len(dataset) // shown for k in range(shown)):
            ids = dataset[number]["input_ids"][: dataset.tokens_in(number)].tolist()
            yield f"==== {dataset.folder.parent.name}: sample {number} of {len(dataset)}, {len(ids)} tokens"
            start = 0
            while info.eos_id in ids[start:]:
                stop = ids.index(info.eos_id, start)
                yield from ([encoder.decode(ids[start:stop])] if stop > start else [])
                yield end
                start = stop + 1
            if start < len(ids):
                yield encoder.decode(ids[start:])
                yield "---- the document continues in the next sample"
