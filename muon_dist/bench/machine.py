"""The machine of a benchmark, and how result files are written."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from muon_dist.json_files import write_json

PACKAGES = ("muon-dist", "torch", "deepspeed", "transformers", "muon-fsdp2", "dtensor-muon", "muon-optimizer")


def describe() -> dict[str, Any]:
    """Hardware, load, versions, commit and command line."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": list(os.getloadavg()),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str | None:
    """The commit of this checkout, with "+changes" if it is not clean."""
    folder = Path(__file__).resolve().parent
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    try:
        commit, changes = (
            subprocess.run(["git", *c], cwd=folder, capture_output=True, text=True, check=True, timeout=10).stdout
            for c in commands
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+changes" if changes.strip() else "")


def write(folder: Path, name: str, record: dict[str, Any], text: str) -> tuple[Path, Path]:
    """Write `name`.json and `name`.md into `folder`, which is made if needed."""
    files = folder / f"{name}.json", folder / f"{name}.md"
    write_json(files[0], record)
    files[1].write_text(text, encoding="utf-8")
    return files


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
