"""The `parallel:` block of a run: its mesh, and its effect on the model and on the trainer's settings."""

from __future__ import annotations

from typing import Any

import torch

from muon_dist.config import Config
from muon_dist.config.parallel import AXES, Parallel
from muon_dist.errors import ConfigError
from muon_dist.model.parallel import architecture, misfits
from muon_dist.train import distributed


def mesh_of(config: Config) -> Parallel | None:
    """The mesh of this run's ranks; None without a `parallel:` block. Raises ConfigError if the block does not fit the
    number of ranks."""
    if config.parallel is None:
        return None
    return Parallel.of(config.parallel.model_dump(exclude={"sp_backend"}), distributed.world_size())


def batches(config: Config) -> int:
    """Number of data-parallel ranks: all ranks, unless some share their samples."""
    mesh = mesh_of(config)
    return distributed.world_size() if mesh is None else mesh.data


def cuts_samples(config: Config) -> bool:
    """Whether Ulysses cuts each sample into parts, one per rank of a group."""
    return config.parallel is not None and config.parallel.sp > 1


def check(config: Config, model: Any) -> None:
    """Check the mesh before data are prepared.

    Args:
        model: the model of the configuration; it may be on the meta device.

    Raises:
        ConfigError: an axis does not divide the model or the samples, or the libraries cannot run it on this machine;
            names the key.
    """
    mesh = mesh_of(config)
    if mesh is None:
        return
    for axis, problem in misfits(vars(mesh), architecture(model), config.data.sequence_length):
        raise ConfigError(f"parallel.{axis}: is {getattr(mesh, axis)}: {problem}")
    if mesh.cp > 1 and not _on_gpus(config):
        raise ConfigError(
            f"parallel.cp: is {mesh.cp}, and torch's ring attention has no CPU kernel: train on GPUs, or set "
            f"parallel.sp: {mesh.cp} with deepspeed, which runs on CPUs too"
        )


def trainer_settings(config: Config) -> dict[str, Any]:
    """`TrainingArguments` for sequence and context parallelism; the other axes are set on the model."""
    mesh = mesh_of(config)
    if mesh is None or mesh.cp * mesh.sp == 1:
        return {}
    from muon_dist.adapters.hf.parallel import context_parallelism, sequence_parallelism  # imports accelerate

    if mesh.sp > 1:
        return sequence_parallelism(mesh, config.model.get("attn_implementation", "sdpa"))
    return context_parallelism(mesh)


def shard(config: Config, model: Any) -> Any:
    """The model, sharded over the mesh if transformers does it (not with DeepSpeed or context parallelism)."""
    mesh = mesh_of(config)
    if mesh is None or config.deepspeed is not None or mesh.cp > 1:
        return model
    from muon_dist.adapters.hf.parallel import shard as sharded

    return sharded(model, mesh)


def describe(config: Config) -> str:
    """Text for the first lines of a run, such as ": dp_shard 2 x tp 2"; empty without a block."""
    mesh = mesh_of(config)
    if mesh is None:
        return ""
    sizes = [f"{name} {getattr(mesh, name)}" for name in AXES if getattr(mesh, name) > 1]
    experts = f" (experts: ep {mesh.ep})" if mesh.ep > 1 else ""
    return f": {' x '.join(sizes)}{experts}" if sizes else ""


def _on_gpus(config: Config) -> bool:
    return torch.cuda.is_available() and not config.trainer.get("use_cpu", False)
