"""The adapter of each framework, by module name: an adapter is imported only after its framework."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

ADAPTERS = (
    ("deepspeed", "muon_dist.adapters.deepspeed"),
    ("torch.distributed.tensor", "muon_dist.adapters.fsdp2"),
    ("torch.nn.parallel", "muon_dist.adapters.ddp"),
)
"""(framework's module, our adapter's module, which has a `bind`)"""

CHECKS = (("torch.distributed.fsdp", "muon_dist.adapters.fsdp2"),)
"""(framework's module, our adapter's module, which has a `check_parameter`)"""


def loaded_binders() -> Iterator[Callable[[Any], Any]]:
    """The `bind` of each adapter whose framework this process has imported."""
    return _loaded(ADAPTERS, "bind")


def loaded_checks() -> Iterator[Callable[[str, Any], None]]:
    """The `check_parameter(name, parameter)` of each adapter whose framework this process has imported. It raises
    FrameworkError for a parameter that the framework has replaced by something that Muon cannot step."""
    return _loaded(CHECKS, "check_parameter")


def _loaded(table: tuple[tuple[str, str], ...], name: str) -> Iterator[Callable[..., Any]]:
    for framework, adapter in table:
        if framework in sys.modules:
            yield getattr(importlib.import_module(adapter), name)
