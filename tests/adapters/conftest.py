"""Every test of an adapter begins without the state that accelerate keeps for a whole process."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _no_accelerator_state() -> None:
    """TrainingArguments of an earlier test leave one behind, which forked ranks would inherit."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
