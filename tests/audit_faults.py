"""Faults that are put into a real optimizer on purpose, and what the audit says of each.

    python -m tests.audit_faults            # a table: found when, named how
    python -m tests.audit_faults NAME ...   # some of them

Every fault is put into the code that runs, on one rank or on all, from the third step on. An audit of every step
must find it within two rotations over the matrices, and name stage and cause.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import muon_dist.optim.adamw
from muon_dist.audit.auditor import Audit
from muon_dist.audit.chain import Chain
from muon_dist.optim import Muon
from muon_dist.optim.bucket_run import BucketRun
from muon_dist.optim.rules import MuonRule
from muon_dist.optim.runtime import Runtime
from tests.distributed import run_ranks

WORLD, FIRST = 3, 3
SHAPES = ((24, 16), (24, 16), (16, 40), (32, 32))
STEPS = FIRST - 1 + 2 * len(SHAPES)
Patch = Callable[[Any], Any]


@dataclass(frozen=True)
class Fault:
    """A fault, and what the audit has to say.

    Attributes:
        stage, cause: of the first alarm, whatever matrix it is of.
        change: a context that puts the fault in, given the optimizer.
        between: called between two steps, once, in place of a context.
    """

    name: str
    stage: str
    cause: str
    change: Callable[[Muon], contextlib.AbstractContextManager[Any]] | None = None
    between: Callable[[Muon, dict[str, Any]], None] | None = None


@dataclass(frozen=True)
class Seen:
    """What was found: the step, the first line with an alarm, all lines with one; None and nothing without."""

    step: int | None
    line: dict[str, Any] | None
    alarms: int


def _on(rank: int | None) -> bool:
    return rank is None or dist.get_rank() == rank


@contextlib.contextmanager
def _rule(method: str, wrong: Callable[..., Any], rank: int | None = None) -> Iterator[None]:
    """`wrong(right, self, *args)` in place of a method of the rule."""
    right = getattr(MuonRule, method)

    def changed(self: MuonRule, *args: Any) -> Any:
        return wrong(right, self, *args) if _on(rank) else right(self, *args)

    with patch.object(MuonRule, method, changed):
        yield


def _factor(value: float, rank: int | None = None) -> Callable[[Muon], Any]:
    return lambda _: _rule("apply", lambda right, rule, w, u, rate: right(rule, w, u, rate * value), rank)


@contextlib.contextmanager
def _stack(wrong: Callable[[BucketRun, Callable[[BucketRun], None]], None]) -> Iterator[None]:
    right = BucketRun.orthogonalize
    with patch.object(BucketRun, "orthogonalize", lambda run: wrong(run, right)):
        yield


def _flip(run: BucketRun, right: Callable[[BucketRun], None]) -> None:
    for s in run.program.stacks:
        words = s.view.view(torch.int32)
        words[:, 3, 5] ^= 1 << 27  # an exponent bit
    right(run)


def _swap(run: BucketRun, right: Callable[[BucketRun], None]) -> None:
    right(run)
    for s in run.program.stacks:
        # What belongs to another matrix of the shape, or to other inputs.
        s.view.copy_(s.view.flip(0) if len(s.view) > 1 else s.view.flip(-1).roll(1, -2))


def _old_rate(optimizer: Muon) -> Any:
    right = Runtime.step

    def step(self: Runtime, work: Any, zero: Any = frozenset()) -> None:
        for w in work.values():
            w.group = {**w.group, "lr": rate_at(optimizer.progress.step)}
        right(self, work, zero)

    return patch.object(Runtime, "step", step)


def _clipped_twice(optimizer: Muon) -> Any:
    assert optimizer.runtime is not None
    optimizer.runtime.binding.gradient_factor = lambda: 0.5

    def wrong(right: Any, rule: Any, momentum: Any, gradients: Any, group: Any) -> None:
        right(rule, momentum, [0.5 * g for g in gradients], group)

    return _rule("remember", wrong)


def _wrong_beta(right: Any, rule: Any, momentum: Any, gradients: Any, group: Any) -> None:
    right(rule, momentum, gradients, {**group, "momentum": 0.9})


def _lost(right: Any, rule: Any, momentum: Any, gradients: Any, group: Any) -> None:
    torch._foreach_zero_(momentum)
    right(rule, momentum, gradients, group)


def _without_nesterov(right: Any, rule: Any, out: Any, momentum: Any, group: Any) -> None:
    torch._foreach_copy_(out, momentum)


def _no_scale(right: Any, rule: Any, weights: Any, updates: Any, rate: float) -> None:
    for w, u in zip(weights, updates, strict=True):
        right(rule, [w], [u], rate / (0.2 * max(w.shape) ** 0.5))


def _weight_bit(right: Any, rule: Any, weights: Any, updates: Any, rate: float) -> None:
    right(rule, weights, updates, rate)
    for w in weights:
        w.view(-1).view(torch.int32)[7] ^= 1 << 24


def _adamw(change: Callable[[dict[str, Any], list[Any]], None]) -> Callable[[Muon], Any]:
    right = muon_dist.optim.adamw.adamw

    def wrong(*args: Any, **kwargs: Any) -> None:
        given = list(args)
        change(kwargs, given)
        right(*given, **kwargs)

    return lambda _: patch.object(muon_dist.optim.adamw, "adamw", wrong)


def _no_correction(kwargs: dict[str, Any], args: list[Any]) -> None:
    args[5] = [torch.tensor(1e6) for _ in args[5]]


def _reload_weights(optimizer: Muon, saved: dict[str, Any]) -> None:
    with torch.no_grad():
        for p, kept in zip(saved["parameters"], saved["weights"], strict=True):
            p.copy_(kept)


def _zero_momentum(optimizer: Muon, saved: dict[str, Any]) -> None:
    assert optimizer.runtime is not None
    for momentum in optimizer.runtime.momentum.values():
        momentum.mul_(0.5)


def _no(right: Any, *args: Any) -> None:
    """Leave a method out."""


FAULTS = (
    Fault("wrong factor on one rank", "scale", "wrong_factor", _factor(1.5, 1)),
    Fault("wrong factor everywhere", "scale", "wrong_factor", _factor(0.7)),
    Fault("bit flipped in the stack", "direction", "bit_flipped", lambda _: _stack(_flip)),
    Fault("stale momentum after a load", "momentum", "stale_momentum", between=_reload_weights),
    Fault("momentum changed by others", "momentum", "stale_momentum", between=_zero_momentum),
    Fault("skipped decay", "decay", "skipped_decay", lambda _: _rule("decay", _no)),
    Fault("doubled clip", "gradient", "clipped_twice", _clipped_twice),
    Fault("old rate", "rate", "old_rate", _old_rate),
    Fault("swapped owner result", "direction", "swapped", lambda _: _stack(_swap)),
    Fault("dropped copy", "copy", "dropped", lambda _: _rule("apply", _no, 2)),
    Fault("wrong beta", "momentum", "wrong_beta", lambda _: _rule("remember", _wrong_beta)),
    Fault("lost momentum", "momentum", "lost_momentum", lambda _: _rule("remember", _lost)),
    Fault("Nesterov off", "direction", "nesterov", lambda _: _rule("send", _without_nesterov)),
    Fault("wrong scale", "scale", "wrong_scale", lambda _: _rule("apply", _no_scale)),
    Fault("bit flipped in a weight", "weight", "bit_flipped", lambda _: _rule("apply", _weight_bit)),
    Fault("AdamW: bias correction", "direction", "bias_correction", _adamw(_no_correction)),
    Fault("AdamW: beta2", "momentum", "wrong_beta", _adamw(lambda k, _: k.update(beta2=0.8))),
    Fault("AdamW: rate", "rate", "wrong_rate", _adamw(lambda k, _: k.update(lr=k["lr"] * 1.3))),
    Fault("AdamW: decay", "decay", "skipped_decay", _adamw(lambda k, _: k.update(weight_decay=0.0))),
)


def rate_at(step: int) -> float:
    return 0.02 * (1 - step / 40)


def watched(
    fault: Fault | None, steps: int = STEPS, **options: Any
) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    """All lines of a run with a fault from step `FIRST` on, and the weights after it; on each rank."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape) * 0.2) for shape in SHAPES]
    parameters += [torch.nn.Parameter(torch.randn(n)) for n in (40, 9)]
    groups = [{"params": parameters[:-2], "algorithm": "muon"}, {"params": parameters[-2:], "algorithm": "adamw"}]
    audit = Audit({"every": 1, **options})
    optimizer = Muon(groups, lr=rate_at(0), weight_decay=0.1, audit=audit)
    lines: list[dict[str, Any]] = []
    kept = {"weights": [p.detach().clone() for p in parameters], "parameters": parameters}
    right = Chain.append
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            patch.object(Chain, "append", lambda self, record: lines.append(right(self, record)) or lines[-1])
        )
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for step in range(1, steps + 1):
            if fault is not None and step == FIRST:
                if fault.change is not None:
                    stack.enter_context(fault.change(optimizer))
                elif fault.between is not None:
                    fault.between(optimizer, kept)
            for n, p in enumerate(parameters):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(97 * step + n))
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step)
            optimizer.step()
    return lines, [p.detach() for p in parameters]


def seen(lines: Sequence[dict[str, Any]]) -> Seen:
    bad = [line for line in lines if line.get("alarms")]
    return Seen(bad[0]["step"], bad[0], len(bad)) if bad else Seen(None, None, 0)


def all_of(names: Sequence[str]) -> dict[str, Seen]:
    """On each rank: what was found of each fault, and of none."""
    torch.set_num_threads(1)
    found = {"none": seen(watched(None)[0])}
    for fault in FAULTS:
        if not names or fault.name in names:
            found[fault.name] = seen(watched(fault)[0])
    return found


def named(fault: Fault, result: Seen) -> bool:
    """Whether a fault was found in time, with the right stage and cause in the first alarm of its line."""
    if result.step is None or result.line is None:
        return False
    first = result.line["alarms"][0]
    return result.step <= STEPS and first["stage"] == fault.stage and fault.cause in first["causes"]


def main() -> int:
    found = run_ranks(all_of, WORLD, sys.argv[1:])[0]
    print(f"without a fault: {found['none'].alarms} alarms in {STEPS} audited steps")
    print("| fault | found after steps | named | as |\n|---|---|---|---|")
    right = 0
    for fault in FAULTS:
        if fault.name not in found:
            continue
        result, ok = found[fault.name], named(fault, found[fault.name])
        right += ok
        said = result.line["alarms"][0] if result.line else {"stage": "", "sentence": "nothing"}
        after = "" if result.step is None else result.step - FIRST + 1
        print(f"| {fault.name} | {after} | {'right' if ok else 'WRONG'} | {said['stage']}: {said['sentence']} |")
    print(f"{right} of {len(found) - 1} found and named rightly")
    return 0 if right == len(found) - 1 and not found["none"].alarms else 1


if __name__ == "__main__":
    sys.exit(main())
