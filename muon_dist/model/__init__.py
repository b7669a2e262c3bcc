"""Models from scratch through transformers, and what they cost."""

from __future__ import annotations

from muon_dist.model.build import DTYPES, build_config, build_model, check_sequence_length
from muon_dist.model.count import ParameterCount, count_parameters, flops_per_token

__all__ = [
    "DTYPES",
    "ParameterCount",
    "build_config",
    "build_model",
    "check_sequence_length",
    "count_parameters",
    "flops_per_token",
]
