"""The inputs and the alarms of an auditor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from muon_dist.audit.recompute import Before

Cut = Callable[[Tensor], Tensor]
"""Returns a part of a whole matrix."""


@dataclass(frozen=True)
class Observed:
    """One step of an optimizer on one matrix: whole tensors in fp32 or fp64.

    Attributes:
        before: the tensors before the step.
        momentum, weight, memory: the tensors after the step.
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
        sentence: a description of the error, for people.
        causes: names of likely causes.
        factor, angle: of the observed tensor relative to the wanted tensor, see `Difference`; angle in radians.
        ranks: ranks with a wrong copy, if not all copies are wrong.
    """

    stage: str
    sentence: str
    causes: tuple[str, ...] = ()
    factor: float = 1.0
    angle: float = 0.0
    ranks: tuple[int, ...] = ()

    def plain(self) -> dict[str, Any]:
        """The alarm as plain data for JSON; numbers that are not finite become None."""
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
    """Further facts that may explain a difference.

    Attributes:
        earlier: learning rates of the group in previous steps. others: rates of the other groups in this step.
        world_size: number of ranks that share the work.
        wanted: the user's tolerance; None for the default.
        weights, momentum: by rank, a function that returns the rank's part of a whole matrix; empty if one rank holds
            the whole judged tensor.
    """

    earlier: Sequence[float] = ()
    others: Sequence[float] = ()
    world_size: int = 1
    wanted: float | None = None
    weights: Mapping[int, Cut] = field(default_factory=dict)
    momentum: Mapping[int, Cut] = field(default_factory=dict)
