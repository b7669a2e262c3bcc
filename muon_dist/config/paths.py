"""Paths as people write them: `~`, `~user` and `${VARIABLE}`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

_VARIABLE = re.compile(r"\$\{([^}]*)\}|\$([A-Za-z_][A-Za-z0-9_]*)")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_PATTERN = re.compile(r"[*?\[]")
# Keys of the trainer block whose value is a path, or may be one.
TRAINER_PATHS = ("fsdp_config", "accelerator_config", "logging_dir")


def expand_path(text: str) -> str:
    """The path with `~` and `${VARIABLE}` replaced, `$$` as a dollar sign.

    Raises ValueError that names a variable that is not set, or a user without a home.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] if found[1] is not None else found[2]
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(
                f"{text!r}: {found[0]} is not an environment variable: write ${{NAME}}, or $$ for a dollar sign"
            )
        if name not in os.environ:
            raise ValueError(f"{text!r}: the environment variable {name} is not set: set it, or write the path out")
        return os.environ[name]

    expanded = "$".join(_VARIABLE.sub(value, part) for part in text.split("$$"))
    if not expanded.startswith("~"):
        return expanded
    home = os.path.expanduser(expanded)
    if home.startswith("~"):
        raise ValueError(f"{text!r}: the user {expanded[1:].split('/')[0]!r} has no home folder here")
    return home


def expand_trainer_paths(trainer: Any) -> Any:
    """The trainer block with its paths expanded. Raises the ValueError of `expand_path`, with the key in front."""
    return _expanded(trainer, TRAINER_PATHS)


def expand_model_paths(model: Any) -> Any:
    """The model block with its paths expanded. Raises as `expand_trainer_paths`."""
    return _expanded(model, ("init_from",))


def _expanded(block: Any, names: tuple[str, ...]) -> Any:
    if not isinstance(block, dict):
        return block
    found = dict(block)
    for name in names:
        if isinstance(block.get(name), str):
            try:
                found[name] = expand_path(block[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    return found


def is_url(path: str | Path) -> bool:
    """Whether a path is a URL, which fsspec opens."""
    return isinstance(path, str) and _URL.match(path) is not None


def is_pattern(path: str | Path) -> bool:
    """Whether a path has a wildcard, so that it may match several files."""
    return _PATTERN.search(str(path)) is not None


def index_of(prefix: Path) -> Path:
    """The index file of a pair of token files that is named by their common prefix, as Megatron does."""
    return prefix.with_name(prefix.name + ".idx")


def is_there(root: Path) -> bool:
    """Whether a source's local path exists: as a file, a folder, a pattern that matches, or the prefix of token
    files."""
    return root.exists() or index_of(root).is_file() or is_pattern(root)
