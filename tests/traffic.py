"""Counts the payload of every collective that a process makes."""

from muon_dist.bench.traffic import Traffic

__all__ = ["Traffic"]
