"""The settings of an audit, and the order in which it visits matrices and ranks."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from muon_dist.errors import ConfigError

ON_ALARM = ("warn", "stop", "undo")


@dataclass(frozen=True)
class AuditSettings:
    """Options of an audit.

    Attributes:
        every: number of optimizer steps from one audited step to the next.
        matrices: number of Muon matrices that are recomputed in an audited step, besides one AdamW parameter.
        tolerance: largest relative error of an update; None: from the dtypes, see `tolerance.tolerance_of`.
        on_alarm: "warn"; "stop": an `AuditError` on all ranks; "undo": restore parameters and state from before the
            step, bit for bit. "undo" keeps a copy of both during every audited step.
        seed: seed of the order of matrices and ranks.
        path: JSON-lines file; None: lines are kept only in memory.

    Raises:
        ConfigError: an option is out of range.
    """

    every: int = 20
    matrices: int = 1
    tolerance: float | None = None
    on_alarm: str = "warn"
    seed: int = 0
    path: Path | None = None

    def __post_init__(self) -> None:
        for name in ("every", "matrices"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"audit: {name} is {value!r}: it must be a whole number, 1 or more")
        if self.tolerance is not None and not 0 < self.tolerance < math.inf:
            raise ConfigError(f"audit: tolerance is {self.tolerance}: it is a relative error above 0, or None")
        if self.on_alarm not in ON_ALARM:
            raise ConfigError(f"audit: on_alarm is '{self.on_alarm}': use one of {', '.join(ON_ALARM)}")
        if self.path is not None:
            object.__setattr__(self, "path", Path(self.path))

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> AuditSettings:
        """The settings from a mapping. Raises ConfigError for an unknown key."""
        known = [f.name for f in fields(cls)]
        for key in given:
            if key not in known:
                raise ConfigError(f"audit: '{key}' is unknown: use one of {', '.join(known)}")
        return cls(**given)


def number_of(*parts: object) -> int:
    """A 64-bit number that depends on all of `parts`, the same on every rank and in every process."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def in_rotation(seed: int, count: int, number: int) -> tuple[int, int]:
    """(index, rotation) of audit `number`, from 0. Each rotation visits all `count` indices, in another order."""
    rotation, place = divmod(number, count)
    order = list(range(count))
    random.Random(number_of(seed, rotation)).shuffle(order)
    return order[place], rotation


def other_rank(rank: int, world_size: int, *parts: object, rotation: int) -> int:
    """A rank other than `rank`, if there is one; each rotation chooses another rank."""
    if world_size == 1:
        return rank
    return (rank + 1 + (number_of(*parts) + rotation) % (world_size - 1)) % world_size
