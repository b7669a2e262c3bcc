"""Small state as JSON: scheduler, loss scaler, random generators, windows of guards; tensors are stored separately.

An object with such state is a provider. Its `state_dict()` returns plain values (None, bool, int, float, str, lists,
tuples, dicts with text keys, tensors). `load_state_dict(state)` loads them, with lists instead of tuples.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch

from muon_dist.errors import CheckpointError

_TENSOR = "__tensor__"
PREFIX = "state/"
"""Prefix of the keys of such tensors in a safetensors file."""


class Provider(Protocol):
    """An object with small state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


def encode(value: Any, tensors: dict[str, torch.Tensor], at: str = "") -> Any:
    """`value` as JSON data; its tensors are put into `tensors` under keys with PREFIX.

    Raises:
        CheckpointError: a value has another type; names its position.
    """
    if isinstance(value, Mapping):
        wrong = next((k for k in value if not isinstance(k, str)), None)
        if wrong is not None:
            raise CheckpointError(f"state {at}: the key {wrong!r} is not a string")
        return {k: encode(v, tensors, f"{at}.{k}" if at else k) for k, v in value.items()}
    if isinstance(value, torch.Tensor):
        key = f"{PREFIX}{at}"
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: key}
    if isinstance(value, (list, tuple)):
        return [encode(v, tensors, f"{at}.{i}") for i, v in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(f"state {at}: a {type(value).__name__} is not a plain value")


def decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value that `encode` encoded; tuples become lists."""
    if isinstance(value, Mapping):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {k: decode(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [decode(v, tensors) for v in value]
    return value


class RandomState:
    """Provider for the random generators of this process: Python, numpy, torch, and every device that it uses.

    seed: for a rank that the saving run did not have: its generators are seeded from `seed`, rank and step.
    """

    def state_dict(self) -> dict[str, Any]:
        """The state of each generator."""
        version, numbers, gauss = random.getstate()
        kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        state: dict[str, Any] = {
            "python": {"version": version, "numbers": torch.tensor(numbers, dtype=torch.int64), "gauss": gauss},
            "numpy": {
                "kind": kind,
                "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
                "position": position,
                "has_gauss": has_gauss,
                "cached": cached,
            },
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_initialized():  # do not create a GPU context in a run on the CPU
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of all generators."""
        python, numpy = state["python"], state["numpy"]
        random.setstate((python["version"], tuple(python["numbers"].tolist()), python["gauss"]))
        keys = numpy["keys"].numpy().astype(np.uint32)
        np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])

    def start_anew(self, seed: int) -> None:
        """Seed all generators, on a rank that the saving run did not have."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
