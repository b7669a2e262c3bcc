"""Parts of a run with different data: another mixture, sample length or packing from a given step on.

The order of a whole run is still a pure function of the position. Each part has its own order, a `MixtureSampler`,
which continues each source where the part before stopped: no sample comes twice before all came once, if the parts
have the same samples. If length or packing changes, the sources are cut again, and each continues at the same fraction
of its samples.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch.utils.data import Dataset, Sampler

from muon_dist.data.dataset import MixtureDataset, Sample
from muon_dist.data.files import sha256_json
from muon_dist.data.sampler import MixtureSampler
from muon_dist.errors import DataError


@dataclass(frozen=True)
class DataPart:
    """The data of one part. from_step: steps that are done when it begins; weights: one per source."""

    from_step: int
    dataset: MixtureDataset
    weights: tuple[float, ...]


class CurriculumDataset(Dataset[Sample]):
    """The samples of all parts, one part after the other.

    `len`, `names` and `lengths` are those of the first part, because epochs are counted by it.
    """

    def __init__(self, datasets: Sequence[MixtureDataset]) -> None:
        self.parts = tuple(datasets)
        self.names, self.lengths = self.parts[0].names, self.parts[0].lengths
        self.starts = list(accumulate((len(part) for part in self.parts), initial=0))

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.starts[-1]:
            raise IndexError(f"sample {index} of {self.starts[-1]}")
        part = bisect_right(self.starts, index) - 1
        return self.parts[part][index - self.starts[part]]


class CurriculumSampler(Sampler[int]):
    """The order of the samples of all parts, as indices into the `CurriculumDataset` of the same parts.

    samples_per_step: of one optimizer step, all ranks. Yields positions `consumed` to `total`. Part i has the
    positions from parts[i].from_step x samples_per_step to where the next one begins.
    """

    def __init__(
        self, parts: Sequence[DataPart], *, samples_per_step: int, seed: int, consumed: int, total: int
    ) -> None:
        self.samples_per_step, self.consumed, self.total = samples_per_step, consumed, total
        self.starts = [part.from_step * samples_per_step for part in parts]
        self.samplers: list[MixtureSampler] = []
        self._offsets = list(accumulate((len(part.dataset) for part in parts[:-1]), initial=0))
        drawn = [0] * len(parts[0].dataset.lengths)
        for number, part in enumerate(parts):
            stop = self.starts[number + 1] if number + 1 < len(parts) else max(total, self.starts[number])
            size = stop - self.starts[number]
            sampler = MixtureSampler(part.dataset.lengths, part.weights, seed=seed, total=size, drawn=drawn)
            self.samplers.append(sampler)
            if number + 1 < len(parts):
                lengths = zip(part.dataset.lengths, parts[number + 1].dataset.lengths, strict=True)
                drawn = [d * new // old for d, (old, new) in zip(sampler.drawn(size), lengths, strict=True)]

    def __len__(self) -> int:
        return self.total - self.consumed

    def __iter__(self) -> Iterator[int]:
        for number in range(self.part(self.consumed), len(self.samplers)):
            start, sampler = self.starts[number], self.samplers[number]
            if start >= self.total:
                return
            sampler.set_consumed(max(self.consumed - start, 0))
            for index in sampler:
                yield self._offsets[number] + index

    def part(self, position: int) -> int:
        """Number of the part of a position, from 0."""
        return bisect_right(self.starts, position) - 1

    def passes(self, position: int) -> list[float]:
        """Number of passes over each source after `position` samples."""
        number = self.part(max(position - 1, 0))
        return self.samplers[number].passes(position - self.starts[number])

    def digest_at(self, position: int) -> str:
        """Hash of everything that decides the order up to a position: later parts may still be changed, or added.

        Within the first part it is the digest of its sampler.
        """
        begun = self.part(max(position - 1, 0)) + 1
        digests = [sampler.digest() for sampler in self.samplers[:begun]]
        return digests[0] if begun == 1 else sha256_json({"starts": self.starts[:begun], "parts": digests})

    def check_resume(self, step: int, consumed: int) -> None:
        """Raises DataError if the number of samples per step has changed, because then the parts begin at other
        samples."""
        if consumed != step * self.samples_per_step:
            raise DataError(
                f"curriculum: {consumed} samples were consumed in {step} steps, but a step now takes "
                f"{self.samples_per_step}: parts begin at steps, so keep the global batch (set "
                "data.global_batch_size)"
            )


def describe(part: DataPart, before: DataPart | None) -> dict[str, Any]:
    """A description of a part for the log: its differences from the part before."""
    dataset = part.dataset.datasets[0]
    about = {"sequence_length": dataset.sequence_length, "packing": dataset.packing, "weights": list(part.weights)}
    known = describe(before, None) if before is not None else {}
    return {name: value for name, value in about.items() if known.get(name) != value}
