"""From a configuration to the model, the routing table and the trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from muon_dist.adapters.hf.callbacks import Console
from muon_dist.adapters.hf.curriculum import PartLog, PartRules, follow_parts
from muon_dist.adapters.hf.guarded import Guards
from muon_dist.adapters.hf.private import use_one_gpu
from muon_dist.adapters.hf.records import EventsFile, OwnershipFile
from muon_dist.adapters.hf.settings import check_frameworks, trial_scheduler
from muon_dist.adapters.hf.trainer import (
    CheckpointOptions,
    MuonFactory,
    MuonTrainer,
    TrainingArguments,
    leave_deepspeed,
)
from muon_dist.config import Config
from muon_dist.config.curriculum import changes_rule, muon_of_parts
from muon_dist.config.redact import redact
from muon_dist.config.routing import routing_rules
from muon_dist.config.schema import MuonConfig
from muon_dist.data.encoder import vocabulary_size
from muon_dist.errors import ConfigError
from muon_dist.failures import one_line
from muon_dist.model import DTYPES, build_model, flops_per_token
from muon_dist.model.load import load_text_tokenizer
from muon_dist.optim.groups import param_groups
from muon_dist.routing import RoutingTable, route
from muon_dist.train import mesh
from muon_dist.train.batch import share_batch
from muon_dist.train.device import refuse_unseen_gpus
from muon_dist.train.folder import RunFolder
from muon_dist.train.parts import check_starting_tokenizer, prepare_for_parts, rate_parts


class AdamWFactory:
    """`torch.optim.AdamW` on the same parameters, with the same parameters exempt from weight decay.

    It is torch's own optimizer, so that the comparison does not depend on our code.
    """

    def __call__(
        self,
        opt_model: nn.Module,
        *,
        table: RoutingTable,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ) -> torch.optim.AdamW:
        """The optimizer, with the groups "adamw" and "adamw_no_decay".

        An entry of `optimizer.groups` keeps its lr and weight decay if AdamW trains its parameters also in a Muon run.
        """
        merged: dict[str, dict[str, Any]] = {}
        for group in param_groups(opt_model, lr=lr, weight_decay=weight_decay, table=table):
            if group["algorithm"] == "muon":  # lr and weight_decay of such a group are Muon's
                group = {**group, "name": "adamw", "lr": lr, "weight_decay": weight_decay}
            own = {key: group[key] for key in ("name", "lr", "weight_decay")}
            into = merged.setdefault(group["name"], {"params": [], "algorithm": "adamw", **own})
            into["params"] += group["params"]
        return torch.optim.AdamW(list(merged.values()), lr=lr, betas=betas, eps=eps)


def make_model(config: Config, tokenizer: Any) -> Any:
    """The model, its vocabulary and special tokens from the tokenizer.

    Its weights are drawn from `config.seed`, or loaded from `model.init_from`.
    """
    check_starting_tokenizer(config)
    model = build_model(
        config.model,
        vocab_size=vocabulary_size(tokenizer),
        seed=config.seed,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    prepare_for_parts(config, model)
    return model


def routing_table(config: Config, model: nn.Module) -> RoutingTable:
    """The routing table of a model under the rules of the configuration."""
    return route(model, **routing_rules(config.optimizer))


def optimizer_factory(
    config: Config,
    table: RoutingTable,
    spectra: Path | None = None,
    audit: Path | None = None,
    muon: MuonConfig | None = None,
) -> tuple[type, dict[str, Any]]:
    """The value for Trainer's `optimizer_cls_and_kwargs`.

    spectra: the folder of the measures; None: nothing is measured. audit: the file of the audit; None: no audit.
    muon: the settings of a part of the run; None: the configuration's.
    """
    muon, adamw = muon if muon is not None else config.optimizer.muon, config.optimizer.adamw
    shared: dict[str, Any] = {"table": table, "betas": tuple(adamw.betas), "eps": adamw.eps}
    if config.optimizer.name == "adamw":
        return AdamWFactory, {**shared, "lr": adamw.lr, "weight_decay": adamw.weight_decay}
    dtypes = {"ns_dtype": muon.ns_dtype, "wire_dtype": muon.wire_dtype}
    rest = muon.model_dump(exclude=set(dtypes), exclude_none=True)
    of_audit = config.optimizer.audit.model_dump()
    return MuonFactory, {
        **shared,
        **rest,
        **{name: None if value is None else DTYPES[value] for name, value in dtypes.items()},
        "adamw_lr": adamw.lr,
        "adamw_weight_decay": adamw.weight_decay,
        "print_routing": False,
        "rounding_seed": config.seed,
        "max_nonfinite": config.guards.max_nonfinite,
        "diagnostics": {**config.diagnostics.model_dump(), "folder": spectra} if config.diagnostics.every else None,
        "audit": {**of_audit, "seed": config.seed, "path": audit} if of_audit["every"] else None,
    }


def part_rules(config: Config, table: RoutingTable) -> PartRules | None:
    """The update rules of the parts of the curriculum; None if no part changes a rule."""
    if not any(map(changes_rule, config.curriculum)):
        return None
    starts = (0, *(part.from_step for part in config.curriculum))
    of_parts = muon_of_parts(config.optimizer.muon.model_dump(), config.curriculum)
    made = [optimizer_factory(config, table, muon=MuonConfig(**muon))[1] for muon in of_parts]
    plain = [{k: v for k, v in arguments.items() if k not in ("diagnostics", "audit")} for arguments in made]
    return PartRules(list(zip(starts, plain, strict=True)))


def training_arguments(config: Config, folder: RunFolder, train_samples: int) -> TrainingArguments:
    """`TrainingArguments` of the trainer block. Epochs are turned into steps, which is how the sampler counts.

    Raises ConfigError if transformers refuses a value (with its message), or if torch does not see the machine's GPUs.
    """
    cuda = torch.cuda.is_available() and not config.trainer.get("use_cpu", False)
    if not cuda and "use_cpu" not in config.trainer:
        refuse_unseen_gpus()
    settings: dict[str, Any] = {
        "logging_steps": 10,
        "report_to": "none",
        # Every parameter of a causal language model gets a gradient, so find_unused_parameters only costs time. But
        # without it DDP reorders its buckets after the first step of a process, which changes the order of its sums:
        # on three or more ranks a resumed run would differ in the last bits.
        "ddp_find_unused_parameters": bool(config.trainer.get("full_determinism", False)),
        "use_cpu": not cuda,
        # The filter reads the loss of every micro-batch on the host, so the host waits for the GPU. The guard of the
        # optimizer step checks the gradients of all ranks instead, and skips a bad step.
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": cuda,
        **config.trainer,
        "output_dir": str(folder.checkpoints),
        "seed": config.seed,
        "data_seed": config.seed,
        "learning_rate": config.optimizer.muon.lr if config.optimizer.name == "muon" else config.optimizer.adamw.lr,
        # DeepSpeed clips by the norm over all parameters; our adapter exempts Muon's parameters.
        "max_grad_norm": (config.optimizer.clip.adamw or 0.0) if config.deepspeed is not None else 0.0,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "deepspeed": config.deepspeed,
        **mesh.trainer_settings(config),
    }
    if config.deepspeed is not None:
        from muon_dist.adapters.deepspeed import prepare_process  # imports DeepSpeed, so only where it is used

        prepare_process(cuda)
    if config.data.global_batch_size is not None:
        most = int(settings.get("per_device_train_batch_size", TrainingArguments.per_device_train_batch_size))
        micro, accumulation = share_batch(config.data.global_batch_size, most, mesh.batches(config))
        settings.update(per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation)
    try:
        args = TrainingArguments(**settings)
    except Exception as error:  # errors of files, JSON, enums and other libraries
        leave_deepspeed()  # a half-made DeepSpeed configuration stays registered, and breaks the next model
        raise ConfigError(f"{_blamed(config)}: transformers refuses these settings: {one_line(error)}") from error
    if args.n_gpu > 1:  # Trainer would wrap the model in DataParallel
        print(
            f"one process uses one GPU, of {args.n_gpu} here. To use all: bash launch/torchrun.sh --nproc-per-node "
            f"{args.n_gpu} train ...",
            flush=True,
        )
        use_one_gpu(args)
    if args.max_steps <= 0:
        batch = args.train_batch_size * args.gradient_accumulation_steps * mesh.batches(config)
        args.max_steps = math.ceil(args.num_train_epochs * train_samples / batch)
    return args


def _blamed(config: Config) -> str:
    """The names of the blocks that `TrainingArguments` reads, for a message."""
    if config.deepspeed is None:
        return "trainer"
    return f"trainer, deepspeed ({config.deepspeed})" if isinstance(config.deepspeed, str) else "trainer, deepspeed"


def check_settings(config: Config, folder: RunFolder) -> None:
    """Raises, before data are prepared for hours, every error that depends on settings only: trackers and kernels that
    are not installed, schedules, layouts, model settings, routing.

    Raises:
        ConfigError: a framework refuses a setting.
        RoutingError: as `routing_table`.
    """
    known = load_text_tokenizer(config.tokenizer.path) if config.tokenizer.path is not None else None
    vocabulary = vocabulary_size(known) if known is not None else config.tokenizer.vocab_size
    # Before the arguments: once arguments with ZeRO-3 exist, transformers partitions every model.
    with torch.device("meta"):
        model = build_model(config.model, vocab_size=max(vocabulary or 0, 1), seed=config.seed)
    prepare_for_parts(config, model)
    mesh.check(config, model)
    args = training_arguments(config, folder, 1)
    check_frameworks(args)
    follow_parts(trial_scheduler(args), rate_parts(config), max(args.max_steps, 1))
    if config.deepspeed is not None:
        from muon_dist.adapters.deepspeed import check_zero_settings  # imports DeepSpeed, so only where it is used

        check_zero_settings(args.hf_deepspeed_config.config)
    del args
    leave_deepspeed()
    routing_table(config, model)


def require_zero3(args: TrainingArguments) -> TrainingArguments:
    """Raises ConfigError unless the run is one with ZeRO-3, which `model.partitioned_init` needs."""
    plugin = getattr(args, "hf_deepspeed_config", None)
    if plugin is None or not plugin.is_zero3():
        raise ConfigError(
            "model.partitioned_init: only DeepSpeed's ZeRO stage 3 partitions a model as it is built: set "
            "deepspeed to a stage-3 configuration, or leave partitioned_init out"
        )
    return args


def check_partitioned_model(model: nn.Module, args: TrainingArguments) -> None:
    """Raises FrameworkError if the weights that DeepSpeed partitioned do not have the configured dtype."""
    from muon_dist.adapters.deepspeed import check_partitioned  # imports DeepSpeed, so only where it is used

    check_partitioned(model, args.hf_deepspeed_config.config)


def make_guards(config: Config, stop_requested: Callable[[], int], say: Callable[[str], None]) -> Guards:
    """The guards of the configuration. stop_requested: the signal that asked this rank to stop, or 0."""
    settings = config.guards.model_dump(exclude={"signals"})
    return Guards(**settings, stop_requested=stop_requested, say=say)


def checkpoint_options(config: Config, begin: Callable[[], None] = lambda: None) -> CheckpointOptions:
    """How the trainer saves. Each manifest contains the configuration without its secrets. begin: see
    `CheckpointOptions`."""
    block = config.checkpoint
    return CheckpointOptions(
        background=block.background,
        keep_last=block.keep_last,
        keep_every=block.keep_every,
        on_error=block.on_error,
        config=redact(config.model_dump(mode="json", by_alias=True)),
        begin=begin,
    )


def stack(samples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Samples of equal length -> one batch, (B, T) for each key."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def stack_with_positions(samples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """`stack`, with the position of each token in its sample, which Ulysses needs because it cuts samples."""
    batch = stack(samples)
    return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}


def make_trainer(
    config: Config,
    folder: RunFolder,
    args: TrainingArguments,
    *,
    model: Any,
    tokenizer: Any,
    table: RoutingTable,
    train_dataset: Any,
    eval_dataset: Any | None,
    sampler: Callable[[int, int, int], Iterable[int]],
    bytes_per_token: tuple[float, float],
    passes: Callable[[int, int], Mapping[str, float]],
    guards: Guards | None = None,
    begin: Callable[[], None] = lambda: None,
) -> MuonTrainer:
    """The trainer of a run. args: of `training_arguments`.

    sampler: (samples consumed, samples in all, samples per step) -> indices into `train_dataset`. passes: (samples
    consumed, samples per step) -> passes over each source. begin: see `CheckpointOptions`.
    """
    per_step = args.train_batch_size * args.gradient_accumulation_steps * mesh.batches(config)
    total = args.max_steps * per_step
    parts = rate_parts(config)
    clip = config.optimizer.clip
    trainer = MuonTrainer(
        model,
        args,
        optimizer_cls_and_kwargs=optimizer_factory(config, table, folder.spectra, folder.audit),
        callbacks=[EventsFile(folder.events), OwnershipFile(folder.ownership), *([PartLog(parts)] if parts else [])],
        clip_muon=clip.muon,
        clip_adamw=clip.adamw,
        # counted from here: if the batch size changed, the samples consumed before are not part of our total
        train_sampler=lambda consumed: sampler(consumed, consumed + total, per_step),
        bytes_per_token=bytes_per_token,
        passes=lambda consumed: passes(consumed, per_step),
        flops_per_token=flops_per_token(model, config.data.sequence_length),
        metrics_path=folder.metrics,
        guards=guards,
        rule_parts=part_rules(config, table),
        qk_clip=config.optimizer.qk_clip.model_dump() if config.optimizer.qk_clip is not None else None,
        checkpoint=checkpoint_options(config, begin),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=stack_with_positions if mesh.cuts_samples(config) else stack,
    )
    trainer.rate_parts = parts
    trainer.show_with(Console())
    return trainer
