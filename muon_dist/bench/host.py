"""Host cost of a step: the operations that one rank dispatches, counted on the meta device.

The process group is torch's `fake` one, and no tensor has memory. So one process can play any rank of any number of
ranks.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from muon_dist.exchange.transport import Transport
from muon_dist.layout import Layout
from muon_dist.optim.binding import Binding
from muon_dist.optim.groups import param_groups
from muon_dist.optim.guard import FINITE
from muon_dist.optim.muon import Muon
from muon_dist.planner.model import PlannedParameter, Settings, Workload
from muon_dist.planner.placement import place
from muon_dist.ranks import Ranks
from muon_dist.routing import RoutingTable

META = torch.device("meta")
_NO_KERNELS = frozenset(
    {"as_strided", "view", "slice", "select", "detach", "unsqueeze", "expand", "t", "transpose", "alias", "split"}
    | {"split_with_sizes", "permute", "unbind", "lift_fresh", "scalar_tensor", "_local_scalar_dense", "empty"}
    | {"empty_like", "empty_strided", "new_empty"}
)
"""Calls that launch nothing: views, memory, and numbers on the host."""
# From ATen/native/cuda/MultiTensorApply.cuh: tensors per launch by the number of lists, blocks per launch, and
# elements per block.
_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36}
_BLOCKS, _CHUNK = 320, 65536
_TIMED = 20
PER_NODE = 8
"""Ranks that share one copy of the model under HSDP."""


class _Without(Transport):
    """Counts messages and sends none; a result that depends on their values is the usual one."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ranks = Ranks()  # agrees with itself

    def highest(self, values: torch.Tensor, words: torch.Tensor | None = None) -> tuple[list[int], bool]:
        self.collectives += 1
        if words is not None:
            evidence = words.view(torch.uint8)
            torch.cat([values, evidence, evidence.bitwise_not()])  # to be counted
        return [FINITE] * values.numel(), True


class _Counter(TorchDispatchMode):
    """Counts the calls of aten, including views, and the kernels that they would launch on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.kernels = self.launches = self.host_reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "aten":
            kind = name.partition(".")[0]
            self.calls[kind] += 1
            launches = kind not in _NO_KERNELS
            self.kernels += launches
            self.launches += _foreach_launches(args) if kind.startswith("_foreach") else launches
            self.host_reads += kind == "_local_scalar_dense" and args[0].device.type != "cpu"
        return func(*args, **(kwargs or {}))


def _foreach_launches(args: Sequence[Any]) -> int:
    """The launches of a `torch._foreach_*` call on CUDA.

    Tensors of equal dtype, shape and dense strides share a launch, as many as fit; others have one launch each
    (ATen/native/ForeachUtils.h, `can_use_fast_route`).
    """
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], torch.Tensor)]
    count = len(lists[0])
    alike = all(
        t.dtype == first.dtype and t.shape == first.shape and t.is_contiguous()
        for first, *others in zip(*lists, strict=True)
        for t in (first, *others)
    )
    if not alike:
        return count
    blocks = sum(-(-t.numel() // _CHUNK) for t in lists[0])
    return max(-(-count // _TENSORS[min(len(lists), 4)]), -(-blocks // _BLOCKS))


def measure(
    model: nn.Module,
    table: RoutingTable,
    workload: Workload,
    settings: Settings,
    layout: str,
    ranks: int,
    rank: int,
    device: torch.device = META,
    offloaded: bool = False,
) -> dict[str, Any]:
    """The operations and the host time of an optimizer step.

    Args:
        model, table: a model on the meta device, and its routing.
        workload, settings: of the planner, for the same model.
        layout: one of the planner's.
        ranks, rank: number of ranks, and the one that is measured. device: "meta", or another device with tensors
            without memory (inside a `FakeTensorMode`).
        offloaded: weights, gradients and state are on the CPU.

    Returns:
        A dict with

        - `operations`, `by_kind`: aten calls of a step, views included, and by name. Newton-Schulz is not counted.
        - `kernels`: those that are not views. `launches`: what they launch on CUDA, by the rules of torch's foreach
          functions. `host_reads`: values of the device that the host waits for, besides the flags of the gradients.
        - `newton_schulz`: the stacks and matrices that would have been orthogonalized.
        - `collectives`, `bytes`: collectives that the rank calls, and bytes that it sends.
        - `host_ms`: median of 20 steps. Tensors of the meta device cost more Python than real ones, and no kernel is
          launched.

    Raises:
        ConfigError: an unknown or impossible layout.
    """
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        groups, kept = param_groups(model, table=table), torch.device("cpu") if offloaded else device
        found = _counted(_optimizer(groups, workload, settings, layout, device, kept))
    finally:
        dist.destroy_process_group()
    return {"model": workload.name, "layout": layout, "ranks": ranks, "rank": rank, **found}


def _counted(optimizer: Muon) -> dict[str, Any]:
    """Count the operations of a step of a bound optimizer, and measure the host's time."""
    stacks: list[int] = []
    assert optimizer.runtime is not None
    optimizer.runtime.orthogonalize = lambda stack, group: stacks.append(len(stack))
    _give_gradients(optimizer)
    optimizer.step()  # compiles the program
    stacks.clear()
    transport = optimizer.runtime.transport
    before = transport.collectives, transport.bytes_sent
    with _Counter() as counter:
        optimizer.step()
    after = transport.collectives, transport.bytes_sent
    orthogonalized = {"stacks": len(stacks), "matrices": sum(stacks)}
    seconds = [_seconds(optimizer) for _ in range(_TIMED)]
    return {
        "operations": counter.calls.total(),
        "kernels": counter.kernels,
        "launches": counter.launches,
        "host_reads": counter.host_reads,
        "by_kind": dict(counter.calls.most_common()),
        "newton_schulz": orthogonalized,
        "collectives": after[0] - before[0],
        "bytes": after[1] - before[1],
        "host_ms": 1e3 * statistics.median(seconds),
    }


def _seconds(optimizer: Muon) -> float:
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def _give_gradients(optimizer: Muon) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.empty_like(p)


def _optimizer(
    groups: list[dict[str, Any]],
    workload: Workload,
    settings: Settings,
    layout: str,
    device: torch.device,
    kept: torch.device,
) -> Muon:
    """Muon bound to the tensors of this rank under `layout`, without a framework, all groups by the rule "muon"."""
    # Other rules read norms on the host, which is impossible for tensors without memory.
    groups = [{key: value for key, value in group.items() if key not in ("rule", "rule_options")} for group in groups]
    rank, world = dist.get_rank(), dist.get_world_size()
    optimizer = Muon(
        groups,
        lr=1e-3,
        ns_steps=settings.ns_steps,
        ns_schedule=settings.ns_schedule,
        ns_dtype=settings.ns_dtype or torch.bfloat16,  # as on a GPU
        wire_dtype=settings.wire_dtype,
        bucket_mb=settings.bucket_mb,
        overlap=settings.overlap,
        owner_policy=settings.owner_policy,
    )
    placed = place(workload, settings, layout, world, min(PER_NODE, world)).layout
    whole = {p.name: p for p in (*workload.muon, *workload.adamw)}
    of_groups = [[whole[spec.name] for spec in specs] for specs in optimizer.specs]
    column = None
    if placed.columns:
        column = dist.new_group([r for r, c in enumerate(placed.columns) if c == placed.columns[rank]])
    share = world if layout != "hsdp" else min(PER_NODE, world)
    for group, algorithm, parameters in zip(optimizer.param_groups, optimizer.algorithms, of_groups, strict=True):
        shapes = _muon_shapes(placed, parameters) if algorithm == "muon" else _adamw_shapes(parameters, layout, share)
        group["params"] = [nn.Parameter(torch.empty(tuple(shape), device=kept)) for shape in shapes]
    muon = [
        (i, p)
        for i, algorithm in enumerate(optimizer.algorithms)
        if algorithm == "muon"
        for p in optimizer.param_groups[i]["params"]
    ]
    buffers = tuple(p for _, p in muon)
    binding = Binding(placed, buffers, dist.group.WORLD, device, column=column)
    transport = _Without(binding.group, device, optimizer.progress, column)
    optimizer.bind(binding, {b: i for b, (i, _) in enumerate(muon)}, transport, compare_copies=False)
    return optimizer


def _muon_shapes(layout: Layout, parameters: Sequence[PlannedParameter]) -> list[Sequence[int]]:
    """Elements of this rank's buffers of a group; of a parameter if each parameter has its own buffer."""
    lengths: dict[int, int] = {}
    names = {p.name for p in parameters}
    for m in layout.matrices:
        if m.matrix.parameter not in names:
            continue
        buffer = m.buffer
        lengths[buffer] = max(lengths.get(buffer, 0), *(f.local.stop for f in m.on(dist.get_rank())), 0)
    sizes = [length for _, length in sorted(lengths.items())]
    if len(sizes) != len(parameters):
        return [(size,) for size in sizes]
    return [(size * p.shape[0] // p.numel, *p.shape[1:]) for size, p in zip(sizes, parameters, strict=True)]


def _adamw_shapes(parameters: Sequence[PlannedParameter], layout: str, share: int) -> list[Sequence[int]]:
    """Shapes of this rank's part of an AdamW group: all, rows of each parameter, or one slice of the flat group."""
    if layout == "ddp":
        return [p.shape for p in parameters]
    if layout.startswith("zero"):
        return [(-(-sum(p.numel for p in parameters) // share),)]
    return [(-(-p.shape[0] // share), *p.shape[1:]) for p in parameters]
