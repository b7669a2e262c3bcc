"""The pieces of a DeepSpeed engine: ZeRO 0 to 3, fp32 masters instead of the 16-bit weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from muon_dist.adapters import module_state
from muon_dist.adapters.muon_state import kept_by_all, muon_pieces
from muon_dist.checkpoint import BUFFER, WEIGHT, Checkpoint, Holding, Piece
from muon_dist.checkpoint.piece import MOMENTUM as MOMENTUM_KIND
from muon_dist.checkpoint.piece import clean_name, run, shaped, whole
from muon_dist.errors import CheckpointError
from muon_dist.layout import StoredParameter
from muon_dist.optim.binding import ParameterSpec
from muon_dist.optim.muon import Muon
from muon_dist.optim.state import MOMENTUM, is_own
from muon_dist.routing import logical_shape

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")


def holding(engine: Any, *, source: Checkpoint | None = None) -> Holding:
    """What this rank holds of an engine; a collective when its Muon has not planned yet. See `module_state.holding`.

    Raises:
        FrameworkError: an optimizer wrapper of which the layout is not known; names it.
    """
    # Here, so that importing this module does not import DeepSpeed.
    from muon_dist.adapters.deepspeed.storage import read

    optimizer = engine.basic_optimizer
    if engine.optimizer is optimizer:
        return module_state.holding(engine.module, optimizer, dist.get_world_size(), source=source)
    specs = {id(p): ParameterSpec(clean_name(name), logical_shape(p)) for name, p in engine.module.named_parameters()}
    storage = read(engine, specs)
    stored = {p.name for b in storage.buffers for p in b.parameters}
    pieces = _outside(engine, stored)
    copied: set[int] = set()
    if isinstance(optimizer, Muon):
        pieces += muon_pieces(optimizer, source)
        copied = kept_by_all(optimizer)
    everyone = tuple(range(dist.get_world_size())) if storage.kind == "replicated" else ()
    checks: list[Callable[[], None]] = []
    places = module_state.Places([], dist.get_world_size())
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for buffer in storage.buffers:
        pieces += _parts(buffer.parameters, WEIGHT, buffer.tensor, everyone)
        if storage.kind == "replicated":
            (parameter,) = buffer.parameters
            if source is not None:
                module_state.make_state(optimizer, buffer.tensor, parameter.name, source, groups[id(buffer.tensor)])
            pieces += module_state.state_pieces(optimizer, parameter.name, buffer.tensor, places)
            if id(buffer.tensor) in copied:
                momentum = optimizer.state[buffer.tensor][MOMENTUM]
                pieces += whole(parameter.name, MOMENTUM_KIND, parameter.shape, momentum, everyone)
        else:
            pieces += _buffer_state(optimizer, buffer.tensor, buffer.parameters, source, checks)

    def finish() -> None:
        for check in checks:
            check()
        places.copy_back()
        storage.refresh()

    return Holding(storage.kind, pieces, finish)


def _parts(
    parameters: list[StoredParameter], kind: str, tensor: torch.Tensor, holders: tuple[int, ...] = ()
) -> list[Piece]:
    """What this rank holds of some parameters in one of its flat tensors."""
    rank = dist.get_rank()
    return [
        Piece(p.name, kind, p.shape, f.block, shaped(tensor.data, f.local), holders)
        for p in parameters
        for f in p.fragments.on(rank)
    ]


def _buffer_state(
    optimizer: torch.optim.Optimizer,
    tensor: torch.Tensor,
    parameters: list[StoredParameter],
    source: Checkpoint | None,
    checks: list[Callable[[], None]],
) -> list[Piece]:
    """The state that the optimizer keeps for a flat buffer: of the buffer's shape, or one number for all of it."""
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
            pieces += _parts(held, kind, value)
        elif source is None:
            # one number for all parameters of the buffer, told by the rank that holds the first element of each
            first = (p for p in held if any(f.block.start == 0 for f in p.fragments.on(dist.get_rank())))
            pieces += [piece for p in first for piece in whole(p.name, kind, (), value)]
        else:
            pieces += _one_number([p.name for p in held], kind, value, checks)
    return pieces


def _one_number(names: list[str], kind: str, value: torch.Tensor, checks: list[Callable[[], None]]) -> list[Piece]:
    """Pieces for the number of each parameter, which must be the same for all of a buffer."""
    found = {name: torch.zeros((), dtype=value.dtype) for name in names}

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
