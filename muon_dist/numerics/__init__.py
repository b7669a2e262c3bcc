"""Pure mathematics on tensors, without communication between ranks."""

from __future__ import annotations

from muon_dist.numerics.newton_schulz import (
    compute_dtype,
    kernel_name,
    newton_schulz,
    newton_schulz_,
    newton_schulz_flops,
    segment_length,
)
from muon_dist.numerics.schedules import (
    SCHEDULES,
    Schedule,
    ScheduleLike,
    coefficients,
    get_schedule,
    register_schedule,
)
from muon_dist.numerics.spectral import SpectralStats, polar_factor, spectral_stats, spectral_stats_batch

__all__ = [
    "SCHEDULES",
    "Schedule",
    "ScheduleLike",
    "SpectralStats",
    "coefficients",
    "compute_dtype",
    "get_schedule",
    "kernel_name",
    "newton_schulz",
    "newton_schulz_",
    "newton_schulz_flops",
    "polar_factor",
    "register_schedule",
    "segment_length",
    "spectral_stats",
    "spectral_stats_batch",
]
