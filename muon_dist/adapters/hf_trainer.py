"""Old module name of `muon_dist.adapters.hf.trainer`; kept until 1.0 for existing imports."""

from muon_dist.adapters.hf.trainer import CheckpointOptions, MuonTrainer

__all__ = ["CheckpointOptions", "MuonTrainer"]
