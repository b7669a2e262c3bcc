"""What an auditor has before it, and what it raises."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from muon_dist.audit.recompute import Before

Cut = Callable[[Tensor], Tensor]
"""Takes a part out of a whole matrix."""


@dataclass(frozen=True)
class Observed:
    """What an optimizer has made of a matrix in one step: everything whole, in fp32 or fp64.

    Attributes:
        before: the inputs.
        momentum, weight, memory: after the step.
    """

    before: Before
    momentum: Tensor
    weight: Tensor
    memory: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Alarm:
    """A stage of the step that is wrong.

    Attributes:
        stage: "gradient", "momentum", "direction", "scale", "decay", "rate", "weight" or "copy".
        sentence: for people: what is wrong.
        causes: names of likely causes.
        factor, angle: of what was found to what was wanted, see `Difference`; angle in radians.
        ranks: whose copy is wrong, if not all are.
    """

    stage: str
    sentence: str
    causes: tuple[str, ...] = ()
    factor: float = 1.0
    angle: float = 0.0
    ranks: tuple[int, ...] = ()

    def plain(self) -> dict[str, Any]:
        """For JSON: numbers that are not finite become None."""
        numbers = {"factor": self.factor, "angle": self.angle}
        return {
            "stage": self.stage,
            "sentence": self.sentence,
            "causes": list(self.causes),
            "ranks": list(self.ranks),
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        }


@dataclass(frozen=True)
class Circumstances:
    """What else may explain a difference.

    Attributes:
        earlier: learning rates of the group in the steps before. others: of the other groups in this step.
        world_size: ranks that share the work.
        wanted: the user's tolerance, if there is one.
        weights, momentum: by rank, what it holds of a whole matrix; empty if one rank holds all that was judged.
    """

    earlier: Sequence[float] = ()
    others: Sequence[float] = ()
    world_size: int = 1
    wanted: float | None = None
    weights: Mapping[int, Cut] = field(default_factory=dict)
    momentum: Mapping[int, Cut] = field(default_factory=dict)
