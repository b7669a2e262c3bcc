"""Forked gloo ranks for tests."""

from muon_dist.bench.ranks import RankFailure, run_ranks

__all__ = ["RankFailure", "run_ranks"]
