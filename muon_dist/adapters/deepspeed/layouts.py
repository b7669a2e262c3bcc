"""The layout of Muon's matrices under each ZeRO stage, from the engine's storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from muon_dist.adapters.deepspeed.storage import Buffer, Storage, model_parameters, read
from muon_dist.errors import LayoutError
from muon_dist.layout import Layout, StoredParameter, matrix_layouts
from muon_dist.layout.replicated import copies_on_all
from muon_dist.optim.binding import ParameterSpec
from muon_dist.optim.muon import Muon
from muon_dist.routing import logical_shape

Tensors = list[torch.Tensor]
Parts = tuple[Layout, Tensors, dict[int, int], Tensors, dist.ProcessGroup | None]
"""layout, Muon's buffers, the parameter group of each, AdamW's tensors, the ranks of the layout"""


def parts(engine: Any, optimizer: Muon) -> Parts:
    """What Muon steps of an engine.

    Raises:
        LayoutError: DeepSpeed holds other parameters than the optimizer was given.
        FrameworkError: see `storage.read`.
    """
    given = model_parameters(engine.optimizer) or [group["params"] for group in optimizer.param_groups]
    specs = {
        id(p): spec
        for index, (parameters, of_group) in enumerate(zip(given, optimizer.specs, strict=True))
        for p, spec in _matched(parameters, of_group, index)
    }
    storage = read(engine, specs)
    muon = [b for b in storage.buffers if _is_muon(b, optimizer)]
    others = [b.tensor for b in storage.buffers if not _is_muon(b, optimizer)]
    world = dist.get_world_size(storage.ranks)
    stored = [_renumbered(p, number) for number, b in enumerate(muon) for p in b.parameters]
    domains, columns = copies_on_all(world) if storage.kind == "replicated" else ((), ())
    layout = Layout(
        storage.kind,
        world,
        matrix_layouts(stored),
        _phases(storage, len(muon)),
        complete_gradients=storage.kind != "replicated",
        domains=domains,
        columns=columns,
    )
    return layout, [b.tensor for b in muon], {n: b.group for n, b in enumerate(muon)}, others, storage.ranks


def _is_muon(buffer: Buffer, optimizer: Muon) -> bool:
    """At stage 0 a buffer is one parameter; else all of a buffer are of one parameter group."""
    return optimizer.algorithms[buffer.group] == "muon"


def _renumbered(parameter: StoredParameter, number: int) -> StoredParameter:
    return replace(parameter, fragments=parameter.fragments.in_buffer(number))


def _phases(storage: Storage, buffers: int) -> tuple[tuple[int, ...], ...]:
    if storage.kind == "replicated":
        return ()
    return (tuple(range(buffers)),) if storage.together else tuple((number,) for number in range(buffers))


def _matched(parameters: Sequence[Any], specs: Sequence[ParameterSpec], group: int) -> list[tuple[Any, ParameterSpec]]:
    """Pair DeepSpeed's parameters with what the optimizer was given, checked by shape."""
    shapes = [logical_shape(p) for p in parameters]
    wrong = [s.name for s, shape in zip(specs, shapes, strict=False) if s.shape != shape]
    if wrong or len(shapes) != len(specs):
        raise LayoutError(
            f"group {group}: DeepSpeed holds {len(shapes)} parameters, Muon was given {len(specs)}"
            f"{', first difference at ' + wrong[0] if wrong else ''}. Freeze parameters before making Muon, and leave "
            "out those without elements"
        )
    return list(zip(parameters, specs, strict=True))
