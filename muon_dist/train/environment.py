"""The machine, versions and command of a run, without secrets."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from muon_dist.config import REDACTED, is_secret

_SHOWN_VARIABLES = re.compile(
    r"^(ACCELERATE|CUDA|DS|GLOO|HF|KMP|MASTER|MKL|MUON|NCCL|OMP|PYTORCH|RDZV|SLURM|TOKENIZERS|TORCH|TORCHELASTIC|TRITON"
    r"|UCX|WANDB|TRACKIO)_|^(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|NNODES|NODE_RANK)$"
)
_PACKAGES = (
    "muon-dist torch deepspeed transformers accelerate datasets sentencepiece tokenizers numpy safetensors pydantic"
).split()


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with the values of secret-looking `key=value` pairs replaced."""
    shown = []
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        # the last part of the key decides: trainer.hub_token is a secret, tokenizer.path is not
        shown.append(f"{key}={REDACTED}" if equals and is_secret(key.rpartition(".")[2]) else argument)
    return shown


def redact_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that affect a run; values that look secret are replaced."""
    return {
        name: REDACTED if is_secret(name) and not name.startswith("TOKENIZERS_") else value
        for name, value in sorted(variables.items())
        if _SHOWN_VARIABLES.search(name)
    }


def describe() -> dict[str, Any]:
    """Versions, hardware, command line, commit and the environment variables that affect the run."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": redact_arguments(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "variables": redact_variables(os.environ),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that contains this file; "+changes" is appended if it is not clean."""
    folder = Path(__file__).resolve().parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
