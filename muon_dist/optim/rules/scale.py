"""The factor by which an update depends on the shape of its matrix."""

from __future__ import annotations

import math

from muon_dist.errors import ConfigError
from muon_dist.layout import Matrix


def update_scale(kind: str, matrix: Matrix) -> float:
    """Factor on the update of a matrix.

    match_rms_adamw: 0.2 sqrt(max(out, in)), so that the update has the root mean square of AdamW's and an AdamW
    learning rate carries over (Liu et al. 2025, arXiv 2502.16982, section 2.2). spectral: sqrt(max(1, out / in))
    (Jordan et al. 2024, Muon). none: 1.

    Raises:
        ConfigError: an unknown kind.
    """
    out, fan_in = matrix.fan
    if kind == "match_rms_adamw":
        return 0.2 * math.sqrt(max(out, fan_in))
    if kind == "spectral":
        return math.sqrt(max(1.0, out / fan_in))
    if kind == "none":
        return 1.0
    raise ConfigError(f"scale '{kind}' is unknown: use match_rms_adamw, spectral or none")
