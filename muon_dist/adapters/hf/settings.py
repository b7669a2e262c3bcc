"""Early checks of settings in `TrainingArguments` that transformers does not check, but that fail later in a run."""

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

_TRACKERS = get_reporting_integration_callbacks.__module__  # module of all trackers in transformers

METRICS = ("loss", "perplexity", "bits_per_byte", "runtime", "samples_per_second", "steps_per_second")
"""Metrics of an evaluation of `MuonTrainer`, without the prefix `eval_`."""


def check_frameworks(args: Any) -> None:
    """Raises ConfigError, before data are prepared, for settings that Trainer would refuse later."""
    if args.fsdp and args.world_size == 1:
        raise ConfigError(
            "trainer.fsdp shards a model over several processes, but there is only one: start several with "
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
    """Run `work`; raises a ConfigError that names `keys` if a library fails."""
    try:
        work()
    except Exception as error:  # each library has its own error types
        with _silent_deletions():  # MLflowCallback's `__del__` fails, loudly, when its `__init__` has
            traceback.clear_frames(error.__traceback__)
        raise ConfigError(f"{keys}: {one_line(error)}") from error


@contextlib.contextmanager
def _silent_deletions() -> Iterator[None]:
    """Context in which errors in `__del__` are not printed."""
    before, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        yield
    finally:
        sys.unraisablehook = before


def trial_scheduler(args: Any) -> Any:
    """The scheduler of the arguments, on a dummy optimizer."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(max(args.max_steps, 1)),
        num_training_steps=max(args.max_steps, 1),
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )


def outlive_trackers(callbacks: list[TrainerCallback]) -> None:
    """Let training continue if a tracker (wandb, mlflow, ...) fails after its start.

    The failed tracker is named once and then ignored. A tracker that cannot start is a ConfigError, because nothing is
    lost yet. Our own records (metrics.jsonl, events.jsonl, ...) are tried again at the next event.
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
            except Exception as error:  # each tracker has its own error types
                if event == "on_train_begin":
                    raise ConfigError(
                        f"trainer.report_to: {name} cannot start: {one_line(error)}. Set it up, or set "
                        "trainer.report_to to none"
                    ) from error
                if not failed:
                    rest = "tries again" if again else "continues without it; metrics.jsonl has the figures"
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
