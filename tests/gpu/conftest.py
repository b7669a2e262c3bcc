"""The device of these tests, and where their figures go.

On a machine with an NVIDIA GPU they run on it, else on the CPU. MUON_DIST_SMOKE_DEVICE=cpu or cuda says which. With
MUON_DIST_SMOKE_OUTPUT=FILE figures and outcomes are added to a JSON file (`bash launch/gpu.sh`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


def chosen() -> torch.device:
    name = os.environ.get("MUON_DIST_SMOKE_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return chosen()


def add(entry: dict[str, Any]) -> None:
    name = os.environ.get("MUON_DIST_SMOKE_OUTPUT")
    if name:
        path = Path(name)
        found = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*found, entry], indent=1))


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """Records a measured value: its name, and the value with its unit."""

    def note(what: str, value: object) -> None:
        add({"test": request.node.name, "figure": what, "value": value})
        print(f"{what}: {value}")

    return note


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: Any = yield
    if report.when == "call" or report.outcome != "passed":
        why = "" if report.passed else str(report.longrepr)[-1500:]
        entry = {"test": item.name, "outcome": report.outcome, "seconds": report.duration, "why": why}
        if report.when == "call" or report.failed or report.skipped:
            add(entry)
    return report


@pytest.fixture
def wait(device: torch.device) -> Callable[[], None]:
    """Waits until the device has finished its work."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None
