"""Known ways in which a step can be wrong: the updates that they would make, and the factors that they show."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from muon_dist.audit.cause import Cause, Difference, Direction, Factor
from muon_dist.audit.recompute import Before, Hyperparameters, plain_step, scale_factor
from muon_dist.errors import ConfigError
from muon_dist.numerics import SCHEDULES
from muon_dist.optim.reference import plain_newton_schulz

_SCALES = ("match_rms_adamw", "spectral", "unit_rms", "none")
FLIPPED = Cause("bit_flipped", "one element of what the owner gathered differs in one bit")
BIAS = "bias_correction"
SWAPPED = Cause("swapped", "the direction of another matrix, or of other inputs: a swapped result or a stale stack")


RATES = ("old_rate", "other_group")
"""Causes that mean another learning rate."""


def rates(asked: Hyperparameters, earlier: Sequence[float], others: Sequence[float]) -> list[Factor]:
    """Factors of wrong learning rates: the rates of previous steps and of other groups, divided by the asked rate."""
    found = []
    for name, what, values in (("old_rate", "a step before", earlier), ("other_group", "another group", others)):
        for lr in dict.fromkeys(values):
            if asked.lr and lr > 0 and lr != asked.lr:
                sentence = f"rate {lr:g} of {what}, asked {asked.lr:g}"
                found.append(Factor(Cause(name, sentence), lr / asked.lr))
    return found


def factors(asked: Hyperparameters, before: Before, world_size: int) -> list[Factor]:
    """Factors that may multiply an update by mistake, apart from rates. world_size: number of ranks."""
    found = []
    if asked.rule == "adamw":
        found += _corrections(asked, float(before.memory["step"]) + 1)
    if asked.rule not in ("adamw", "hyperball"):
        rows, cols = before.weight.shape
        own = scale_factor(asked.scale, rows, cols, asked.transposed)
        for kind in _SCALES:
            if kind != asked.scale:
                value = scale_factor(kind, rows, cols, asked.transposed) / own
                found.append(Factor(Cause("wrong_scale", f"scale '{kind}', asked '{asked.scale}'"), value))
        turned = scale_factor(asked.scale, rows, cols, not asked.transposed) / own
        found.append(Factor(Cause("wrong_scale", f"scale '{asked.scale}' of the transposed shape"), turned))
    for ranks in {world_size} - {1}:
        found.append(Factor(Cause("summed", f"summed over {ranks} ranks, not averaged"), float(ranks)))
        found.append(Factor(Cause("averaged_twice", f"divided by {ranks} ranks once too often"), 1 / ranks))
    found.append(Factor(Cause("twice", "applied twice"), 2.0))
    if asked.weight_decay:
        late = Cause("decay_order", "weight decay was applied after the update, and to it")
        found.append(Factor(late, 1 - asked.lr * asked.weight_decay))
    return found


def _corrections(asked: Hyperparameters, steps: float) -> list[Factor]:
    """Factors of a wrong bias correction of AdamW: c1 / sqrt(c2), or a part of it, where eps is negligible."""
    beta1, beta2 = asked.betas
    c1, root = 1 - beta1**steps, math.sqrt(1 - beta2**steps)
    ways = [
        ("computed without bias correction", c1 / root),
        ("the first moment has no bias correction", c1),
        ("the second moment has no bias correction", 1 / root),
    ]
    for other in (steps - 1, steps + 1):
        if other > 0:
            value = c1 / (1 - beta1**other) * math.sqrt(1 - beta2**other) / root
            ways.append((f"bias correction of step {other:.0f}, asked {steps:.0f}", value))
    return [Factor(Cause(BIAS, sentence), value) for sentence, value in ways]


def gradient_factors(asked: Hyperparameters, beta: float, world_size: int) -> list[Factor]:
    """Factors that may multiply the gradient in momentum by mistake; momentum is a moving average with `beta`."""
    found = []
    if beta:
        found.append(Factor(Cause("summed_momentum", "added in full, as in a sum of gradients"), 1 / (1 - beta)))
    if asked.gradient_factor != 1.0:
        f = asked.gradient_factor
        found.append(Factor(Cause("clipped_twice", f"its factor {f:g} was applied twice"), f))
        found.append(Factor(Cause("not_clipped", f"its factor {f:g} was not applied"), 1 / f))
    for ranks in {world_size} - {1}:
        found.append(Factor(Cause("summed", f"summed over {ranks} ranks, not averaged"), float(ranks)))
        found.append(Factor(Cause("averaged_twice", f"divided by {ranks} ranks once too often"), 1 / ranks))
    return found


def directions(
    before: Before, asked: Hyperparameters, momentum: Tensor, memory: dict[str, Tensor], got: Tensor, world_size: int
) -> list[Direction]:
    """Updates of known deviations, likely ones first.

    Args:
        momentum, memory: tensors after the step.
        got: the observed update, divided by the rate.
        world_size: number of ranks that share the work.
    """
    if asked.rule == "adamw":
        return list(_of_adamw(before, asked, momentum, memory, got))
    return [*_of_muon(before, asked, momentum), *_of_blocks(before, asked, momentum, world_size)]


def _of_muon(before: Before, asked: Hyperparameters, momentum: Tensor) -> Iterator[Direction]:
    def of(changed: Hyperparameters, sent: Tensor = momentum, start: Before = before) -> Callable[[], Tensor]:
        return lambda: plain_step(start, changed, momentum=sent).direction

    gradient = before.gradient * asked.gradient_factor
    without = replace(asked, nesterov=False)
    if asked.rule != "namo":
        said = "without" if asked.nesterov else "with"
        yield Direction(Cause("nesterov", f"computed {said} the Nesterov look-ahead"), of(
            replace(asked, nesterov=not asked.nesterov)))  # fmt: skip
    if bool(before.momentum.any()):
        stale = Cause("stale_momentum", "made from the momentum before this step")
        yield Direction(stale, of(without, before.momentum))
    yield Direction(Cause("no_momentum", "made only from the gradient"), of(without, gradient))
    f = asked.gradient_factor
    if f != 1.0 and asked.nesterov:
        for name, how, other in (("clipped_twice", "applied twice", f * f), ("not_clipped", "not applied", 1.0)):
            cause = Cause(name, f"the gradient's factor {f:g} was {how} in the look-ahead")
            yield Direction(cause, of(replace(asked, gradient_factor=other)))
    for steps in (asked.ns_steps - 1, asked.ns_steps + 1):
        if steps > 0 and _known(asked.ns_schedule, steps):
            sentence = f"{steps} Newton-Schulz steps, asked {asked.ns_steps}"
            yield Direction(Cause("ns_steps", sentence), of(replace(asked, ns_steps=steps)))
    for schedule in SCHEDULES:
        if schedule != asked.ns_schedule and _known(schedule, asked.ns_steps):
            sentence = f"coefficients '{schedule}', asked '{asked.ns_schedule}'"
            yield Direction(Cause("ns_schedule", sentence), of(replace(asked, ns_schedule=schedule)))
    if asked.rule != "muon":
        yield Direction(Cause("wrong_rule", f"rule 'muon', asked '{asked.rule}'"), of(replace(asked, rule="muon")))


def _of_blocks(before: Before, asked: Hyperparameters, momentum: Tensor, world_size: int) -> Iterator[Direction]:
    """Updates that orthogonalize the matrix block by block: `world_size`, 2, 3, 4 or 8 blocks of outputs or inputs."""

    def of(count: int, axis: int) -> Tensor:
        def iteration(x: Tensor) -> Tensor:
            parts = [plain_newton_schulz(part, asked.ns_steps, asked.ns_schedule) for part in x.chunk(count, dim=axis)]
            return torch.cat(parts, dim=axis)

        return plain_step(before, asked, iteration, momentum).direction

    counts = dict.fromkeys((world_size, 2, 3, 4, 8))
    for count, (axis, word) in itertools.product(counts, ((0, "outputs"), (1, "inputs"))):
        if 1 < count <= before.weight.size(axis if not asked.transposed else 1 - axis):
            cause = Cause("by_shards", f"orthogonalized by shards, {count} blocks of {word}")
            yield Direction(cause, partial(of, count, axis))


def halves(before: Before, asked: Hyperparameters, momentum: Tensor) -> Iterator[Direction]:
    """Updates by Newton-Schulz in 16 bits. Tolerance: the distance between two roundings of this iteration."""

    def of(dtype: torch.dtype) -> Tensor:
        def iteration(x: Tensor) -> Tensor:
            return plain_newton_schulz((x / x.norm()).to(dtype), asked.ns_steps, asked.ns_schedule).to(x.dtype)

        return plain_step(before, asked, iteration, momentum).direction

    for dtype, limit in ((torch.float16, 0.008), (torch.bfloat16, 0.06)):
        name = str(dtype).removeprefix("torch.")
        yield Direction(Cause("precision", f"Newton-Schulz in {name}"), partial(of, dtype), limit)


def _known(schedule: str, steps: int) -> bool:
    try:
        return bool(SCHEDULES[schedule].coefficients(steps))
    except ConfigError:
        return False


def _of_adamw(
    before: Before, asked: Hyperparameters, momentum: Tensor, memory: dict[str, Tensor], got: Tensor
) -> Iterator[Direction]:
    second, steps = memory["exp_avg_sq"], float(before.memory["step"]) + 1
    beta1, beta2 = asked.betas

    def of(first: float, of_second: float, eps: float = asked.eps) -> Callable[[], Tensor]:
        return lambda: momentum / first / ((second / of_second).sqrt() + eps)

    c1, c2 = 1 - beta1**steps, 1 - beta2**steps
    yield Direction(Cause(BIAS, "computed without bias correction"), of(1.0, 1.0))
    yield Direction(Cause(BIAS, "the first moment has no bias correction"), of(1.0, c2))
    yield Direction(Cause(BIAS, "the second moment has no bias correction"), of(c1, 1.0))
    for other in (steps - 1, steps + 1):
        if other > 0:
            cause = Cause(BIAS, f"bias correction of step {other:.0f}, asked {steps:.0f}")
            yield Direction(cause, of(1 - beta1**other, 1 - beta2**other))
    moved = got != 0
    # got = mean / (root + eps), element by element.
    found = float(((momentum / c1)[moved] / got[moved] - (second / c2).sqrt()[moved]).median()) if moved.any() else 0.0
    if found > 0:
        yield Direction(Cause("eps", f"eps {found:.3g}, asked {asked.eps:g}"), of(c1, c2, found))


def swapped(difference: Difference) -> bool:
    """Whether an update has about the right length, but a completely different direction."""
    return math.isfinite(difference.error) and abs(difference.factor) < 0.3 and 0.5 < difference.error < 3.0


def trait(got: Tensor, want: Tensor) -> Cause | None:
    """A cause for an otherwise unexplained direction of Muon, from properties that it shares with the right one.

    If both have the same singular vectors, got want^T and want^T got are symmetric. The output of Newton-Schulz always
    has full rank and singular values between 0.65 and 1.35.
    """
    got, want = got.double(), want.double()
    pairs = (got @ want.mT, want.mT @ got)
    if all(float((s - s.mT).norm()) < 0.02 * float(s.norm()) for s in pairs):
        sentence = "singular vectors are right and values are not: other coefficients, steps or scaling"
        return Cause("ns_coefficients", sentence)
    values = torch.linalg.svdvals(got)
    if float(values.min()) > 0.4 * float(values.max()):
        return Cause("other_inputs", "orthogonalized, but from other inputs: of another step, rank or matrix")
    return None


def flipped(before: Before, asked: Hyperparameters, momentum: Tensor, got: Tensor, want: Tensor, limit: float) -> str:
    """Text about the flipped bit in the gathered matrix that explains the update `got`; "" if there is none.

    Tries every bit of the elements where the updates differ most.
    """
    mu = asked.momentum
    sent = momentum.float()
    if asked.nesterov:
        sent = mu * sent + (1 - mu) * (before.gradient * asked.gradient_factor).float()
    rest = (got - want).float()
    rows, cols = rest.norm(dim=1), rest.norm(dim=0)
    places = {(int(rows.argmax()), int(cols.argmax())), divmod(int(rest.abs().argmax()), rest.size(1))}
    places.add(divmod(int(got.abs().argmax()), rest.size(1)))
    plain = replace(asked, nesterov=False)
    for i, j in places:
        for bit in reversed(range(16, 32)):
            wrong = sent.clone()
            word = wrong.view(torch.int32)[i, j]
            wrong.view(torch.int32)[i, j] = word ^ (-(2**31) if bit == 31 else 2**bit)
            if not bool(torch.isfinite(wrong[i, j])):
                continue
            made = plain_step(before, plain, momentum=wrong.to(momentum.dtype)).direction
            if Difference.between(got, made).turn <= limit:
                return f"bit {bit} of element ({i}, {j}) of what the owner gathered is flipped"
    return ""
