"""The trainer block: names, types and bounds of `TrainingArguments`, and those that another key decides."""

from __future__ import annotations

import ast
import builtins
import enum
import functools
import importlib.util
import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from muon_dist.config.kinds import SWITCHES, switch
from muon_dist.config.redact import redact
from muon_dist.config.source import Keys, closest

Found = Iterator[tuple[Keys, str]]

# Keys of the trainer block that another of our keys decides.
DECIDED_ELSEWHERE = {
    "output_dir": "run_dir and name",
    "seed": "seed",
    "data_seed": "seed",
    "learning_rate": "optimizer.muon.lr and optimizer.adamw.lr",
    "weight_decay": "optimizer.muon.weight_decay and optimizer.adamw.weight_decay",
    "adam_beta1": "optimizer.adamw.betas",
    "adam_beta2": "optimizer.adamw.betas",
    "adam_epsilon": "optimizer.adamw.eps",
    "optim": "optimizer.name",
    "optim_args": "optimizer",
    "optim_target_modules": "optimizer.routing",
    "max_grad_norm": "optimizer.clip.muon and optimizer.clip.adamw",
    "deepspeed": "deepspeed",
    "parallelism_config": "parallel",
    "resume_from_checkpoint": "the option --resume of muon-dist train",
}


@functools.lru_cache(maxsize=1)
def training_arguments() -> dict[str, Any]:
    """Name -> type of every argument of `transformers.TrainingArguments`, read from its source.

    An import of transformers and torch would cost seconds before an error message. Types that are neither Python's
    nor enumerations are `Any`.
    """
    classes = _classes("training_args.py") | _classes("trainer_utils.py")
    names = _Names(typing.__dict__ | builtins.__dict__)
    for name, body in classes.items():
        values = {n: v for n, v in _assigned(body) if isinstance(v, str)}
        if values and any(isinstance(base, ast.Name) and base.id == "ExplicitEnum" for base in body.bases):
            names[name] = enum.Enum(name, values)
    fields = [node for node in classes["TrainingArguments"].body if isinstance(node, ast.AnnAssign)]
    return {ast.unparse(f.target): eval(ast.unparse(f.annotation), {}, names) for f in fields}


class _Names(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        return Any


def _classes(file: str) -> dict[str, ast.ClassDef]:
    """The classes of a source file of transformers, by name."""
    package = importlib.util.find_spec("transformers")
    assert package is not None and package.origin is not None
    tree = ast.parse(Path(package.origin).with_name(file).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _assigned(body: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    """(name, value) of the constants that a class assigns."""
    for node in body.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            yield ast.unparse(node.targets[0]), node.value.value


def with_switches(trainer: dict[str, Any]) -> dict[str, Any]:
    """The trainer block with `on`, `yes`, `off` and `no` as booleans, for arguments that take a boolean but no
    text."""
    if not any(isinstance(value, str) and value.lower() in SWITCHES for value in trainer.values()):
        return trainer
    known = training_arguments()

    def kinds(name: str) -> tuple[Any, ...]:
        kind = known.get(name)
        return typing.get_args(kind) or (kind,)

    return {
        name: switch(value) if bool in kinds(name) and str not in kinds(name) else value
        for name, value in trainer.items()
    }


def trainer_problems(trainer: dict[str, Any]) -> Found:
    """Unknown names, values of the wrong type and unknown choices in the trainer block."""
    if not trainer:
        return
    known = training_arguments()
    for name, value in trainer.items():
        keys: Keys = ("trainer", name)
        if name not in known:
            usable = [k for k in known if k not in DECIDED_ELSEWHERE]
            yield keys, f"unknown TrainingArguments name{closest(name, usable)}"
            continue
        choices = [m.value for t in typing.get_args(known[name]) if _is_enum(t) for m in t]
        if choices and isinstance(value, str) and value not in choices:
            yield keys, f"{value!r} is not one of {', '.join(choices)}{closest(value, choices)}"
            continue
        try:
            TypeAdapter(known[name], config={"arbitrary_types_allowed": True}).validate_python(value, strict=True)
        except ValidationError:
            yield keys, f"needs {_type_text(known[name])}, not {redact({name: value})[name]!r}"
            continue
        problem = _number_problem(name, value)
        if problem is not None:
            yield keys, problem


# Smallest values of numbers in the trainer block. transformers does not check them, and fails later.
_AT_LEAST: dict[str, float] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": 1,
    "ddp_timeout": 1,
    "warmup_steps": 0,
    "logging_steps": 0,
    "save_steps": 0,
    "label_smoothing_factor": 0,
}
_MUST_BE_POSITIVE = ("num_train_epochs", "eval_steps")
_LARGEST = 2**31 - 1


def _number_problem(name: str, value: Any) -> str | None:
    """The error of a number in the trainer block; None if it is right, or not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not math.isfinite(value):
        return f"is {value}, and must be a finite number"
    if name == "max_steps" and value != -1 and value < 1:
        return f"is {value}, and must be at least 1; -1 trains num_train_epochs instead"
    if name in _MUST_BE_POSITIVE and value <= 0:
        return f"is {value}, and must be above 0"
    if value < _AT_LEAST.get(name, -math.inf):
        return f"is {value}, and must be at least {_AT_LEAST[name]}"
    if name == "label_smoothing_factor" and value >= 1:
        return f"is {value}, and must be below 1"
    if isinstance(value, int) and value > _LARGEST:
        return f"is {value}, and must be at most {_LARGEST}"
    return None


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


_TYPE_WORDS = {bool: "true or false", str: "text", int: "a whole number", float: "a number", type(None): "null"}


def _type_text(kind: Any) -> str:
    """A type of TrainingArguments in words."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_type_text(t) for t in typing.get_args(kind) if not _is_enum(t))
    return _TYPE_WORDS.get(kind, {list: "a list", dict: "a mapping"}.get(typing.get_origin(kind) or kind, str(kind)))
