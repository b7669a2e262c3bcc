"""The faults of `tests.audit_faults`: what is put in, and what the audit has to say."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import muon_dist.optim.adamw
from muon_dist.optim import Muon
from muon_dist.optim.bucket_run import BucketRun
from muon_dist.optim.low_precision import MasterWeights
from muon_dist.optim.reference import plain_newton_schulz
from muon_dist.optim.rules import HeldWeights, MuonRule
from muon_dist.optim.runtime import Runtime

WORLD = 3


def rate_at(step: int) -> float:
    return 0.02 * (1 - step / 40)


@dataclass(frozen=True)
class Fault:
    """A fault, and what the audit has to say.

    Attributes:
        stage, cause: of the first alarm, whatever matrix it is of.
        change: a context that puts the fault in, given the optimizer.
        between: called between two steps, once, in place of a context.
        ranks: that the alarm has to name.
        group: options of Muon's parameter group. optimizer: of the optimizer.
        mesh: shape of a device mesh. Rows of all parameters are sharded over its last axis, as under FSDP2; an axis
            before it holds copies, as under HSDP. Empty: every rank holds a copy.
        dtype: of the parameters.
    """

    name: str
    stage: str
    cause: str
    change: Callable[[Muon], contextlib.AbstractContextManager[Any]] | None = None
    between: Callable[[Muon, dict[str, Any]], None] | None = None
    ranks: tuple[int, ...] = ()
    group: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    mesh: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32


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


def _moments_halved(optimizer: Muon, saved: dict[str, Any]) -> None:
    for p in saved["parameters"][-2:]:
        optimizer.state[p]["exp_avg"].mul_(0.5)


def _steps_forgotten(optimizer: Muon, saved: dict[str, Any]) -> None:
    for p in saved["parameters"][-2:]:
        optimizer.state[p]["step"].zero_()


def _no(right: Any, *args: Any) -> None:
    """Leave a method out."""


def _old_decay(right: Any, rule: Any, held: HeldWeights, group: Any) -> None:
    right(rule, replace(held, lr=held.lr + 0.0005), group)


def _two(right: Any, rule: Any, *args: Any) -> None:
    right(rule, *args)
    right(rule, *args)


@contextlib.contextmanager
def _late_decay(optimizer: Muon) -> Iterator[None]:
    def apply(right: Any, rule: Any, weights: Any, updates: Any, rate: float) -> None:
        right(rule, weights, updates, rate)
        for w in weights:
            w.mul_(1 - optimizer.param_groups[0]["lr"] * 0.1)

    with _rule("decay", _no), _rule("apply", apply):
        yield


@contextlib.contextmanager
def _look_back(_: Muon) -> Iterator[None]:
    """What is sent is the momentum before this step."""
    before: dict[int, torch.Tensor] = {}

    def remember(right: Any, rule: Any, momentum: Any, gradients: Any, group: Any) -> None:
        before.update({m.data_ptr(): m.clone() for m in momentum})
        right(rule, momentum, gradients, group)

    def send(right: Any, rule: Any, out: Any, momentum: Any, group: Any) -> None:
        right(rule, out, [before[m.data_ptr()] for m in momentum], group)

    with _rule("remember", remember), _rule("send", send):
        yield


def _stale(_: Muon) -> Any:
    kept: dict[int, torch.Tensor] = {}

    def wrong(run: BucketRun, right: Callable[[BucketRun], None]) -> None:
        right(run)
        for s in run.program.stacks:
            now = s.view.clone()
            s.view.copy_(kept.get(s.numbers[0], now))
            kept[s.numbers[0]] = now

    return _stack(wrong)


def _half(right: Any, rule: Any, weights: Any, updates: Any, rate: float) -> None:
    right(rule, [w[: len(w) // 2] for w in weights], [u[: len(u) // 2] for u in updates], rate)


def _exchanged(right: Any, rule: Any, weights: Any, updates: Any, rate: float) -> None:
    """Updates of matrices of one shape change places."""
    given = list(updates)
    for i, u in enumerate(updates):
        j = next((j for j, v in enumerate(updates) if j != i and v.shape == u.shape), i)
        given[j] = u.clone()
    right(rule, weights, given, rate)


def _gradients(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    return lambda right, rule, m, gradients, group: right(rule, m, [change(g) for g in gradients], group)


def _sum(right: Any, rule: Any, momentum: Any, gradients: Any, group: Any) -> None:
    for m, g in zip(momentum, gradients, strict=True):
        m.mul_(group["momentum"]).add_(g)


def _rounded_momentum(right: Any, rule: Any, momentum: Any, gradients: Any, group: Any) -> None:
    right(rule, momentum, gradients, group)
    torch._foreach_copy_(momentum, [m.bfloat16() for m in momentum])


def _rounded_weight(right: Any, rule: Any, weights: Any, updates: Any, rate: float) -> None:
    right(rule, weights, updates, rate)
    torch._foreach_copy_(weights, [w.bfloat16() for w in weights])


def _iterated(iteration: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Muon], Any]:
    def wrong(right: Any, rule: Any, owned: Any, group: Any) -> None:
        for x in owned.stack:
            x.copy_(iteration(x))

    return lambda _: _rule("direction", wrong)


def _by_shards(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([plain_newton_schulz(part) for part in x.chunk(WORLD)])


def _other_coefficients(x: torch.Tensor) -> torch.Tensor:
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.0 * x - 3.2 * gram @ x + 1.2 * gram @ gram @ x
    return x


def _in_bf16(x: torch.Tensor) -> torch.Tensor:
    return plain_newton_schulz((x / x.norm()).bfloat16()).float()


def _other_group(optimizer: Muon) -> Any:
    right = Runtime.step

    def step(self: Runtime, work: Any, zero: Any = frozenset()) -> None:
        for w in work.values():
            w.group = {**w.group, "lr": optimizer.param_groups[1]["lr"]}
        right(self, work, zero)

    return patch.object(Runtime, "step", step)


def _clipped(method: str, wrong: Callable[..., None]) -> Callable[[Muon], Any]:
    def change(optimizer: Muon) -> Any:
        assert optimizer.runtime is not None
        optimizer.runtime.binding.gradient_factor = lambda: 0.5
        return _rule(method, wrong)

    return change


def _unclipped_look_ahead(right: Any, rule: Any, out: Any, momentum: Any, group: Any) -> None:
    torch._foreach_mul_(out, 2.0)
    right(rule, out, momentum, group)


def _transposed_scale(right: Any, rule: Any, weights: Any, updates: Any, rate: float) -> None:
    for w, u in zip(weights, updates, strict=True):
        rows, cols = w.shape
        right(rule, [w], [u], rate * (max(1.0, cols / rows) / max(1.0, rows / cols)) ** 0.5)


def _coupled(kwargs: dict[str, Any], args: list[Any]) -> None:
    args[1] = [g + 0.1 * p for p, g in zip(args[0], args[1], strict=True)]
    kwargs["weight_decay"] = 0.0


def _still(kwargs: dict[str, Any], args: list[Any]) -> None:
    if dist.get_rank() == 2:
        kwargs["lr"] = 0.0


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
    Fault("decay at the rate before", "decay", "old_rate", lambda _: _rule("decay", _old_decay)),
    Fault("decay twice", "decay", "wrong_decay", lambda _: _rule("decay", _two)),
    Fault("decay after the update", "decay", "decay_order", _late_decay),
    Fault("update twice", "scale", "twice", lambda _: _rule("apply", _two)),
    Fault("Nesterov off on one rank", "direction", "nesterov", lambda _: _rule("send", _without_nesterov, 1)),
    Fault("momentum of the step before", "direction", "stale_momentum", _look_back, group={"nesterov": False}),
    Fault("stale stack", "direction", "other_inputs", _stale),
    Fault("half a matrix not updated", "copy", "dropped", lambda _: _rule("apply", _half)),
    Fault("sign of the update", "direction", "wrong_sign", _factor(-1.0)),
    Fault("sign of the gradient", "gradient", "wrong_sign", lambda _: _rule("remember", _gradients(torch.neg))),
    Fault("momentum not updated", "momentum", "not_updated", lambda _: _rule("remember", _no)),
    Fault("momentum is a sum", "gradient", "summed_momentum", lambda _: _rule("remember", _sum)),
    Fault("momentum rounded", "momentum", "rounded", lambda _: _rule("remember", _rounded_momentum)),
    Fault("weight rounded", "weight", "rounded", lambda _: _rule("apply", _rounded_weight)),
    Fault("a step of Newton-Schulz less", "direction", "ns_steps", _iterated(lambda x: plain_newton_schulz(x, 4))),
    Fault("a known schedule", "direction", "ns_schedule",
          _iterated(lambda x: plain_newton_schulz(x, 5, "polar_express"))),
    Fault("other coefficients", "direction", "ns_coefficients", _iterated(_other_coefficients)),
    Fault("Newton-Schulz in bf16", "direction", "precision", _iterated(_in_bf16)),
    Fault("orthogonalized by shards", "direction", "by_shards", _iterated(_by_shards)),
    Fault("rate of another group", "rate", "other_group", _other_group),
    Fault("clip left out", "gradient", "not_clipped", _clipped("remember", _gradients(lambda g: 2 * g))),
    Fault("clip left out of the look-ahead", "direction", "not_clipped", _clipped("send", _unclipped_look_ahead)),
    Fault("scale of the transposed shape", "scale", "wrong_scale", lambda _: _rule("apply", _transposed_scale),
          group={"scale": "spectral"}),
    Fault("updates change places on one rank", "copy", "wrong_copy", lambda _: _rule("apply", _exchanged, 2),
          ranks=(2,)),
    Fault("16-bit weights not refreshed", "momentum", "stale_momentum",
          lambda _: patch.object(MasterWeights, "close", lambda self: self._opened.clear()),
          optimizer={"master_weights": True}, dtype=torch.bfloat16),
    Fault("AdamW: eps", "direction", "eps", _adamw(lambda k, _: k.update(eps=0.1))),
    Fault("AdamW: bias correction of the next step", "direction", "bias_correction",
          _adamw(lambda _, args: args.__setitem__(5, [t + 1 for t in args[5]]))),
    Fault("AdamW: coupled decay", "gradient", "coupled_decay", _adamw(_coupled)),
    Fault("AdamW: sign", "gradient", "wrong_sign", _adamw(lambda k, _: k.update(maximize=True))),
    Fault("AdamW: moments changed by others", "momentum", "stale_momentum", between=_moments_halved),
    Fault("AdamW: count of steps lost", "momentum", "stale_momentum", between=_steps_forgotten),
    Fault("AdamW: one rank stands still", "copy", "dropped or wrong_copy", _adamw(_still)),
    Fault("sharded: factor on one rank", "scale", "wrong_factor", _factor(1.5, 1), ranks=(1,), mesh=(WORLD,)),
    Fault("sharded: decay on one rank", "decay", "skipped_decay", lambda _: _rule("decay", _no, 2), ranks=(2,),
          mesh=(WORLD,)),
    Fault("sharded: beta on one rank", "momentum", "wrong_beta", lambda _: _rule("remember", _wrong_beta, 0),
          ranks=(0,), mesh=(WORLD,)),
    Fault("sharded: one rank stands still", "copy", "dropped", lambda _: _rule("apply", _no, 1), ranks=(1,),
          mesh=(WORLD,)),
    Fault("sharded: updates change places", "direction", "swapped", lambda _: _rule("apply", _exchanged),
          mesh=(WORLD,)),
    Fault("sharded: AdamW's rate", "rate", "wrong_rate", _adamw(lambda k, _: k.update(lr=k["lr"] * 1.3)),
          mesh=(WORLD,)),
)  # fmt: skip
HSDP = Fault("HSDP: AdamW on one rank stands still", "copy", "dropped or wrong_copy", _adamw(_still), mesh=(2, 2))
"""On four ranks."""
