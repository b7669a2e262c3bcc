"""GPUs of this machine that torch does not see."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from muon_dist.errors import ConfigError


def gpus_of_driver() -> int:
    """GPUs that the NVIDIA driver lists; 0 without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def refuse_unseen_gpus(environment: Mapping[str, str] = os.environ, node: Path = Path("/dev/nvidia0")) -> None:
    """Raise ConfigError if this machine has an NVIDIA GPU that torch cannot use: the run would train on the CPU.
    Nothing is raised if CUDA_VISIBLE_DEVICES hides all GPUs.

    node: device file of the first GPU, which exists also in containers without nvidia-smi.
    """
    if torch.cuda.is_available() or environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles"):
        return
    count = gpus_of_driver() or int(node.exists())
    if not count:
        return
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda is not None else "a build without CUDA"
    raise ConfigError(
        f"this machine has {count} NVIDIA GPU{'s' if count > 1 else ''}, but torch {torch.__version__} ({build}) "
        "sees none: the driver may be too old for it. Install a torch that fits the driver (`muon-dist doctor` says "
        "what it sees), or set trainer.use_cpu=true to train on the CPU"
    )
