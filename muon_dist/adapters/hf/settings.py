"""Settings of `TrainingArguments` that transformers takes without a look, and over which a run fails later."""

from __future__ import annotations

import contextlib
import functools
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.optimization import get_scheduler
from transformers.utils import logging as transformers_logging

from muon_dist.adapters.hf.flow import RunRecord
from muon_dist.errors import ConfigError
from muon_dist.failures import one_line

_TRACKERS = get_reporting_integration_callbacks.__module__  # where transformers keeps all of them

METRICS = ("loss", "perplexity", "bits_per_byte", "runtime", "samples_per_second", "steps_per_second")
"""What an evaluation of `MuonTrainer` gives, without the prefix `eval_`."""


def check_frameworks(args: Any) -> None:
    """Raises ConfigError, before any data is prepared, for what Trainer would refuse when it is made or begins."""
    if args.fsdp and args.world_size == 1:
        raise ConfigError(
            "trainer.fsdp shards a model over several processes, and here is one: start several with "
            "launch/torchrun.sh, or leave fsdp out"
        )
    levels = (*transformers_logging.log_levels, "passive")
    for level in ("log_level", "log_level_replica"):
        if getattr(args, level) not in levels:
            raise ConfigError(f"trainer.{level}: {getattr(args, level)!r} is not one of {', '.join(levels)}")
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in METRICS:
        raise ConfigError(f"trainer.metric_for_best_model: {metric!r} is not one of {', '.join(METRICS)}")
    _tried("trainer.report_to", lambda: [make() for make in get_reporting_integration_callbacks(args.report_to)])
    _tried("trainer.lr_scheduler_type, trainer.lr_scheduler_kwargs", lambda: trial_scheduler(args))
    if args.use_liger_kernel:
        _tried("trainer.use_liger_kernel", lambda: __import__("liger_kernel.transformers"))
    if args.torch_compile:
        known = torch._dynamo.list_backends(exclude_tags=())
        if args.torch_compile_backend not in (None, *known):
            raise ConfigError(
                f"trainer.torch_compile_backend: {args.torch_compile_backend!r} is not one of {', '.join(known)}"
            )


def _tried(keys: str, work: Callable[[], Any]) -> None:
    """Raises ConfigError that names `keys` when a library fails at `work`."""
    try:
        work()
    except Exception as error:  # each library raises its own
        with _silent_deletions():  # MLflowCallback's `__del__` fails, loudly, when its `__init__` has
            traceback.clear_frames(error.__traceback__)
        raise ConfigError(f"{keys}: {one_line(error)}") from error


@contextlib.contextmanager
def _silent_deletions() -> Iterator[None]:
    """Does not print errors in `__del__` while it is active."""
    before, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        yield
    finally:
        sys.unraisablehook = before


def trial_scheduler(args: Any) -> Any:
    """The scheduler that the arguments ask for, on an optimizer of nothing."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(max(args.max_steps, 1)),
        num_training_steps=max(args.max_steps, 1),
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )


def outlive_trackers(callbacks: list[TrainerCallback]) -> None:
    """A tracker (wandb, mlflow, ...) that fails after it has begun no longer fails the training: it is named once, and
    left out from then on. One that cannot begin is a ConfigError, since nothing is lost then. Our own records
    (metrics.jsonl, events.jsonl, ...) are tried again at the next event.
    """
    for callback in callbacks:
        if type(callback).__module__ == _TRACKERS:
            _guard(callback)
        elif isinstance(callback, RunRecord):
            _guard(callback, again=True)


def _guard(callback: TrainerCallback, again: bool = False) -> None:
    name = type(callback).__name__
    failed = False

    def guarded(event: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal failed
            if failed and not again:
                return None
            try:
                return call(*args, **kwargs)
            except Exception as error:  # each tracker raises its own
                if event == "on_train_begin":
                    raise ConfigError(
                        f"trainer.report_to: {name} cannot begin: {one_line(error)}. Set it up, or set "
                        "trainer.report_to to none"
                    ) from error
                if not failed:
                    rest = "tries again" if again else "continues without it, and metrics.jsonl holds the figures"
                    print(
                        f"warning: {name} failed in {event} ({type(error).__name__}: {one_line(error)}); "
                        f"the run {rest}",
                        file=sys.stderr,
                        flush=True,
                    )
                failed = True
                return None

        return run

    for event in [name for name in dir(callback) if name.startswith("on_")]:
        setattr(callback, event, guarded(event, getattr(callback, event)))
