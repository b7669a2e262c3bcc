"""Estimated seconds to orthogonalize and to send a matrix; used to choose owners and to plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from muon_dist.numerics import newton_schulz_flops, segment_length


@dataclass(frozen=True)
class CostModel:
    """An analytic cost model. Only the ratio of its two numbers affects the choice of owners.

    Attributes:
        flops_per_second: matmul throughput of one rank.
        bytes_per_second: bytes that one rank can send, and also receive, per second.

    The default ratio, 1e4 FLOPs per byte, is that of an H100 in bf16 (about 5e14 achieved) with a 400 Gbit/s link
    (5e10 bytes/s). For a laptop core over loopback (5e10, 1e9) it is 50. A wrong ratio makes the balance worse, never
    the result.
    """

    flops_per_second: float = 5e14
    bytes_per_second: float = 5e10

    def orthogonalize(
        self, rows: int, cols: int, steps: int, dtype: torch.dtype = torch.float32, count: int = 1
    ) -> float:
        """Seconds of Newton-Schulz on `count` matrices (rows, cols) in one stack, in compute dtype `dtype`."""
        segment = segment_length(rows, cols, dtype)
        return count * newton_schulz_flops(rows, cols, steps, segment) / self.flops_per_second

    def move(self, elements: int, bytes_per_element: int) -> float:
        """Seconds to send `elements` one way."""
        return elements * bytes_per_element / self.bytes_per_second

    def fields(self) -> Iterable[tuple[str, object]]:
        """(name, value) of everything that affects the owners; ranks compare these when they compare plans."""
        yield "cost model", (type(self).__name__, self.flops_per_second, self.bytes_per_second)
