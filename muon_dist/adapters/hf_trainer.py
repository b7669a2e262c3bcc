"""The former place of `muon_dist.adapters.hf.trainer`: what others have imported from here stays until 1.0."""

from muon_dist.adapters.hf.trainer import CheckpointOptions, MuonTrainer

__all__ = ["CheckpointOptions", "MuonTrainer"]
