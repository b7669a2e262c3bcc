"""Saving and loading the state of Muon groups in state dicts."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from muon_dist.errors import CheckpointError, ConfigError
from muon_dist.layout import view
from muon_dist.optim.low_precision import MASTER
from muon_dist.optim.memory import ROUNDINGS
from muon_dist.optim.rules import MuonRule, memory_names
from muon_dist.optim.runtime import Runtime

logger = logging.getLogger("muon_dist")
MOMENTUM = "momentum_buffer"
PARTIAL = "partial_momentum"
"""Key in a rank's state dict: for each parameter whose momentum the rank holds in part, names of the held matrices."""
RESTING = "zero_gradient_steps"
"""Key of the number of steps in a row with a zero gradient, per matrix of a parameter; absent if all are 0."""


def indexed_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters in the order in which torch numbers them in a state dict."""
    return [p for group in optimizer.param_groups for p in group["params"]]


# In the state -------------------------------------------------------------------------------------------------------


def owner_key(runtime: Runtime, name: str, i: int) -> str:
    """State key of the owner's tensor `name` for matrix `i`, with the matrix's name if its buffer has several."""
    m = runtime.plan.layout.matrices[i]
    alone = len(runtime.memory.matrices[m.buffer]) == 1
    return name if alone else f"{name}:{m.matrix.name}"


def entries(runtime: Runtime, buffer: int) -> dict[str, Tensor]:
    """The entries of a buffer in `optimizer.state`: live tensors, or DTensors that share their memory."""
    binding, plan, memory = runtime.binding, runtime.plan, runtime.memory
    found: dict[str, Tensor | None] = {
        MOMENTUM: None if buffer in runtime.at_owners else binding.stored(plan, buffer, runtime.momentum.get(buffer)),
        **memory.numbers[buffer],
    }
    for name in memory.owner_names[buffer]:
        for i in memory.matrices[buffer]:
            found[owner_key(runtime, name, i)] = binding.stored_by_owner(
                plan, i, memory.owners[name].get(i), memory.size(name, i)
            )
    return {key: value for key, value in found.items() if value is not None}


def partial_momentum(runtime: Runtime, parameters: Sequence[Tensor]) -> dict[int, list[str]]:
    """This rank's `PARTIAL` entry: state-dict index -> names of its matrices, where it holds only some momentum."""
    index_of = {id(p): i for i, p in enumerate(parameters)}
    found = {}
    for buffer, shard in runtime.momentum.items():
        parameter = runtime.binding.buffers[buffer]
        if id(parameter) in index_of and shard.shape != runtime.binding.local(parameter).shape:
            found[index_of[id(parameter)]] = _held_matrices(runtime, buffer)
    return found


def _held_matrices(runtime: Runtime, buffer: int) -> list[str]:
    return sorted({matrix.name for matrix, _, _ in runtime.momentum_pieces(buffer)})


def warn_if_partial(runtime: Runtime, state: Mapping[Tensor, Mapping[str, Any]]) -> bool:
    """Whether this rank's state dict lacks momentum that other ranks hold; warns if it does.

    Never under ZeRO and FSDP2, where each rank's part of the state belongs to its part of the parameters.
    """
    if runtime.transport.world_size == 1:
        return False
    held = [(b, p, state.get(p, {}).get(MOMENTUM)) for b, p in enumerate(runtime.binding.buffers)]
    missing = sum(
        not runtime.memory.everywhere and runtime.plan.layout.kind == "replicated"
        if b in runtime.at_owners
        else momentum is None or momentum.shape != p.shape
        for b, p, momentum in held
    )
    if not missing:
        return False
    warnings.warn(
        f"this state_dict has only the part of rank {runtime.transport.rank}: it lacks the momentum of {missing} of "
        f"{len(runtime.binding.buffers)} parameters, which other ranks hold. It can be loaded only on this rank and "
        "for the same plan. To save everything: make the optimizer with momentum_everywhere=True, so that every "
        "state_dict is complete; or call full_state_dict() on all ranks and save the result of rank 0; or save with "
        "muon_dist.checkpoint (MuonTrainer does; docs/checkpoints.md)",
        RuntimeWarning,
        stacklevel=3,
    )
    return True


def say_bytes(runtime: Runtime) -> None:
    """Log the memory that `momentum_everywhere` needs, once, on rank 0."""
    if not runtime.everywhere or not runtime.options.momentum_everywhere or runtime.transport.rank:
        return
    kept = sum(runtime.momentum[b].numel() for b in runtime.everywhere)
    needed = sum(f.length for b in runtime.everywhere for _, f, _ in runtime.momentum_pieces(b))
    logger.info(
        "momentum_everywhere: rank 0 keeps %.1f MB of momentum; without this option it would keep %.1f MB",
        4 * kept / 1e6,
        4 * needed / 1e6,
    )


# Loading ------------------------------------------------------------------------------------------------------------


@dataclass
class Loaded:
    """The entries of a state dict for one parameter of Muon.

    Attributes:
        momentum: None if the state dict has none.
        matrices: names of the matrices in `momentum`; None for all.
        memory: the rule's tensors, by their keys in the state.
        fresh: the parameter was added after the save: its state starts at zero.
    """

    momentum: Tensor | None = None
    matrices: list[str] | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    fresh: bool = False

    def entries(self) -> dict[str, Tensor]:
        """All entries by their keys in the state dict."""
        return self.memory if self.momentum is None else {MOMENTUM: self.momentum, **self.memory}


def split_state(
    parameters: Sequence[Tensor], state_dict: Mapping[str, Any]
) -> tuple[dict[Tensor, Loaded], dict[str, Any]]:
    """Split a state dict into the state of Muon groups, by parameter, and the rest, which torch loads.

    Torch would cast Muon's state to the parameter's dtype.
    """
    # Torch matches entries by order. Keys are numbers, or FQNs from torch.distributed.checkpoint.
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    by_key = dict(zip(keys, parameters, strict=False))
    partial = state_dict.get(PARTIAL, {})
    loaded: dict[Tensor, Loaded] = {}
    rest: dict[Any, dict[str, Any]] = {}
    for key, entry in state_dict["state"].items():
        own = {name: value for name, value in entry.items() if is_own(name)}
        rest[key] = {name: value for name, value in entry.items() if name not in own}
        if isinstance(rest[key].get("step"), (int, float)):  # other AdamW implementations store a number
            rest[key]["step"] = torch.tensor(float(rest[key]["step"]))
        if own and key in by_key:
            copies = {name: value.detach().clone() for name, value in own.items()}
            loaded[by_key[key]] = Loaded(copies.pop(MOMENTUM, None), partial.get(key), copies)
    return loaded, {"state": rest, "param_groups": state_dict["param_groups"]}


def is_own(key: str) -> bool:
    """Whether a key belongs to the state of a Muon group: momentum, a rule's tensor, or a master."""
    return key in (MOMENTUM, RESTING, ROUNDINGS, MASTER) or key.partition(":")[0] in memory_names()


def _planned(key: str) -> bool:
    """Whether the plan manages this entry: all of a Muon group except masters (see `low_precision.MasterWeights`)."""
    return is_own(key) and key != MASTER


def settle(runtime: Runtime, state: MutableMapping[Tensor, dict[str, Any]]) -> None:
    """Call `follow`, and update `RESTING` in `state`; for a save or a copy."""
    follow(runtime, state)
    for buffer, parameter in enumerate(runtime.binding.buffers):
        members = runtime.memory.matrices[buffer]
        counts = runtime.resting[members[0] : members[-1] + 1]  # a view, so that a copy made later is correct
        if counts.any():
            state[parameter][RESTING] = counts
        else:
            state[parameter].pop(RESTING, None)


def install(
    runtime: Runtime, state: MutableMapping[Tensor, dict[str, Any]], loaded: Mapping[Tensor, Loaded] | None
) -> None:
    """Load the entries in the optimizer's `state` into this rank's part, and put this part into `state`.

    Args:
        runtime: the runtime of the new plan.
        state: the optimizer's state. Momentum without an entry starts at zero.
        loaded: the entries that a load has put into `state`; None without a load. If other code has changed `state`
            since the load, its values are used.

    Raises:
        CheckpointError: loaded state that this rank needs is missing or has another shape.
        ConfigError: an entry that other code has put into `state` is invalid.
    """
    runtime.in_state.clear()
    frozen: list[str] = []
    for buffer, parameter in enumerate(runtime.binding.buffers):
        own = _own(state, parameter)
        given = loaded.get(parameter, Loaded()) if loaded is not None else None
        absent = given is not None and not (own or given.entries() or given.fresh)
        kept = buffer in runtime.momentum or buffer in runtime.at_owners
        if absent and kept and not parameter.requires_grad:
            frozen.append(runtime.plan.layout.matrices[runtime.memory.matrices[buffer][0]].matrix.parameter)
            given = None
        if given is not None and _same(own, given.entries()):
            _adopt(runtime, buffer, given)
        else:
            runtime.forget([buffer])
            _take(runtime, buffer, own, given.matrices if given is not None else None)
        _place(runtime, state, buffer)
    runtime.memory.started.clear()
    if frozen:
        warnings.warn(
            f"the state dict has no momentum of {len(frozen)} frozen parameters ({', '.join(frozen[:3])}): "
            "torch.distributed.checkpoint leaves it out. If they are unfrozen later, their momentum starts at zero. "
            "To keep it, freeze them after the state is loaded",
            RuntimeWarning,
            stacklevel=2,
        )


def follow(runtime: Runtime, state: MutableMapping[Tensor, dict[str, Any]]) -> None:
    """Apply changes that other code made in the optimizer's `state`: replaced, removed or added entries.

    State whose entry was removed is set to zero. Local.

    Raises:
        ConfigError: an entry is not a tensor, or has another shape; names parameter and key.
    """
    for buffer, parameter in enumerate(runtime.binding.buffers):
        own, put = _own(state, parameter), runtime.in_state[parameter]
        if any(own.get(key) is not kept for key, kept in put.items()):
            _take(runtime, buffer, own, None)
            _place(runtime, state, buffer)


def change_rules(
    runtime: Runtime, state: MutableMapping[Tensor, dict[str, Any]], rules: Mapping[int, MuonRule]
) -> None:
    """Use other rules from now on; local. rules: the rule of each parameter group.

    Momentum stays, and memory that the old and the new rule share. Other memory of the new rule starts at zero.
    """
    settle(runtime, state)
    before = runtime.memory
    runtime.use_rules(rules)
    runtime.memory.adopt(before)
    for buffer in range(len(runtime.binding.buffers)):
        _place(runtime, state, buffer)


def put(state: MutableMapping[Tensor, dict[str, Any]], parameter: Tensor, found: Mapping[str, Tensor]) -> None:
    """Replace the entries of `parameter` in a Muon group's state by `found`; its master weight stays."""
    for key in [key for key in state.get(parameter, {}) if _planned(key)]:
        del state[parameter][key]
    if found:
        state[parameter].update(found)


def _own(state: Mapping[Tensor, Mapping[str, Any]], parameter: Tensor) -> dict[str, Any]:
    """The entries of a parameter that the plan keeps. None counts as absent."""
    return {key: value for key, value in state.get(parameter, {}).items() if _planned(key) and value is not None}


def _same(own: Mapping[str, Any], given: Mapping[str, Tensor]) -> bool:
    return own.keys() == given.keys() and all(own[key] is value for key, value in given.items())


def _place(runtime: Runtime, state: MutableMapping[Tensor, dict[str, Any]], buffer: int) -> None:
    """Replace the entries of a buffer in `state` by its live tensors."""
    parameter, found = runtime.binding.buffers[buffer], entries(runtime, buffer)
    put(state, parameter, found)
    runtime.in_state[parameter] = {MOMENTUM: None, **found}


def _take(runtime: Runtime, buffer: int, own: Mapping[str, Any], matrices: list[str] | None) -> None:
    """Copy entries that other code put into a buffer's state into this rank's part; removed entries become zero.

    Entries that still equal those in `runtime.in_state` keep their values.
    """
    members, parameter = runtime.memory.matrices[buffer], runtime.binding.buffers[buffer]
    name = runtime.plan.layout.matrices[members[0]].matrix.parameter
    put = runtime.in_state.get(parameter, {})
    new = {key: value for key, value in own.items() if put.get(key) is not value}
    for key, value in new.items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"optimizer.state of {name}: {key} is a {type(value).__name__}: put a tensor there, or delete the "
                "entry to start at zero"
            )
    for key, live in put.items():
        if live is not None and key not in own:
            runtime.binding.local(live).zero_()
            if key == MOMENTUM:
                runtime.resting[members] = 0.0
                runtime.unmoved.update(members)
    if any(own.get(key) is not put.get(key) for key in runtime.memory.numbers[buffer]):
        runtime.memory.started.discard(buffer)
    given = Loaded(new.get(MOMENTUM), matrices, {key: new[key] for key in new if key != MOMENTUM})
    try:
        if given.momentum is not None and buffer in runtime.momentum:
            if given.momentum.shape == runtime.momentum[buffer].shape != parameter.shape:
                given.matrices = _held_matrices(runtime, buffer)  # another object for this rank's part
            _adopt_momentum(runtime, buffer, given)
        _adopt_memory(runtime, buffer, given, strict=False)
    except CheckpointError as error:
        raise ConfigError(f"optimizer.state of {name} was changed and cannot be used: {error}") from error
    if given.momentum is not None:
        runtime.unmoved.difference_update(members)
    if RESTING in new:
        runtime.resting[members] = new[RESTING].to("cpu", torch.float64)


def _adopt(runtime: Runtime, buffer: int, given: Loaded) -> None:
    """Copy loaded state of a buffer into this rank's part.

    Raises:
        CheckpointError: state that this rank holds is missing or has another shape.
    """
    if given.fresh:
        return
    if buffer in runtime.momentum:
        _adopt_momentum(runtime, buffer, given)
    _adopt_memory(runtime, buffer, given)
    counts = given.memory.get(RESTING, 0.0)
    runtime.unmoved.difference_update(runtime.memory.matrices[buffer])
    runtime.resting[runtime.memory.matrices[buffer]] = torch.as_tensor(counts, dtype=torch.float64, device="cpu")


def _adopt_momentum(runtime: Runtime, buffer: int, given: Loaded) -> None:
    shard, parameter = runtime.momentum[buffer], runtime.binding.local(runtime.binding.buffers[buffer])
    pieces = runtime.momentum_pieces(buffer)
    if given.momentum is None:
        if pieces:  # else this rank holds only padding or copies
            raise CheckpointError(_missing(runtime, f"momentum of {pieces[0][0].name}"))
        return
    value = runtime.binding.local(given.momentum)
    label = pieces[0][0].name if pieces else f"the padding or copies on rank {runtime.transport.rank}"
    if given.matrices is not None:
        held = _held_matrices(runtime, buffer)
        if given.matrices != held or value.numel() != shard.numel():
            raise CheckpointError(
                f"the state dict has momentum of {len(given.matrices)} matrices, such as {given.matrices[:3]}, but "
                f"rank {runtime.transport.rank} holds {held[:3]}: it was saved by another rank or plan. Save with "
                "full_state_dict()"
            )
        shard.copy_(value.view_as(shard))
    elif value.numel() != parameter.numel():
        raise CheckpointError(
            f"momentum of {label} has {value.numel()} elements in the state dict, its parameter {parameter.numel()}"
        )
    else:
        flat = value.to(shard.device).reshape(-1)
        if shard.numel() == parameter.numel():
            shard.view(-1).copy_(flat)
        else:
            for _, f, piece in pieces:
                piece.copy_(view(flat, f.local))


def _adopt_memory(runtime: Runtime, buffer: int, given: Loaded, strict: bool = True) -> None:
    memory, matrices = runtime.memory, runtime.plan.layout.matrices
    wanted = dict(memory.numbers[buffer])
    whole: dict[str, Tensor] = {}
    for name in memory.owner_names[buffer]:
        if name in given.memory and len(memory.matrices[buffer]) > 1:  # all in one tensor, from full_state_dict
            sizes = [memory.size(name, i) for i in memory.matrices[buffer]]
            if len(given.memory[name]) == sum(sizes):
                parts = given.memory[name].split(sizes)
                members = zip(memory.matrices[buffer], parts, strict=True)
                whole.update({f"{name}:{matrices[i].matrix.name}": part for i, part in members})
        of_name = memory.owners[name]
        wanted.update({owner_key(runtime, name, i): of_name[i] for i in memory.matrices[buffer] if i in of_name})
    for key, kept in wanted.items():
        value = given.memory.get(key, whole.get(key))
        if value is None and not strict:
            continue
        if value is None and key == ROUNDINGS:
            value = torch.zeros_like(kept)  # saved without stochastic rounding
        if value is None:
            raise CheckpointError(_missing(runtime, f"{key} of {matrices[memory.matrices[buffer][0]].matrix.name}"))
        value = runtime.binding.local(value)
        if value.shape != kept.shape:
            raise CheckpointError(
                f"{key} has shape {tuple(value.shape)} in the state dict, but {tuple(kept.shape)} in this optimizer"
            )
        kept.copy_(value)


def _missing(runtime: Runtime, what: str) -> str:
    return (
        f"the state dict has no {what}, which rank {runtime.transport.rank} owns: it has only one rank's part. "
        "Save with full_state_dict() on all ranks (MuonTrainer does), or from an optimizer made with "
        "momentum_everywhere=True; or load on each rank the file that this rank saved"
    )
