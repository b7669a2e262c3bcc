"""Seconds that a device needs to orthogonalize and to send a matrix; used to choose owners and to plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from muon_dist.numerics import newton_schulz_flops, segment_length


@dataclass(frozen=True)
class CostModel:
    """An analytic device: only the ratio of its two numbers changes who owns what.

    Attributes:
        flops_per_second: matmul throughput of one rank.
        bytes_per_second: what one rank sends (and receives) in a second.

    The default ratio, 1e4 FLOPs a byte, is that of an H100 in bf16 (about 5e14 achieved) behind a 400 Gbit/s link
    (5e10 bytes/s); a laptop core over loopback (5e10, 1e9) has 50. A wrong ratio costs balance, never exactness.
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
        """(name, value) of all that decides owners; ranks compare them with the plan."""
        yield "cost model", (type(self).__name__, self.flops_per_second, self.bytes_per_second)
