"""The matrices that a witness follows: their choice, their source, and the record of each."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from muon_dist.audit.asked import Wanted
from muon_dist.audit.directions import Habit
from muon_dist.audit.lengths import Decay
from muon_dist.audit.memory import Memory
from muon_dist.audit.sources import Source, TorchSource
from muon_dist.errors import ConfigError, RoutingError
from muon_dist.optim.unwrap import layers
from muon_dist.routing import table_of


class Followed:
    """The witness's record of one matrix.

    Attributes:
        late: it was not followed from the optimizer's first step on, so its momentum is not known at first.
        written: other code wrote the weight between two steps, and not from a save that the witness has seen.
    """

    def __init__(self, name: str, shape: tuple[int, int], pieces: Sequence[int], late: bool) -> None:
        self.name = name
        self.shape = shape
        self.pieces = tuple(pieces)
        self.memory = Memory(shape, torch.device("cpu"))
        self.habit: Habit | None = None
        self.decay = Decay()
        self.searches = 0
        self.late = late
        self.written = False
        self.gradients: dict[str, Tensor] | None = None
        self.before: Tensor | None = None
        self.after: Tensor | None = None


def candidates(source: Source, model: nn.Module | None, wanted: Wanted, chosen: int | str | Sequence[str]) -> set[str]:
    """Names of the matrices that may be followed: those in `chosen`, or all that the rule should train."""
    if not isinstance(chosen, (int, str)):
        found = {n for n in source.matrices for pattern in chosen if re.fullmatch(pattern, n)}
        if not found:
            raise ConfigError(f"matrices={list(chosen)!r} match none of {', '.join(source.matrices)}")
        return found
    if wanted.rule == "adamw":
        return set(source.matrices) - set(source.claimed)
    try:
        routed = {r.fqn for r in table_of(model).select("muon")} if model is not None else set()
    except RoutingError:
        routed = set()
    found = (routed | set(source.claimed)) & set(source.matrices)
    if not found:
        raise ConfigError(
            "the witness found no matrix that Muon should train: no parameter group says so, and no parameter is a "
            f"hidden matrix of the model; pass matrices=[...] with names from {', '.join(source.matrices)}"
        )
    return found


def draw(names: Sequence[str], shapes: Mapping[str, tuple[int, int]], count: int, seed: str) -> list[str]:
    """`count` random names by `seed`; prefers different shapes, to tell a factor of the shape from a rate."""
    names = list(names)
    random.Random(seed).shuffle(names)
    seen: dict[tuple[int, int], int] = {}
    rank = {}
    for name in names:
        rank[name] = seen[shapes[name]] = seen.get(shapes[name], -1) + 1
    return sorted(names, key=lambda n: rank[n])[:count]


def digest(tensor: Tensor | None) -> int:
    """A checksum that is equal for equal bits, in any order of summation; 0 for None."""
    if tensor is None:
        return 0
    bits = tensor.contiguous().view(torch.int64).flatten()
    return int((bits * (2 * torch.arange(bits.numel(), device=bits.device) + 1)).sum())


def source_of(optimizer: Any, model: nn.Module | None, clip: float | None) -> Source:
    """The source for an optimizer, a list of optimizers, or an engine."""
    if "deepspeed" in sys.modules:
        from deepspeed.runtime.engine import DeepSpeedEngine

        from muon_dist.audit.follow_deepspeed import DeepSpeedSource

        if isinstance(optimizer, DeepSpeedEngine):
            return DeepSpeedSource(optimizer, clip)
    several = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    plain = []
    for one in several:
        hooked = (layer for layer in layers(one) if hasattr(type(layer), "register_step_pre_hook"))
        found = next((layer for layer in hooked if type(layer).__name__ != "AcceleratedOptimizer"), None)
        if found is None:
            raise ConfigError(f"{type(one).__name__} is not a torch optimizer, DeepSpeed engine or Trainer")
        plain.append(found)
    return TorchSource(plain, model, clip)
