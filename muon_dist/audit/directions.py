"""Finds the update rule that explains the change of the weight in one step of one matrix.

The change W' - W is fitted by -decay W - length D, with D the asked direction. If the remainder is larger than the
dtypes explain, D is the direction of each known choice and each known fault in turn.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from muon_dist.audit.asked import Asked
from muon_dist.audit.cause import Cause, Difference, Factor
from muon_dist.audit.convention import EPSILON, FAINT, HALVES, VARIANTS, Iteration, choices, known_iterations, named
from muon_dist.audit.memory import BASE, BF16, CLIPPED, LOCAL, RESET, SCALED, STALE, TWICE, Memory

# Error of fp32 arithmetic in a well-conditioned step, with a margin of one order of magnitude.
TIGHT = 2e-3
# If rounding may change an update by more than this share of its length, the update cannot be judged.
BLURRED = 0.5
ADAM_BETAS = ((0.9, 0.95), (0.9, 0.999))

MEMORY_CAUSES = {
    BF16: Cause("momentum_bf16", "momentum is stored in bf16", "choice"),
    SCALED: Cause("momentum_scaled", "momentum is kept in loss-scaled units"),
    TWICE: Cause("divided_gradient", "the gradient arrives divided by the loss scale once more"),
    CLIPPED: Cause("clipped_gradient", "the gradient was clipped before the momentum", "choice"),
    LOCAL: Cause("local_gradient", "only one rank's own gradient was used"),
    STALE: Cause("momentum_stale", "momentum is stale: it is the one from before the load"),
    RESET: Cause("momentum_reset", "momentum was lost: it starts from zero after the load"),
}


@dataclass(frozen=True)
class Facts:
    """Facts about a step besides its tensors.

    Attributes:
        shards: possible numbers of shards of the matrix, such as the world size.
        factors: numbers that may multiply the update by mistake.
        weight_eps, gradient_eps: machine epsilon of the stored weight, and of the gradient that we read; 0 if the
            optimizer reads the same tensor.
    """

    shards: tuple[int, ...] = ()
    factors: tuple[Factor, ...] = ()
    weight_eps: float = 2.0**-23
    gradient_eps: float = 0.0


@dataclass(frozen=True)
class Step:
    """The observed tensors of one step of one matrix: (out, in), fp64; memory after this step's gradient."""

    before: Tensor
    after: Tensor
    memory: Memory
    asked: Asked
    facts: Facts


@dataclass(frozen=True)
class Fit:
    """The fit W' - W = -decay W - length D, and the remainder as a share of the update.

    `doubt`: largest error of `decay` that the remainder can explain.
    """

    length: float
    decay: float
    left: float
    doubt: float


@dataclass(frozen=True)
class Habit:
    """The explanation of the last step, to be tried first for the next step.

    Attributes:
        iteration: the iteration, with its dtype.
        deviation: name of the choice in the explanation; empty without one.
        suspect: name of the deviation that explained the last step, possibly a fault: tried after `deviation`.
    """

    iteration: Iteration
    deviation: str = ""
    suspect: str = ""


@dataclass(frozen=True)
class Judgement:
    """The explanation of a step.

    Attributes:
        causes: causes for the direction; empty if it is the asked direction.
        known: whether a known direction explains the step.
        fit: the fit of this direction, or of the asked direction if none explains the step.
        difference: difference of the update from the asked direction times the rate, without a factor of the shape.
        habit: the explanation to try first in the next step.
        noise: error of this step against the same rule in fp64, only from its precision.
    """

    causes: tuple[Cause, ...]
    known: bool
    fit: Fit
    difference: Difference
    habit: Habit | None
    noise: float = 0.0


@dataclass(frozen=True)
class Deviation:
    """A direction as a function of the iteration; without a cause: the asked one. label: the running mean it uses."""

    name: str
    cause: Cause | None
    direction: Callable[[Iteration], Tensor]
    iterates: bool = True
    label: str = BASE


@torch.no_grad()
def fit(change: Tensor, weight: Tensor, direction: Tensor) -> Fit:
    """The least-squares fit of the change of a weight by decay and a direction."""
    ww, wd, dd = float((weight * weight).sum()), float((weight * direction).sum()), float((direction**2).sum())
    cw, cd = float((change * weight).sum()), float((change * direction).sum())
    # If the weight is parallel to the direction, decay cannot be told from the update.
    apart = ww - wd * wd / dd if dd > 0 else ww
    decay = 0.0
    if apart > 1e-12 * max(ww, 1e-300):
        decay = -(cw - cd * wd / dd) / apart if dd > 0 else -cw / ww
    length = -(cd + decay * wd) / dd if dd > 0 else 0.0
    update = change + decay * weight
    rest = float((update + length * direction).norm())
    size = float(update.norm())
    return Fit(length, decay, rest / size if size > 0 else 0.0, rest / math.sqrt(apart) if apart > 0 else math.inf)


def blocks(cut: int, axis: int, u: Tensor, iteration: Iteration) -> Tensor:
    """The matrix with each of `cut` blocks along `axis` orthogonalized separately."""
    return torch.cat([iteration(part) for part in u.chunk(cut, dim=axis)], dim=axis)


def normalized_rows(o: Tensor, memory: Memory, cut: int = 1) -> Tensor:
    """NorMuon's direction (arXiv 2510.05491): rows divided by their running root mean square, then the norm restored.

    The norm is that of the whole matrix, or with `cut` > 1 of each block of rows.
    """
    before = memory.rows if memory.rows is not None else torch.zeros_like(o[:, :1])
    mean = before.lerp(o.square().mean(dim=1, keepdim=True), 0.05)
    n = o / (mean.sqrt() + 1e-10)
    parts = zip(n.chunk(cut), o.chunk(cut), strict=True)
    return torch.cat([a * (b.norm() / (a.norm() + 1e-10)) for a, b in parts])


class Judge:
    """The directions to try for one step."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.asked = step.asked
        self.memory = step.memory
        self.change = step.after - step.before
        self._directions: dict[tuple[str, Iteration | None], Tensor] = {}

    def direction(self, deviation: Deviation, iteration: Iteration) -> Tensor:
        """The direction of a deviation; cached."""
        key = deviation.name, iteration if deviation.iterates else None
        if key not in self._directions:
            self._directions[key] = deviation.direction(iteration)
        return self._directions[key]

    def _ahead(self, label: str = BASE, nesterov: bool | None = None) -> Tensor:
        asked = True if self.asked.nesterov is None else self.asked.nesterov
        return self.memory.look_ahead(label, self.asked.momentum, asked if nesterov is None else nesterov)

    def _finish(self, o: Tensor, cut: int = 1) -> Tensor:
        return normalized_rows(o, self.memory, cut) if self.asked.rule == "normuon" else o

    def _orthogonal(self, iteration: Iteration, u: Tensor) -> Tensor:
        """The orthogonalized matrix, by the asked pieces."""
        if not self.asked.pieces:
            return iteration(u)
        return torch.cat([iteration(part) for part in u.split(list(self.asked.pieces))])

    def norm(self, deviation: Deviation) -> float:
        """Norm of the running mean that a deviation uses."""
        return float(self.memory.means[deviation.label].norm())

    def base(self) -> Deviation:
        if self.asked.rule == "adamw":
            betas, eps = self.asked.betas, self.asked.eps
            return Deviation("", None, lambda _: self.memory.adam_update(betas, eps), iterates=False)
        return Deviation("", None, lambda it: self._finish(self._orthogonal(it, self._ahead())))

    def deviations(self) -> Iterator[Deviation]:
        """All known deviations: faults and choices."""
        muon = self.asked.rule != "adamw"
        if muon:
            yield from self._of_muon()
        name = "AdamW" if not muon else "Muon"
        yield Deviation(
            "sgd", Cause("sgd", f"this matrix is trained by SGD, not {name}"), lambda _: self._ahead(), False
        )
        raw = self.memory.gradients[BASE]
        yield Deviation("sgd_plain", Cause("sgd", f"this matrix is trained by SGD, not {name}"), lambda _: raw, False)
        sign = Cause("sign", f"this matrix is trained by signs (Lion), not {name}")
        yield Deviation("sign", sign, lambda _: self._ahead(nesterov=False).sign(), False)
        if muon:
            cause = Cause("adamw", "this matrix is trained by AdamW, not Muon")
            for betas in self.memory.adam:
                update = functools.partial(self.memory.adam_update, betas, self.asked.eps)
                yield Deviation(f"adamw {betas}", cause, functools.partial(_ignoring, update), False)
        else:
            cause = Cause("muon", "this parameter is trained by Muon, not AdamW")
            yield Deviation("muon", cause, lambda it: it(self._ahead()))

    def _of_muon(self) -> Iterator[Deviation]:
        other = not (self.asked.nesterov is None or self.asked.nesterov)
        cause = Cause(
            "nesterov", f"nesterov {'on' if other else 'off'}", "choice" if self.asked.nesterov is None else "fault"
        )
        yield Deviation("nesterov", cause, lambda it: self._finish(self._orthogonal(it, self._ahead(nesterov=other))))
        for label, why in MEMORY_CAUSES.items():
            if label in self.memory.means:
                yield Deviation(label, why, functools.partial(self._of_label, label), label=label)
        raw = self.memory.gradients[BASE]
        yield Deviation(
            "no_momentum", Cause("no_momentum", "the momentum is not used"), lambda it: self._orthogonal(it, raw)
        )
        yield from self._by_blocks()

    def _of_label(self, label: str, iteration: Iteration) -> Tensor:
        return self._finish(self._orthogonal(iteration, self._ahead(label)))

    def _of_blocks(self, run: Callable[[Iteration], Tensor], iteration: Iteration) -> Tensor:
        return self._finish(run(iteration))

    def _rescaled(self, cut: int, iteration: Iteration) -> Tensor:
        return self._finish(iteration(self._ahead()), cut)

    def _by_blocks(self) -> Iterator[Deviation]:
        rows, columns = self.change.shape
        shards = self.step.facts.shards
        for axis, length, word in ((0, rows, "rows"), (1, columns, "columns")):
            for cut in sorted({*shards, 2, 3, 4, 8, 16}, key=lambda c: (c not in shards, c)):
                if cut < 2 or length < cut:
                    continue
                if cut in shards:
                    cause = Cause("by_shards", f"orthogonalized by shards ({cut} blocks of {word})")
                elif length % cut:
                    continue
                else:
                    cause = Cause("by_blocks", f"orthogonalized by {cut} blocks of {word}, such as heads", "choice")
                for label in (BASE, CLIPPED) if CLIPPED in self.memory.means and cut in shards else (BASE,):
                    run = functools.partial(blocks, cut, axis, self._ahead(label))
                    finished = functools.partial(self._of_blocks, run)
                    yield Deviation(f"{cut} {word} {label}", cause, finished, label=label)
                if self.asked.rule == "normuon" and axis == 0 and cut in shards:
                    why = Cause("rescaled_by_shards", f"NorMuon's norm was restored by shards ({cut} blocks of rows)")
                    yield Deviation(f"rescale {cut}", why, functools.partial(self._rescaled, cut))

    def blur(self, deviation: Deviation, iteration: Iteration, direction: Tensor, size: float) -> float:
        """Largest error of the update from rounding, as a share of its length.

        It includes the rounding of the weight, the rounding of the gradient (amplified by the iteration), and that of
        the iteration: three times its distance from fp64, because two programs round at different places, or half of
        this if each operation is rounded.
        """
        margin = 3.0 if iteration.fused else 1.5
        weight = 0.6 * self.step.facts.weight_eps * float(self.step.before.norm()) / max(size, 1e-300)
        return (
            TIGHT + weight + self._gradient_blur(deviation, direction) + margin * self.precision(deviation, iteration)
        )

    def precision(self, deviation: Deviation, iteration: Iteration) -> float:
        """Error of the iteration's dtype against fp64, for this step's matrix."""
        if iteration.dtype not in HALVES or not deviation.iterates:
            return 0.0
        exact = self.direction(deviation, iteration.in_dtype("fp64"))
        return Difference.between(self.direction(deviation, iteration), exact).error

    def _gradient_blur(self, deviation: Deviation, direction: Tensor) -> float:
        eps = self.step.facts.gradient_eps
        if not eps or not deviation.iterates or self.asked.rule == "adamw":
            return 4 * eps
        u = self._ahead()
        noise = torch.randn(u.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(u.device)
        keller = named("keller")
        return 2 * Difference.between(keller(u + 2 * eps * u.abs() * noise), keller(u)).error

    def attempt(self, deviation: Deviation, iteration: Iteration) -> tuple[Fit, float, bool]:
        """The fit of a direction, the blur of its dtypes, and whether it explains the step."""
        direction = self.direction(deviation, iteration)
        found = fit(self.change, self.step.before, direction)
        if found.left <= TIGHT:
            return found, TIGHT, True
        size = float((self.change + found.decay * self.step.before).norm())
        blur = self.blur(deviation, iteration, direction, size)
        return found, blur, found.left <= min(blur, BLURRED)


def _ignoring(update: Callable[[], Tensor], _: Iteration) -> Tensor:
    return update()


def judge(step: Step, habit: Habit | None = None, *, search: bool = True) -> Judgement:
    """Find the explanation of one step.

    Args:
        habit: explanation of the last step; tried first.
        search: search a cause if neither the asked direction nor the habit explains the step.
    """
    judging = Judge(step)
    asked = step.asked.iteration or named("keller")
    first = habit or Habit(asked)
    known = {d.name: d for d in (judging.base(), *judging.deviations())}
    for name in dict.fromkeys((first.deviation, first.suspect)):
        if name not in known:
            continue
        found, blur, fits = judging.attempt(known[name], first.iteration)
        if fits:
            return _judgement(judging, known[name], first.iteration, found, first)
    if blur - TIGHT > BLURRED and first.iteration.dtype not in HALVES:
        cause = Cause("blurred", f"cannot be judged: dtypes blur the update by {100 * blur:.0f}%", "choice")
        return replace(_judgement(judging, known[""], first.iteration, found, first), causes=(cause,), noise=blur)
    best = _best(judging, list(known.values()), asked) if search else None
    if best is not None:
        deviation, iteration, found = best
        choice = deviation.cause is not None and deviation.cause.kind == "choice"
        name = deviation.name if choice else ""
        return _judgement(judging, deviation, iteration, found, Habit(iteration, name, deviation.name))
    found, _, _ = judging.attempt(known[""], first.iteration)
    noise = judging.precision(known[""], asked.in_dtype("bf16", fused=False))
    unknown = _judgement(judging, known[""], first.iteration, found, first)
    if noise > max(0.2, found.left / 3):
        cause = Cause("blurred", f"cannot be judged: in bf16 this update is {100 * noise:.0f}% noise", "choice")
        return replace(unknown, causes=(cause,), noise=noise)
    return replace(unknown, causes=(), known=False)


def _judgement(judging: Judge, deviation: Deviation, iteration: Iteration, found: Fit, habit: Habit) -> Judgement:
    step = judging.step
    wanted = step.asked.lr * judging.direction(judging.base(), replace(iteration.in_dtype("fp64"), epsilon=0.0))
    update = -(judging.change + found.decay * step.before)
    causes = [deviation.cause] if deviation.cause is not None else []
    if deviation.iterates:
        causes += choices(iteration, step.asked.iteration, judging.norm(deviation))
    noise = judging.precision(deviation, iteration)
    return Judgement(tuple(causes), True, found, Difference.between(update, wanted), habit, noise)


Explained = tuple[Deviation, Iteration, Fit]


def _best(judging: Judge, deviations: Sequence[Deviation], asked: Iteration) -> Explained | None:
    """The direction with the smallest remainder; each further cause must reduce the remainder enough.

    16-bit precision is tried only if fp64 comes near, because it costs more. For a 16-bit iteration, a remainder below
    half of its rounding error means nothing: another order of rounding gives as much.
    """
    found: list[tuple[float, Explained]] = []
    for deviation in deviations:
        base = deviation.cause is None
        common = (named("keller"), named("polar_express_102"))
        iterations = (asked, *(known_iterations() if base else common)) if deviation.iterates else (asked,)
        small = deviation.iterates and 0 < judging.norm(deviation) < FAINT
        if small:
            iterations = (*iterations, *(replace(i, epsilon=EPSILON) for i in (asked, *common)))
        for iteration in dict.fromkeys(iterations):
            left = 1.0
            for dtype, fused in VARIANTS if deviation.iterates else VARIANTS[:1]:
                if dtype != "fp64" and left > BLURRED and not (base and iteration in (asked, *common)):
                    break
                one = iteration.in_dtype(dtype, fused)
                fitted, _, fits = judging.attempt(deviation, one)
                left = min(left, fitted.left)
                if fits:
                    causes = (not base) + (
                        len(choices(one, judging.asked.iteration, judging.norm(deviation)))
                        if deviation.iterates
                        else 0
                    )
                    least = max(fitted.left, judging.precision(deviation, one) / 2)
                    found.append(((least + 1e-4) * (1 + causes), (deviation, one, fitted)))
                if fitted.left < 1e-5:
                    return deviation, one, fitted
    return min(found, key=lambda f: f[0])[1] if found else None
