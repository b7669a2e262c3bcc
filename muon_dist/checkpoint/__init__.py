"""Checkpoints: safetensors and JSON by parameter name, committed by rename, loaded only if every byte is correct."""

from muon_dist.checkpoint.background import Saver
from muon_dist.checkpoint.folder import checkpoint_name, commits, set_aside_after, step_of, tidy
from muon_dist.checkpoint.manifest import MODEL_FOLDER
from muon_dist.checkpoint.phases import LISTENERS, PHASES, Phase
from muon_dist.checkpoint.piece import BUFFER, MOMENTUM, WEIGHT, Holding, Piece, to_write
from muon_dist.checkpoint.ranks import Ranks
from muon_dist.checkpoint.reader import Checkpoint, load, newest_good, open_checkpoint
from muon_dist.checkpoint.state import Provider, RandomState
from muon_dist.checkpoint.writer import Contents

__all__ = [
    "BUFFER",
    "LISTENERS",
    "MODEL_FOLDER",
    "MOMENTUM",
    "PHASES",
    "WEIGHT",
    "Checkpoint",
    "Contents",
    "Holding",
    "Phase",
    "Piece",
    "Provider",
    "RandomState",
    "Ranks",
    "Saver",
    "checkpoint_name",
    "commits",
    "load",
    "newest_good",
    "open_checkpoint",
    "set_aside_after",
    "step_of",
    "tidy",
    "to_write",
]
