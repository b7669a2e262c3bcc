"""Settings of every test process, made before torch or transformers is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Two cores run several processes: one thread each. No test may reach a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch

from muon_dist.routing.announce import _shown
from tests.choice import mark_the_others_slow

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables of a launcher. Frameworks set some of them also in a process that was started by hand."""


@pytest.fixture(autouse=True)
def _launchers_variables_of_its_own() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in LAUNCHERS}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    """A test begins without what accelerate and the routing tables keep for a whole process."""
    _shown.clear()
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root."""
    return ROOT


LONGEST = (
    "train/test_launch.py",
    "adapters/test_deepspeed.py",
    "optim/test_rules.py",
    "faults/test_bar.py",
    "optim/test_touched_state.py",
    "adapters/test_fsdp2.py",
    "train/test_run.py",
    "train/test_parallel.py",
    "adapters/test_deepspeed_checkpoint.py",
    "adapters/test_deepspeed_failures.py",
    "test_fuzz.py",
    "adapters/test_deepspeed_traffic.py",
    "optim/test_at_rest.py",
    "optim/test_runtime.py",
    "bench/test_fake_cuda.py",
    "adapters/test_meshes.py",
    "adapters/test_qk_clip.py",
    "checkpoint/test_reshard.py",
    "adapters/hf/test_checkpoint.py",
    "adapters/hf/test_trainer.py",
    "checkpoint/test_rule_memory.py",
    "test_failures.py",
)
"""Files that take more than 20 s. They start first, so that no process is left alone with
one of them at the end."""


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_the_others_slow(items)
    order = {ROOT / "tests" / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("fp16") is not None:
        from tests.adapters.deepspeed_ranks import why_no_fp16

        reason = why_no_fp16()
        if reason is not None:
            pytest.skip(reason)
    if item.get_closest_marker("namespaces") is not None:
        from tests.namespaces import why_not

        reason = why_not()
        if reason is not None:
            pytest.skip(reason)
