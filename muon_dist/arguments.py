"""Checks of command-line arguments without torch and transformers, so that a typo is reported at once."""

from __future__ import annotations

from pathlib import Path

from muon_dist.errors import CheckpointError


def existing_run(path: Path) -> Path:
    """`path`, if there is such a file or folder; CheckpointError otherwise."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder; name a run folder, such as runs/quickstart, or a checkpoint")
    return path


def existing_runs(paths: list[Path]) -> list[Path]:
    """`existing_run` for several paths."""
    return [existing_run(path) for path in paths]
