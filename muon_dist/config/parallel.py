"""The mesh that a `parallel:` block describes for a number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from muon_dist.errors import ConfigError

AXES = ("dp_replicate", "dp_shard", "cp", "sp", "tp")
"""Axes whose product is the number of ranks, slowest first; ep is another view of dp_shard x tp."""


@dataclass(frozen=True)
class Parallel:
    """Ranks along each axis; see `muon_dist.config.schema.ParallelConfig`."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    sp: int = 1
    tp: int = 1
    ep: int = 1

    @classmethod
    def of(cls, sizes: Mapping[str, int | None], ranks: int) -> Parallel:
        """The mesh of `ranks`.

        Args:
            sizes: ranks by axis; 1 where one is missing. dp_shard None: the ranks that the others leave.

        Raises:
            ConfigError: the product is not the number of ranks, or ep does not divide a copy of the model.
        """
        given = {name: size for name, size in sizes.items() if size is not None}
        others = 1
        for name in AXES:
            others *= given.get(name, 1) if name != "dp_shard" else 1
        if "dp_shard" not in given and ranks % others == 0:
            given["dp_shard"] = ranks // others
        product = others * given.get("dp_shard", 1)
        if product != ranks:
            words = " x ".join(f"{name} {given[name]}" for name in AXES if given.get(name, 1) > 1) or "1 rank"
            raise ConfigError(
                f"parallel: {words} = {product} ranks, and the run has {ranks}: start a multiple of {others} "
                "processes, and leave parallel.dp_shard out (it takes the ranks that are left) or set it to match"
            )
        made = cls(**given)
        if made.ep > 1 and (made.ep % made.tp or made.dp_shard * made.tp % made.ep):
            raise ConfigError(
                f"parallel.ep: is {made.ep}, and must be a multiple of parallel.tp = {made.tp} and divide "
                f"dp_shard x tp = {made.dp_shard * made.tp}, the ranks of one copy of the model"
            )
        return made

    @property
    def data(self) -> int:
        """Number of ranks that read different samples; ranks that differ only in the other axes read the same ones."""
        return self.dp_replicate * self.dp_shard
