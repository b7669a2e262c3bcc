"""FSDP2 and other uses of DTensors: reads their placements, and binds Muon to them."""

from muon_dist.adapters.fsdp2.binder import bind
from muon_dist.adapters.fsdp2.storage import check_parameter

__all__ = ["bind", "check_parameter"]
