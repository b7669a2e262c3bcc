"""Prints the routing table once per process."""

from __future__ import annotations

import warnings

import torch

from muon_dist.routing.folded import fold
from muon_dist.routing.table import RoutingTable

_shown: set[str] = set()


def is_rank_zero() -> bool:
    """True on the first rank, and in a single process."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def announce(table: RoutingTable, show: bool = True, again: bool = False) -> RoutingTable:
    """Print the folded table on the first rank, issue a RuntimeWarning for each doubt, and return the table.

    Args:
        show: print the table. Warnings are issued in any case.
        again: do both even if this process has already shown an equal table.
    """
    if not is_rank_zero():
        return table
    folded = fold(table)
    text = str(folded)
    if text in _shown and not again:
        return table
    _shown.add(text)
    if show:
        print(text, flush=True)
    for row in folded.doubts:
        warnings.warn(f"{row.pattern}: {row.doubt}", RuntimeWarning, stacklevel=3)
    return table
