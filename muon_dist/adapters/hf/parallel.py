"""Meshes of ranks with the Hugging Face libraries: transformers shards the model, accelerate distributes batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.utils import DeepSpeedSequenceParallelConfig, DistributedType, recursively_apply
from transformers import DistributedConfig, PreTrainedModel

from muon_dist.adapters.hf.private import PrivateTrainer
from muon_dist.config.parallel import Parallel
from muon_dist.errors import ConfigError, FrameworkError
from muon_dist.failures import known, one_line


class OnCpu(ParallelismConfig):
    """A `ParallelismConfig` for CPU processes, which accelerate 1.15 refuses without need.

    Its mesh, data loaders and wrappers also work on CPUs. Only the private method `_validate_accelerator` is replaced;
    tests/train/test_parallel.py fails if accelerate no longer calls it.
    """

    def _validate_accelerator(self, accelerator: Any) -> None:
        if accelerator.distributed_type != DistributedType.MULTI_CPU:
            super()._validate_accelerator(accelerator)
        elif self.total_size != accelerator.num_processes:
            raise ConfigError(
                f"the model was sharded for {self.total_size} ranks, but the run has {accelerator.num_processes}"
            )


def shard(model: PreTrainedModel, mesh: Parallel) -> PreTrainedModel:
    """The model, sharded by transformers over `mesh`: FSDP2, HSDP, tensor and expert parallelism.

    `model` is whole and equal on every rank. With only data parallelism it is returned unchanged.
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
    except Exception as error:  # transformers raises many types
        raise known(error) or ConfigError(
            f"parallel: transformers cannot shard a {model.config.model_type} in this way: {type(error).__name__}: "
            f"{one_line(error)}"
        ) from error
    return made.train(model.training)


def parallelism_on_cpu(args: Any, model: Any) -> ParallelismConfig | None:
    """The `args.parallelism_config` for a model under tensor parallelism on CPUs; None in all other cases.

    Trainer would make a configuration with the same sizes, but accelerate refuses it on a CPU.
    """
    tp = getattr(model, "tp_size", None) or 1
    if tp == 1 or args.device.type != "cpu" or isinstance(args.parallelism_config, OnCpu):
        return None
    return OnCpu(tp_size=tp, dp_shard_size=model.config.distributed_config.dp_size)


def gather_once(accelerator: Any, copies: int) -> Callable[..., Any]:
    """A gather function for Trainer's evaluation that counts each sample once.

    Every `copies` consecutive ranks evaluate the same samples. accelerate's `gather_for_metrics` would keep all copies
    except in the last batch, so that the last batch would have a smaller weight.
    """

    def gather(data: Any, *_: Any, **__: Any) -> Any:
        state = accelerator.gradient_state
        last = state.remainder if state.end_of_dataloader and state.remainder > 0 else None

        def once(tensor: torch.Tensor) -> torch.Tensor:
            by_rank = tensor.reshape(accelerator.num_processes, -1, *tensor.shape[1:])
            return by_rank[::copies].flatten(0, 1)[:last]

        return recursively_apply(once, accelerator.gather(data))

    return gather


def sequence_parallel_loss(engine: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """(mean loss over the tokens of all ranks of the sequence-parallel group, the model's outputs).

    Each rank's gradient is that of its tokens' share of the loss. transformers' loss gathers the losses of the group
    differentiably. This makes the gradients of ZeRO 0 to 2 too large, by the number of ranks in the group, also for
    clipping. It hangs over gloo if the group has only some of the ranks.

    Args:
        engine: DeepSpeed's engine.
        inputs: batch of `UlyssesSPDataLoaderAdapter`: this rank's tokens, with their labels as "shift_labels".

    Raises:
        FrameworkError: ZeRO-3 without reduce_scatter: there DeepSpeed 0.19.8 scales gradients by the size of a bucket.
    """
    labels = inputs["shift_labels"].contiguous()  # on CPUs it is a slice, which transformers' loss cannot view
    outputs = engine(**{**inputs, "labels": labels, "shift_labels": labels})
    group = engine.seq_parallel_group
    number = (labels != -100).sum()
    own = torch.where(number > 0, outputs.loss, 0.0) * number  # the mean over no tokens is NaN
    sums = torch.stack([own.detach().float(), number.float()])
    dist.all_reduce(sums, group=group)
    tokens = sums[1].clamp(min=1)
    # DeepSpeed sums over the ranks of a group and averages over the groups, but ZeRO-3 averages over all ranks.
    ranks = dist.get_world_size(group) if engine.zero_optimization_stage() == 3 else 1
    if ranks > 1 and not engine.zero_reduce_scatter():
        raise FrameworkError(
            "zero_optimization.reduce_scatter: is false. With sequence parallelism DeepSpeed's ZeRO-3 then scales the "
            "gradients of large and small parameters differently: set it to true"
        )
    share = own * ranks / tokens
    return share + (sums[0] / tokens - share).detach(), outputs


class SequenceParallelTrainer(PrivateTrainer):
    """A `Trainer` whose training loss under sequence parallelism is `sequence_parallel_loss`."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Trainer's `compute_loss`; under sequence parallelism `sequence_parallel_loss`."""
        if self.get_sp_size() == 1 or not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        loss, outputs = sequence_parallel_loss(model, inputs)
        return (loss, outputs) if return_outputs else loss


def share_of_heads(trainer: Any) -> tuple[int, int]:
    """(index, number of shares): the share of each layer's heads that this process computes, by the mesh.

    Raises:
        FrameworkError: context parallelism, where a process sees only the keys of its own tokens.
    """
    if trainer.get_cp_size() > 1:
        raise FrameworkError(
            "qk_clip: under context parallelism (parallel.cp) no process sees the logits of all keys: use sp, or "
            "leave qk_clip out"
        )
    if trainer.get_sp_size() > 1:
        group = trainer.deepspeed.seq_parallel_group
        return dist.get_rank(group), dist.get_world_size(group)
    if trainer.get_tp_size() > 1:
        return int(trainer.accelerator.tensor_parallel_rank), int(trainer.get_tp_size())
    return 0, 1


def consecutive(samples: Iterable[int], batch: int, mesh: tuple[int, int]) -> Iterator[int]:
    """`samples` in the loading order with which Ulysses trains on them in their given order.

    Under Ulysses each rank loads different batches, and then the ranks of a group train on these batches one after
    another. Without this reordering a step of several groups would use batches that are not consecutive, so a run that
    resumes would train on some samples twice and on others never.

    Args:
        batch: samples per micro-batch.
        mesh: (groups, ranks per group).
    """
    groups, ranks = mesh
    remaining = iter(samples)
    while window := list(islice(remaining, batch * groups * ranks)):
        window += window[-1:] * (batch * groups * ranks - len(window))  # never used for training
        for group in range(groups):
            for rank in range(ranks):
                first = (rank * groups + group) * batch
                yield from window[first : first + batch]


def sequence_parallelism(mesh: Parallel, attention: str) -> dict[str, Any]:
    """Arguments of `TrainingArguments` for DeepSpeed's Ulysses, besides `deepspeed`.

    Args:
        attention: the model's `attn_implementation`.

    Raises:
        ConfigError: Ulysses does not support this attention.
    """
    try:
        handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation=attention)
    except ValueError as error:
        raise ConfigError(f"model.attn_implementation with parallel.sp: {one_line(error)}") from error
    return {
        "parallelism_config": ParallelismConfig(
            sp_size=mesh.sp, sp_backend="deepspeed", sp_handler=handler, dp_shard_size=mesh.dp_shard
        )
    }


def context_parallelism(mesh: Parallel) -> dict[str, Any]:
    """Arguments of `TrainingArguments` for torch's ring attention, which accelerate supports with FSDP2."""
    return {
        "fsdp": True,
        "fsdp_config": {"version": 2},
        "parallelism_config": ParallelismConfig(
            cp_size=mesh.cp, dp_shard_size=mesh.dp_shard, dp_replicate_size=mesh.dp_replicate
        ),
    }
