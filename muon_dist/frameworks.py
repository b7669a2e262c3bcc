"""Which adapter binds the optimizer under which framework, by name: no adapter is imported before its framework is."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

ADAPTERS = (("deepspeed", "muon_dist.adapters.deepspeed"),)
"""(framework's module, our adapter's module, which has a `bind`)"""


def loaded_binders() -> Iterator[Callable[[Any], Any]]:
    """The `bind` of each adapter whose framework this process has imported."""
    for framework, adapter in ADAPTERS:
        if framework in sys.modules:
            yield importlib.import_module(adapter).bind
