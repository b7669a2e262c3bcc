"""The pieces of a DeepSpeed engine: ZeRO 0 to 3, fp32 masters instead of the 16-bit weights.

Attributes by DeepSpeed 0.19.8. Knows no class of it, so that importing this does not import DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from muon_dist.adapters import module_state
from muon_dist.checkpoint import BUFFER, WEIGHT, Checkpoint, Holding, Piece
from muon_dist.checkpoint.piece import MOMENTUM as MOMENTUM_KIND
from muon_dist.checkpoint.piece import clean_name, run, whole
from muon_dist.errors import CheckpointError, FrameworkError
from muon_dist.optim.muon import Muon
from muon_dist.optim.state import MOMENTUM, momentum_pieces
from muon_dist.routing import logical_shape

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")


@dataclass(frozen=True)
class _Slot:
    """A run of a parameter in a flat buffer of this rank."""

    name: str
    shape: tuple[int, ...]
    start: int  # in the flattened parameter
    at: int  # in the buffer
    length: int


@dataclass(frozen=True)
class _Buffer:
    """A flat fp32 tensor that the optimizer steps, and the runs in it."""

    tensor: torch.Tensor
    slots: list[_Slot]


def holding(engine: Any, *, source: Checkpoint | None = None) -> Holding:
    """What this rank holds of an engine; a collective when its Muon has not planned yet. See `module_state.holding`.

    Raises:
        FrameworkError: an optimizer wrapper of which the layout is not known; names it.
    """
    wrapper, optimizer = engine.optimizer, engine.basic_optimizer
    if wrapper is optimizer:
        return module_state.holding(engine.module, optimizer, dist.get_world_size(), source=source)
    names = {id(p): clean_name(name) for name, p in engine.module.named_parameters()}
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        layout, buffers, refresh = "per_parameter", _stage3(wrapper, names), lambda: _refresh3(wrapper)
    elif hasattr(wrapper, "fp32_groups_flat_partition") or hasattr(wrapper, "single_partition_of_fp32_groups"):
        layout, buffers, refresh = "flat", _stage12(wrapper, names), wrapper.update_lp_params
    elif hasattr(wrapper, "fp32_groups") and hasattr(wrapper, "fp16_groups"):
        return _masters(engine, names, source)
    else:
        raise FrameworkError(f"the layout of DeepSpeed's {type(wrapper).__name__} is not known: use ZeRO 1, 2 or 3")
    pieces = _outside(engine, {slot for b in buffers for slot in _all_names(b)} | _held_elsewhere(wrapper, names))
    if isinstance(optimizer, Muon):
        pieces += momentum_pieces(optimizer)
    checks: list[Callable[[], None]] = []
    for buffer in buffers:
        pieces += [p for s in buffer.slots for p in _slot_piece(s, WEIGHT, buffer.tensor)]
        pieces += _buffer_state(optimizer, buffer, source, checks)

    def finish() -> None:
        for check in checks:
            check()
        refresh()

    return Holding(layout, pieces, finish)


def _slot_piece(slot: _Slot, kind: str, tensor: torch.Tensor) -> list[Piece]:
    return run(slot.name, kind, slot.shape, slot.start, tensor.data[slot.at : slot.at + slot.length])


def _all_names(buffer: _Buffer) -> set[str]:
    return {slot.name for slot in buffer.slots}


def _held_elsewhere(wrapper: Any, names: dict[int, str]) -> set[str]:
    """Parameters that some rank's slices hold, also those of which this rank has no element."""
    for attribute in ("bf16_groups", "bit16_groups", "fp16_groups"):
        if hasattr(wrapper, attribute):
            return {names[id(p)] for group in getattr(wrapper, attribute) for p in group}
    return set()


def _buffer_state(
    optimizer: torch.optim.Optimizer, buffer: _Buffer, source: Checkpoint | None, checks: list[Callable[[], None]]
) -> list[Piece]:
    """The state that the optimizer keeps for a flat buffer: of the buffer's shape, or one number for all of it."""
    state = optimizer.state[buffer.tensor] if source is not None else optimizer.state.get(buffer.tensor, {})
    if source is not None:
        for slot in buffer.slots:
            for kind, tensor in source.states.get(slot.name, {}).items():
                if kind in state or (isinstance(optimizer, Muon) and kind == MOMENTUM_KIND):
                    continue
                one = tensor.shape == () and slot.shape != ()
                state[kind] = torch.tensor(0.0) if one else torch.zeros_like(buffer.tensor, requires_grad=False)
    pieces: list[Piece] = []
    for kind, value in state.items():
        if kind == MOMENTUM and isinstance(optimizer, Muon):
            continue
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{type(optimizer).__name__} keeps {kind} as a {type(value).__name__}, not a tensor")
        if value.numel() == buffer.tensor.numel() and value.dim() > 0:
            pieces += [p for s in buffer.slots for p in _slot_piece(s, kind, value)]
        elif source is None:
            # one number for all parameters of the buffer, told by the rank that holds the first element of each
            pieces += [p for s in buffer.slots if s.start == 0 for p in whole(s.name, kind, (), value)]
        else:
            pieces += _one_number(buffer, kind, value, checks)
    return pieces


def _one_number(buffer: _Buffer, kind: str, value: torch.Tensor, checks: list[Callable[[], None]]) -> list[Piece]:
    """Pieces for the number of each parameter, which must be the same for all of a buffer."""
    found = {slot.name: torch.zeros((), dtype=value.dtype) for slot in buffer.slots}

    def check() -> None:
        different = {float(number) for number in found.values()}
        if len(different) > 1:
            raise CheckpointError(
                f"{kind} differs between parameters that ZeRO steps as one ({sorted(different)}; some had no gradient "
                "in some steps): this state can go on under DDP or FSDP2 only"
            )
        value.fill_(different.pop() if different else 0.0)

    checks.append(check)
    return [p for name, number in found.items() for p in whole(name, kind, (), number)]


# Stages --------------------------------------------------------------------------------------------------------------


def _offsets(parameters: Iterable[Any]) -> list[int]:
    found, at = [], 0
    for p in parameters:
        found.append(at)
        at += p.numel()
    return found


def _stage12(wrapper: Any, names: dict[int, str]) -> list[_Buffer]:
    """Equal slices of each group, its parameters end to end. Not by `_hp_mapping`; see `deepspeed.layouts`."""
    if hasattr(wrapper, "fp32_groups_flat_partition"):  # BF16_Optimizer
        slices = wrapper.fp32_groups_flat_partition
        groups = [(group, _offsets(group)) for group in wrapper.bf16_groups]
    else:
        slices = wrapper.single_partition_of_fp32_groups
        groups = list(zip(wrapper.round_robin_bit16_groups, wrapper.round_robin_bit16_offsets, strict=True))
    buffers = []
    for index, (tensor, (parameters, offsets)) in enumerate(zip(slices, groups, strict=True)):
        size = tensor.numel()
        first = size * dist.get_rank(wrapper.real_dp_process_group[index])
        slots = []
        for p, offset in zip(parameters, offsets, strict=True):
            left, right = max(offset, first), min(offset + p.numel(), first + size)
            if left < right:
                slots.append(_Slot(names[id(p)], tuple(p.shape), left - offset, left - first, right - left))
        buffers.append(_Buffer(tensor, slots))
    return buffers


def _stage3(wrapper: Any, names: dict[int, str]) -> list[_Buffer]:
    """One equal, padded slice of each parameter, those of a sub-group end to end."""
    buffers = []
    for parameters, tensor in zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True):
        slots = []
        for p in parameters:
            _, at, length = wrapper.grad_position[wrapper.get_param_id(p)]
            start = length * dist.get_rank(wrapper.dp_process_group)
            held = min(length, int(p.ds_numel) - start)
            if held > 0:
                slots.append(_Slot(names[id(p)], logical_shape(p), start, at, held))
        buffers.append(_Buffer(tensor, slots))
    return buffers


def _refresh3(wrapper: Any) -> None:
    """What `DeepSpeedZeroOptimizer_Stage3.load_state_dict` does after it has loaded the masters."""
    for sub_group in range(len(wrapper.fp32_partitioned_groups_flat)):
        wrapper._reassign_or_swap_out_partitioned_parameters(sub_group)
    persistent = wrapper.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


def _masters(engine: Any, names: dict[int, str], source: Checkpoint | None) -> Holding:
    """Stage 0 in 16 bits: every rank holds an fp32 copy of every parameter."""
    wrapper, optimizer = engine.optimizer, engine.basic_optimizer
    everyone = tuple(range(dist.get_world_size()))
    model = [p for group in wrapper.fp16_groups for p in group]
    kept = [p for group in wrapper.fp32_groups for p in group]
    pieces = _outside(engine, {names[id(p)] for p in model})
    if isinstance(optimizer, Muon):
        pieces += momentum_pieces(optimizer)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for given, master in zip(model, kept, strict=True):
        name = names[id(given)]
        pieces += whole(name, WEIGHT, tuple(master.shape), master, everyone)
        if source is not None:
            module_state.make_state(optimizer, master, name, source, groups[id(master)])
        pieces += module_state.state_pieces(optimizer, name, master, everyone)

    def refresh() -> None:
        with torch.no_grad():
            for given, master in zip(model, kept, strict=True):
                given.copy_(master)

    return Holding("replicated", pieces, refresh)


def _outside(engine: Any, held: set[str]) -> list[Piece]:
    """Frozen parameters and buffers, which no optimizer holds."""
    everyone = tuple(range(dist.get_world_size()))
    pieces: list[Piece] = []
    tensor: Any
    for kind, name, tensor in module_state.named_tensors(engine.module):
        if kind == WEIGHT and name in held:
            continue
        if kind == WEIGHT and hasattr(tensor, "ds_tensor"):
            local = tensor.ds_tensor.data
            start = local.numel() * dist.get_rank(tensor.ds_process_group)
            length = min(local.numel(), int(tensor.ds_numel) - start)
            if length > 0:
                pieces += run(name, kind, logical_shape(tensor), start, local.view(-1)[:length])
        else:
            assert kind in (WEIGHT, BUFFER)
            pieces += whole(name, kind, tuple(tensor.shape), tensor, everyone)
    return pieces


class EngineState:
    """DeepSpeed's counters and its loss scaler, as a provider."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def _scaler(self) -> Any:
        wrapper = self._engine.optimizer
        return getattr(wrapper, "loss_scaler", None) or getattr(wrapper, "loss_scale_config", None)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        scaler = self._scaler()
        return {
            "counters": {name: int(getattr(self._engine, name)) for name in _COUNTERS},
            "scaler": {name: getattr(scaler, name) for name in _SCALER if getattr(scaler, name, None) is not None},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back; what this engine's scaler does not have is left out."""
        for name, value in state["counters"].items():
            setattr(self._engine, name, value)
        scaler = self._scaler()
        for name, value in state["scaler"].items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)
