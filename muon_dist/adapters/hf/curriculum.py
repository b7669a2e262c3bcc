"""The parts (phases) of a run: their learning rates, update rules, and numbers in the log."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.optimization import get_scheduler

from muon_dist.adapters.factory import MuonFactory
from muon_dist.errors import ConfigError
from muon_dist.failures import one_line
from muon_dist.optim.rule_change import RuleSettings, change_rule, check_change, rule_settings
from muon_dist.optim.unwrap import find_muon

Factor = Callable[[int], float]
"""Number of finished optimizer steps -> factor on the learning rates in the next step."""


@dataclass(frozen=True)
class RatePart:
    """The learning rates of a part.

    schedule: name of a transformers schedule; None: the previous part's schedule continues. scale: `lr_scale` of the
    configuration. about: text for the log.
    """

    from_step: int
    schedule: str | None = None
    arguments: Mapping[str, Any] | None = None
    warmup_steps: int = 0
    scale: float | None = None
    about: str = ""


def follow_parts(scheduler: Any, parts: Sequence[RatePart], steps: int) -> None:
    """Make a transformers scheduler follow the parts. steps: number of steps of the whole run.

    The rate depends only on the step, so a resumed run needs no further state. Raises ConfigError for a schedule that
    depends on more than the step.
    """
    if not any(part.schedule is not None or part.scale is not None for part in parts):
        return
    if type(scheduler) is not LambdaLR:
        raise ConfigError(
            f"curriculum: trainer.lr_scheduler_type makes a {type(scheduler).__name__}, which follows the loss, not "
            "the step: choose another type, or leave lr_scheduler_type and lr_scale out of the parts"
        )
    peak = float(scheduler.optimizer.defaults.get("lr") or 1.0)
    scheduler.lr_lambdas = [_piecewise(base, parts, steps, peak) for base in scheduler.lr_lambdas]


def _piecewise(base: Factor, parts: Sequence[RatePart], steps: int, peak: float) -> Factor:
    factors = [base]
    for number, part in enumerate(parts):
        stop = parts[number + 1].from_step if number + 1 < len(parts) else steps
        before, start = factors[-1], part.from_step
        if part.schedule is None:
            factors.append(functools.partial(_scaled, before, 1.0 if part.scale is None else part.scale, 0))
            continue
        own = _schedule(number, part, max(stop - start, 1), peak)
        factors.append(functools.partial(_scaled, own, before(start) if part.scale is None else part.scale, start))
    return functools.partial(_at, tuple(factors), (0, *(part.from_step for part in parts)))


def _scaled(factor: Factor, scale: float, start: int, step: int) -> float:
    return scale * factor(step - start)


def _at(factors: Sequence[Factor], starts: Sequence[int], step: int) -> float:
    return factors[max(k for k, start in enumerate(starts) if start <= step)](step)


def _schedule(number: int, part: RatePart, steps: int, peak: float) -> Factor:
    """The factor of the part's schedule, as a function of the steps since the part began."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    try:
        found = get_scheduler(
            str(part.schedule),
            optimizer=optimizer,
            num_warmup_steps=part.warmup_steps,
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(part.arguments or {}),
        )
    except Exception as error:  # transformers raises many types
        raise ConfigError(
            f"curriculum.{number}.lr_scheduler_type, curriculum.{number}.lr_scheduler_kwargs: {one_line(error)}"
        ) from error
    if type(found) is not LambdaLR:
        raise ConfigError(f"curriculum.{number}.lr_scheduler_type: {part.schedule} depends on more than the step")
    return found.lr_lambdas[0]


def order_at(samples: Any, consumed: int) -> str | None:
    """Hash of a sampler's order up to a position, or of the whole order if it has no parts; None if it has no hash."""
    of_parts, digest = getattr(samples, "digest_at", None), getattr(samples, "digest", None)
    if of_parts is not None:
        return str(of_parts(consumed))
    return str(digest()) if digest is not None else None


class PartRates:
    """Mixin for Trainer: the learning rates follow `rate_parts`, if set. List it before Trainer in the bases."""

    rate_parts: Sequence[RatePart] = ()

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the scheduler of all parts; Trainer's method makes only one schedule."""
        trainer: Any = self
        made = trainer.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        if made:
            follow_parts(scheduler, self.rate_parts, num_training_steps)
        return scheduler


class PartRules:
    """The update rules of a run's parts.

    parts: (finished steps at its start, arguments of `MuonFactory`) of each part; the first part starts at step 0.
    """

    def __init__(self, parts: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
        self.parts = tuple(parts)
        self._settings: list[RuleSettings] = []

    def read(self, model: nn.Module) -> None:
        """Compute the rule settings of every part for `model`. Call it when the optimizer is made.

        Raises ConfigError if the rule cannot change from one part to the next.
        """
        self._settings = [rule_settings(MuonFactory()(model, **arguments)) for _, arguments in self.parts]
        for before, after in pairwise(self._settings):
            check_change(before, after)

    def use(self, optimizer: Any, step: int) -> None:
        """Let the optimizer use the rule of the part that contains the step after `step`. Call it on all ranks."""
        muon = find_muon(optimizer)
        if muon is not None and self._settings:
            change_rule(muon, self._settings[max(k for k, (start, _) in enumerate(self.parts) if start <= step)])


class RuleChange(TrainerCallback):
    """Changes the rule before the first step of a part. trainer: a trainer with `rule_parts`."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.rule_parts.use(self.trainer.optimizer, state.global_step)


class PartLog(TrainerCallback):
    """Adds the number of the part, from 1, to the log as `part`, and prints a line when a part begins."""

    def __init__(self, parts: Sequence[RatePart]) -> None:
        self.parts = tuple(parts)
        self._said = -1

    def _part(self, step: int) -> int:
        """Number of the part after `step` finished steps; 0: before the first part."""
        return sum(part.from_step <= step for part in self.parts)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        part = self._part(state.global_step)
        if part != self._said and part > 0 and state.is_world_process_zero:
            about = self.parts[part - 1]
            print(f"part {part + 1} of {len(self.parts) + 1}, from step {about.from_step}: {about.about}", flush=True)
        self._said = part

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            logs["part"] = self._part(state.global_step - 1) + 1
