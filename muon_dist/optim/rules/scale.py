"""The factor on an update that depends on the shape of its matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

from muon_dist.errors import ConfigError
from muon_dist.layout import Matrix

Scale = Callable[[int, int], float]
"""Returns the factor on an update, from (output features, input features)."""

SCALES: dict[str, Scale] = {
    # The update has the root mean square of AdamW's update, so AdamW learning rates can be reused (Liu et al. 2025,
    # arXiv 2502.16982, section 2.2).
    "match_rms_adamw": lambda out, fan_in: 0.2 * math.sqrt(max(out, fan_in)),
    # Jordan et al. 2024, Muon.
    "spectral": lambda out, fan_in: math.sqrt(max(1.0, out / fan_in)),
    # The update changes the root mean square of the outputs equally for every width and shape: its spectral norm is
    # sqrt(out / in) (Yang, Simon and Bernstein 2023, arXiv 2310.17813, condition 1).
    "unit_rms": lambda out, fan_in: math.sqrt(out / fan_in),
    "none": lambda out, fan_in: 1.0,
}
"""Scales by the value of the option `scale`; `register_scale` adds to them."""


def register_scale(name: str, factor: Scale) -> None:
    """Register a scale: with `scale=name`, `factor(output features, input features)` multiplies each update.

    For a weight stored (in, out), such as transformers' Conv1D, the arguments are still (outputs, inputs). `factor`
    must be the same on all ranks.

    Raises:
        ConfigError: another scale has the name.
    """
    known = SCALES.get(name, factor)
    if getattr(known, "__code__", known) != getattr(factor, "__code__", factor):
        raise ConfigError(f"scale '{name}' exists already: choose another name")
    SCALES[name] = factor


def update_scale(kind: str, matrix: Matrix) -> float:
    """The factor on the update of a matrix.

    match_rms_adamw: 0.2 sqrt(max(out, in)). spectral: sqrt(max(1, out / in)). unit_rms: sqrt(out / in). none: 1.
    Others: see `register_scale`.

    Raises:
        ConfigError: `kind` is unknown.
    """
    if kind not in SCALES:
        raise ConfigError(f"scale '{kind}' is unknown: use {', '.join(list(SCALES)[:-1])} or {list(SCALES)[-1]}")
    return SCALES[kind](*matrix.fan)
