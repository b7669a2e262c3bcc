"""Checks of command-line arguments without torch and transformers, so that a typo is reported at once."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from muon_dist.errors import CheckpointError, ConfigError

AUTO, IF_ANY = "auto", "if-any"
"""Values of `--resume` other than a path: the newest checkpoint of the run; or the newest, or step 0 without one."""


class SettingsCommand(TyperCommand):
    """A command with settings as KEY=VALUE, which the error for `--key value` explains."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments. Raises ConfigError for an option that the command does not have."""
        known = {name for option in self.get_params(ctx) for name in (*option.opts, *option.secondary_opts)}
        for argument in args[: args.index("--")] if "--" in args else args:
            name = argument.partition("=")[0]
            if name.startswith("--") and name not in known:
                close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.75)
                setting = "settings of the configuration are written without --, such as optimizer.muon.lr=0.003"
                meant = (
                    f"did you mean {close[0]}?" if close else f"{setting}; for the options see {ctx.command_path} -h"
                )
                raise ConfigError(f"{name}: no such option; {meant}")
        return super().parse_args(ctx, args)


def existing(path: Path) -> Path:
    """`path` of a configuration or a run. Raises ConfigError if it does not exist."""
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder: name a configuration, or run folders")
    return path


def existing_run(path: Path) -> Path:
    """`path`. Raises CheckpointError if it does not exist."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder; name a run folder, such as runs/quickstart, or a checkpoint")
    return path


def existing_runs(paths: list[Path]) -> list[Path]:
    """`existing_run` for several paths."""
    return [existing_run(path) for path in paths]


def existing_checkpoint(resume: str | None) -> None:
    """Raise CheckpointError if `--resume` is a path that does not exist."""
    if resume not in (None, AUTO, IF_ANY) and not Path(resume).exists():
        raise CheckpointError(
            f"--resume {resume}: no such folder; name a checkpoint, such as runs/NAME/checkpoints/checkpoint-400, or "
            "write --resume auto for the newest checkpoint of this run"
        )
