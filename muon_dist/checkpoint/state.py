"""Small state as JSON: scheduler, loss scaler, random generators, windows of guards; tensors are stored separately.

Whoever has such state is a provider: `state_dict()` gives plain values (None, bool, int, float, str, lists, tuples,
dicts with text keys, tensors), `load_state_dict(state)` takes them back, with lists for tuples.
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
"""Of the keys of such tensors in a safetensors file."""


class Provider(Protocol):
    """Something with a small state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


def encode(value: Any, tensors: dict[str, torch.Tensor], at: str = "") -> Any:
    """JSON for `value`; its tensors go into `tensors` under keys with PREFIX.

    Raises:
        CheckpointError: a value of another type; names its place.
    """
    if isinstance(value, Mapping):
        wrong = next((k for k in value if not isinstance(k, str)), None)
        if wrong is not None:
            raise CheckpointError(f"state {at}: the key {wrong!r} is not text")
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
    """Undo `encode`; tuples become lists."""
    if isinstance(value, Mapping):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {k: decode(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [decode(v, tensors) for v in value]
    return value


class RandomState:
    """The random generators of this process: Python, numpy, torch, and every device that it uses.

    seed: a rank that was not there at the save starts from it, its rank and the step; two ranks never share numbers.
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
        if torch.cuda.is_initialized():  # a run on the CPU makes no context on a GPU
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as if there had been no stop."""
        python, numpy = state["python"], state["numpy"]
        random.setstate((python["version"], tuple(python["numbers"].tolist()), python["gauss"]))
        keys = numpy["keys"].numpy().astype(np.uint32)
        np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])

    def start_anew(self, seed: int) -> None:
        """Seed all generators: on a rank that was not there at the save."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
