"""Counts the payload of every collective that a process makes."""

from muon_dist.bench.traffic import BATCH, Traffic

__all__ = ["BATCH", "Traffic"]
