"""A mesh of ranks through the Hugging Face libraries: transformers shards the model, accelerate deals out batches."""

from __future__ import annotations

from typing import Any

from accelerate import ParallelismConfig
from accelerate.utils import DistributedType
from transformers import DistributedConfig, PreTrainedModel

from muon_dist.errors import ConfigError
from muon_dist.failures import known, one_line
from muon_dist.model.parallel import Parallel


class OnCpu(ParallelismConfig):
    """A `ParallelismConfig` for processes on CPUs, which accelerate 1.15 refuses for no reason of its own.

    Its mesh, its data loaders and its wrappers work there as on GPUs. `_validate_accelerator` is private, and all that
    is replaced; tests/adapters/test_parallel.py fails when accelerate no longer calls it.
    """

    def _validate_accelerator(self, accelerator: Any) -> None:
        if accelerator.distributed_type != DistributedType.MULTI_CPU:
            super()._validate_accelerator(accelerator)
        elif self.total_size != accelerator.num_processes:
            raise ConfigError(
                f"the model was sharded for {self.total_size} ranks, and the run has {accelerator.num_processes}"
            )


def shard(model: PreTrainedModel, mesh: Parallel) -> PreTrainedModel:
    """`model`, whole and equal on every rank, as transformers shards it over `mesh`: FSDP2, HSDP, tensor and expert
    parallelism. Data parallelism alone needs no sharding: then the model itself.

    Raises:
        ConfigError: transformers refuses the mesh for this model.
    """
    if mesh.dp_shard * mesh.tp == 1:
        return model
    dtype = model.dtype
    try:
        sizes = DistributedConfig(
            tp_size=mesh.tp, fsdp_size=mesh.dp_shard, dp_replicate_size=mesh.dp_replicate, ep_size=mesh.ep
        )
        made: PreTrainedModel = type(model).from_pretrained(
            None, config=model.config, state_dict=model.state_dict(), distributed_config=sizes, dtype=dtype
        )
    except Exception as error:  # it raises what it stumbles on, of plans, meshes and shapes
        raise known(error) or ConfigError(
            f"parallel: transformers cannot shard a {model.config.model_type} so: {type(error).__name__}: "
            f"{one_line(error)}"
        ) from error
    return made.train(model.training)


def parallelism_on_cpu(args: Any, model: Any) -> ParallelismConfig | None:
    """What `args.parallelism_config` must be for a model under tensor parallelism on CPUs; None where Trainer's own
    will do.

    Trainer makes one of the same sizes for such a model, which accelerate refuses on a CPU.
    """
    tp = getattr(model, "tp_size", None) or 1
    if tp == 1 or args.device.type != "cpu" or isinstance(args.parallelism_config, OnCpu):
        return None
    return OnCpu(tp_size=tp, dp_shard_size=model.config.distributed_config.dp_size)


def sequence_parallelism(mesh: Parallel) -> dict[str, Any]:
    """Arguments of `TrainingArguments` for DeepSpeed's Ulysses, beside `deepspeed`."""
    return {
        "parallelism_config": ParallelismConfig(
            sp_size=mesh.sp, sp_backend="deepspeed", dp_shard_size=mesh.dp_shard, dp_replicate_size=mesh.dp_replicate
        )
    }


def context_parallelism(mesh: Parallel) -> dict[str, Any]:
    """Arguments of `TrainingArguments` for torch's ring attention, which accelerate offers with its FSDP2."""
    return {
        "fsdp": True,
        "fsdp_config": {"version": 2},
        "parallelism_config": ParallelismConfig(
            cp_size=mesh.cp, dp_shard_size=mesh.dp_shard, dp_replicate_size=mesh.dp_replicate
        ),
    }
