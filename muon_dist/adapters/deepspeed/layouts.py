"""The layout of Muon's matrices under each ZeRO stage, from the engine's storage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from muon_dist.adapters.deepspeed.parallel import Parallelism
from muon_dist.adapters.deepspeed.storage import Buffer, Storage, model_parameters, read
from muon_dist.checkpoint.piece import clean_name
from muon_dist.errors import LayoutError
from muon_dist.layout import Layout, StoredParameter, matrix_layouts
from muon_dist.optim.binding import ParameterSpec
from muon_dist.optim.muon import Muon
from muon_dist.ranks import Ranks
from muon_dist.routing import logical_shape


@dataclass(frozen=True)
class Parts:
    """The parameters of an engine that Muon updates.

    Attributes:
        layout: the layout of the buffers.
        buffers: Muon's tensors.
        group_of: parameter-group index of each buffer.
        others: AdamW's tensors.
        storage: the engine's storage.
        specs: the parameters of all ranks, if ranks step different parameters; None: this optimizer's parameters.
    """

    layout: Layout
    buffers: list[torch.Tensor]
    group_of: dict[int, int]
    others: list[torch.Tensor]
    storage: Storage
    specs: list[list[ParameterSpec]] | None


def parts(engine: Any, optimizer: Muon, parallelism: Parallelism) -> Parts:
    """The parameters of an engine that Muon updates. A collective if ranks hold different parts of the model.

    Raises:
        LayoutError: DeepSpeed and the optimizer have different parameters.
        FrameworkError: see `storage.read`.
    """
    given = model_parameters(engine.optimizer) or [group["params"] for group in optimizer.param_groups]
    match = _by_name(engine, parallelism) if parallelism.sharded else _by_order

    def paired() -> dict[int, ParameterSpec]:
        return {
            id(p): spec
            for index, (parameters, of_group) in enumerate(zip(given, optimizer.specs, strict=True))
            for p, spec in match(parameters, of_group, index)
        }

    # Names differ between ranks, so an error may occur on one rank only: raise it on all, or the others hang.
    specs = Ranks(dist.group.WORLD).everywhere(paired) if parallelism.sharded else paired()
    storage = read(engine, specs, parallelism)
    muon = [b for b in storage.buffers if _is_muon(b, optimizer)]
    others = [b.tensor for b in storage.buffers if not _is_muon(b, optimizer)]
    world = dist.get_world_size(storage.ranks)
    stored = [_renumbered(p, number) for number, b in enumerate(muon) for p in b.parameters]
    layout = Layout(
        storage.kind,
        world,
        matrix_layouts(stored),
        _phases(storage, len(muon)),
        complete_gradients=not storage.by_tensor,
        domains=storage.domains,
        columns=storage.columns,
    )
    every = [[ParameterSpec(p.name, p.shape, p.matrices) for p in stored]] if parallelism.sharded else None
    return Parts(layout, [b.tensor for b in muon], {n: b.group for n, b in enumerate(muon)}, others, storage, every)


def _is_muon(buffer: Buffer, optimizer: Muon) -> bool:
    """Whether Muon steps a buffer. At stage 0 a buffer is one parameter; else it belongs to one parameter group."""
    return optimizer.algorithms[buffer.group] == "muon"


def _renumbered(parameter: StoredParameter, number: int) -> StoredParameter:
    return replace(parameter, fragments=parameter.fragments.in_buffer(number))


def _phases(storage: Storage, buffers: int) -> tuple[tuple[int, ...], ...]:
    if storage.by_tensor:
        return ()
    return (tuple(range(buffers)),) if storage.together else tuple((number,) for number in range(buffers))


_Pairs = list[tuple[Any, ParameterSpec]]


def _by_name(engine: Any, parallelism: Parallelism) -> Callable[[Sequence[Any], Sequence[ParameterSpec], int], _Pairs]:
    """Function that pairs DeepSpeed's parameters with the optimizer's by name: AutoTP may have replaced parameters and
    moved them to the end of their group."""
    names = {id(p): clean_name(name) for name, p in engine.module.named_parameters()}

    def match(parameters: Sequence[Any], specs: Sequence[ParameterSpec], group: int) -> _Pairs:
        by_name = {clean_name(spec.name): replace(spec, name=clean_name(spec.name)) for spec in specs}
        found: _Pairs = []
        for p in parameters:
            name = names.get(id(p), f"a parameter of shape {tuple(p.shape)} that is not in the engine's module")
            spec = by_name.pop(name, None)
            shape = parallelism.held(name, p).shard.shape if spec is not None else None
            if spec is None or spec.shape != shape:
                raise LayoutError(
                    f"group {group}: DeepSpeed steps {name} of shape {shape or tuple(p.shape)}, Muon was given "
                    f"{spec.shape if spec is not None else 'no such name'}: make Muon from "
                    "muon_dist.param_groups(model) before deepspeed.initialize, with the same model"
                )
            found.append((p, spec))
        if by_name:
            raise LayoutError(f"group {group}: Muon has {sorted(by_name)[:3]}, but DeepSpeed does not step them")
        return found

    return match


def _by_order(parameters: Sequence[Any], specs: Sequence[ParameterSpec], group: int) -> _Pairs:
    """DeepSpeed's parameters paired with the optimizer's, by order; checks the shapes."""
    shapes = [logical_shape(p) for p in parameters]
    wrong = [s.name for s, shape in zip(specs, shapes, strict=False) if s.shape != shape]
    if wrong or len(shapes) != len(specs):
        raise LayoutError(
            f"group {group}: DeepSpeed holds {len(shapes)} parameters, Muon was given {len(specs)}"
            f"{', first difference at ' + wrong[0] if wrong else ''}. Freeze parameters before making Muon, and leave "
            "out parameters without elements"
        )
    return list(zip(parameters, specs, strict=True))
