"""Versions, combinations that are known to fail, devices and backends."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Mapping
from importlib import metadata

from muon_dist.doctor.verdict import Verdict
from muon_dist.train.device import gpus_of_driver

# The ranges of pyproject.toml: package -> (lowest version, first version that is too new, or None).
RANGES: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "torch": ((2, 12), None),
    "deepspeed": ((0, 19, 8), None),
    "transformers": ((5, 23), (6,)),
    "accelerate": ((1, 15), None),
    "datasets": ((4,), None),
    "sentencepiece": ((0, 2, 3), None),
    "protobuf": ((7, 36, 1), None),
}


def installed() -> dict[str, str | None]:
    """Version of each package of RANGES and of muon-dist; None if it is missing."""
    found: dict[str, str | None] = {}
    for name in (*RANGES, "muon-dist"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def numbers(version: str) -> tuple[int, ...]:
    """ "2.13.0+cpu" -> (2, 13, 0); text after the numbers is ignored."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match is not None else ()


def check_versions(
    found: Mapping[str, str | None] | None = None, python: tuple[int, ...] = sys.version_info[:3]
) -> list[Verdict]:
    """Checks Python and the packages against the supported ranges."""
    found = installed() if found is None else found
    shown = ".".join(map(str, python))
    verdicts = []
    if python < (3, 11):
        verdicts.append(Verdict("versions", "problem", f"Python {shown}", "install Python 3.11 or newer"))
    for name, (lowest, above) in RANGES.items():
        version = found.get(name)
        wanted = f"{name}>={'.'.join(map(str, lowest))}" + (f",<{'.'.join(map(str, above))}" if above else "")
        if version is None:
            verdicts.append(Verdict("versions", "problem", f"{name} is not installed", f"pip install '{wanted}'"))
        elif numbers(version) < lowest or (above is not None and numbers(version) >= above):
            text = f"{name} {version} is outside the supported range ({wanted})"
            verdicts.append(Verdict("versions", "problem", text, f"pip install '{wanted}'"))
    if verdicts:
        return verdicts
    text = f"Python {shown}, " + ", ".join(f"{name} {version}" for name, version in found.items())
    return [Verdict("versions", "ok", text, figures=dict(found))]


def check_devices(driver: int | None = None) -> list[Verdict]:
    """GPUs, and whether torch can use those that the driver lists. driver: number of GPUs of the driver; None: look it
    up."""
    import torch

    driver = gpus_of_driver() if driver is None else driver
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0))
        if driver and torch.version.cuda is None:
            fix = "install torch's CUDA build: pip install --force-reinstall torch, without constraints-cpu.txt"
            return [Verdict("devices", "problem", f"{driver} GPUs, but torch {torch.__version__} is a CPU build", fix)]
        if driver:
            fix = "a driver older than torch's CUDA, or CUDA_VISIBLE_DEVICES empty: compare nvidia-smi with torch's"
            text = f"{driver} GPUs, but torch (CUDA {torch.version.cuda}) sees none"
            return [Verdict("devices", "problem", text, fix)]
        return [Verdict("devices", "ok", f"no GPU; {cores} CPU cores", figures={"gpus": 0, "cores": cores})]
    verdicts, names = [], []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        names.append(f"{torch.cuda.get_device_name(index)} ({total / 2**30:.0f} GiB)")
        if free < 0.9 * total:
            text = f"GPU {index}: {(total - free) / 2**30:.1f} of {total / 2**30:.0f} GiB are in use already"
            verdicts.append(Verdict("devices", "warning", text, "end the process that nvidia-smi shows there"))
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        text = f"{names[0]} has no bfloat16: Newton-Schulz runs in float32 there"
        verdicts.append(Verdict("devices", "warning", text, "set optimizer.muon.ns_dtype: float32"))
    shown = f"{len(names)} GPUs: {', '.join(sorted(set(names)))}"
    return verdicts or [Verdict("devices", "ok", shown, figures={"gpus": len(names)})]


def check_backends() -> list[Verdict]:
    """gloo, and NCCL if there are GPUs."""
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        return [Verdict("backends", "problem", "this torch has no gloo", "install a build with torch.distributed")]
    if torch.cuda.is_available() and not dist.is_nccl_available():
        return [Verdict("backends", "problem", "this torch has no NCCL", "install torch's CUDA build")]
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
    return [Verdict("backends", "ok", "gloo" + (f", NCCL {nccl}" if nccl else ""), figures={"nccl": nccl})]


def check_combinations(variables: Mapping[str, str] = os.environ, gpu: bool | None = None) -> list[Verdict]:
    """Combinations that are known to fail; each was seen with the versions in launch/constraints-cpu.txt."""
    import torch

    gpu = torch.cuda.is_available() if gpu is None else gpu
    verdicts = []
    if not gpu and importlib.util.find_spec("deepspeed") is not None:
        missing = [name for name in ("ninja", "g++") if shutil.which(name) is None]
        if missing:
            text = (
                f"DeepSpeed compiles operators on CPU when it first needs them, and {', '.join(missing)} is not there"
            )
            fix = "apt-get install ninja-build g++, or in your own scripts leave FusedAdam out (torch_adam: true)"
            verdicts.append(Verdict("combinations", "warning", text, fix))
        if variables.get("DS_ACCELERATOR") not in (None, "cpu"):
            text = f"DS_ACCELERATOR is {variables['DS_ACCELERATOR']}, and there is no GPU"
            verdicts.append(Verdict("combinations", "problem", text, "unset DS_ACCELERATOR, or set it to cpu"))
    if gpu and variables.get("DS_ACCELERATOR") == "cpu":
        text = "DS_ACCELERATOR is cpu, and there is a GPU: DeepSpeed would not use it"
        verdicts.append(Verdict("combinations", "problem", text, "unset DS_ACCELERATOR"))
    if variables.get("NCCL_BLOCKING_WAIT", variables.get("TORCH_NCCL_BLOCKING_WAIT")) == "1" and gpu:
        text = "TORCH_NCCL_BLOCKING_WAIT=1: every collective blocks the host, so nothing overlaps"
        verdicts.append(Verdict("combinations", "warning", text, "unset it; the watchdog ends a stuck collective"))
    if variables.get("CUDA_LAUNCH_BLOCKING") == "1" and gpu:
        text = "CUDA_LAUNCH_BLOCKING=1: every kernel waits for the previous one"
        verdicts.append(Verdict("combinations", "warning", text, "unset it, unless you look for a fault"))
    return verdicts or [Verdict("combinations", "ok", "none of the known bad ones")]
