"""Checkpoint pieces of a DeepSpeed engine: ZeRO 0 to 3, with fp32 masters instead of the 16-bit weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from muon_dist.adapters import module_state
from muon_dist.adapters.muon_state import kept_by_all, muon_pieces
from muon_dist.checkpoint import BUFFER, WEIGHT, Checkpoint, Holding, Piece
from muon_dist.checkpoint.piece import MOMENTUM as MOMENTUM_KIND
from muon_dist.checkpoint.piece import clean_name, shaped, whole
from muon_dist.errors import CheckpointError
from muon_dist.layout import Fragment, StoredParameter
from muon_dist.optim.binding import ParameterSpec
from muon_dist.optim.muon import Muon
from muon_dist.optim.state import MOMENTUM, is_own
from muon_dist.routing import logical_shape

if TYPE_CHECKING:
    from muon_dist.adapters.deepspeed.parallel import Held, Parallelism

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")


def holding(engine: Any, *, source: Checkpoint | None = None) -> Holding:
    """This rank's part of an engine's state. See `module_state.holding`.

    A collective if its Muon has no plan yet, under AutoTP, and with experts.

    Raises:
        FrameworkError: DeepSpeed's optimizer wrapper is not supported; names it.
    """
    # Imported here, so that importing this module does not import DeepSpeed.
    from muon_dist.adapters.deepspeed.parallel import Parallelism
    from muon_dist.adapters.deepspeed.storage import read

    optimizer, parallelism = engine.basic_optimizer, Parallelism(engine)
    if engine.optimizer is optimizer and not parallelism.sharded:
        return module_state.holding(engine.module, optimizer, dist.get_world_size(), source=source)
    named = list(engine.module.named_parameters())
    held = {id(p): parallelism.held(name, p) for name, p in named} if parallelism.sharded else {}
    shapes = {id(p): held[id(p)].shard.shape if held else logical_shape(p) for _, p in named}
    specs = {id(p): ParameterSpec(clean_name(name), shapes[id(p)]) for name, p in named}
    storage = read(engine, specs, parallelism)
    stored = {p.name for b in storage.buffers for p in b.parameters}
    places = _HeldPlaces(storage.held) if storage.held else module_state.Places([], dist.get_world_size())
    pieces = _outside(engine, parallelism, stored, source is not None)
    copied: set[int] = set()
    if isinstance(optimizer, Muon):
        pieces += muon_pieces(optimizer, source)
        copied = kept_by_all(optimizer)
    checks: list[Callable[[], None]] = []
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for buffer in storage.buffers:
        tensor = buffer.tensor
        if storage.by_tensor:
            name = storage.held[id(tensor)].name if storage.held else buffer.parameters[0].name
            if source is not None:
                module_state.make_state(optimizer, tensor, name, source, groups[id(tensor)])
            pieces += places.pieces(name, WEIGHT, tensor, tensor)
            pieces += module_state.state_pieces(optimizer, name, tensor, places)
            if id(tensor) in copied:
                pieces += places.pieces(name, MOMENTUM_KIND, optimizer.state[tensor][MOMENTUM], tensor)
            continue
        pieces += _parts(buffer.parameters, WEIGHT, tensor, source is not None)
        pieces += _buffer_state(optimizer, tensor, buffer.parameters, source, checks)
        if id(tensor) in copied:
            pieces += _parts(buffer.parameters, MOMENTUM_KIND, optimizer.state[tensor][MOMENTUM], source is not None)

    def finish() -> None:
        for check in checks:
            check()
        places.copy_back()
        storage.refresh()

    return Holding(storage.kind, pieces, finish)


class _HeldPlaces(module_state.Places):
    """`Places` of stage-0 tensors that are split over ranks. held: this rank's parts, by `id()` of the tensors."""

    def __init__(self, held: Mapping[int, Held]) -> None:
        super().__init__([], dist.get_world_size())
        self._held = held

    def ranks(self, parameter: torch.Tensor) -> tuple[int, ...]:
        return self._held[id(parameter)].holders

    def pieces(self, name: str, kind: str, tensor: Any, like: Any) -> list[Piece]:
        return _of(self._held[id(like)], kind, tensor)


def _of(held: Held, kind: str, tensor: torch.Tensor) -> list[Piece]:
    """The pieces of a tensor. This rank holds the part `held` of it."""
    return [
        Piece(held.name, kind, held.shard.shape, block, shaped(tensor, place), held.holders)
        for block, place in held.shard.blocks
    ]


def _parts(parameters: list[StoredParameter], kind: str, tensor: torch.Tensor, loads: bool) -> list[Piece]:
    """This rank's pieces of `parameters` in a flat tensor: for a load all that it holds, for a save its share."""
    return [
        Piece(p.name, kind, p.shape, f.block, shaped(tensor.data, f.local))
        for p in parameters
        for f in (p.fragments.on(dist.get_rank()) if loads else _written(p))
    ]


def _written(p: StoredParameter) -> list[Fragment]:
    """The fragments of a parameter that this rank writes: all that it holds, or its share of one copy.

    AutoTP leaves some parameters whole. Then each tensor-parallel rank has a copy, which ZeRO may shard differently.
    """
    rank = dist.get_rank()
    if int(p.fragments.length.sum()) == math.prod(p.shape):
        return list(p.fragments.on(rank))
    found, at = [], 0
    for f in sorted(p.fragments, key=lambda f: (f.block.start, f.rank)):
        if f.block.start == at:
            found.append(f)
            at = f.block.stop
    return [f for f in found if f.rank == rank]


def _buffer_state(
    optimizer: torch.optim.Optimizer,
    tensor: torch.Tensor,
    parameters: list[StoredParameter],
    source: Checkpoint | None,
    checks: list[Callable[[], None]],
) -> list[Piece]:
    """The pieces of the optimizer's state for a flat buffer: tensors of the buffer's shape, or one number."""
    state = optimizer.state[tensor] if source is not None else optimizer.state.get(tensor, {})
    held = [p for p in parameters if len(p.fragments.on(dist.get_rank()))]
    if source is not None:
        for p in held:
            for kind, saved in source.states.get(p.name, {}).items():
                if kind in state or (isinstance(optimizer, Muon) and (kind == MOMENTUM_KIND or is_own(kind))):
                    continue
                one = saved.shape == () and p.shape != ()
                state[kind] = torch.tensor(0.0) if one else torch.zeros_like(tensor, requires_grad=False)
    pieces: list[Piece] = []
    for kind, value in state.items():
        if isinstance(optimizer, Muon) and is_own(kind):
            continue
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{type(optimizer).__name__} keeps {kind} as a {type(value).__name__}, not a tensor")
        if value.numel() == tensor.numel() and value.dim() > 0:
            pieces += _parts(held, kind, value, source is not None)
        elif source is None:
            # One number for all parameters of the buffer: the rank with a parameter's first element writes it.
            first = (p for p in held if any(f.block.start == 0 for f in _written(p)))
            pieces += [piece for p in first for piece in whole(p.name, kind, (), value)]
        else:
            pieces += _one_number([p.name for p in held], kind, value, checks)
    return pieces


def _one_number(names: list[str], kind: str, value: torch.Tensor, checks: list[Callable[[], None]]) -> list[Piece]:
    """Pieces with one number per parameter; the number must be equal for all parameters of a buffer."""
    found = {name: torch.zeros((), dtype=value.dtype) for name in names}

    def check() -> None:
        different = {float(number) for number in found.values()}
        if len(different) > 1:
            raise CheckpointError(
                f"{kind} differs between parameters that ZeRO steps together ({sorted(different)}; some had no "
                "gradient in some steps): this state can continue only under DDP or FSDP2"
            )
        value.fill_(different.pop() if different else 0.0)

    checks.append(check)
    return [p for name, number in found.items() for p in whole(name, kind, (), number)]


def _outside(engine: Any, parallelism: Parallelism, stored: set[str], loads: bool) -> list[Piece]:
    """Pieces of frozen parameters and buffers, which no optimizer holds.

    stored: names that an optimizer holds. loads: True lists every copy (load), False one copy (save).
    """
    pieces: list[Piece] = []
    tensor: Any
    for kind, fqn, tensor in module_state.named_tensors(engine.module):
        held = parallelism.held(fqn, tensor)
        if kind == WEIGHT and held.name in stored:
            continue
        if kind == WEIGHT and hasattr(tensor, "ds_tensor"):
            local = tensor.ds_tensor.data
            start = local.numel() * dist.get_rank(tensor.ds_process_group)
            length = min(local.numel(), int(tensor.ds_numel) - start)
            first = held.holders[0] == dist.get_process_group_ranks(tensor.ds_process_group)[0]
            if length > 0 and (loads or first):
                flat = local.view(-1)[:length]
                pieces += [
                    Piece(held.name, kind, held.shard.shape, block, shaped(flat, place))
                    for block, place in held.shard.run(start, length)
                ]
        else:
            assert kind in (WEIGHT, BUFFER)
            pieces += _of(held, kind, tensor)
    return pieces


class EngineState:
    """State provider for DeepSpeed's counters and its loss scaler."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def _scaler(self) -> Any:
        wrapper = self._engine.optimizer
        return getattr(wrapper, "loss_scaler", None) or getattr(wrapper, "loss_scale_config", None)

    def state_dict(self) -> dict[str, Any]:
        """Counters and loss-scaler values, as plain numbers."""
        scaler = self._scaler()
        return {
            "counters": {name: int(getattr(self._engine, name)) for name in _COUNTERS},
            "scaler": {name: getattr(scaler, name) for name in _SCALER if getattr(scaler, name, None) is not None},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load counters and loss scaler; ignores values that this engine's scaler does not have."""
        for name, value in state["counters"].items():
            setattr(self._engine, name, value)
        scaler = self._scaler()
        for name, value in state["scaler"].items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)
