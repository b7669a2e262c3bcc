"""A training run from its configuration to its summary."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml

from muon_dist.adapters.hf.callbacks import quiet_transformers
from muon_dist.adapters.hf.guarded import stop_text
from muon_dist.adapters.hf.trainer import MuonTrainer, leave_deepspeed
from muon_dist.arguments import AUTO
from muon_dist.checkpoint import Checkpoint, newest_good, open_checkpoint
from muon_dist.checkpoint import Ranks as CheckpointRanks
from muon_dist.checkpoint.weights import record_step, trained_with
from muon_dist.config import Config
from muon_dist.data.encoder import vocabulary_size
from muon_dist.errors import PeerError, Stopped
from muon_dist.failures import one_line
from muon_dist.json_files import write_json
from muon_dist.model import count_parameters
from muon_dist.model.load import load_model
from muon_dist.model.portable import make_portable
from muon_dist.ranks import Ranks
from muon_dist.routing import RoutingTable
from muon_dist.routing.folded import fold
from muon_dist.train import build, corpus, distributed, environment, mesh, summary
from muon_dist.train.command import continuing
from muon_dist.train.folder import RunFolder, Start, changed_settings
from muon_dist.train.generation import generate
from muon_dist.train.lock import RunLock
from muon_dist.train.signals import StopSignals
from muon_dist.train.trackers import TrackerFolder


def train(
    config: Config,
    *,
    run_dir: str | None = None,
    resume: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train as configured and return the summary (rank 0: complete; other ranks: without the sample).

    run_dir: parent folder of the run folder (run_dir/name), instead of the configured one. resume: "auto" or a
    checkpoint. overwrite: start again in a folder that already has a run. Every rank must call this function.
    """
    quiet_transformers()
    use_cpu = bool(config.trainer.get("use_cpu", False))
    if use_cpu or not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which accelerate imports, warns on every rank
    joined = distributed.start(float(config.trainer.get("ddp_timeout", 1800)), use_cpu, config.deepspeed is not None)
    try:
        folder = RunFolder(Path(run_dir if run_dir is not None else config.run_dir) / config.name)
        trackers = TrackerFolder(folder.trackers, config.trainer.get("report_to"), distributed.rank() == 0)
        lock, begun = RunLock(folder.root), list[int]()
        ranks = Ranks.of_the_run(distributed.PATIENCE)
        start = ranks.first(lambda: _decide(folder, lock, config, resume, overwrite))
        checkpoint = _verified(folder, start.resume, float(config.trainer.get("ddp_timeout", 1800)))
        _say(f"run folder {folder.root}" + (f", resuming from {checkpoint.path}" if checkpoint else ""))

        def begin(table: RoutingTable, data: dict[str, Any]) -> None:
            begun.append(0 if checkpoint is None or checkpoint.beginning else checkpoint.step)
            _begin(folder, start, config, table, begun[0])
            write_json(folder.data, data)
            if start.replaces:
                trackers.drop_old()

        with trackers:
            ranks.everywhere(lambda: build.check_settings(config, folder))
            started = time.perf_counter()
            # a run that continues needs the tokens with which it began
            ranks.first_of_each_node(
                lambda: corpus.prepare(config, rebuild=checkpoint is None), distributed.local_rank()
            )
            with StopSignals() if config.guards.signals else nullcontext() as signals:
                trainer = _trainer(config, folder, begin, time.perf_counter() - started, ranks, signals)
                trainer.train(resume_from_checkpoint=checkpoint)
            _leave_if_stopped(trainer)
            return _finish(config, folder, trainer)
    finally:
        if distributed.rank() == 0:
            if not begun:
                trackers.drop_new()
            lock.release()
            folder.remove_if_empty(lock.made)
        if joined:
            distributed.stop()


def _say(text: str) -> None:
    if distributed.rank() == 0:
        print(text, flush=True)


def _decide(folder: RunFolder, lock: RunLock, config: Config, resume: str | None, overwrite: bool) -> Start:
    """How the run starts, decided while no other run can change the folder. Changed settings are printed."""
    lock.take()
    start = folder.decide(resume, overwrite, config.checkpoint.resume)
    if start.resume is not None and folder.config.exists():
        before = yaml.safe_load(folder.config.read_text("utf-8"))
        for line in changed_settings(before, yaml.safe_load(config.to_yaml())):
            print(f"changed since the run began: {line}", flush=True)
    return start


def _begin(folder: RunFolder, start: Start, config: Config, table: RoutingTable, step: int) -> None:
    """Prepare the run folder and write the run's description. step: the step from which the run continues."""
    folder.begin(start, step)
    folder.config.write_text(config.to_yaml(), encoding="utf-8")
    write_json(folder.environment, environment.describe())
    folder.routing.with_suffix(".txt").write_text(table.render() + "\n", encoding="utf-8")
    write_json(folder.routing, table.to_json())


def _verified(folder: RunFolder, found: str | None, timeout: float) -> Checkpoint | None:
    """The checkpoint to continue from, after every byte was checked; if it is damaged, the previous checkpoint."""
    if found is None:
        return None
    ranks = CheckpointRanks.of_the_run(timeout)
    if found == AUTO:
        return newest_good(folder.checkpoints, ranks, lambda text: print(f"warning: {text}", flush=True))
    return open_checkpoint(found, ranks)


def _leave_if_stopped(trainer: MuonTrainer) -> None:
    """Raises Stopped on every rank when a signal ended the training; the first rank reports it."""
    guards = trainer.guards
    if guards is not None and guards.stopped:
        error = Stopped(
            f"{stop_text(guards.stopped)}: all ranks stopped after step {trainer.state.global_step}; the newest "
            f"commit is {guards.committed}. To continue: {continuing(saved=guards.committed is not None)}"
        )
        error.reported_elsewhere = distributed.rank() != 0
        raise error


def _trainer(
    config: Config,
    folder: RunFolder,
    begin: Callable[[RoutingTable, dict[str, Any]], None],
    preparation: float,
    ranks: Ranks,
    signals: StopSignals | None = None,
) -> MuonTrainer:
    tokenizer, datasets, args, model, table = ranks.everywhere(lambda: _parts(config, folder))
    _say(str(fold(table)))
    if config.optimizer.name == "adamw":
        _say("optimizer.name is adamw: AdamW trains all parameters; the table shows which ones Muon would train")
    count = count_parameters(model)
    train_bytes, _ = datasets.bytes_per_token
    packing = config.data.packing
    packed = f"{packing} with {datasets.train.padding:.2%} padding, " if packing != "concatenate" else ""
    _say(
        f"model {model.config.model_type}, {count.total:,} parameters, {count.non_embedding:,} outside embeddings; "
        f"data {len(datasets.train):,} samples of {config.data.sequence_length} tokens, {packed}"
        f"{train_bytes:.3f} bytes per token, "
        f"ready in {preparation:.1f} s; {distributed.world_size()} processes{mesh.describe(config)}; "
        f"{config.optimizer.name}"
    )
    return ranks.everywhere(
        lambda: build.make_trainer(
            config,
            folder,
            args,
            model=model,
            tokenizer=tokenizer,
            table=table,
            train_dataset=datasets.drawn,
            eval_dataset=datasets.validation,
            sampler=datasets.sampler,
            bytes_per_token=datasets.bytes_per_token,
            passes=datasets.passes,
            guards=build.make_guards(config, lambda: signals.requested if signals is not None else 0, _say),
            begin=lambda: begin(table, datasets.describe(config)),
        )
    )


def _parts(config: Config, folder: RunFolder) -> tuple[Any, corpus.Datasets, Any, Any, RoutingTable]:
    """Tokenizer, datasets, training arguments, model, routing table."""
    tokenizer = corpus.text_tokenizer(config)
    datasets = corpus.open_datasets(config, vocabulary_size(tokenizer))

    def arguments() -> Any:
        return build.training_arguments(config, folder, len(datasets.train))

    # While TrainingArguments with ZeRO-3 exist, transformers partitions every model that it builds.
    if config.model.get("partitioned_init", False):
        args = build.require_zero3(arguments())
        model = build.make_model(config, tokenizer)
        build.check_partitioned_model(model, args)
    else:
        model = mesh.shard(config, build.make_model(config, tokenizer))
        args = arguments()
    return tokenizer, datasets, args, model, build.routing_table(config, model)


def _final_evaluation(trainer: MuonTrainer) -> dict[str, float]:
    """The validation figures of the final weights, computed now unless the training loop has computed them.

    If that fails: a warning and no figures, because the training is finished and its model is saved.
    """
    if trainer.eval_dataset is None:
        return {}
    for entry in reversed(trainer.state.log_history):
        if "eval_loss" in entry and entry["step"] == trainer.weights_step:
            return dict(entry)
    try:
        return dict(trainer.evaluate())
    except PeerError:
        raise  # another rank ended; its own message says why
    except Exception as error:  # errors of data, memory or a kernel: `eval` shows more
        _warn(f"no validation figures ({type(error).__name__}: {one_line(error)}): muon-dist eval gives them")
        return {}


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _save_model(folder: RunFolder, trainer: MuonTrainer) -> None:
    """Save the final model by one rename, as transformers 4.57 and 5.x load it. Every rank must call this."""
    temporary = folder.model.with_name(".model.tmp")
    trainer.save_model(str(temporary))
    if distributed.rank() != 0:
        return
    tokenizers = trained_with(folder.model)
    record_step(temporary, trainer.weights_step, trainer.state.global_step, tokenizers)
    for problem in make_portable(temporary):
        _warn(problem)
    shutil.rmtree(folder.model, ignore_errors=True)
    temporary.rename(folder.model)


def _finish(config: Config, folder: RunFolder, trainer: MuonTrainer) -> dict[str, Any]:
    """Evaluate, save the model, write and show the summary."""
    _save_model(folder, trainer)  # first, so that no later failure loses the weights
    figures = _final_evaluation(trainer)
    found = folder.finished_checkpoints()
    out: dict[str, Any] = {
        "name": config.name,
        "optimizer": config.optimizer.name,
        "seed": config.seed,
        "steps": trainer.state.global_step,
        "weights_step": trainer.weights_step,
        "world_size": distributed.world_size(),
        **trainer.throughput(),
        "validation_loss": figures.get("eval_loss"),
        "validation_bits_per_byte": figures.get("eval_bits_per_byte"),
        "validation_perplexity": figures.get("eval_perplexity"),
        "run": str(folder.root),
        "checkpoint": str(found[-1]) if found else None,
        "model": str(folder.model),
        "metrics": str(folder.metrics),
    }
    if distributed.rank() == 0:
        if config.evaluation.generate_tokens > 0:
            out.update(_sample(config, folder, trainer))
        write_json(folder.summary, out)
        summary.show(out)
    return out


def _sample(config: Config, folder: RunFolder, trainer: MuonTrainer) -> dict[str, str]:
    """{"sample": text of the model}; if that fails, {} and a warning, because a sample must not fail a finished
    training."""
    block = config.evaluation
    try:
        speaker = trainer.model
        if trainer.is_deepspeed_enabled or trainer.is_distributed_loading_by_transformers:
            # This rank may hold only a part of the model, so the saved model is used.
            leave_deepspeed()
            speaker = load_model(folder.model)
        text = generate(
            speaker,
            trainer.processing_class,
            block.generate_prompt,
            block.generate_tokens,
            temperature=block.temperature,
            top_k=block.top_k,
            seed=config.seed,
        )
    except Exception as error:  # of tokenizer, prompt, weights or memory: the model is saved; `generate` shows more
        _warn(
            f"no sample ({type(error).__name__}: {one_line(error)}); the model is saved: muon-dist generate "
            f"{folder.root}"
        )
        return {}
    return {"sample": text}
