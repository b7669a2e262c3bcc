"""Modules of the user that register rules, scales and schedules before a configuration is checked."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from muon_dist.config.source import Keys

PLUGINS = ("optimizer", "plugins")


def import_plugins(data: dict[str, Any]) -> list[tuple[Keys, str]]:
    """Import the modules of `optimizer.plugins`, in order; a module that cannot be imported is a problem of its key.

    Modules are found as usual, and then in the current folder. A value that is not a list of names is left to the
    schema.
    """
    optimizer = data.get("optimizer")
    names = optimizer.get("plugins") if isinstance(optimizer, dict) else None
    problems: list[tuple[Keys, str]] = []
    for index, name in enumerate(names if isinstance(names, list) else []):
        if not isinstance(name, str):
            continue
        here = os.getcwd()
        if here not in sys.path and "" not in sys.path:
            sys.path.append(here)
        try:
            importlib.import_module(name)
        except Exception as error:
            hint = ": write the name of a module, not the path of a file" if name.endswith(".py") else ""
            problems.append(((*PLUGINS, index), f"{name!r} cannot be imported: {type(error).__name__}: {error}{hint}"))
    return problems
