"""Checkpoints: safetensors and JSON by parameter name, committed by rename, loaded only when every byte is right."""

from muon_dist.checkpoint.phases import LISTENERS, PHASES, Phase
from muon_dist.checkpoint.piece import BUFFER, MOMENTUM, WEIGHT, Extent, Holding, Piece, to_write

__all__ = ["BUFFER", "LISTENERS", "MOMENTUM", "PHASES", "WEIGHT", "Extent", "Holding", "Phase", "Piece", "to_write"]
