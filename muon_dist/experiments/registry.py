"""The experiments by name; every experiment is run, timed and written here."""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from muon_dist.errors import ConfigError
from muon_dist.experiments import (
    e1_threshold,
    e2_input_scale,
    e3_divergence,
    e4_kronecker,
    e5_efficiency,
    e6_networks,
    e7_milestones,
    e8_tiny_gpt,
    newton_schulz_study,
)
from muon_dist.experiments.result import environment, write_result

EXPERIMENTS: dict[str, ModuleType] = {
    "E1": e1_threshold,
    "E2": e2_input_scale,
    "E3": e3_divergence,
    "E4": e4_kronecker,
    "E5": e5_efficiency,
    "E6": e6_networks,
    "E7": e7_milestones,
    "E8": e8_tiny_gpt,
}
NEWTON_SCHULZ = "NS"
MODULES = {**EXPERIMENTS, NEWTON_SCHULZ: newton_schulz_study}

PROFILES = ("quick", "full")


def select(names: Sequence[str]) -> list[str]:
    """Experiment names in order, ``all`` standing for E1 to E8; raises ConfigError naming the closest."""
    chosen: list[str] = []
    for name in names:
        upper = name.upper()
        if upper == "ALL":
            chosen += list(EXPERIMENTS)
        elif upper in MODULES:
            chosen.append(upper)
        else:
            close = difflib.get_close_matches(upper, MODULES, n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"experiment {name!r} does not exist{hint} (one of: {', '.join(EXPERIMENTS)}, all)")
    return list(dict.fromkeys(chosen))


def profile_config(name: str, profile: str) -> Any:
    """The frozen configuration of one experiment; raises ConfigError on an unknown profile."""
    if profile not in PROFILES:
        raise ConfigError(f"--profile {profile!r} does not exist (one of: {', '.join(PROFILES)})")
    return MODULES[name].PROFILES[profile]


def run_experiment(name: str, config: Any, profile: str) -> dict[str, Any]:
    """Run one experiment on one thread and add profile, environment and time.

    One thread, because the matrices are small, and a result must not depend on the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        record: dict[str, Any] = MODULES[name].run(config)
        record |= {
            "profile": profile,
            "seconds": round(time.perf_counter() - wall, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "environment": environment(),
        }
    finally:
        torch.set_num_threads(threads)
    return record


def run_and_write(name: str, config: Any, profile: str, output: Path) -> dict[str, Any]:
    """Run, then write ``<name>.json`` (every number) and ``<name>-<n>.svg`` (its panels) into ``output``."""
    from muon_dist.experiments.figures import draw  # matplotlib takes a second to import

    output.mkdir(parents=True, exist_ok=True)
    if not os.access(output, os.W_OK):
        raise ConfigError(f"--output {output}: not writable")
    record = run_experiment(name, config, profile)
    write_result(record, output / f"{name}.json")
    draw(record, output)
    return record
