"""Source for DeepSpeed engines of stages 0 to 3 and AutoTP, with DeepSpeed's Muon or any client optimizer.

At stages 1 to 3 hooks on the parameters read the gradient before DeepSpeed reduces it, because DeepSpeed's Muon
overwrites the gradient with the orthogonalized update. This source averages over ranks itself. At stage 0 the gradient
is `p.grad` at the beginning of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, SubParamColumnParallel, TensorParallel_Layer
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from muon_dist.audit.asked import is_muon_group
from muon_dist.audit.cause import Cause, Factor
from muon_dist.audit.memory import BASE, LOCAL, SCALED
from muon_dist.audit.sources import Circumstances, Names, shared_factors, size_of_group
from muon_dist.errors import FrameworkError


class DeepSpeedSource:
    """See `audit.sources.Source`. clip: overrides the engine's `gradient_clipping`."""

    def __init__(self, engine: DeepSpeedEngine, clip: float | None = None) -> None:
        self.engine = engine
        self.clip = engine.gradient_clipping() if clip is None else clip
        self.group: dist.ProcessGroup | None = engine.seq_data_parallel_group
        self.matrices: dict[str, tuple[int, int]] = {}
        self.claimed: list[str] = []
        self._parameters: dict[str, Any] = {}
        self._slices: dict[str, tuple[int, TensorParallel_Layer]] = {}
        self._sums: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._scale = 1.0
        self._norm: float | None = None
        self._step: Callable[..., Any] | None = None
        self._save: Callable[..., Any] | None = None
        self._homes = dict(_homes(engine))
        slices = dict(_slices(engine.module))
        kind = type(engine.basic_optimizer).__name__
        for name, p in engine.module.named_parameters():
            shape = tuple(getattr(p, "ds_shape", p.shape))
            if len(shape) != 2 or not p.requires_grad or id(p) not in self._homes:
                continue
            if getattr(p, "tensor_model_parallel", False) and id(p) not in slices:
                continue  # in a fused layer a slice is not contiguous in the whole weight
            self._parameters[name] = p
            if id(p) in slices:
                axis, layer = self._slices[name] = slices[id(p)]
                sizes = list(shape)
                sizes[axis] = sum(layer._partition_sizes)
                shape = tuple(sizes)
            self.matrices[name] = (int(shape[0]), int(shape[1]))
            if is_muon_group(self.options(name), kind):
                self.claimed.append(name)
        if not self.matrices:
            raise FrameworkError("the witness found no two-dimensional parameter in the engine's optimizer")
        some = next(iter(self._parameters.values()))
        # Stage 0 does not multiply the loss by the scale, but still divides the gradient by it.
        self._scales_loss = isinstance(engine.optimizer, ZeROOptimizer)
        self.gradient_eps = torch.finfo(some.dtype).eps if self._scales_loss else 0.0

    def listen(self, before: Callable[[Names], None], after: Callable[[Names], None]) -> None:
        original = self._step = self.engine.step

        def step(*args: Any, **kwargs: Any) -> Any:
            if not self.engine.is_gradient_accumulation_boundary():
                return original(*args, **kwargs)
            self._scale = self._loss_scale()
            self._norm = None if self._scales_loss or not self.clip else self._gradient_norm()
            before(list(self.matrices))
            result = original(*args, **kwargs)
            after(list(self.matrices))
            self._sums.clear()
            return result

        self.engine.step = step

    def follow(self, names: Names) -> None:
        for hook in self._hooks:
            hook.remove()
        self._sums.clear()
        self._hooks = [self._parameters[n].register_hook(lambda g, n=n: self._add(n, g)) for n in names]

    def _add(self, name: str, gradient: Tensor) -> None:
        found = gradient.detach().float()
        self._sums[name] = self._sums[name] + found if name in self._sums else found.clone()

    def on_save(self, call: Callable[[], None]) -> None:
        original = self._save = self.engine.save_checkpoint

        def save(*args: Any, **kwargs: Any) -> Any:
            call()
            return original(*args, **kwargs)

        self.engine.save_checkpoint = save

    def gradients(self, name: str) -> dict[str, Tensor] | None:
        p = self._parameters[name]
        found = self._sums.get(name)
        if found is None:  # DeepSpeed uses a zero gradient for a parameter without one
            found = torch.zeros(tuple(getattr(p, "ds_shape", p.shape)), device=p.device)
        local = self._joined(name, found.double())
        mean = local.clone()
        ranks = size_of_group(self.group)
        if ranks > 1:
            dist.all_reduce(mean, group=self.group)
            mean /= ranks
        scale = self._scale if self._scales_loss else 1.0
        if not self._scales_loss and p.grad is not None:
            mean = self._joined(name, p.grad.detach().double())
        labels = {BASE: mean / scale}
        if scale != 1.0:
            labels[SCALED] = mean
        if ranks > 1:
            labels[LOCAL] = local / scale
        return labels

    def weight(self, name: str) -> Tensor:
        p = self._parameters[name]
        found = safe_get_full_fp32_param(p) if self._has_masters(p) else _master_of_stage_0(self.engine, p)
        return self._joined(
            name,
            (p.detach() if found is None else found.detach().view(tuple(getattr(p, "ds_shape", p.shape)))).double(),
        )

    def weight_eps(self, name: str) -> float:
        p = self._parameters[name]
        masters = self._has_masters(p) or _master_of_stage_0(self.engine, p) is not None
        return torch.finfo(torch.float32 if masters else p.dtype).eps

    def _has_masters(self, p: Any) -> bool:
        """Whether `safe_get_full_fp32_param` must and can read this parameter.

        At stages 1 and 2 in fp32 it is not needed, because the parameters are whole after each step. With
        `round_robin_gradients` DeepSpeed's mapping finds the wrong fragments.
        """
        if hasattr(p, "ds_id"):
            return True
        config = self.engine._config.zero_config
        return hasattr(p, "_hp_mapping") and p.dtype != torch.float32 and not config.round_robin_gradients

    def options(self, name: str) -> Mapping[str, Any]:
        groups = getattr(self.engine.optimizer, "param_groups", self.engine.basic_optimizer.param_groups)
        return groups[self._homes[id(self._parameters[name])]]

    def shards(self, name: str) -> tuple[int, ...]:
        sizes = {size_of_group(self.group)}
        if name in self._slices:
            sizes.add(self._slices[name][1].tp_world_size)
        return tuple(sorted(s for s in sizes if s > 1))

    def circumstances(self) -> Circumstances:
        norm = self.engine.get_global_grad_norm() if self._norm is None else self._norm
        clip = 1.0
        factors = shared_factors(size_of_group(self.group), self.engine.gradient_accumulation_steps(), self._scale)
        if self.clip and norm is not None and float(norm) > self.clip:
            clip = self.clip / (float(norm) + 1e-6)
            cause = Cause("clipped_update", "clipped after orthogonalization")
            factors = (Factor(cause, clip), *factors)
        # Stage 0 raises its scale first, and divides by the new one.
        scale = self._scale if self._scales_loss else self._loss_scale()
        return Circumstances(self.engine.was_step_applied(), factors, clip, scale)

    def _gradient_norm(self) -> float:
        """Norm of all gradients of the model, at stage 0."""
        whole = sliced = 0.0
        for p in self.engine.module.parameters():
            if p.grad is not None:
                square = float(p.grad.double().square().sum())
                if getattr(p, "tensor_model_parallel", False):
                    sliced += square
                else:
                    whole += square
        layers = [layer for _, layer in self._slices.values()]
        if layers:
            total = torch.tensor(sliced, dtype=torch.float64, device=layers[0].weight.device)
            dist.all_reduce(total, group=layers[0].mp_group)
            sliced = float(total)
        return math.sqrt(whole + sliced)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._step is not None:
            self.engine.step = self._step
        if self._save is not None:
            self.engine.save_checkpoint = self._save

    def _loss_scale(self) -> float:
        if not self.engine.fp16_enabled():
            return 1.0
        return float(getattr(self.engine.optimizer, "cur_scale", 0) or self.engine.optimizer.loss_scale)

    def _joined(self, name: str, tensor: Tensor) -> Tensor:
        """The whole tensor, gathered if tensor parallelism slices it."""
        if name not in self._slices:
            return tensor.clone()
        axis, layer = self._slices[name]
        sizes = list(layer._partition_sizes)
        shape = list(tensor.shape)
        shape[axis] = max(sizes)
        padded = tensor.new_zeros(shape)
        padded.narrow(axis, 0, tensor.size(axis)).copy_(tensor)
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=layer.mp_group)
        return torch.cat([part.narrow(axis, 0, size) for part, size in zip(parts, sizes, strict=True)], dim=axis)


def _homes(engine: DeepSpeedEngine) -> Iterator[tuple[int, int]]:
    """(id of a parameter, index of its group) for all parameters that the engine's optimizer steps."""
    optimizer = engine.optimizer
    lists = next(
        (g for a in ("bit16_groups", "bf16_groups", "fp16_groups") if (g := getattr(optimizer, a, None))), None
    )
    index = getattr(optimizer, "sub_group_to_group_id", None)
    for i, parameters in enumerate(lists if lists is not None else (g["params"] for g in optimizer.param_groups)):
        yield from ((id(p), i if index is None else index[i]) for p in parameters)


def _slices(module: torch.nn.Module) -> Iterator[tuple[int, tuple[int, TensorParallel_Layer]]]:
    """(id of a weight, (axis along which AutoTP slices it, its layer)), except for fused weights."""
    for layer in module.modules():
        if not isinstance(layer, (LinearLayer, LinearAllreduce)) or isinstance(layer, SubParamColumnParallel):
            continue
        if layer.tp_world_size > 1 and hasattr(layer, "_partition_sizes"):
            yield id(layer.weight), (0 if isinstance(layer, LinearLayer) else 1, layer)


def _master_of_stage_0(engine: DeepSpeedEngine, p: Any) -> Tensor | None:
    """The fp32 master of a parameter in a 16-bit engine at stage 0; None without a master."""
    optimizer = engine.optimizer
    if engine.zero_optimization() or not hasattr(optimizer, "fp32_groups"):
        return None
    for halves, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for half, master in zip(halves, masters, strict=True):
            if half is p:
                return master
    return None
