"""QK-clip: after a step, scales down query and key weights of heads whose attention logits grew too large.

MuonClip (Kimi K2, arXiv 2507.20534, algorithm 1): S is the largest logit of a head in the forward passes of the step.
g = min(1, threshold / S). The head's rows of W_q are multiplied by g^alpha, those of W_k by g^(1 - alpha).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from muon_dist.checkpoint.piece import clean_name
from muon_dist.defaults import QK_ALPHA, QK_THRESHOLD
from muon_dist.errors import ConfigError, FrameworkError, NonFiniteError
from muon_dist.layout.block import Block, view
from muon_dist.optim.muon import Muon
from muon_dist.optim.runtime import Runtime

_CHUNK = 2**20
"""Elements that are scaled at a time, because the index of their features takes eight bytes per element."""


@dataclass(frozen=True, eq=False)
class Scaled:
    """A parameter to be scaled: a layer's logits are proportional to each of its features.

    Attributes:
        name: clean FQN of the parameter.
        axis: axis of the features.
        group: (features,) the head group of each feature.
        power: (features,) each feature is multiplied by g^power; 0 for features that do not change.
    """

    name: str
    axis: int
    group: np.ndarray
    power: np.ndarray

    def factors(self, g: Sequence[float]) -> np.ndarray | None:
        """(features,) factor of each feature, from the g of every head group; None if all are 1."""
        found = np.asarray(g, dtype=np.float64)[self.group] ** self.power
        return None if (found == 1.0).all() else found


@dataclass(frozen=True)
class AttentionLayer:
    """One attention module.

    Attributes:
        name: FQN of the module.
        heads: query heads.
        groups: number of key heads; consecutive query heads share one, the same number for each.
        scaled: the parameters that compute its queries and keys.
    """

    name: str
    heads: int
    groups: int
    scaled: tuple[Scaled, ...]

    def g(self, maxima: Sequence[float], threshold: float) -> list[float]:
        """min(1, threshold / S) of each group, with S the largest logit of the group's query heads."""
        size = self.heads // self.groups
        largest = [max(maxima[i : i + size]) for i in range(0, self.heads, size)]
        return [threshold / s if s > threshold else 1.0 for s in largest]


class Maxima:
    """The largest attention logit of each head of some layers, since the last call of `taken`.

    share: returns (index of this process's share of the heads, number of shares), if tensor or sequence parallelism
        divides the heads of a layer. `taken` calls it.
    """

    def __init__(self, layers: Sequence[AttentionLayer], share: Callable[[], tuple[int, int]]) -> None:
        self.layers = layers
        self.recorded = False
        self._share = share
        self._found: dict[int, Tensor] = {}

    def record(self, layer: int, highest: Tensor) -> None:
        """Record the largest logits of one forward pass, (heads of this process,)."""
        before = self._found.get(layer)
        self._found[layer] = highest if before is None else torch.maximum(before, highest)
        self.recorded = True

    def clear(self) -> None:
        """Delete the recorded logits."""
        self._found = {}

    def taken(self, device: torch.device) -> Tensor:
        """Return and clear the recorded logits, (heads of all layers,) in fp32. -inf: head not seen; inf: NaN.

        Raises:
            FrameworkError: the number of heads seen in a layer differs from this process's share.
        """
        share, shares = self._share()
        every = torch.full((sum(layer.heads for layer in self.layers),), -math.inf, device=device)
        starts = accumulate((layer.heads for layer in self.layers), initial=0)
        for number, (layer, start) in enumerate(zip(self.layers, starts, strict=False)):
            seen = self._found.get(number)
            if seen is None:
                continue
            whole = len(seen) == layer.heads  # also if tensor parallelism does not shard a fused projection
            if not whole and len(seen) * shares != layer.heads:
                raise FrameworkError(
                    f"qk_clip: {layer.name} has {layer.heads} heads on {shares} ranks, but this one sees {len(seen)}. "
                    "Under tensor or sequence parallelism use MuonTrainer, which knows which heads each rank has"
                )
            at = start if whole else start + share * len(seen)
            every[at : at + len(seen)] = seen.to(device, torch.float32)
        self.clear()
        return every.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)


class QKClip:
    """Scales the weights after each step of a `Muon`. It has no state between steps.

    It runs as a hook of the optimizer, because some frameworks copy fp32 masters into 16-bit weights right after the
    step: they then copy scaled masters. If the optimizer skips a step, nothing is scaled.

    Args:
        optimizer: has the parameters of all layers.
        maxima: the largest logits, recorded in the forward passes.
        threshold: largest logit that is not clipped; 100 in the paper.

    Attributes:
        optimizer, maxima, threshold: the arguments.
        max_logit: the largest logit of all heads in the last step; None before the first.
        clipped: number of heads above the threshold in the last step.

    Raises:
        ConfigError: an option is out of range, or a rule keeps the norm of a weight that should be scaled.
        FrameworkError: the optimizer does not step a parameter that should be scaled.
    """

    def __init__(self, optimizer: Muon, maxima: Maxima, threshold: float = QK_THRESHOLD) -> None:
        self.optimizer = optimizer
        self.maxima = maxima
        self.threshold = threshold
        self.max_logit: float | None = None
        self.clipped = 0
        self._steps = 0
        self._pending: dict[str, tuple[Scaled, np.ndarray]] = {}
        _check(optimizer, maxima.layers)
        optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def _after_step(self, optimizer: Any, args: object, kwargs: object) -> None:
        runtime = optimizer.runtime
        if runtime is None or not optimizer.guard.applied:
            self.maxima.clear()
            return
        if optimizer.guard.begins:  # a framework may split one step into several calls
            self._decide(runtime)
        if self._pending:
            if optimizer.audit is not None:
                optimizer.audit.forget_weights()
            for tensor, name, part in _stepped(optimizer, runtime):
                self._scale(optimizer, tensor, name, part)

    def _decide(self, runtime: Runtime) -> None:
        """Compute the factors of all layers. A collective: one all-reduce of 4 bytes per head; the host waits."""
        transport, layers = runtime.transport, self.maxima.layers
        transport.progress.enter("qk_clip")
        self._steps += 1
        if self._steps > 1 and not self.maxima.recorded:
            raise FrameworkError(
                f"qk_clip: no logits of {layers[0].name} were seen in two steps: its forward pass does not go through "
                "transformers' attention interface, or the model that is trained is a copy: leave qk_clip out"
            )
        every = self.maxima.taken(runtime.binding.device)
        if transport.world_size > 1:
            dist.all_reduce(every, dist.ReduceOp.MAX, group=transport.group)
        values: list[float] = every.tolist()
        self.max_logit, self.clipped = max(values), sum(value > self.threshold for value in values)
        self._pending, at = {}, 0
        for layer in layers:
            own, at = values[at : at + layer.heads], at + layer.heads
            if math.inf in own:
                raise NonFiniteError(
                    f"qk_clip: an attention logit of head {own.index(math.inf)} of {layer.name} is infinite or NaN, "
                    "while all gradients are finite"
                )
            if max(own) > self.threshold:
                g = layer.g(own, self.threshold)
                found = ((scaled, scaled.factors(g)) for scaled in layer.scaled)
                self._pending.update({s.name: (s, factors) for s, factors in found if factors is not None})

    def _scale(self, optimizer: Muon, tensor: Tensor, name: str, part: Tensor) -> None:
        """Scale the layers' parameters inside `part`, this rank's part of a stepped tensor."""
        runtime = optimizer.runtime
        assert runtime is not None
        binding, rank = runtime.binding, runtime.transport.rank
        if binding.contents is None:
            if name not in self._pending:
                return
            held = [(name, tuple(tensor.shape), binding.fragments(name, tensor))]
        else:
            stored = (p for p in binding.contents(tensor) if clean_name(p.name) in self._pending)
            held = [(clean_name(p.name), p.shape, p.fragments.on(rank)) for p in stored]
        for of_parameter, shape, fragments in held:
            scaled, factors = self._pending[of_parameter]
            masters = optimizer._masters
            wide = part if masters is None else masters.open(tensor, part)
            by_feature = torch.as_tensor(factors, dtype=torch.float32, device=wide.device)
            for f in fragments:
                if f.length:
                    scale_features(view(wide.detach(), f.local), f.block, shape, scaled.axis, by_feature)
            if masters is not None:
                masters.close()


def scale_features(weight: Tensor, block: Block, shape: Sequence[int], axis: int, factors: Tensor) -> None:
    """Multiply a block of a parameter, in place, feature by feature.

    Args:
        weight: (rows, cols) of the block.
        block: the block's position in the flattened parameter.
        shape: shape of the whole parameter.
        axis: axis of the features.
        factors: (shape[axis],) in fp32; the product is rounded once to the dtype of the weight.
    """
    inner, features = math.prod(shape[axis + 1 :]), shape[axis]
    cols = min(block.cols, _CHUNK)
    rows = max(1, _CHUNK // cols)
    for top in range(0, block.rows, rows):
        for left in range(0, block.cols, cols):
            part = weight[top : top + rows, left : left + cols]
            down = torch.arange(part.shape[0], device=weight.device).mul_(block.stride)
            across = torch.arange(part.shape[1], device=weight.device)
            index = down[:, None] + across + (block.start + top * block.stride + left)
            part.mul_(factors[index.div_(inner, rounding_mode="floor").remainder_(features)])


def _stepped(optimizer: Muon, runtime: Runtime) -> Iterator[tuple[Tensor, str, Tensor]]:
    """Each tensor that this call has stepped, its clean name, and this rank's part of the tensor."""
    names = {id(p): name for name, p, _ in optimizer._named()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            part = runtime.binding.local(p)
            if part.numel():
                if not part.is_contiguous():
                    raise FrameworkError(f"qk_clip: {names[id(p)]} is not contiguous in memory")
                yield p, names.get(id(p), ""), part


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ConfigError for an option of QK-clip that is unknown or out of range."""
    if unknown := sorted(set(options) - {"threshold", "alpha"}):
        raise ConfigError(f"qk_clip: unknown {', '.join(unknown)}; known are alpha, threshold")
    threshold, alpha = options.get("threshold", QK_THRESHOLD), options.get("alpha", QK_ALPHA)
    if not (isinstance(threshold, (int, float)) and 0 < threshold < math.inf):
        raise ConfigError(f"qk_clip: threshold is {threshold!r}: it must be a number above 0, 100 in the paper")
    if not (isinstance(alpha, (int, float)) and 0 <= alpha <= 1):
        raise ConfigError(f"qk_clip: alpha is {alpha!r}: it must be from 0 (only keys) to 1 (only queries)")


def _check(optimizer: Muon, layers: Sequence[AttentionLayer]) -> None:
    rules = {
        clean_name(spec.name): rule
        for specs, rule in zip(optimizer.specs, optimizer._rules, strict=True)
        for spec in specs
    }
    for layer in layers:
        for scaled in layer.scaled:
            if scaled.name not in rules:
                raise FrameworkError(
                    f"qk_clip: the optimizer does not step {scaled.name}: it is frozen, or an adapter (LoRA) replaces "
                    "it. Train it, or leave qk_clip out"
                )
            rule = rules[scaled.name]
            if rule is not None and rule.name == "hyperball":
                raise ConfigError(
                    f"qk_clip: rule hyperball restores the norm of {scaled.name} in the next step: leave one out"
                )
